# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hooks, the service and commands from the damage of the state database to its rebuilding."""

import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from lab import (
    FastGuest,
    Libvirtd,
    Provider,
    Service,
    define_network,
    isolated,
    natns,
    remove_config,
    virsh,
    wait_for,
    write_config,
)
from lab_domains import STATE, create, destroy, domain, nat, networks, nic, ports, unordered
from lab_snapshot import remaining
from views import namespaces, refusal

FILE = STATE / "state.db"
MAC = "52:54:00:00:00:05"
ON_HOST = nat('<natns:upstream name="host"/>')


@pytest.fixture
def upstream(installed: None, provider: Provider) -> Iterator[Provider]:
    """The provider's bridge as the upstream; no service runs yet."""
    write_config(provider.config(more="probe = 0"))
    yield provider
    forget_damaged()
    remove_config()


def forget_damaged() -> int:
    """Remove what was put aside; returns how many files that were."""
    found = list(STATE.glob("state.db.damaged-*"))
    for file in found:
        file.unlink()
    return len(found)


def remove() -> None:
    for file in STATE.glob("state.db*"):
        file.unlink()


def garble() -> None:
    remove()
    FILE.write_text("this is no database\n" * 100)


def break_networks() -> None:
    with closing(sqlite3.connect(FILE)) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'network'")
        db.execute("PRAGMA wal_checkpoint (TRUNCATE)")
    with FILE.open("r+b") as stream:
        stream.seek((int(page[0]) - 1) * 4096)
        stream.write(b"\xff" * 4096)


DAMAGES: dict[str, Callable[[], None]] = {
    "garbage": garble,
    "missing": remove,
    "networks": break_networks,
}


def inodes() -> dict[str, int]:
    return {file.name: file.stat().st_ino for file in Path("/run/netns").glob("nat-*")}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("serve", [False, True], ids=["hooks", "service"])
def test_starts_are_refused_and_ends_succeed(damage: str, serve: bool, upstream: Provider) -> None:
    with ExitStack() as cleanup:
        service = cleanup.enter_context(Service()) if serve else None
        define_network(isolated("new", "virbr15"))
        before = unordered()
        both = isolated("a", "virbr10"), isolated("c", "virbr12", metadata=ON_HOST)
        with networks(*both):
            cleanup.callback(destroy, "web")
            create(domain("web", nic("a", MAC), publishes=ports("start='2222' to='22'")))
            if service:
                # What follows a start is done.
                service.idle()
            DAMAGES[damage]()
            told = refusal("new")
            assert told.startswith(f"state database {FILE}: is "), told
            assert ": run virt-natns sync" in told
            examined = natns("doctor", check=False).stdout
            assert f"broken  state database: state database {FILE}: is " in examined
            for command in ("status", "check"):
                assert f"state database {FILE}: is " in natns(command, check=False).stderr
            with FastGuest("virbr10", MAC) as guest:
                guest.dhcp()
                assert guest.ping(upstream.gateway)
            virsh("destroy", "web")
            virsh("net-destroy", "a")
            assert namespaces() == {"nat-c"}
            kept = inodes()
            if service:
                service.signal(signal.SIGHUP)
                wait_for(lambda: service.logged("event=rebuilt"), timeout=20, what="a rebuild")
                wait_for(lambda: natns("check", check=False).returncode == 0, timeout=20)
            else:
                natns("sync")
                checked = natns("check", check=False)
                assert checked.returncode == 0, checked.stdout + checked.stderr
            assert inodes() == kept
            virsh("net-start", "new")
            virsh("net-destroy", "new")
            virsh("net-start", "a")
        assert bool(forget_damaged()) == (damage != "missing")
        left = remaining(before, unordered, timeout=10)
        assert not left, left


@pytest.mark.parametrize("damage", ["garbage", "missing"])
def test_without_libvirt_nothing_is_changed(
    damage: str, upstream: Provider, libvirtd: Libvirtd
) -> None:
    with networks(isolated("a", "virbr10"), isolated("c", "virbr12", metadata=ON_HOST)):
        kept = inodes()
        DAMAGES[damage]()
        libvirtd.stop()
        try:
            done = natns("sync", check=False)
        finally:
            libvirtd.start()
        assert done.returncode == 1
        assert f"state database {FILE}: is " in done.stderr
        assert ": start libvirt, and try again" in done.stderr
        assert not list(STATE.glob("state.db.damaged-*"))
        natns("sync")
        checked = natns("check", check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        assert inodes() == kept
