# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes are known by their command line."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from libvirt_natns.kernel import processes

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_NAME = 15
ODD_NAME = b"natns \xff) Z ("
"""A name that any user may give a process: no UTF-8, and with the marks of /proc/PID/stat."""


def test_a_program_that_replaces_another_has_a_command_line() -> None:
    """execve(2) empties it for a moment; a process that starts is not taken for one that ended."""
    for _ in range(40):
        started = subprocess.Popen(["setpriv", "--no-new-privs", "--", "sleep", "9"])
        try:
            deadline = time.monotonic() + 5
            while (words := processes.command(started.pid))[0] != "sleep":
                assert words != [""]
                assert time.monotonic() < deadline
        finally:
            started.kill()
            started.wait()


def test_a_process_that_has_ended_has_none() -> None:
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert processes.command(ended.pid) == [""]
    ended.wait()
    assert processes.command(ended.pid) == []


@contextmanager
def forked(prepare: Callable[[], None], *, ends: bool = False) -> Iterator[int]:
    """Run a child that prepares itself, and then waits or ends; yield its process id."""
    child = os.fork()
    if child == 0:
        try:
            prepare()
            if not ends:
                os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def take_odd_name() -> None:
    LIBC.prctl(PR_SET_NAME, ODD_NAME, 0, 0, 0)


def lose_command_line() -> None:
    """Unmap the pages of the command line, as every process may."""
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    # Fields 48 and 49 of proc(5).
    first, end = (int(fields[at]) for at in (45, 46))
    first -= first % 4096
    length = (end - first + 4095) // 4096 * 4096
    LIBC.munmap(ctypes.c_void_p(first), ctypes.c_size_t(length))


def lose_all() -> None:
    take_odd_name()
    lose_command_line()


@pytest.mark.parametrize("ends", [True, False])
def test_a_process_may_have_any_name(ends: bool) -> None:
    with forked(take_odd_name, ends=ends) as child:
        assert processes.with_word("no process has this word") == []
        assert (processes.command(child) == [""]) == ends
        assert processes.opened(child, "no process has this word") is None


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_processes_without_a_command_line_are_waited_for_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each user can run thousands of them, and a network's start waits for the search."""
    clock = Clock(monkeypatch)
    with (
        forked(lose_command_line) as first,
        forked(lose_command_line) as second,
        forked(lose_all) as third,
    ):
        assert [processes.command(pid) for pid in (first, second, third)] == [[""]] * 3
        clock.now = 1000.0
        assert processes.with_word("no process has this word") == []
    assert clock.now <= 1000.0 + processes.EXEC_LIMIT + processes.EXEC_POLL


def test_processes_of_other_users_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with forked(lose_command_line) as child:
        monkeypatch.setattr(os, "getuid", lambda: 4242)
        assert processes.command(child) == [""]
    assert clock.now == 1000.0


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"0", b"1", b"-7", "\u00b2".encode(), b"4194305", b"9" * 5000]
)
def test_a_damaged_pid_file_names_no_process(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pid").write_bytes(content)
    assert processes.read_pid(tmp_path / "pid") is None
    (tmp_path / "pid").write_text(f"{os.getpid()}\n")
    assert processes.read_pid(tmp_path / "pid") == os.getpid()
