# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits of the files of a process, with a child that has some open."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from libvirt_natns.kernel import open_files

CHILD = """
import os, socket, sys
sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(int(sys.argv[1]))]
numbers = [os.dup2(each.fileno(), 20 + place) for place, each in enumerate(sockets)]
log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
log.bind("")
os.dup2(log.fileno(), 40)
os.dup2(os.pipe()[1], 41)
null = os.open("/dev/null", os.O_RDWR)
os.dup2(null, 42)
os.closerange(5, 20)
for number in (3, 4):
    os.dup2(42, number)
print(len(numbers), flush=True)
sys.stdin.read()
"""
"""It has the files 0 to 4, of which it may wait for 0, and some from 20 on."""


@contextmanager
def child(sockets: int) -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-I", "-c", CHILD, str(sockets)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline()
        yield process.pid
        process.stdin.close()


@pytest.mark.parametrize(("sockets", "limit"), [(1, 5), (4, 5), (5, None), (9, None)])
def test_a_process_can_go_on_to_wait_for_its_files(sockets: int, limit: int | None) -> None:
    with child(sockets) as pid:
        assert open_files.closing_limit(pid) == limit


def test_a_process_that_has_ended() -> None:
    with child(1) as pid:
        pass
    assert open_files.closing_limit(pid) is None
