# SPDX-License-Identifier: LGPL-2.1-or-later
"""Spare namespaces: how many there are, and that none outlives its owner."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from libvirt_natns import names
from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import locks, netns
from libvirt_natns.kernel.locks import locked
from libvirt_natns.kernel.netns import Spares


def make() -> int:
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


@pytest.fixture(autouse=True)
def pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares are made a moment later, not a second."""
    monkeypatch.setattr(netns, "PAUSE", 0.02)


def soon(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.001)
    return holds()


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_what_is_taken_is_made_up_for() -> None:
    before = descriptors()
    spares = Spares(2, make)
    assert soon(lambda: len(spares._kept) == 2)
    taken = [spares.take() for _ in range(2)]
    assert None not in taken
    assert soon(lambda: len(spares._kept) == 2)
    assert not {each for each in taken if each is not None} & set(spares._kept)
    for each in taken:
        assert each is not None
        os.close(each)
    spares.close()
    assert spares.take() is None
    assert descriptors() == before


def test_nobody_waits_for_a_spare() -> None:
    go_on = threading.Event()

    def slow() -> int:
        go_on.wait()
        return make()

    spares = Spares(1, slow)
    assert spares.take() is None
    # What comes too late is not kept either.
    spares.close()
    before = descriptors()
    go_on.set()
    assert soon(lambda: not spares._refilling)
    assert descriptors() == before


def test_a_kernel_that_gives_none_is_asked_again() -> None:
    answers = iter([False, True])

    def refusing() -> int:
        if not next(answers):
            raise KernelError("the kernel refuses a network namespace")
        return make()

    spares = Spares(1, refusing)
    assert soon(lambda: not spares._refilling)
    assert spares.take() is None
    assert soon(lambda: len(spares._kept) == 1)
    spares.close()


def test_anybodys_lock_is_waited_for_a_moment_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may open /run/netns may lock it; ours is where only root may."""
    mounted: list[bytes] = []

    def call(function: str, *arguments: object) -> None:
        if function == "mount" and arguments[0] == b"" and not mounted:
            raise OSError(errno.EINVAL, "no mount point")
        if arguments[0]:
            assert isinstance(arguments[1], bytes)
            mounted.append(arguments[1])

    monkeypatch.setattr(netns, "_call", call)
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path / "natns")
    monkeypatch.setattr(names, "NETNS_DIRECTORY", tmp_path / "netns")
    monkeypatch.setattr(names, "namespace_path", lambda name: str(tmp_path / "netns" / name))
    (tmp_path / "netns").mkdir()
    with locked(tmp_path / "netns"):
        began = time.monotonic()
        netns.bind("nat-a", 0)
        assert netns.IP_LIMIT <= time.monotonic() - began < locks.LIMIT
        began = time.monotonic()
        netns.bind("nat-b", 0)
        assert time.monotonic() - began < netns.IP_LIMIT
    inside = os.fsencode(tmp_path / "netns")
    assert mounted == [inside, inside + b"/nat-a", inside + b"/nat-b"]
    # The lock leaves nothing behind.
    assert list((tmp_path / "natns").iterdir()) == []
