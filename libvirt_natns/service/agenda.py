# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is still to be done, for threads that do it: each thing once, one at a time."""

import time
from collections.abc import Hashable
from threading import Condition
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Agenda(Generic[T]):
    """Tasks that wait, in the order of their time; safe for threads.

    A task that waits already is not put down twice.  One that is put down while it
    is being done is given out again once that is over: what it is about may have
    changed since it was looked at.
    """

    def __init__(self) -> None:
        self._due: dict[T, float] = {}
        self._in_work: set[T] = set()
        self._closed = False
        self._changed = Condition()

    def put(self, task: T, delay: float = 0.0) -> None:
        """Put a task down, to be done in ``delay`` seconds; of two times the earlier counts."""
        due = time.monotonic() + delay
        with self._changed:
            self._due[task] = min(due, self._due.get(task, due))
            self._changed.notify()

    def take(self) -> T | None:
        """Wait for a task whose time has come; None once there will be no more."""
        with self._changed:
            while not self._closed:
                task, wait = self._next()
                if task is not None and wait <= 0:
                    del self._due[task]
                    self._in_work.add(task)
                    # Whoever waits for the next one's time may be the one that left.
                    self._changed.notify()
                    return task
                self._changed.wait(wait if task is not None else None)
            return None

    def _next(self) -> tuple[T | None, float]:
        """The task that is the next to be done, and in how many seconds."""
        free = {task: due for task, due in self._due.items() if task not in self._in_work}
        if not free:
            return None, 0.0
        task = min(free, key=free.__getitem__)
        return task, free[task] - time.monotonic()

    def done(self, task: T) -> None:
        """Say that a task that was taken is over."""
        with self._changed:
            self._in_work.discard(task)
            self._changed.notify()

    def close(self) -> None:
        """Give out nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
