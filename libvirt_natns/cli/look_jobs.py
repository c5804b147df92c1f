# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands that run for clients of the look server: each in a fork, with a limit of time.

The server has loaded all modules, so that a fork begins at once.  The fork has a process group of
its own, which is killed as a whole.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

LIMIT = 60.0
"""Seconds that a command may take."""

MOST_OUTPUT = 1 << 26
"""Octets of output that are handed on."""

FAILED = 70
"""Exit status of a fork that could not run its command."""

DESCRIPTORS = 4096
"""Descriptors that the server can have at most."""

Body = Callable[[], int]
"""Runs a command, and returns its exit status."""


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """The end of a job: its exit status, and its output as text."""

    status: int
    out: str
    err: str


@dataclass(slots=True, eq=False)
class Job:
    """A fork at work; ``descriptor`` is readable when it has ended."""

    pid: int
    descriptor: int
    _out: int
    _err: int
    deadline: float = field(default_factory=lambda: time.monotonic() + LIMIT)

    def kill(self) -> None:
        """End the fork and the programs that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def finish(self) -> JobOutcome:
        """Wait for the end, and return the outcome.  The job is over then."""
        # Programs of a command that was killed halfway must not stay.  The group's number is
        # the fork's own until the fork is waited for.
        self.kill()
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        texts = [_text(each) for each in (self._out, self._err)]
        os.close(self.descriptor)
        return JobOutcome(status, *texts)


def _text(descriptor: int) -> str:
    """Return the content of a file in memory, and close it."""
    with os.fdopen(descriptor, "rb") as file:
        file.seek(0)
        return file.read(MOST_OUTPUT).decode(errors="replace")


def start(body: Body) -> Job:
    """Run a command in a fork.  Raises OSError where there can be none."""
    files = [os.memfd_create("natns-look") for _ in range(2)]
    try:
        pid = os.fork()
    except OSError:
        for file in files:
            os.close(file)
        raise
    if pid == 0:
        _become(body, files)
    # Both processes set it, so neither has to wait for the other.
    with suppress(OSError):
        os.setpgid(pid, pid)
    return Job(pid, os.pidfd_open(pid), *files)


def _become(body: Body, files: list[int]) -> None:
    """Take the place of the command, and end."""
    status = FAILED
    try:
        with suppress(OSError):
            os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, file in enumerate((nothing, *files)):
            os.dup2(file, number)
        # The clients' connections are the server's alone.
        os.closerange(3, DESCRIPTORS)
        sys.stdout, sys.stderr = (
            os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") for number in (1, 2)
        )
        status = body()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else FAILED
    except BaseException:  # the fork must not go on as a second server
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
