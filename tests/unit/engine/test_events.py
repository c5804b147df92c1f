# SPDX-License-Identifier: LGPL-2.1-or-later
"""Work that a network's start is the occasion for."""

from types import SimpleNamespace
from typing import cast

import pytest

from libvirt_natns.engine import events, network_end
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.guests.guest_engine import Guests
from libvirt_natns.errors import ConflictError
from libvirt_natns.model.network import Network
from libvirt_natns.state.networks import NetworkRecord


def test_a_failure_beside_a_start_is_told_and_fails_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    ended: list[str] = []

    def rejoin(_self: Guests, _network: Network) -> None:
        raise OSError(28, "No space left on device")

    def failed(when: str, error: Exception) -> None:
        told.append(f"{when}: {error}")

    monkeypatch.setattr(Guests, "rejoin", rejoin)
    monkeypatch.setattr(events, "Guests", lambda _engine: Guests.__new__(Guests))
    observer = SimpleNamespace(failed=failed)

    def end_given_up(but: str, *, wait: bool) -> list[NetworkRecord]:
        ended.append(but)
        return []

    engine = cast("Engine", SimpleNamespace(observer=observer, end_given_up=end_given_up))
    network = cast("Network", SimpleNamespace(uuid="a"))
    events._beside(engine, network)
    assert told == ["publishing guests again: [Errno 28] No space left on device"]
    assert ended == ["a"]


def test_a_guest_that_cannot_follow_a_networks_end_holds_no_other_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    rerouted: list[str] = []

    def refresh(_self: Guests, _network: str) -> None:
        raise ConflictError("guest web: no address")

    monkeypatch.setattr(Guests, "refresh", refresh)
    monkeypatch.setattr(Guests, "reroute", lambda _, record: rerouted.append(record.uuid))
    monkeypatch.setattr(network_end, "Guests", lambda _engine: Guests.__new__(Guests))
    observer = SimpleNamespace(failed=lambda when, error: told.append(f"{when}: {error}"))
    network_end.leave(
        cast("Engine", SimpleNamespace(observer=observer)),
        cast("NetworkRecord", SimpleNamespace(uuid="a")),
    )
    assert told == ["withdrawing from a network that has ended: guest web: no address"]
    assert rerouted == ["a"]
