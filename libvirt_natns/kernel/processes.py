# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes that run on their own: find a program, find a daemon again, and end it.

A process id alone identifies no process: the kernel gives the number to another process
later.  A daemon is identified by a word of its command line that no other process has.
A descriptor (pidfd) holds the process while it is signalled and waited for.

Daemons read packets of guests and of the upstream.  ``confined`` starts a daemon with the
capabilities that it needs.  Neither the daemon nor its children can gain another one.
"""

import os
import select
import shutil
import signal
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from libvirt_natns.errors import NatnsError
from libvirt_natns.kernel import netns

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""The directories that are searched first: su(1) keeps the PATH of a user."""

EXEC_LIMIT = 0.1
"""Seconds that execve(2) may take to set a command line."""
EXEC_POLL = 0.001

PID_LIMIT = 2**22
"""The largest process id of any kernel, from linux/threads.h."""

PF_KTHREAD = 0x00200000
"""A flag of the kernel's own threads, from linux/sched.h."""

OOM_SCORE = Path("/proc/self/oom_score_adj")

POLITELY = (signal.SIGTERM, signal.SIGKILL)
AT_ONCE = (signal.SIGKILL,)


# -- programs ----------------------------------------------------------------


def program(name: str) -> str | None:
    """Return the path of a program; None where it is not installed."""
    return shutil.which(name, path=PATH + os.pathsep + os.environ.get("PATH", ""))


def required(name: str, missing: NatnsError) -> str:
    """Return the path of a program.  Raises ``missing`` where it is not installed."""
    path = program(name)
    if path is None:
        raise missing
    return path


def confined(*capabilities: str, no_new_privs: bool = True) -> tuple[str, ...]:
    """Return the words before a command that leave it these capabilities alone (setpriv(1)).

    Switch ``no_new_privs`` off for a daemon with an AppArmor profile that gives a helper
    program its own profile.  The kernel refuses that execve(2) to a process with no_new_privs.
    The command is also killed like any other program where memory runs out (choom(1)),
    though systemd spares the service.  Without setpriv or choom the command runs without
    the limits of that program.
    """
    setpriv, choom = program("setpriv"), program("choom")
    words = [choom, "-n", "0", "--"] if choom and _is_spared() else []
    if setpriv:
        kept = ",".join(("-all", *(f"+{capability}" for capability in capabilities)))
        words += [setpriv, "--no-new-privs"] if no_new_privs else [setpriv]
        words += ["--inh-caps", "-all", "--bounding-set", kept, "--"]
    return tuple(words)


def _is_spared() -> bool:
    """True if the kernel ends other programs first; only then may the value be raised to 0."""
    try:
        return int(OOM_SCORE.read_text()) < 0
    except (OSError, ValueError):
        return False


# -- finding -----------------------------------------------------------------


def read_pid(path: Path) -> int | None:
    """Return the process id in a file; None without a readable file."""
    try:
        pid = int(path.read_bytes())
    except (OSError, ValueError):
        return None
    return pid if 1 < pid <= PID_LIMIT else None


def from_pid_file(path: Path, word: str) -> int | None:
    """Return the process id in a file, if that process has the word in its command line."""
    pid = read_pid(path)
    return pid if pid is not None and word in command(pid) else None


def with_word(word: str) -> list[int]:
    """Return all processes that have a word in their command line."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid, words in _commands(pids).items() if word in words]


def children(pid: int) -> list[int]:
    """Return the children of a process's first thread; none for a process that has ended."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def command(pid: int) -> list[str]:
    """Return the command line of a process; empty for a process that has ended."""
    return _commands([pid])[pid]


def _commands(pids: Iterable[int]) -> dict[int, list[str]]:
    """Return the command lines of processes; a process that has ended has none.

    All processes that are about to have a command line are waited for together, for
    EXEC_LIMIT at most.
    """
    found: dict[int, list[str]] = {}
    unset, deadline = list(pids), time.monotonic() + EXEC_LIMIT
    while unset:
        found |= {pid: _words(pid) for pid in unset}
        if time.monotonic() >= deadline:
            break
        unset = [pid for pid in unset if found[pid] == [""] and _will_have_a_line(pid)]
        if unset:
            time.sleep(EXEC_POLL)
    return found


def _words(pid: int) -> list[str]:
    """Return the words of a command line as it is now; [""] while it is empty."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [word.decode(errors="replace") for word in line.split(b"\0")]


def _will_have_a_line(pid: int) -> bool:
    """True if a process may be about to have a command line.

    The kernel shows none for a moment while execve(2) replaces a program, as setpriv(1) is
    by the daemon.  Zombies and the kernel's own threads never have a command line.  Any user
    can run processes that never have a command line, and names that are not UTF-8.  So
    processes of other users are not waited for.
    """
    process = Path(f"/proc/{pid}")
    try:
        fields = (process / "stat").read_bytes().rpartition(b")")[2].split()
        if fields[0] in (b"Z", b"X") or int(fields[6]) & PF_KTHREAD:
            return False
        status = (process / "status").read_bytes()
    except OSError:
        return False
    # The kernel escapes line ends in the name, which comes first.
    return int(status.partition(b"\nUid:")[2].split(None, 1)[0]) == os.getuid()


def descriptors(pid: int) -> dict[int, str]:
    """Return what each descriptor of a process is of, as the kernel shows it; none if it ended."""
    files = {}
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                files[int(file.name)] = os.fspath(file.readlink())
    return files


def lives_in(pid: int, namespace: str | None) -> bool:
    """True if a process runs in a network namespace; ``namespace`` None is the host's."""
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino == netns.inode(namespace)
    except OSError:
        return False


# -- ending ------------------------------------------------------------------


def opened(pid: int, word: str) -> int | None:
    """Return a descriptor of a process with that word in its command line; the caller closes it.

    The kernel gives the process id to no other process while the descriptor is open.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return None
    if word in command(pid):
        return descriptor
    os.close(descriptor)
    return None


def end(
    pids: Iterable[int],
    word: str,
    limit: float,
    signals: tuple[signal.Signals, ...] = POLITELY,
) -> bool:
    """End the processes among ``pids`` that have that word in their command line.

    Return True if all of them have ended, at most ``limit`` seconds after one of the signals.
    """
    with ExitStack() as stack:
        descriptors = []
        for pid in pids:
            if (descriptor := opened(pid, word)) is not None:
                stack.callback(os.close, descriptor)
                descriptors.append(descriptor)
        for number in signals:
            for descriptor in descriptors:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, number)
            deadline = time.monotonic() + limit
            if all(has_ended(descriptor, deadline) for descriptor in descriptors):
                return True
    return False


def has_ended(descriptor: int, deadline: float) -> bool:
    """Wait until a process ends or a time of the monotonic clock; True if it has ended."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
