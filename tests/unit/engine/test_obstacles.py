# SPDX-License-Identifier: LGPL-2.1-or-later
"""One list of what keeps guests from the outside, for all commands."""

import errno
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from libvirt_natns import names
from libvirt_natns.engine import names_health
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.host import record, zone
from libvirt_natns.engine.host.record import HostRecord
from libvirt_natns.engine.host.stops import HostStops, StoppedNetwork
from libvirt_natns.engine.reconcile import comparison, obstacles, ways_out
from libvirt_natns.engine.reconcile.obstacles import Obstacle, Obstacles
from libvirt_natns.errors import FirewallError
from libvirt_natns.kernel.boot_clock import boot_id
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store

GUARD = "stopped by nftables: inet guard forward (policy drop)"


def recorded(uuid: str, kind: str) -> NetworkRecord:
    return NetworkRecord(
        uuid, uuid, f"nat-{uuid}", "virbr1", kind, kind, (), True, "up", boot_id(), 0.0, b""
    )


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """All sources, with something to say of network a."""
    stops = HostStops(("a chain",), {"a": StoppedNetwork(GUARD, sure=True)})
    monkeypatch.setattr(ways_out, "closed", lambda *_: {"a": ("no way out: why",), "b": ()})
    monkeypatch.setattr(comparison, "host_stops", lambda _: stops)
    monkeypatch.setattr(names_health, "findings", lambda _: {"a": "guests have no names: why"})
    monkeypatch.setattr(zone, "notes", list)
    return monkeypatch


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with closing(Store(tmp_path)) as store:
        yield Engine(Config(), store, Kernel())


def find(engine: Engine) -> Obstacles:
    return obstacles.find(engine, [recorded("a", "host"), recorded("b", "bridge")])


def test_the_weightiest_comes_first(sources: pytest.MonkeyPatch, engine: Engine) -> None:
    found = find(engine)
    assert [each.brief for each in found.of("a")] == ["no way out", GUARD, "no names"]
    assert found.of("b") == found.of("unknown") == ()
    assert (found.stops, found.notes) == (("a chain",), ())


def test_a_damaged_network_hears_no_server_anyway(
    sources: pytest.MonkeyPatch, engine: Engine
) -> None:
    found = find(engine)
    assert [each.kind for each in found.of("a", damaged=True)] == ["no way out", "stopped"]


def test_firewalld_stops_networks_of_the_host_alone(
    sources: pytest.MonkeyPatch, engine: Engine
) -> None:
    sources.setattr(zone, "notes", lambda: ["firewalld: it does not know the zone natns"])
    found = find(engine)
    assert Obstacle("stopped", "stopped by firewalld") in found.of("a")
    assert found.of("b") == ()
    assert found.notes[0].startswith("firewalld: ")


def test_a_source_that_fails_is_a_note(sources: pytest.MonkeyPatch, engine: Engine) -> None:
    def fail(_: Engine) -> dict[str, str]:
        raise FirewallError("nft cannot list the rules")

    sources.setattr(names_health, "findings", fail)
    found = find(engine)
    assert [each.kind for each in found.of("a")] == ["no way out", "stopped"]
    assert found.notes == ("nft cannot list the rules",)


# -- a way out that the host has had -------------------------------------------


@pytest.fixture
def way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The link of the host's way out, if any; the host's record is in that directory."""
    links: list[str] = []
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path)
    monkeypatch.setattr(record, "link_towards", lambda _: links[0] if links else None)
    return links


def test_a_way_out_is_noted_while_networks_need_it(way: list[str]) -> None:
    way.append("wlan0")
    record.note_way_out()
    assert not record.had_way_out(), "no network needs it"
    record.save(HostRecord(bridges=["natns-host"]))
    way.clear()
    record.note_way_out()
    assert not record.had_way_out(), "a lab"
    way.append("wlan0")
    record.note_way_out()
    way.clear()
    record.note_way_out()
    assert record.had_way_out(), "lost by now"
    record.save(HostRecord())
    assert not record.had_way_out()
    assert list(names.RUN_DIRECTORY.iterdir()) == []


def test_a_full_disk_stops_nothing_for_the_mark(
    way: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    record.save(HostRecord(bridges=["natns-host"]))
    way.append("wlan0")
    monkeypatch.setattr(Path, "touch", full)
    record.note_way_out()
    assert not record.had_way_out()
