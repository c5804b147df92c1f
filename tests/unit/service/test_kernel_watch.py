# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which events are damage, and whose turn an audit is."""

import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, cast

import pytest

from libvirt_natns import names
from libvirt_natns.engine.observer import HOST
from libvirt_natns.errors import KernelError
from libvirt_natns.service import audit, kernel_watch, legacy_tables
from libvirt_natns.service.audit import Audit
from libvirt_natns.service.kernel_watch import Bell, KernelWatch
from libvirt_natns.service.legacy_tables import LegacyTables
from libvirt_natns.service.own_changes import OwnChanges
from libvirt_natns.service.watched import Watched
from libvirt_natns.state.networks import NetworkRecord

LIMIT = 10.0


@pytest.fixture
def suspected() -> list[str]:
    return []


@pytest.fixture
def own(suspected: list[str]) -> OwnChanges:
    return OwnChanges(suspected.append, lambda: None)


def test_events_during_our_own_changes_are_kept_until_their_end(
    own: OwnChanges, suspected: list[str]
) -> None:
    with own.changing("a"), own.changing("a"):
        own.heard("a")
        own.heard("b")
        own.heard(None)
    assert suspected == ["b"]
    # Until the thread has read all events, they are taken for ours.
    own.heard("a")
    assert own.is_going_on("a")
    assert own.take_ended() == ["a", "a"]
    assert own.take_ended() == []
    assert [own.finish("a"), own.finish("a")] == [False, True]
    assert own.was_overheard("a")
    assert not own.was_overheard("a")
    own.heard("a")
    assert suspected == ["b", "a"]


def test_our_own_changes_of_the_hosts_rules_are_no_news(
    own: OwnChanges, suspected: list[str]
) -> None:
    with own.changing(HOST):
        own.heard(HOST)
        assert not own.was_overheard(HOST)
        own.heard_of_host()
        assert own.was_overheard(HOST)
    assert suspected == []
    own.finish(HOST)
    own.heard_of_host()
    assert suspected == [HOST]


def test_changes_are_settled_when_their_ends_are_attended_to(own: OwnChanges) -> None:
    assert own.settled(0)
    with own.changing("a"):
        assert own.settled(0)
    assert not own.settled(0)
    own.note_attended()
    assert own.settled(0)


def test_a_bell_rings_until_it_is_closed() -> None:
    open_before = descriptors()
    bell = Bell()
    assert not is_readable(bell)
    bell.ring()
    assert is_readable(bell)
    bell.clear()
    bell.clear()
    assert not is_readable(bell)
    bell.close()
    # A change of ours may end after the watch.
    bell.ring()
    assert descriptors() == open_before


def is_readable(bell: Bell) -> bool:
    return bool(select.select([bell], [], [], 0)[0])


def test_a_stopped_watch_leaves_no_descriptor_open() -> None:
    open_before = descriptors()
    watch = KernelWatch(lambda uuid: None, lambda uuid: None)
    assert descriptors() != open_before
    watch.stop()
    assert descriptors() == open_before


def descriptors() -> set[str]:
    """Return the descriptors that this process has open, apart from that of the look itself."""
    return {entry.name for entry in Path("/proc/self/fd").iterdir() if entry.exists()}


def test_an_audit_takes_turns() -> None:
    turns = Audit()
    assert turns.take(100.0, []) is None
    assert turns.due == 0.0
    # The networks have just come up.
    assert turns.take(100.0, ["a", "b"]) is None
    pause = audit.ROUND / 3
    assert turns.due == 100.0 + pause
    assert turns.take(100.0 + pause / 2, ["a", "b"]) is None
    taken = [turns.take(100.0 + pause * number, ["a", "b"]) for number in range(1, 6)]
    assert taken == [HOST, "a", "b", HOST, "a"]
    # "b" went down before its turn.
    assert turns.take(100.0 + pause * 6, ["a", "c"]) is None
    assert turns.take(100.0 + pause * 7, ["a", "c"]) == HOST


def test_an_audit_of_many_networks_costs_little() -> None:
    turns = Audit()
    many = [str(number) for number in range(10_000)]
    turns.take(100.0, many)
    assert turns.due == 100.0 + audit.PAUSE


# -- errors of the thread ------------------------------------------------------


class Deaf:
    """The monitors, in which nothing happens by itself; they fail with the errors in ``broken``."""

    broken: ClassVar[list[Exception]] = []

    tell: ClassVar[list[Callable[[str], None]]] = []

    def __init__(self, *given: object) -> None:
        self.tell[:] = cast("list[Callable[[str], None]]", given[3:])

    def nsid(self, path: str) -> None:
        return None

    def descriptors(self) -> list[int]:
        return []

    def read_all(self) -> None:
        if self.broken:
            raise self.broken.pop()

    def close(self) -> None:
        pass


NOT_TEXT = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")


class Watch:
    """A watch without the kernel, and all that it tells."""

    def __init__(self) -> None:
        self.suspected: list[str] = []
        self.faults: list[Exception] = []
        self.broken: dict[str, Exception] = {}
        self.newcomers: list[str] = []
        self.kernel = KernelWatch(
            self._describe, self.suspected.append, self._appeared, self.faults.append
        )

    def _describe(self, uuid: str) -> Watched:
        if uuid in self.broken:
            raise self.broken[uuid]
        return Watched(uuid, f"nat-{uuid}", f"virbr-{uuid}", ())

    def _appeared(self, namespace: str) -> None:
        self.newcomers.append(namespace)
        raise self.broken[namespace]

    def follow(self, *uuids: str) -> None:
        """Have the thread follow networks, which takes a living thread."""
        self.kernel.follow(uuids)
        assert self.kernel.settled(LIMIT)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    monkeypatch.setattr(kernel_watch, "NamespaceMonitor", Deaf)
    monkeypatch.setattr(kernel_watch, "KernelEvents", Deaf)
    monkeypatch.setattr(Deaf, "broken", [])
    for name in ("TICK", "TICK_LEAST", "ONCE_MORE", "FAULT_PAUSE"):
        monkeypatch.setattr(kernel_watch, name, 0.01)
    made = Watch()
    made.kernel.start()
    yield made
    made.kernel.stop()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.002)


@pytest.mark.parametrize("error", [NOT_TEXT, OSError(24, "too many"), KernelError("x"), KeyError()])
def test_a_network_that_cannot_be_read_ends_no_watch(error: Exception, watch: Watch) -> None:
    watch.broken["a"] = error
    watch.follow("a", "b")
    assert watch.kernel.follows("b")
    assert not watch.kernel.follows("a")
    del watch.broken["a"]
    until(lambda: watch.kernel.follows("a"))
    expected = isinstance(error, KernelError | OSError)
    assert watch.faults == ([] if expected else [error])


@pytest.mark.parametrize("error", [NOT_TEXT, OSError(24, "too many files are open")])
def test_events_that_cannot_be_read_end_no_watch(error: Exception, watch: Watch) -> None:
    watch.follow("a", "b")
    watch.suspected.clear()
    # The thread reads the events of the next change, and the end of that change is not lost.
    Deaf.broken.append(error)
    watch.follow("c")
    until(lambda: {HOST, "a", "b"} <= set(watch.suspected))
    until(lambda: watch.kernel.follows("c"))
    assert watch.faults == [error]


@pytest.mark.parametrize("error", [NOT_TEXT, OSError(24, "too many"), KernelError("x")])
def test_tables_that_cannot_be_listed_end_no_watch(
    error: Exception, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(LegacyTables, "accept_host", fail)
        broken.setattr(LegacyTables, "altered", fail)
        broken.setattr(LegacyTables, "has_host", True)
        watch.follow("a")
        watch.follow(HOST)
        watch.follow("b")
        assert watch.kernel.follows("b")
    # Perhaps the tables were altered in between.
    until(lambda: HOST in watch.suspected)
    watch.follow("c")
    assert watch.kernel.follows("c")
    assert watch.faults.count(error) == len(watch.faults)


def test_a_namespace_that_cannot_be_looked_up_ends_no_watch(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch.broken["nat-x"] = NOT_TEXT
    watch.follow("a")
    Deaf.tell[0]("nat-x")
    watch.follow("a")
    until(lambda: watch.newcomers)
    until(lambda: watch.faults == [NOT_TEXT])
    watch.follow("b")
    assert watch.kernel.follows("b")


class Tables:
    """Tables that are altered, unless there is an error."""

    broken: ClassVar[dict[str | None, Exception]] = {}

    def __init__(self, namespace: str | None) -> None:
        self._namespace = namespace

    def is_altered(self) -> bool:
        if self._namespace in self.broken:
            raise self.broken[self._namespace]
        return True


def test_a_host_that_cannot_be_listed_hides_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy_tables, "RuleTables", Tables)
    monkeypatch.setattr(Tables, "broken", {None: OSError(24, "too many files are open")})
    tables = LegacyTables()
    tables.open("a", "nat-a")
    found = []
    with pytest.raises(OSError, match="too many"):
        for uuid in tables.altered():
            found.append(uuid)
    assert found == ["a"]
    Tables.broken.clear()
    assert list(tables.altered()) == ["a", HOST]


def test_a_damaged_note_of_the_backend_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path)
    note = names.network_directory("a") / "firewall"
    note.parent.mkdir(parents=True)
    record = cast(
        NetworkRecord, SimpleNamespace(uuid="a", namespace="nat-a", bridge="virbr10", router=None)
    )
    for text, backend in (
        (b"nftables 1", "nftables"),
        (b"\xff\xfe", "\N{REPLACEMENT CHARACTER}" * 2),
    ):
        note.write_bytes(text)
        assert Watched.of(record).firewall == backend
