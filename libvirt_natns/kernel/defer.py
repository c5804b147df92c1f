# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a verb need not wait for: done at once, or by a resident process in a while."""

from collections.abc import Callable

Later = Callable[[Callable[[], None]], None]
"""Takes work that may raise a NatnsError, and runs it whenever it likes.

What fails then must be told to somebody, and must not fail the verb.
"""


def at_once(work: Callable[[], None]) -> None:
    """Keeps nothing for later: for a process that is about to end."""
    work()
