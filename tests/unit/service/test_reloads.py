# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reloads of the whole ruleset, and programs that remove our rules alone."""

import pytest

from libvirt_natns.firewall import nfnetlink
from libvirt_natns.service.reloads import Reloads

OURS = ["nftables: table inet natns is missing"]
LEGACY = [
    "iptables: chain NATNS-DNAT in table nat is missing",
    "iptables: PREROUTING in table nat lacks our jump at its end",
]
ALTERED = ["iptables: chain NATNS-DNAT in table nat was altered"]
SYSCTL = ["net/ipv4/conf/wlan0/forwarding is 0"]


@pytest.mark.parametrize(
    ("before", "after", "differences", "undone"),
    [
        ({"inet natns": 1, "inet filter": 2}, {"inet filter": 2}, OURS, OURS),
        ({"inet natns": 1, "inet filter": 2}, {"inet filter": 5}, OURS, None),
        ({"inet natns": 1, "inet filter": 2}, {}, OURS, None),
        ({"inet natns": 1, "inet filter": 2}, {}, [*SYSCTL, *OURS], SYSCTL),
        ({"inet natns": 1}, {}, OURS, []),
        ({}, {}, SYSCTL, SYSCTL),
        ({"ip nat": 1}, {"ip nat": 1}, LEGACY, []),
        ({"ip nat": 1}, {"ip nat": 1}, ALTERED, ALTERED),
    ],
)
def test_what_may_be_a_fight(
    before: dict[str, int],
    after: dict[str, int],
    differences: list[str],
    undone: list[str] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reloads = Reloads()
    monkeypatch.setattr(nfnetlink, "table_numbers", lambda: before)
    reloads.look()
    monkeypatch.setattr(nfnetlink, "table_numbers", lambda: after)
    assert reloads.undone(differences) == undone
