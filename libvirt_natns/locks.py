# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks between processes, which the kernel frees when their holder ends.

What is locked is a directory itself, so no lock file stays behind, and a
holder may remove the directory together with what it protected.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the exclusive lock of a directory, which is made where it is missing.

    Waits for as long as it takes.
    """
    descriptor = _acquire(directory)
    try:
        yield
    finally:
        os.close(descriptor)


def _acquire(directory: Path) -> int:
    while True:
        try:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _still(descriptor, directory):
            return descriptor
        # Its last holder removed it: somebody may hold a new one of that name.
        os.close(descriptor)


def _still(descriptor: int, directory: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), directory.stat())
    except FileNotFoundError:
        return False
