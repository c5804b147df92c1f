# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks between processes, which the kernel frees when their holder ends.

A lock is on a directory itself, so no lock file stays behind.  A holder may remove the directory
together with its content.

A waiter tries again and again, since flock(2) knows no time limit.  So waiters are not served in
their order.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, repeat
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.errors import LockError

OURS = 0o711
"""The mode of our run-time directories."""

LIMIT = 60.0
"""Seconds after which a holder counts as stuck."""

POLLS = (0.001, 0.002, 0.005, 0.01)
"""Seconds between two tries; the last value repeats."""

LEAST = 1.0
"""Seconds that may be waited in any case: failed work still has to be undone."""

_ends: list[float] = []
"""The time at which all waiting of this process ends, on the monotonic clock."""


def end_waiting_in(seconds: float) -> None:
    """Limit all waiting of this process from now on, together.

    This is for a hook: libvirt waits for the hook, and the hook may need several locks.
    """
    _ends.append(time.monotonic() + seconds)


def at_most(seconds: float) -> float:
    """Return how many of these seconds this process may wait; ``LEAST`` is always left."""
    left = min((end - time.monotonic() for end in _ends), default=seconds)
    return min(seconds, max(LEAST, left))


@contextmanager
def locked(directory: Path, limit: float = LIMIT) -> Iterator[None]:
    """Hold the exclusive lock of a directory, which is made where it is missing.

    Raises LockError after ``limit`` seconds, or where there can be no directory.
    """
    descriptor = _acquire(directory, time.monotonic() + at_most(limit))
    try:
        yield
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Make a directory to lock or to put run-time files into, unless it is there.

    A process that can open a directory can lock it, and keep all others waiting.  So only root can
    open our directories.  Others (a dnsmasq that has dropped its privileges) can only pass through.
    """
    if not directory.is_relative_to(names.RUN_DIRECTORY):
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        return
    inside = directory.relative_to(names.RUN_DIRECTORY)
    for each in (*reversed(inside.parents), inside):
        made = names.RUN_DIRECTORY / each
        with suppress(FileExistsError):
            made.mkdir(mode=OURS, parents=each == Path())
            # The umask may have removed bits of the mode.
            made.chmod(OURS)


def _acquire(directory: Path, deadline: float) -> int:
    while True:
        try:
            make_directory(directory)
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            _check_links(directory)
            if time.monotonic() > deadline:
                raise LockError(
                    f"cannot lock {directory} ({error.strerror})", "try again"
                ) from error
            # Its last holder has just removed the directory, or a directory above.
            time.sleep(POLLS[0])
            continue
        except OSError as error:
            raise LockError(
                f"cannot lock {directory} ({error.strerror})",
                f"check its file system (df -i {directory.parent})",
            ) from error
        try:
            _lock(descriptor, directory, deadline)
        except BaseException:
            os.close(descriptor)
            raise
        if _still(descriptor, directory):
            return descriptor
        # Its last holder removed the directory: another process may hold a new one of that name.
        os.close(descriptor)


def _check_links(directory: Path) -> None:
    """Raise LockError where a part of a directory's path is a link to nothing."""
    for part in (directory, *directory.parents):
        if part.is_symlink() and not part.exists():
            raise LockError(
                f"{part} is a link to {part.readlink()}, which is missing (expected: a directory)",
                f"rm {part}",
            )


def _lock(descriptor: int, directory: Path, deadline: float) -> None:
    for wait in chain(POLLS, repeat(POLLS[-1])):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise LockError(
                    f"{directory} is locked by a process that does not end",
                    f"end that process (lsof {directory}), or systemctl restart libvirt-natns",
                ) from None
            time.sleep(wait)
        else:
            return


def _still(descriptor: int, directory: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), directory.stat())
    except FileNotFoundError:
        return False
