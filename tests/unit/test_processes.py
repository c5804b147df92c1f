# SPDX-License-Identifier: LGPL-2.1-or-later
"""Command lines by which daemons are found again."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from libvirt_natns import processes

PID = 4711


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process in the midst of execve(2): it has a program, and no command line yet."""
    monkeypatch.setattr(processes, "PROCESSES", tmp_path)
    directory = tmp_path / str(PID)
    directory.mkdir()
    (directory / "exe").symlink_to("/usr/sbin/dnsmasq")
    (directory / "cmdline").touch()
    return directory


def timed(work: Callable[[], list[str]]) -> tuple[list[str], float]:
    began = time.monotonic()
    return work(), time.monotonic() - began


def test_execve_is_waited_for(process: Path) -> None:
    ready = process / "ready"
    ready.write_bytes(b"dnsmasq\0--conf-file=a\0")
    threading.Timer(0.05, os.replace, (ready, process / "cmdline")).start()
    assert "--conf-file=a" in processes.command(PID)


def test_an_empty_command_line_is_not_waited_for_forever(process: Path) -> None:
    found, seconds = timed(lambda: processes.command(PID))
    assert found == []
    assert processes.EXEC_LIMIT <= seconds < processes.EXEC_LIMIT + 2


@pytest.mark.parametrize("missing", ["exe", "cmdline"])
def test_what_has_ended_is_not_waited_for(process: Path, missing: str) -> None:
    """A zombie, and a thread of the kernel, have no program; a process that is gone has nothing."""
    (process / "exe").unlink()
    if missing == "cmdline":
        (process / "cmdline").unlink()
    found, seconds = timed(lambda: processes.command(PID))
    assert found == []
    assert seconds < processes.EXEC_LIMIT
