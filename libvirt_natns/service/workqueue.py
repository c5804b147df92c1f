# SPDX-License-Identifier: LGPL-2.1-or-later
"""Queues of work for threads: each task waits once, and one thread at a time does it.

``WorkQueue`` has the tasks and their times, ``Workers`` are threads that do the tasks.
``Background`` runs functions that have no result, at once or after a while.

A queue lives in memory: its tasks end with the process.
"""

import time
import traceback
from collections.abc import Callable, Hashable
from threading import Condition, Thread
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

Work = Callable[[], None]

WORKERS = 8
"""Threads of ``Background``.  They mostly wait: for an answer, or for a dnsmasq that starts."""

STOP_LIMIT = 10.0
"""Seconds that work in the background gets to end."""

STOP_LOOK = 0.01
"""Seconds between two looks whether it has ended."""


class WorkQueue(Generic[T]):
    """Tasks that wait for their time; safe for threads.

    Equal tasks wait once.  A task that is put while a thread does it is given out
    again after that: its subject may have changed since the thread looked at it.

    The ``leader`` is the task that the others rely on.  As soon as any task is due, the
    leader goes first, if it waits.  No other task is given out while it is being done.
    A leader that was postponed goes at its own time instead.
    """

    def __init__(self, leader: T | None = None) -> None:
        self._leader = leader
        self._leader_is_postponed = False
        self._due: dict[T, float] = {}
        self._in_work: set[T] = set()
        self._closed = False
        self._changed = Condition()

    # -- putting -----------------------------------------------------------

    def put(self, task: T, delay: float = 0.0) -> None:
        """Have a task done in ``delay`` seconds; of two times the earlier counts."""
        due = time.monotonic() + delay
        with self._changed:
            self._put(task, min(due, self._due.get(task, due)))

    def put_new(self, task: T, delay: float) -> None:
        """Have a task done in ``delay`` seconds; a task that waits already keeps its time."""
        due = time.monotonic() + delay
        with self._changed:
            self._put(task, self._due.get(task, due))

    def postpone(self, task: T, delay: float) -> None:
        """Have a task done in ``delay`` seconds, in place of its earlier time.

        The leader does not go ahead of that time.
        """
        with self._changed:
            self._put(task, time.monotonic() + delay)
            if task == self._leader:
                self._leader_is_postponed = True

    def _put(self, task: T, due: float) -> None:
        self._due[task] = due
        self._changed.notify()

    def drop(self, task: T) -> None:
        """Have a task that waits not done."""
        with self._changed:
            self._forget(task)

    def _forget(self, task: T) -> None:
        self._due.pop(task, None)
        if task == self._leader:
            self._leader_is_postponed = False

    def close(self) -> None:
        """Give out nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # -- doing -------------------------------------------------------------

    def take(self) -> T | None:
        """Wait for a task that is due, and return it; None once the queue is closed.

        The thread calls ``done`` after its work.
        """
        with self._changed:
            while not self._closed:
                task, wait = self._next()
                if task is not None and wait <= 0:
                    self._forget(task)
                    self._in_work.add(task)
                    # The thread that waited for the next task's time may be this one.
                    self._changed.notify()
                    return task
                self._changed.wait(wait if task is not None else None)
            return None

    def _next(self) -> tuple[T | None, float]:
        """Return the task to be given out next, and in how many seconds."""
        if self._leader is not None and self._leader in self._in_work:
            return None, 0.0
        waiting = {task: due for task, due in self._due.items() if task not in self._in_work}
        if not waiting:
            return None, 0.0
        now = time.monotonic()
        task = min(waiting, key=waiting.__getitem__)
        wait = waiting[task] - now
        leader = self._leader
        if leader in waiting and not (self._leader_is_postponed and now < waiting[leader]):
            task = leader
        return task, wait

    def done(self, task: T) -> None:
        """Note that a task that was taken is over."""
        with self._changed:
            self._in_work.discard(task)
            self._changed.notify()

    def is_idle(self, seconds: float = 0.0) -> bool:
        """True if no task is being done, and none is due within that time."""
        limit = time.monotonic() + seconds
        with self._changed:
            return not self._in_work and all(due > limit for due in self._due.values())


class Workers(Generic[T]):
    """Threads that do a queue's tasks.

    ``do`` handles its errors.  An error that it raises goes to standard error, with its
    traceback, and the thread goes on.
    """

    def __init__(self, queue: WorkQueue[T], do: Callable[[T], None], count: int, name: str) -> None:
        self._queue = queue
        self._do = do
        self._threads = [
            Thread(target=self._run, name=f"{name}-{number}", daemon=True)
            for number in range(count)
        ]

    def start(self) -> None:
        """Begin to do tasks."""
        for thread in self._threads:
            thread.start()

    def stop(self, limit: float) -> None:
        """Close the queue, and wait up to ``limit`` seconds for tasks that are being done."""
        self._queue.close()
        deadline = time.monotonic() + limit
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (task := self._queue.take()) is not None:
            try:
                self._do(task)
            except Exception:  # a thread that ended would be missed by later tasks
                traceback.print_exc()
            finally:
                self._queue.done(task)


class Background:
    """Runs work in threads of its own, and reports errors of the work to ``failed``.

    All threads start at once: a machine that is short of threads later loses no work.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._queue: WorkQueue[Work] = WorkQueue()
        self._workers = Workers(self._queue, self._do, WORKERS, "background")

    def start(self) -> None:
        """Begin with the work."""
        self._workers.start()

    def stop(self, limit: float = STOP_LIMIT) -> None:
        """Finish work that is due, within ``limit`` seconds; work for later is left to others."""
        deadline = time.monotonic() + limit
        while not self._queue.is_idle() and time.monotonic() < deadline:
            time.sleep(STOP_LOOK)
        self._workers.stop(max(0.0, deadline - time.monotonic()))

    def soon(self, work: Work) -> None:
        """Do some work as soon as a thread is free for it; equal work that waits is done once."""
        self._queue.put(work)

    def after(self, seconds: float, work: Work) -> None:
        """Do some work later, unless the process ends before; equal work is done once."""
        self._queue.put(work, seconds)

    def _do(self, work: Work) -> None:
        try:
            work()
        except Exception as error:  # an error must neither end the thread nor be lost
            self._failed(error)
