# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is read of a damaged database for networks and guests at rest."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from libvirt_natns.engine.rebuild import damage
from libvirt_natns.kernel.boot_clock import boot_id, now
from libvirt_natns.state import salvage
from libvirt_natns.state.chosen_ports import PortKey
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store

ADDRESS, OTHER = IPv4Address("192.168.0.100"), IPv4Address("192.168.0.101")
INNER = IPv4Address("10.0.0.100")
KEY = PortKey("uuid-web", "uuid-a", "tcp", "", 22)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A database with a network and a guest that has ended."""
    with closing(Store(tmp_path / "old")) as store:
        store.networks.put(
            NetworkRecord("uuid-a", "a", "nat-a", "virbr10", "provider", "bridge",
                   (IPv4Network("10.0.0.0/24"),), True, "up", boot_id(), now(), b"<network/>")
        )  # fmt: skip
        assert store.leases.reserve("provider", "br0", "uuid-a", ADDRESS)
        store.reservations.reserve("uuid-a", "m1", "uuid-web", [INNER], lambda _: True)
        store.chosen_ports.put(KEY, 20000)
        return store.path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """The new one, which does not know the owner of a reservation."""
    with closing(Store(tmp_path / "new")) as opened:
        opened.reservations.reserve("uuid-a", "m1", "", [INNER], lambda _: True)
        yield opened


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(statement)


def owner(store: Store) -> str:
    (row,) = store.select("SELECT owner FROM reservation")
    return str(row[0])


def test_all_that_can_be_read(old: Path, store: Store) -> None:
    salvage.copy(old, store)
    record = store.networks.get("uuid-a")
    assert record is not None
    # libvirt did not tell that it runs.
    assert record.state == "down"
    assert store.leases.of("provider", "uuid-a").address == ADDRESS
    assert store.chosen_ports.get(KEY) == 20000
    assert owner(store) == "uuid-web"


def test_what_runs_has_been_adopted_and_stays(old: Path, store: Store) -> None:
    assert store.leases.reserve("provider", "br0", "uuid-a", OTHER)
    assert store.leases.reserve("provider", "br0", "uuid-b", ADDRESS)
    store.chosen_ports.put(PortKey("uuid-mail", "uuid-a", "tcp", "", 25), 20000)
    salvage.copy(old, store)
    assert store.leases.of("provider", "uuid-a").address == OTHER
    assert store.leases.of("provider", "uuid-b").address == ADDRESS
    assert store.chosen_ports.get(KEY) is None


def test_a_table_with_nonsense_is_left_out(old: Path, store: Store) -> None:
    change(old, "UPDATE network SET subnets = 'x'")
    assert damage(old.parent) is not None
    salvage.copy(old, store)
    assert store.networks.all() == []
    assert store.leases.of("provider", "uuid-a").address == ADDRESS
    assert owner(store) == "uuid-web"
    store.check()


@pytest.mark.parametrize("statement", ["PRAGMA user_version = 2", "DROP TABLE lease"])
def test_another_format(statement: str, old: Path, store: Store) -> None:
    change(old, statement)
    salvage.copy(old, store)
    assert store.leases.of("provider", "uuid-a").address is None
    store.check()


def test_no_database_at_all(old: Path, store: Store) -> None:
    old.write_bytes(b"nothing of the kind" * 100)
    salvage.copy(old, store)
    salvage.copy(old.parent / "missing", store)
    assert store.networks.all() == []
