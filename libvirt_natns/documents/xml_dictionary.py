# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bound on the dictionaries of names that libxml2 keeps, one for each thread.

lxml has all documents of a thread share one dictionary, and a name leaves it only
when the thread ends.  A full dictionary (some 20 MB in libxml2 2.9) is worse than
the memory it takes: every further document of that thread is then refused with
"Memory allocation failed".

So each thread reads documents up to a budget.  Beyond the budget, each document is
read in a thread of its own, which costs some 0.1 ms.  Threads that answer one hook,
and processes of hooks, stay within their budget.
"""

from collections.abc import Callable
from functools import partial, wraps
from threading import Thread, local
from typing import Concatenate, ParamSpec, TypeVar

BUDGET = 1 << 20
"""Octets of documents that a thread itself reads before it ends."""

P = ParamSpec("P")
R = TypeVar("R")


class _Spent(local):
    """The octets of documents that the current thread has read."""

    octets = 0


_spent = _Spent()


def bounded(
    read: Callable[Concatenate[bytes, P], R],
) -> Callable[Concatenate[bytes, P], R]:
    """Return ``read``, a function that parses a document, within the thread's budget."""

    @wraps(read)
    def within_budget(data: bytes, /, *args: P.args, **kwargs: P.kwargs) -> R:
        spent = _spent.octets + len(data)
        if spent > BUDGET:
            return _elsewhere(partial(read, data, *args, **kwargs))
        _spent.octets = spent
        return read(data, *args, **kwargs)

    return within_budget


def _elsewhere(work: Callable[[], R]) -> R:
    """Run ``work`` in another thread; returns its result, or raises its error."""
    results: list[R] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised again where it is waited for
            errors.append(error)

    thread = Thread(target=run, name="document")
    thread.start()
    thread.join()
    for error in errors:
        raise error
    return results[0]
