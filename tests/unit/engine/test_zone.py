# SPDX-License-Identifier: LGPL-2.1-or-later
"""When firewalld is asked about the transit bridges' zone."""

from pathlib import Path

import pytest

from libvirt_natns import names
from libvirt_natns.daemons import firewalld
from libvirt_natns.engine.host import zone
from libvirt_natns.engine.host.record import HostRecord, load, save
from libvirt_natns.firewall import nfnetlink

BRIDGE = "natns-host"


@pytest.fixture
def placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The bridges that a firewalld without a fault was told, with a network that runs."""
    told: list[str] = []

    def place(links: list[str]) -> list[str]:
        told.extend(links)
        return links

    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path)
    monkeypatch.setattr(firewalld, "may_run", lambda: True)
    monkeypatch.setattr(firewalld, "place", place)
    monkeypatch.setattr(firewalld, "withdraw", lambda links: None)
    save(HostRecord(bridges=[BRIDGE]))
    return told


@pytest.mark.parametrize("tables", [{"inet firewalld": 7}, {}], ids=["nftables", "iptables"])
def test_a_start_asks_once(
    tables: dict[str, int], placed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """firewalld has a table, or rules of iptables alone (FirewallBackend=iptables)."""
    monkeypatch.setattr(nfnetlink, "table_numbers", lambda: tables)
    zone.follow([])
    assert placed == [BRIDGE]
    zone.follow([BRIDGE])
    assert placed == [BRIDGE]
    # The host's rules were compared as a whole.
    record = load()
    record.zones_of = ""
    save(record)
    zone.follow([BRIDGE])
    assert placed == [BRIDGE, BRIDGE]


def test_a_firewalld_that_loads_its_rules_is_asked_again(
    placed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (7, 9):
        monkeypatch.setattr(nfnetlink, "table_numbers", lambda n=number: {"inet firewalld": n})
        zone.follow([BRIDGE])
    assert placed == [BRIDGE, BRIDGE]
