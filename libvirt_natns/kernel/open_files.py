# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open files of another process, and how many of them it may be limited to.

A limit of the numbers that are in use keeps a process from opening another file.  But poll(2)
also refuses to wait for more files than the limit: such a process would ask again without end.
Source: proc(5), setrlimit(2), poll(2).
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from libvirt_natns.kernel import processes

DATAGRAMS = "0002"
"""The type of a Unix socket to which only lines of a log are sent."""

SOCKET = re.compile(r"socket:\[(\d+)\]")


def closing_limit(pid: int) -> int | None:
    """Return the limit by which a process can open no other file.

    None if the process waits for more files than that, or has ended.
    """
    files = processes.descriptors(pid)
    if not files:
        return None
    try:
        logs = _log_sockets(pid)
        awaited = sum(_may_be_awaited(pid, number, file, logs) for number, file in files.items())
    except OSError:
        return None
    limit = next(number for number in range(len(files) + 1) if number not in files)
    return limit if awaited <= limit else None


def _may_be_awaited(pid: int, number: int, file: str, logs: set[str]) -> bool:
    """True if a process could be waiting for input of a file."""
    if file.startswith("/"):
        return False
    socket = SOCKET.fullmatch(file)
    if socket:
        return socket[1] not in logs
    with suppress(FileNotFoundError):
        lines = Path(f"/proc/{pid}/fdinfo/{number}").read_text().splitlines()
        flags = next(line.split()[1] for line in lines if line.startswith("flags:"))
        return int(flags, 8) & os.O_ACCMODE != os.O_WRONLY
    return False


def _log_sockets(pid: int) -> set[str]:
    """Return the inodes of the Unix sockets for datagrams, in a process's namespace."""
    listed = Path(f"/proc/{pid}/net/unix").read_text(errors="replace").splitlines()[1:]
    fields = (line.split() for line in listed)
    return {words[6] for words in fields if len(words) > 6 and words[4] == DATAGRAMS}
