# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finding again, and ending, what runs on its own: daemons that nobody waits for.

A process id alone names nobody: its number may be another's by now.  A process is
known by a word of its command line that no other one has, and is held by a
descriptor (pidfd) while it is signalled and waited for.

Daemons read packets of guests and of the upstream.  ``confined`` starts a daemon with the
capabilities that it needs, and no others: neither it nor its children can gain one outside
that set.
"""

import os
import select
import shutil
import signal
import time
from pathlib import Path

from libvirt_natns.kernel import netns

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where programs are looked for first: su(1) keeps the PATH of a user."""

EXEC_LIMIT = 0.1
"""Seconds that execve(2) may take to set a command line."""
EXEC_POLL = 0.001

PF_KTHREAD = 0x00200000
"""A flag of the kernel's own threads, from linux/sched.h."""

OOM_SCORE = Path("/proc/self/oom_score_adj")


def program(name: str) -> str | None:
    """The path of a program; None where it is not installed."""
    return shutil.which(name, path=PATH + os.pathsep + os.environ.get("PATH", ""))


def confined(*capabilities: str, no_new_privs: bool = True) -> tuple[str, ...]:
    """Return the words before a command that leave it these capabilities alone (setpriv(1)).

    Switch ``no_new_privs`` off for a daemon whose AppArmor profile gives a helper program a
    profile of its own: the kernel refuses that execve(2) to a process with no_new_privs.
    The command is also killed like any other program where memory runs out (choom(1)),
    though systemd spares the service.  Without these programs nothing is left out.
    """
    setpriv, choom = program("setpriv"), program("choom")
    words = [choom, "-n", "0", "--"] if choom and _is_spared() else []
    if setpriv:
        kept = ",".join(("-all", *(f"+{each}" for each in capabilities)))
        words += [setpriv, "--no-new-privs"] if no_new_privs else [setpriv]
        words += ["--inh-caps", "-all", "--bounding-set", kept, "--"]
    return tuple(words)


def _is_spared() -> bool:
    """True if the kernel ends other programs first; only then may the value be raised to 0."""
    try:
        return int(OOM_SCORE.read_text()) < 0
    except (OSError, ValueError):
        return False


def read_pid(path: Path) -> int | None:
    """The process id in a file; None where there is none."""
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() and int(text) > 1 else None


def command(pid: int) -> list[str]:
    """The command line of a process; empty for one that has ended."""
    deadline = time.monotonic() + EXEC_LIMIT
    try:
        while not (line := Path(f"/proc/{pid}/cmdline").read_bytes()) and _has_a_line(pid):
            if time.monotonic() >= deadline:
                break
            time.sleep(EXEC_POLL)
    except OSError:
        return []
    return [word.decode(errors="replace") for word in line.split(b"\0")]


def _has_a_line(pid: int) -> bool:
    """True if a process is about to have a command line.  Raises OSError.

    The kernel shows none for a moment while execve(2) replaces a program, as setpriv(1) is
    by the daemon.  Zombies and the kernel's own threads never have a command line.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0] not in "ZX" and not int(fields[6]) & PF_KTHREAD


def lives_in(pid: int, namespace: str) -> bool:
    """Whether a process runs in a network namespace."""
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino == netns.inode(namespace)
    except OSError:
        return False


def opened(pid: int, word: str) -> int | None:
    """A descriptor of the process with that word in its command line; the caller closes it.

    From here on the process id cannot be another's.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return None
    if word in command(pid):
        return descriptor
    os.close(descriptor)
    return None


POLITELY = (signal.SIGTERM, signal.SIGKILL)
AT_ONCE = (signal.SIGKILL,)


def end(descriptor: int, limit: float, signals: tuple[signal.Signals, ...] = POLITELY) -> bool:
    """End a process; whether it has, ``limit`` seconds after one of the signals."""
    for number in signals:
        try:
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return True
        if has_ended(descriptor, time.monotonic() + limit):
            return True
    return False


def has_ended(descriptor: int, deadline: float) -> bool:
    """Wait until a process has ended, or until a time of the monotonic clock; whether it has."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
