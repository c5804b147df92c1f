# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state database: uniqueness, turns and leases, from one process and from many."""

import multiprocessing
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from libvirt_natns import __version__, names
from libvirt_natns.errors import ConflictError, DamagedError, FormatError, StoreError
from libvirt_natns.kernel import boot_clock as boot_module
from libvirt_natns.kernel.boot_clock import boot_id, now
from libvirt_natns.kernel.locks import locked
from libvirt_natns.model.publication import StaticNat
from libvirt_natns.state import database
from libvirt_natns.state.chosen_ports import PortKey
from libvirt_natns.state.claim_scope import ClaimScope
from libvirt_natns.state.claims import Claims
from libvirt_natns.state.networks import START_LIMIT, NetworkRecord
from libvirt_natns.state.schema import SCHEMA, VERSION
from libvirt_natns.state.store import Store

FIRST = IPv4Address("192.168.0.100")
SECOND = IPv4Address("192.168.0.101")
THIRD = IPv4Address("192.168.0.102")
SEGMENT = "br0"
PROCESSES = 16
ROUNDS = 3
FORK = multiprocessing.get_context("fork")
_all_ready = FORK.Barrier(PROCESSES)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path)
    yield opened
    opened.close()


def record(name: str, **changes: Any) -> NetworkRecord:  # noqa: ANN401
    plain = NetworkRecord(
        uuid=f"uuid-{name}",
        name=name,
        namespace=f"nat-{name}",
        bridge=f"virbr-{name}",
        upstream="provider",
        kind="bridge",
        subnets=(IPv4Network("10.0.0.0/24"),),
        taken_over=True,
        state="up",
        boot=boot_id(),
        since=now(),
        document=b"<network/>",
    )
    return replace(plain, **changes)


def lease(store: Store, name: str, address: IPv4Address, upstream: str = "provider") -> bool:
    return store.leases.reserve(upstream, SEGMENT, f"uuid-{name}", address)


@pytest.fixture
def reboot(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Call it to go on in the next boot."""
    boots = iter(range(100))

    def happen() -> None:
        number = next(boots)
        monkeypatch.setattr(boot_module, "boot_id", lambda: f"boot-{number}")

    yield happen


# -- the file ------------------------------------------------------------------


def _open_with_others(directory: Path) -> str:
    _all_ready.wait()
    return _open_and_read(directory)


def _open_and_read(directory: Path) -> str:
    try:
        opened = Store(directory)
        opened.networks.all()
        opened.close()
    except StoreError as error:
        return str(error)
    return ""


def test_many_processes_open_a_new_database_at_once(tmp_path: Path) -> None:
    """As after an installation, when a host's networks all start for the first time."""
    with FORK.Pool(PROCESSES) as pool:
        for number in range(ROUNDS):
            said = pool.map(_open_with_others, [tmp_path / str(number)] * PROCESSES, chunksize=1)
            assert set(said) == {""}


def test_database_that_another_process_is_creating(tmp_path: Path) -> None:
    """SQLite itself would not wait here, but fail at once."""
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(_open_and_read(tmp_path)))
    with locked(tmp_path), closing(sqlite3.connect(tmp_path / "state.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        thread.start()
        thread.join(0.2)
        assert not said
        other.rollback()
    thread.join()
    assert said == [""]


def test_records_outlive_the_process(tmp_path: Path) -> None:
    first = Store(tmp_path)
    first.networks.put(record("a"))
    first.close()
    again = Store(tmp_path)
    since = again.networks.all()[0].since
    assert again.networks.get("uuid-a") == replace(record("a"), since=since)
    again.close()


def rewritten(directory: Path, *statements: str) -> None:
    """Change a database behind everybody's back."""
    with closing(sqlite3.connect(directory / "state.db", isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


@pytest.mark.parametrize(
    ("statement", "writer"),
    [
        (f"INSERT INTO writer VALUES ({VERSION + 1}, '7.1.0')", "version 7.1.0"),
        ("SELECT 1", "a later version"),
        ("DROP TABLE writer", "a later version"),
    ],
)
def test_database_of_a_later_version(statement: str, writer: str, tmp_path: Path) -> None:
    Store(tmp_path).close()
    rewritten(tmp_path, f"PRAGMA user_version = {VERSION + 1}", statement)
    with pytest.raises(FormatError) as caught:
        Store(tmp_path)
    assert f"has format {VERSION + 1}, written by {writer} (version" in str(caught.value)
    assert f": install {writer} again, or move the file away and run virt" in str(caught.value)


def test_database_tells_which_version_wrote_it(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "state.db")) as db:
        assert db.execute("SELECT * FROM writer").fetchall() == [(VERSION, __version__)]


EARLIER = f"""
{SCHEMA}
DROP INDEX network_start; DROP INDEX network_user; DROP INDEX lease_network;
DROP INDEX lease_used; DROP INDEX forward_claim; DROP INDEX forward_ports;
DROP INDEX static_nat_network; DROP INDEX static_nat_owner; DROP TRIGGER one_claim;
CREATE INDEX forward_claim ON forward (scope, proto, first);
CREATE TRIGGER one_claim BEFORE INSERT ON forward
WHEN EXISTS (
    SELECT 1 FROM forward WHERE scope = NEW.scope AND proto = NEW.proto
    AND claimed = NEW.claimed
    AND first <= NEW.last AND last >= NEW.first
) BEGIN SELECT RAISE(ABORT, 'claimed'); END;
DROP TABLE reservation; DROP TABLE chosen_port; DROP TABLE lease; DROP TABLE transit6;
CREATE TABLE lease (upstream TEXT NOT NULL, segment TEXT NOT NULL, address INTEGER NOT NULL,
    network TEXT NOT NULL, used INTEGER NOT NULL,
    PRIMARY KEY (segment, address), UNIQUE (upstream, network));
CREATE TABLE chosen_port (owner TEXT NOT NULL, network TEXT NOT NULL, proto TEXT NOT NULL,
    target_port INTEGER NOT NULL, port INTEGER NOT NULL,
    PRIMARY KEY (owner, network, proto, target_port));
CREATE TABLE reservation (network TEXT NOT NULL, mac TEXT NOT NULL, address INTEGER NOT NULL,
    PRIMARY KEY (network, mac), UNIQUE (network, address));
PRAGMA user_version = 1;
"""
"""Format 1 as it was."""


def _schema(directory: Path) -> set[tuple[str, str]]:
    with closing(sqlite3.connect(directory / "state.db")) as db:
        return set(db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))


def test_database_of_the_earlier_format_keeps_all_it_has(tmp_path: Path) -> None:
    old, fresh = tmp_path / "old", tmp_path / "fresh"
    old.mkdir()
    with closing(sqlite3.connect(old / "state.db")) as db:
        db.executescript(EARLIER)
    with closing(sqlite3.connect(old / "state.db", isolation_level=None)) as db:
        db.execute("INSERT INTO lease VALUES ('provider', 'br0', 77, 'uuid-a', 1)")
        db.execute("INSERT INTO transit VALUES ('host', '198.19.252.0/22')")
        db.execute("INSERT INTO chosen_port VALUES ('web', 'a', 'tcp', 22, 20000)")
        # Of a guest that runs meanwhile, and of one that does not.
        db.execute("INSERT INTO reservation VALUES ('a', 'm1', 5), ('a', 'm2', 6)")
        db.execute(
            "INSERT INTO forward VALUES ('', 'web', 'guest web', 'a', 'tcp', 0, 0, 80, 80, 5,"
            " 80, 80, '', 1, ?)",
            (boot_id(),),
        )
    Store(fresh).close()
    store = Store(old)
    assert store.leases.of("provider", "uuid-a").address == IPv4Address(77)
    assert store.transit.subnet("host") == IPv4Network("198.19.252.0/22")
    assert store.reservations.all("a") == {"m1": IPv4Address(5), "m2": IPv4Address(6)}
    assert store.reservations.for_dhcp("a", 0) == {"m1": IPv4Address(5)}
    # Goes to the first forward to that port that asks for it.
    mine, other = (PortKey("web", "a", "tcp", which, 22) for which in ("mac=m1", "mac=m2"))
    assert store.chosen_ports.get(mine) == 20000
    store.chosen_ports.put(mine, 20000)
    assert (store.chosen_ports.get(mine), store.chosen_ports.get(other)) == (20000, None)
    store.close()
    assert _schema(old) == _schema(fresh)


def test_a_migration_that_fails_leaves_the_database_as_it_was(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "state.db")) as db:
        db.executescript(EARLIER)
    # Two leases of one kind, which no later format takes.
    rewritten(
        tmp_path,
        "DROP TABLE lease",
        "CREATE TABLE lease (upstream, segment, address, network, used)",
        "INSERT INTO lease VALUES ('p', 'br0', 1, 'a', 1), ('p', 'br0', 1, 'a', 1)",
    )
    before = _schema(tmp_path)
    for _ in range(2):
        with pytest.raises(StoreError) as caught:
            Store(tmp_path)
        assert not isinstance(caught.value, DamagedError)
        assert f"cannot be brought from format 1 to {VERSION} (UNIQUE" in str(caught.value)
    assert _schema(tmp_path) == before
    with closing(sqlite3.connect(tmp_path / "state.db")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert len(db.execute("SELECT * FROM lease").fetchall()) == 2


def test_two_processes_migrate_at_once(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "state.db")) as db:
        db.executescript(EARLIER)
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda _: _open_and_read(tmp_path), range(4))) == {""}


def _plans(store: Store, run: Callable[[], object]) -> list[str]:
    """How SQLite finds the rows of each query and change that ``run`` makes."""
    seen: list[str] = []
    with store.transaction() as db:
        db.set_trace_callback(seen.append)
    run()
    with store.transaction() as db:
        db.set_trace_callback(None)
        asked = [text for text in seen if text.split()[0] in ("SELECT", "UPDATE", "DELETE")]
        return [
            f"{row[3]}: {text}"
            for text in asked
            for row in db.execute(f"EXPLAIN QUERY PLAN {text}")
        ]


def test_no_start_reads_all_rows_of_a_table(store: Store) -> None:
    mine = record("a", state="starting")

    def start() -> None:
        store.networks.holders("nat-a", "virbr-a")
        store.networks.put(mine)
        assert store.leases.reserve("provider", SEGMENT, mine.uuid, FIRST)
        assert store.networks.enter_start(mine) is None
        store.networks.set_state(mine.uuid, "up")
        store.networks.in_use("provider")
        store.claims.move(mine.uuid, SECOND)
        store.claims.forwards(mine.uuid)
        store.claims.static_nats(owner=mine.uuid)
        store.guests.in_network(mine.uuid)
        store.reservations.reserve(mine.uuid, "m1", "web", [FIRST], lambda _: True)
        store.reservations.for_dhcp(mine.uuid, 5)
        store.claims.set_published("web", False)
        store.leases.restore(store.leases.all_of(mine.uuid))
        store.leases.has("provider", "web", FIRST)
        store.claims.drop(mine.uuid)

    plans = _plans(store, start)
    assert any("USING" in plan for plan in plans)
    assert [plan for plan in plans if plan.startswith("SCAN")] == []


def overwritten(file: Path, where: int, octets: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(where)
        stream.write(octets)


@pytest.mark.parametrize("content", [b"no database at all, but long enough " * 50, bytes(8192)])
def test_no_database(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(content)
    with pytest.raises(DamagedError, match=r"state.db: is damaged \(file is not .*: run virt-nat"):
        Store(tmp_path)


def test_damage_that_shows_later(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(100):
        store.networks.put(replace(record(f"n{number}"), document=b"x" * 2000))
    store.check()
    store.close()
    file = tmp_path / "state.db"
    # Half of it: the tables' names stand at the beginning.
    half = file.stat().st_size // 2
    overwritten(file, half, b"\xff" * half)
    with closing(Store(tmp_path)) as store:
        with pytest.raises(DamagedError, match="is damaged"):
            store.networks.all()
        with pytest.raises(DamagedError, match="is damaged"):
            for number in range(100):
                store.networks.put(replace(record(f"n{number}"), document=b""))
        with pytest.raises(DamagedError, match="is damaged"):
            store.check()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE network SET subnets = '10.0.0.0/240'",
        "UPDATE lease SET address = 'x'",
        "INSERT INTO transit VALUES ('host', '198.19.252.x/22')",
        "INSERT INTO transit6 VALUES ('host', 'fd00:')",
        "INSERT INTO reservation VALUES ('a', 'm', 4, 'x', '', 1)",
        "INSERT INTO static_nat VALUES ('p', 1, 'w', 'w', 'a', 'x', '', 1, '')",
        "INSERT INTO static_nat VALUES ('p', 1, 'w', 'w', 'a', 1, 'tcp:x', 1, '')",
        "INSERT INTO chosen_port VALUES ('w', 'a', 'tcp', '', 80, 'x', 1)",
        "UPDATE network SET since = 'x'",
        "DROP TABLE forward",
    ],
)
def test_values_that_make_no_sense(statement: str, tmp_path: Path) -> None:
    with closing(Store(tmp_path)) as store:
        store.networks.put(record("a"))
        assert store.leases.reserve("provider", SEGMENT, "uuid-a", FIRST)
        store.check()
    rewritten(tmp_path, statement)
    with (
        closing(Store(tmp_path)) as store,
        pytest.raises(DamagedError, match=r"is damaged \(.*\): run virt-natns sync"),
    ):
        store.check()


READERS: dict[str, tuple[str, Callable[[Store], object]]] = {
    "transit": (
        "INSERT INTO transit VALUES ('host', 'x')",
        lambda store: store.transit.subnet("host"),
    ),
    "transit6": (
        "INSERT INTO transit6 VALUES ('host', 'x')",
        lambda store: store.transit.prefix("host"),
    ),
    "reservation": (
        "INSERT INTO reservation VALUES ('a', 'm', 4, 'x', '', 1)",
        lambda store: store.reservations.get("a", "m"),
    ),
    "reservation6": (
        "INSERT INTO reservation VALUES ('a', 'm', 6, 'fd00:', '', 1)",
        lambda store: store.reservations.get("a", "m", 6),
    ),
    "reservations": (
        "INSERT INTO reservation VALUES ('a', 'm', 4, 'x', '', 1)",
        lambda store: store.reservations.all("a"),
    ),
    "reservations for DHCP": (
        "INSERT INTO reservation VALUES ('a', 'm', 4, 'x', '', 1)",
        lambda store: store.reservations.for_dhcp("a", 10),
    ),
    "a reservation to take": (
        "INSERT INTO reservation VALUES ('a', 'm', 4, 'x', '', 1)",
        lambda store: store.reservations.reserve("a", "other", "w", [], lambda _: True),
    ),
    "guest": (
        f"INSERT INTO guest VALUES ('w', 'w', '{boot_id()}', 1, x'00');"
        "ALTER TABLE guest ADD COLUMN other",
        lambda store: store.guests.get("w"),
    ),
    "lease": (
        "UPDATE lease SET address = 'x'; UPDATE network SET state = 'down'",
        lambda store: store.leases.reclaimable(SEGMENT, 4),
    ),
    "lease6": (
        "UPDATE lease SET kind = 'ipv6', address = 'x'; UPDATE network SET state = 'down'",
        lambda store: store.leases.reclaimable(SEGMENT, 6),
    ),
    "prefix": (
        "UPDATE lease SET kind = 'prefix', address = 'x'; UPDATE network SET state = 'down'",
        lambda store: store.leases.reclaimable_prefixes(SEGMENT),
    ),
    "chosen port": (
        "INSERT INTO chosen_port VALUES ('w', 'a', 'tcp', '', 80, 'x', 1)",
        lambda store: store.chosen_ports.get(PortKey("w", "a", "tcp", "", 80)),
    ),
    "chosen ports": (
        "INSERT INTO chosen_port VALUES ('w', 'a', 'tcp', '', 80, 'x', 1)",
        lambda store: store.chosen_ports.all(),
    ),
    "chosen ports to take": (
        "INSERT INTO chosen_port VALUES ('w', 'b', 'tcp', '', 80, 'x', 1)",
        lambda store: store.chosen_ports.reclaimable("tcp"),
    ),
    "claimed ports": (
        "INSERT INTO forward VALUES ('p', 'w', 'w', 'a', 'tcp', 1, 1, 'x', 'x', 1, 1, 1, '', 1,"
        f" '{boot_id()}')",
        lambda store: store.claims.ports("tcp"),
    ),
    "start": ("UPDATE network SET since = 'x'", lambda store: store.networks.get("uuid-a")),
    "user": (
        f"UPDATE network SET since = 'x', state = 'starting', boot = '{boot_id()}'",
        lambda store: store.host.users(),
    ),
}
"""A value that makes no sense, and a reader that meets it."""


@pytest.mark.parametrize("reader", READERS)
def test_each_reader_tells_damage_as_such(reader: str, tmp_path: Path) -> None:
    statements, read = READERS[reader]
    with closing(Store(tmp_path)) as store:
        store.networks.put(record("a"))
        assert store.leases.reserve("provider", SEGMENT, "uuid-a", FIRST)
    rewritten(tmp_path, *statements.split(";"))
    with (
        closing(Store(tmp_path)) as store,
        pytest.raises(DamagedError, match=r"is damaged \(.*\): run virt-natns sync"),
    ):
        read(store)


def test_put_aside_with_its_companions(tmp_path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"state.db{suffix}").write_text(suffix)
    aside = database.put_aside(tmp_path, "today")
    assert aside == tmp_path / "state.db.damaged-today"
    (tmp_path / "state.db").write_text("second")
    assert database.put_aside(tmp_path, "today").name == "state.db.damaged-today+"
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "state.db.damaged-today": "",
        "state.db.damaged-today-wal": "-wal",
        "state.db.damaged-today-shm": "-shm",
        "state.db.damaged-today+": "second",
    }


def test_a_missing_database_while_networks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "STATE_DIRECTORY", tmp_path / "state")
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path / "run")
    monkeypatch.setattr(names, "NETNS_DIRECTORY", tmp_path / "netns")
    (tmp_path / "netns/nat-a").mkdir(parents=True)
    Store(names.STATE_DIRECTORY).close()
    names.network_directory("uuid-a").mkdir(parents=True)
    Store(names.STATE_DIRECTORY).close()
    for file in names.STATE_DIRECTORY.iterdir():
        file.unlink()
    for _ in range(2):
        with pytest.raises(DamagedError, match="is missing, although networks run: run virt-natns"):
            Store(names.STATE_DIRECTORY)
        with pytest.raises(DamagedError, match="is missing"):
            database.check_there(names.STATE_DIRECTORY)
    # Of another directory nothing can be said.
    Store(tmp_path / "other").close()


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot open the state database"):
        Store(tmp_path / "file")


def test_failed_transaction_changes_nothing(store: Store) -> None:
    store.networks.put(record("a"))

    def fail_halfway() -> None:
        with store.transaction():
            lease(store, "a", FIRST)
            store.networks.set_state("uuid-a", "down")
            raise ConflictError("no")

    with pytest.raises(ConflictError):
        fail_halfway()
    assert store.leases.of("provider", "uuid-a").address is None
    assert [found.state for found in store.networks.all()] == ["up"]


# -- networks ------------------------------------------------------------------


def test_networks_by_state(store: Store) -> None:
    for name, state in (("c", "up"), ("a", "down"), ("b", "starting"), ("d", "preparing")):
        store.networks.put(record(name, state=state))
    assert [found.name for found in store.networks.all()] == ["a", "b", "c", "d"]
    assert [found.name for found in store.networks.all("up", "starting")] == ["b", "c"]


def test_a_user_has_its_document_where_it_may_choose_helpers(store: Store) -> None:
    own = b"<network><nat helpers='ftp'/></network>"
    store.networks.put(record("a", document=own))
    store.networks.put(record("b"))
    assert [user.document for user in store.host.users()] == [own, b""]


@pytest.mark.parametrize("field", ["namespace", "bridge"])
def test_two_networks_cannot_share(store: Store, field: str) -> None:
    store.networks.put(record("a"))
    rival = record("b", **{field: getattr(record("a"), field)})
    with pytest.raises(ConflictError, match=r"network b: .* belongs to a: stop that network"):
        store.networks.put(rival)
    store.networks.put(replace(rival, state="down"))
    store.networks.set_state("uuid-a", "down")
    store.networks.put(rival)
    assert [found.name for found in store.networks.all("up")] == ["b"]


def test_what_a_network_held_before_a_reboot_is_free(
    store: Store, reboot: Callable[[], None]
) -> None:
    store.networks.put(record("a"))
    reboot()
    store.networks.put(record("b", bridge="virbr-a", boot=boot_module.boot_id()))
    assert [found.name for found in store.networks.all("up")] == ["b"]


def test_networks_without_a_lease_are_forgotten(store: Store) -> None:
    """One for each job of a build host, and all of them transient."""
    for number in range(30):
        store.networks.put(record(f"job{number}", state="preparing"))
        assert lease(store, f"job{number}", (FIRST, SECOND)[number % 2])
        store.networks.set_state(f"uuid-job{number}", "down")
    assert sorted(found.name for found in store.networks.all()) == ["job28", "job29"]


# -- turns ---------------------------------------------------------------------


def enter(store: Store, name: str, **changes: object) -> str | None:
    blocker = store.networks.enter_start(record(name, state="starting", **changes))
    return blocker.name if blocker else None


def test_starts_with_one_subnet_go_one_by_one(store: Store) -> None:
    assert enter(store, "a") is None
    assert enter(store, "b") == "a"
    assert store.networks.get("uuid-b") is None
    store.networks.set_state("uuid-a", "up")
    assert enter(store, "b") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"subnets": (IPv4Network("10.0.1.0/24"),)},
        {"taken_over": False},
        {"uuid": "uuid-a", "namespace": "nat-a", "bridge": "virbr-a"},
    ],
)
def test_who_need_not_wait(store: Store, changes: dict[str, object]) -> None:
    assert enter(store, "a") is None
    assert enter(store, "b", **changes) is None


def test_a_start_without_an_end_holds_up_for_so_long(store: Store) -> None:
    for age, waits in ((START_LIMIT - 1, "a"), (START_LIMIT + 1, None)):
        assert enter(store, "a", since=now() - age) is None
        assert enter(store, "b") == waits


def test_a_start_before_the_reboot_holds_nobody_up(
    store: Store, reboot: Callable[[], None]
) -> None:
    assert enter(store, "a") is None
    reboot()
    assert enter(store, "b", boot=boot_module.boot_id()) is None


def _enter_in_turn(job: tuple[Path, int]) -> bool:
    directory, number = job
    store = Store(directory)
    me = record(f"n{number}", state="starting")
    while store.networks.enter_start(me):
        pass
    alone = [found.uuid for found in store.networks.all("starting")] == [me.uuid]
    store.networks.set_state(me.uuid, "up")
    store.close()
    return alone


def test_turns_between_processes(tmp_path: Path) -> None:
    with FORK.Pool(PROCESSES) as pool:
        jobs = [(tmp_path, number) for number in range(40)]
        assert all(pool.map(_enter_in_turn, jobs, chunksize=1))


# -- leases --------------------------------------------------------------------


def test_an_address_has_one_holder(store: Store) -> None:
    store.networks.put(record("a"))
    store.networks.put(record("b"))
    assert lease(store, "a", FIRST)
    assert not lease(store, "b", FIRST)
    assert store.leases.of("provider", "uuid-b").address is None
    holder = store.leases.holder(SEGMENT, FIRST)
    assert holder is not None
    assert holder.name == "a"
    assert lease(store, "a", FIRST), "one's own address can be leased again"


def test_a_network_has_one_address(store: Store) -> None:
    store.networks.put(record("a"))
    assert lease(store, "a", FIRST)
    assert lease(store, "a", SECOND)
    assert store.leases.of("provider", "uuid-a").address == SECOND
    assert store.leases.in_segment(SEGMENT) == {int(SECOND)}


def test_upstreams_on_one_segment_share_its_addresses(store: Store) -> None:
    store.networks.put(record("a"))
    store.networks.put(record("b", upstream="other"))
    assert lease(store, "a", FIRST)
    assert not lease(store, "b", FIRST, "other")
    assert store.leases.reserve("third", "br1", "uuid-b", FIRST), "another segment, another address"


def test_only_resting_networks_lose_their_address(store: Store) -> None:
    for name, address in (("a", FIRST), ("b", SECOND), ("c", THIRD)):
        store.networks.put(record(name))
        lease(store, name, address)
    for name in ("c", "a"):
        store.networks.set_state(f"uuid-{name}", "down")
    assert store.leases.reclaimable(SEGMENT, 4) == [THIRD, FIRST]
    # Used once more, the first one to have stopped is the last one to lose it.
    store.networks.set_state("uuid-c", "up")
    store.networks.set_state("uuid-c", "down")
    assert store.leases.reclaimable(SEGMENT, 4) == [FIRST, THIRD]
    store.networks.put(record("d"))
    assert lease(store, "d", FIRST)
    assert store.leases.of("provider", "uuid-a").address is None


def test_after_a_reboot_those_that_ran_lose_theirs_last(
    store: Store, reboot: Callable[[], None]
) -> None:
    for name, address in (("a", FIRST), ("b", SECOND)):
        store.networks.put(record(name))
        lease(store, name, address)
    store.networks.set_state("uuid-b", "down")
    assert store.leases.reclaimable(SEGMENT, 4) == [SECOND]
    reboot()
    assert store.leases.reclaimable(SEGMENT, 4) == [SECOND, FIRST]
    assert store.leases.of("provider", "uuid-a").address == FIRST
    assert store.leases.holder(SEGMENT, FIRST) is None


def test_lease_of_an_upstream_that_a_network_has_left(store: Store) -> None:
    store.networks.put(record("a"))
    lease(store, "a", FIRST)
    assert store.leases.reclaimable(SEGMENT, 4) == []
    store.networks.put(record("a", upstream="other"))
    assert store.leases.reclaimable(SEGMENT, 4) == [FIRST]
    assert store.leases.of("provider", "uuid-a").address == FIRST


def test_what_guests_keep_goes_with_their_network(store: Store) -> None:
    for name, address in (("a", FIRST), ("b", SECOND)):
        store.networks.put(record(name, state="down"))
        lease(store, name, address)
        store.reservations.reserve(f"uuid-{name}", "m1", "web", [THIRD], lambda _: True)
        store.chosen_ports.put(PortKey("web", f"uuid-{name}", "tcp", "", 22), int(address) % 100)
    store.networks.put(record("c"))
    lease(store, "c", FIRST)
    assert store.networks.get("uuid-a") is None
    assert store.reservations.all("uuid-a") == {}
    assert store.reservations.all("uuid-b") == {"m1": THIRD}
    assert len(store.chosen_ports.all()) == 1


def test_replaced_lease_is_given_back(store: Store) -> None:
    """As long as nobody has it; a guest has one for each NIC that asks."""
    keys = ("guest/m1", "guest/m2", "guest2/m1", "guest")
    for number, key in enumerate(keys):
        assert store.leases.reserve("provider", SEGMENT, key, FIRST + number)
    before = store.leases.all_of("guest")
    assert {each.network for each in before} == {"guest/m1", "guest/m2", "guest"}
    assert store.leases.has("provider", "guest", FIRST)
    assert not store.leases.has("provider", "guest", FIRST + 2)
    for key in keys[:2]:
        assert store.leases.reserve("provider", SEGMENT, key, FIRST + 10 + len(key))
        store.leases.restore(before)
        assert store.leases.all_of("guest") == before
    assert store.leases.reserve("provider", SEGMENT, "guest/m1", FIRST + 20)
    assert store.leases.reserve("provider", SEGMENT, "late", FIRST)
    store.leases.restore(before)
    assert store.leases.of("provider", "guest/m1").address == FIRST + 20
    assert store.leases.of("provider", "late").address == FIRST


def test_address_of_a_guest_whose_lease_is_being_changed(store: Store) -> None:
    """It is the guest's until its claim says otherwise."""
    static = StaticNat("guest", "guest web", "uuid-a", FIRST, THIRD)
    assert store.leases.reserve("provider", SEGMENT, "guest/m1", FIRST)
    store.claims.put(
        Claims("guest", (), (static,)), {"uuid-a": ClaimScope("provider", False)}, published=True
    )
    assert not store.leases.reserve("other", SEGMENT, "uuid-b", FIRST)
    assert store.leases.reserve("provider", SEGMENT, "guest/m1", SECOND)
    assert not store.leases.reserve("provider", SEGMENT, "uuid-b", FIRST)
    assert store.leases.guest_holder("provider", SEGMENT, "uuid-b", FIRST) == "guest web"
    # Another NIC of the guest's own may have it.
    assert store.leases.reserve("provider", SEGMENT, "guest/m2", FIRST)


def test_release(store: Store) -> None:
    store.networks.put(record("a"))
    lease(store, "a", FIRST)
    store.leases.release("provider", "uuid-a", "ipv4")
    assert store.leases.of("provider", "uuid-a").address is None
    assert store.leases.in_segment(SEGMENT) == set()


# -- transit subnets -----------------------------------------------------------

TRANSITS = (IPv4Network("198.19.252.0/22"), IPv4Network("198.19.248.0/22"))


def test_transit_is_chosen_once(store: Store) -> None:
    assert store.transit.subnet("host") is None
    assert store.transit.choose_subnet("host", TRANSITS, None) == TRANSITS[0]
    assert store.transit.choose_subnet("host", TRANSITS[1:], None) == TRANSITS[0]
    assert store.transit.subnet("host") == TRANSITS[0]


def test_transit_is_replaced_with_its_leases(store: Store) -> None:
    store.transit.choose_subnet("host", TRANSITS, None)
    store.networks.put(record("a", upstream="host", state="down"))
    store.leases.reserve("host", "natns-host", "uuid-a", IPv4Address("198.19.252.2"))
    assert store.transit.choose_subnet("host", TRANSITS[1:], TRANSITS[0]) == TRANSITS[1]
    assert store.leases.of("host", "uuid-a").address is None


def test_transit_that_has_come_into_use_stays(store: Store, reboot: Callable[[], None]) -> None:
    store.transit.choose_subnet("host", TRANSITS, None)
    store.networks.put(record("a", upstream="host", state="preparing"))
    assert store.networks.in_use("host")
    assert store.transit.choose_subnet("host", TRANSITS[1:], TRANSITS[0]) == TRANSITS[0]
    reboot()
    assert not store.networks.in_use("host")
    assert store.transit.choose_subnet("host", TRANSITS[1:], TRANSITS[0]) == TRANSITS[1]
