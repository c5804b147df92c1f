# SPDX-License-Identifier: LGPL-2.1-or-later
"""Making, entering and removing network namespaces.

setns(2) and unshare(2) concern the calling thread alone, so all of this is safe in a process with
several threads.  A socket, a child or a file of /proc/sys/net that a thread opens inside belongs to
the namespace for good.

A name is a file below /run/netns with the namespace mounted on it, as ip(8) has it.  A namespace
without a name lives as long as a descriptor of it is open.
"""

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Thread

from libvirt_natns import names
from libvirt_natns.errors import KernelError, LockError
from libvirt_natns.kernel.locks import locked, make_directory

CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MS_REC = 0x4000
MS_SHARED = 0x100000
MNT_DETACH = 2
OWN = Path("/proc/thread-self/ns/net")

IP_LIMIT = 0.1
"""Seconds for which an ip(8) that makes the first namespace of a boot is waited for."""


def exists(name: str) -> bool:
    """True if a namespace of that name can be entered."""
    return inode(name) is not None


def inode(name: str | None) -> int | None:
    """Return the namespace's identity: its inode, as /proc/PID/ns/net shows it.

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
    _call("setns", descriptor, CLONE_NEWNET)


def go_to_host() -> None:
    """Move the calling thread into the host's namespace, that of the first process, for good.

    Raises OSError.
    """
    descriptor = os.open("/proc/1/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(descriptor)
    finally:
        os.close(descriptor)


def leave() -> None:
    """Move the calling thread into a fresh namespace, which ends with the thread.

    Raises KernelError where the kernel has none to give.
    """
    try:
        _call("unshare", CLONE_NEWNET)
    except OSError as error:
        raise KernelError("the kernel refuses a network namespace", str(error)) from error


def in_scratch_namespace(trial: Callable[[], object]) -> None:
    """Run ``trial`` in a network namespace that ends with it.

    A new thread enters the namespace, so no thread must return from it.  Raises the
    trial's error.
    """
    errors: list[Exception] = []

    def run() -> None:
        try:
            leave()
            trial()
        except Exception as error:  # the caller of the thread reports it
            errors.append(error)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(function: str, *arguments: object) -> None:
    """Call a function of the C library that Python lacks.  Raises OSError."""
    if getattr(_library(), function)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def make() -> int:
    """Return a descriptor of a fresh namespace, which has no name yet; the caller closes it.

    Costs the kernel 0.5 ms.  Raises KernelError.
    """
    found: list[int] = []
    problems: list[Exception] = []

    def unshare() -> None:
        try:
            leave()
            found.append(os.open(OWN, os.O_RDONLY | os.O_CLOEXEC))
        except (KernelError, OSError) as error:
            problems.append(error)

    # A thread that ends, as none can leave a namespace without entering another.
    thread = Thread(target=unshare)
    thread.start()
    thread.join()
    if not found:
        raise KernelError("cannot make a network namespace", str(problems[0]))
    return found[0]


def bind(name: str, descriptor: int) -> None:
    """Give a namespace a name.

    Raises OSError, also where the name is taken, and LockError.
    """
    path = names.namespace_path(name)
    _prepare_directory()
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
    try:
        source = f"/proc/self/fd/{descriptor}".encode()
        _call("mount", source, path.encode(), b"none", MS_BIND, None)
    except OSError:
        Path(path).unlink()
        raise


def _prepare_directory() -> None:
    """Have all mount namespaces see mounts below /run/netns come and go.

    The first namespace of a boot turns the directory into a mount of its own.  Two
    processes that do so at once would hide each other's.
    """
    make_directory(names.NETNS_DIRECTORY)
    directory = os.fspath(names.NETNS_DIRECTORY).encode()
    if _share(directory):
        return
    lock = names.RUN_DIRECTORY / "netns"
    with locked(lock), _locked_for_ip():
        if not _share(directory):
            _call("mount", directory, directory, b"none", MS_BIND | MS_REC, None)
            _share(directory)
        with suppress(OSError):
            lock.rmdir()


def _share(directory: bytes) -> bool:
    """Make a mount shared; False for a directory that is no mount point.  Raises OSError."""
    try:
        _call("mount", b"", directory, b"none", MS_SHARED | MS_REC, None)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


@contextmanager
def _locked_for_ip() -> Iterator[None]:
    """Hold the lock that ip(8) takes on /run/netns, or go on without it after ``IP_LIMIT``.

    Each user may open that directory, and so hold the lock for ever.
    """
    with ExitStack() as stack:
        with suppress(LockError):
            stack.enter_context(locked(names.NETNS_DIRECTORY, IP_LIMIT))
        yield


def remove(name: str) -> None:
    """Take a namespace's name away; the kernel ends the namespace once it is unused.

    A missing name is success.  Raises OSError.
    """
    path = names.namespace_path(name)
    try:
        _call("umount2", path.encode(), MNT_DETACH)
    except OSError as error:
        # A killed start left no mount there, or there is no such file.
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
    Path(path).unlink(missing_ok=True)


def rename(name: str, other: str) -> None:
    """Give a namespace another name; processes in it notice nothing.

    A kill leaves both names, and another call goes on from there.  Raises KernelError or OSError.
    """
    with opened(name) as descriptor:
        if inode(other) != os.fstat(descriptor).st_ino:
            bind(other, descriptor)
    remove(name)


def _open(name: str | None) -> int:
    """Return a descriptor of a namespace; None is the thread's own.  Raises KernelError."""
    try:
        return os.open(names.namespace_path(name) if name else OWN, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise KernelError(f"network namespace {name} is missing") from None
    except OSError as error:
        which = f"network namespace {name}" if name else "the thread's network namespace"
        raise KernelError(f"cannot open {which}", str(error)) from error


@contextmanager
def opened(name: str | None) -> Iterator[int]:
    """Open a namespace for the body, which gets its descriptor; None is the thread's own.

    Raises KernelError.
    """
    descriptor = _open(name)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def entered(name: str | None) -> Iterator[None]:
    """Run the body inside the namespace ``name``; None stays where it is.  Raises KernelError."""
    if name is None:
        yield
        return
    own = _open(None)
    try:
        other = _open(name)
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
