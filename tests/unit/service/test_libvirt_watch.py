# SPDX-License-Identifier: LGPL-2.1-or-later
"""Following libvirt without one: patience, and which daemons run."""

import io
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn, cast

import libvirt
import pytest

from libvirt_natns.daemons import libvirt_events, libvirtd
from libvirt_natns.daemons.libvirtd import LXC, NETWORK, QEMU, Driver, LibvirtDaemon
from libvirt_natns.service import libvirt_watch
from libvirt_natns.service.libvirt_watch import Backoff, ConnectionKeeper
from libvirt_natns.service.log import Log
from libvirt_natns.service.workqueue import WorkQueue

# -- patience --------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_patience_grows_to_its_limit(clock: list[float]) -> None:
    patience = Backoff()
    assert patience.allows(7)
    assert patience.refused(7)
    waits = []
    for _ in range(9):
        begin = clock[0]
        while not patience.allows(7):
            clock[0] += 0.5
        waits.append(clock[0] - begin)
        assert not patience.refused(7)
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_next_daemon_is_tried_at_once(clock: list[float]) -> None:
    patience = Backoff()
    for _ in range(9):
        patience.refused(7)
    assert not patience.allows(7)
    assert patience.allows(8)
    assert patience.refused(8)
    clock[0] += 0.5
    assert patience.allows(8)


# -- errors of the threads -------------------------------------------------------


def test_no_error_ends_the_thread_of_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> NoReturn:
        tried.append(1)
        raise RuntimeError("bug")

    tried: list[int] = []
    monkeypatch.setattr(libvirt_watch, "LOOK", 0.001)
    monkeypatch.setattr(libvirt_watch, "EventConnection", connect)
    log = io.StringIO()
    driver = cast("Driver", SimpleNamespace(scheme="qemu", daemon=lambda: LibvirtDaemon("x", 7)))
    keeper = ConnectionKeeper(driver, Log(log), WorkQueue())
    keeper.start()
    deadline = time.monotonic() + 10
    while len(tried) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    keeper.stop()
    keeper.join(10)
    assert len(tried) >= 3
    assert log.getvalue().count("event=fault") == 1


def test_no_error_ends_the_loop_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> None:
        polled.append(1)
        time.sleep(0.001)
        raise libvirt.libvirtError("poll failed")

    polled: list[int] = []
    for name in ("registerErrorHandler", "virEventRegisterDefaultImpl", "virEventAddTimeout"):
        monkeypatch.setattr(libvirt, name, lambda *_: None)
    monkeypatch.setattr(libvirt, "virEventRunDefaultImpl", run)
    monkeypatch.setattr(libvirt_events, "FAULT_PAUSE", 0.0)
    loop = libvirt_events.Loop()
    loop.start()
    deadline = time.monotonic() + 10
    while len(polled) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    loop.stop()
    assert len(polled) >= 3


# -- daemons ---------------------------------------------------------------------


class Host:
    """A host's pid files and processes."""

    def __init__(self, root: Path) -> None:
        self.run = root / "run"
        self.processes = root / "proc"
        self.run.mkdir()

    def write(self, daemon: str, pid: object) -> None:
        (self.run / f"{daemon}.pid").write_text(f"{pid}\n")

    def start(self, daemon: str, pid: int, command: str | None = None) -> None:
        self.write(daemon, pid)
        (self.processes / str(pid)).mkdir(parents=True)
        (self.processes / str(pid) / "comm").write_text(f"{command or daemon}\n")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    found = Host(tmp_path)
    monkeypatch.setattr(libvirtd, "RUN", found.run)
    monkeypatch.setattr(libvirtd, "PROCESSES", found.processes)
    yield found


def test_monolithic_daemon_has_all_drivers(host: Host) -> None:
    host.start("libvirtd", 5)
    assert QEMU.daemon() == LibvirtDaemon("qemu:///system?mode=legacy", 5)
    assert LXC.daemon() == LibvirtDaemon("lxc:///system?mode=legacy", 5)
    assert NETWORK.daemon() == LibvirtDaemon("network:///system?mode=legacy", 5)


def test_modular_daemons_come_first(host: Host) -> None:
    """Those that sleep are none, whatever another driver's daemon does."""
    host.start("virtqemud", 5)
    host.start("virtnetworkd", 6)
    assert QEMU.daemon() == LibvirtDaemon("qemu:///system?mode=direct", 5)
    assert NETWORK.daemon() == LibvirtDaemon("network:///system?mode=direct", 6)
    assert LXC.daemon() is None
    host.start("libvirtd", 7)
    assert QEMU.daemon() == LibvirtDaemon("qemu:///system?mode=direct", 5)
    assert LXC.daemon() == LibvirtDaemon("lxc:///system?mode=legacy", 7)


def test_daemons_that_have_ended(host: Host) -> None:
    """No file, one that was left behind, or whose number another process has by now."""
    assert QEMU.daemon() is None
    host.write("virtqemud", 5)
    assert QEMU.daemon() is None
    host.write("virtqemud", "")
    assert QEMU.daemon() is None
    host.start("libvirtd", 6, "bash")
    assert QEMU.daemon() is None
