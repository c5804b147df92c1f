# SPDX-License-Identifier: LGPL-2.1-or-later
"""One list of what keeps guests from the outside, for all commands."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from libvirt_natns.engine import names_health
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.host import zone
from libvirt_natns.engine.host.stops import HostStops, StoppedNetwork
from libvirt_natns.engine.reconcile import comparison, obstacles, ways_out
from libvirt_natns.engine.reconcile.obstacles import Obstacle, Obstacles
from libvirt_natns.kernel.boot_clock import boot_id
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store

GUARD = "stopped by nftables: inet guard forward (policy drop)"


def record(uuid: str, kind: str) -> NetworkRecord:
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
    return obstacles.find(engine, [record("a", "host"), record("b", "bridge")])


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
