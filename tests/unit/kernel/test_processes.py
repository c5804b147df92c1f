# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes are known by their command line."""

import os
import subprocess
import time

from libvirt_natns.kernel import processes


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
