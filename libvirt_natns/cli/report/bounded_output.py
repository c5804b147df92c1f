# SPDX-License-Identifier: LGPL-2.1-or-later
"""The output of a program, bounded in time and size: a report never hangs with its machine."""

import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress

from libvirt_natns import names
from libvirt_natns.kernel import processes

TIME_LIMIT = 20.0
"""Seconds that a program gets."""

SIZE_LIMIT = 192 * 1024
"""Bytes of a program's output that are read."""

END_LIMIT = 1.0
"""Seconds that a killed program gets to end; it may be in a system call that does not end."""

ENVIRONMENT: Mapping[str, str] = {
    "PATH": processes.PATH,
    "LC_ALL": "C.UTF-8",
    "NO_COLOR": "1",
    "SYSTEMD_COLORS": "0",
}

COMMAND = "from libvirt_natns.cli.commands import main; sys.exit(main())"


def of_our_command(*arguments: str) -> str:
    """Return the output of ``virt-natns`` with these arguments, in a process of its own."""
    return of(*names.python_command(COMMAND, *arguments))


def of(program: str, *arguments: str, limit: float = TIME_LIMIT, size: int = SIZE_LIMIT) -> str:
    """Return the output of a program, both streams, and a line about a program that failed.

    The program is ended after ``limit`` seconds, or ``size`` bytes of output.
    """
    path = processes.program(program)
    if path is None:
        return f"({program} is not installed)"
    try:
        # A group of its own, so that a shell's children end with the shell.
        process = subprocess.Popen(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
            start_new_session=True,
        )
    except OSError as error:
        return f"({program}: {error.strerror})"
    assert process.stdout is not None
    with process.stdout:
        said, note = _read(process.stdout.fileno(), time.monotonic() + limit, size)
    note = note or _ended(process, limit)
    _kill(process)
    text = said.decode(errors="replace").rstrip()
    return "\n".join(part for part in (text, note) if part)


def _read(descriptor: int, deadline: float, size: int) -> tuple[bytes, str]:
    """Return all that comes until the end of a stream, and a note if that is not all."""
    said = bytearray()
    while len(said) < size:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            return bytes(said), "(ended: it took too long)"
        chunk = os.read(descriptor, 64 * 1024)
        if not chunk:
            return bytes(said), ""
        said += chunk
    return bytes(said[:size]), f"(cut after {size // 1024} KiB)"


def _ended(process: subprocess.Popen[bytes], limit: float) -> str:
    """Return a note about the exit status, once the program has closed its streams."""
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        return "(ended: it took too long)"
    return f"(exit status {status})" if status else ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_LIMIT)
