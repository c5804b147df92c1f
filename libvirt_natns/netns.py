# SPDX-License-Identifier: LGPL-2.1-or-later
"""Entering network namespaces.

setns(2) concerns the calling thread alone, so ``entered`` is safe in a process
with several threads: whatever the thread opens or starts inside (a socket, a
child, a file of /proc/sys/net) belongs to the namespace for good.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.errors import KernelError

CLONE_NEWNET = 0x40000000
OWN = Path("/proc/thread-self/ns/net")


def exists(name: str) -> bool:
    """Whether a namespace of that name can be entered."""
    return inode(name) is not None


def inode(name: str | None) -> int | None:
    """The namespace's identity: its inode, as /proc/PID/ns/net shows it.

    ``None`` stands for the caller's own.  Returns None for a namespace that is
    missing, or of which only the empty mount point was left behind.
    """
    path = Path(names.namespace_path(name)) if name else OWN
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    own = OWN.stat()
    return found.st_ino if found.st_dev == own.st_dev else None


def _setns(descriptor: int) -> None:
    if hasattr(os, "setns"):
        os.setns(descriptor, CLONE_NEWNET)
        return
    # Python before 3.12 has no os.setns.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def leave() -> None:
    """Move the calling thread into a fresh namespace, which ends with the thread.

    Raises KernelError where the kernel has none to give.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise KernelError("the kernel gives no network namespace", os.strerror(code))


@contextmanager
def entered(name: str | None) -> Iterator[None]:
    """Run the body inside the namespace ``name``; None stays where it is."""
    if name is None:
        yield
        return
    own = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            other = os.open(names.namespace_path(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise KernelError(f"network namespace {name} is missing") from None
        try:
            _setns(other)
        except OSError as error:
            raise KernelError(f"cannot enter network namespace {name}", str(error)) from error
        finally:
            os.close(other)
        try:
            yield
        finally:
            _setns(own)
    finally:
        os.close(own)
