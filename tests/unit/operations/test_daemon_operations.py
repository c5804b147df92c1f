# SPDX-License-Identifier: LGPL-2.1-or-later
"""Daemons as a plan has them, where something beside the daemon fails."""

from types import SimpleNamespace
from typing import cast

import pytest

from libvirt_natns.daemons import dnsmasq, guest_leases
from libvirt_natns.daemons.dnsmasq import Daemon
from libvirt_natns.daemons.dnsmasq_files import Files
from libvirt_natns.errors import DnsmasqError
from libvirt_natns.operations.daemon_operations import Dnsmasq
from libvirt_natns.operations.operation import ApplyContext
from libvirt_natns.operations.undo import Undo

OPERATION = Dnsmasq(Daemon("u", "nat-a", "virbr10", Files("x\n")))


def note_events(monkeypatch: pytest.MonkeyPatch, leases: list[str], broken: str = "") -> list[str]:
    """Have a lease helper that fails for the MAC address ``broken``; return a list of events."""
    events: list[str] = []

    def forget(_bridge: str, mac: str, _address: object) -> None:
        events.append(f"forgets {mac}")
        if mac == broken:
            raise DnsmasqError("cannot end the lease", mac)

    monkeypatch.setattr(guest_leases, "squatted", lambda _: [(mac, None) for mac in leases])
    monkeypatch.setattr(guest_leases, "forget", forget)
    monkeypatch.setattr(dnsmasq, "running", lambda *_: 7)
    monkeypatch.setattr(dnsmasq, "stop", lambda _: events.append("stops"))
    monkeypatch.setattr(dnsmasq, "ensure", lambda *_: events.append("starts"))
    return events


def context(*, starting: bool) -> ApplyContext:
    return cast(
        "ApplyContext",
        SimpleNamespace(starting=starting, done=[], later=None, undo=Undo(), kernel=None),
    )


@pytest.mark.parametrize("starting", [True, False])
def test_dnsmasq_runs_although_the_lease_helper_fails(
    monkeypatch: pytest.MonkeyPatch, starting: bool
) -> None:
    events = note_events(monkeypatch, ["first", "second"], broken="first")
    with pytest.raises(DnsmasqError, match="first"):
        OPERATION.ensure(context(starting=starting))
    assert events == ["stops", "forgets first", "forgets second", "starts"]


def test_dnsmasq_is_not_stopped_without_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    events = note_events(monkeypatch, [])
    OPERATION.ensure(context(starting=False))
    assert events == ["starts"]
