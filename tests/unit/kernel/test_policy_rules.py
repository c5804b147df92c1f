# SPDX-License-Identifier: LGPL-2.1-or-later
"""Policy routing rules, as the kernel tells them."""

import socket
import struct
from ipaddress import ip_address

import pytest

from libvirt_natns.kernel import netlink, policy_rules, rtnetlink
from libvirt_natns.kernel.channel import NetlinkChannel, Sockets
from libvirt_natns.kernel.link_addresses import LinkAddresses
from libvirt_natns.kernel.policy_rules import MARKS, MarkRule, PolicyRules, SourceRule

SOURCE = (netlink.FRA_SRC, bytes([198, 51, 100, 60]))
TABLE = netlink.u32(netlink.FRA_TABLE, 100)
PRIORITY = netlink.u32(netlink.FRA_PRIORITY, 500)
NO_LIMIT = netlink.u32(netlink.FRA_SUPPRESS_PREFIXLEN, 0xFFFFFFFF)


TUNNEL = 12
"""FRA_TUN_ID, in place of any condition that we do not know."""


def message(
    *attributes: netlink.Attribute, length: int = 32, flags: int = 0, action: int = 1, tos: int = 0
) -> bytes:
    header = netlink.RULE_HEADER.pack(socket.AF_INET, 0, length, tos, 100, 0, 0, action, flags)
    return header + netlink.pack(attributes)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Rules of IPv4 of the test's own: making one needs root."""
    bodies: list[bytes] = []

    def dump(_: rtnetlink.Session, kind: int, body: bytes) -> list[bytes]:
        assert kind == netlink.RTM_GETRULE
        return bodies if body[0] == socket.AF_INET else []

    monkeypatch.setattr(rtnetlink.Session, "dump", dump)
    return bodies


def rules() -> PolicyRules:
    return PolicyRules(NetlinkChannel(Sockets(), None))


def test_rules_by_source_get_marks(listed: list[bytes]) -> None:
    listed += [
        message(SOURCE, TABLE, PRIORITY, NO_LIMIT),
        message(SOURCE, netlink.u32(netlink.FRA_TABLE, 1000), length=24),
    ]
    assert rules().by_mark() == [
        (MARKS[0], SourceRule(0, "198.51.100.0/24", 1000)),
        (MARKS[1], SourceRule(500, "198.51.100.60/32", 100)),
    ]


def test_a_kernel_without_ipv6_has_no_rules_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel answers for a family that it lacks."""
    monkeypatch.setitem(policy_rules.SOCKET_FAMILIES, 6, socket.AF_DECnet)
    assert all(rule.network.version == 4 for rule in rules().by_source())
    assert all(rule.family == 4 for rule in rules().marked())


def test_other_rules_are_left_alone(listed: list[bytes]) -> None:
    mark = netlink.u32(netlink.FRA_FWMARK, 0xCA6C)
    listed += [
        message(TABLE, PRIORITY, length=0),
        message(SOURCE, TABLE, flags=netlink.FIB_RULE_INVERT),
        # A rule that refuses packets.
        message(SOURCE, action=7),
        message(SOURCE, TABLE, netlink.u32(netlink.FRA_SUPPRESS_PREFIXLEN, 0)),
        message(SOURCE, TABLE, mark),
        message(SOURCE, TABLE, netlink.text(netlink.FRA_IIFNAME, "eth0")),
        message(SOURCE, TABLE, (netlink.FRA_SPORT_RANGE, struct.pack("=HH", 80, 80))),
        message(SOURCE, TABLE, netlink.u32(netlink.FRA_SUPPRESS_IFGROUP, 7)),
        message(SOURCE, TABLE, (TUNNEL, struct.pack("!Q", 5))),
        message(SOURCE, TABLE, tos=0x10),
    ]
    assert rules().by_source() == []
    assert rules().marked() == set()


def test_of_many_rules_those_of_the_hosts_own_addresses_count(
    listed: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ip_address("198.51.100.60")
    monkeypatch.setattr(LinkAddresses, "beyond_link", lambda _: {own})
    listed += [
        message((netlink.FRA_SRC, bytes([10, 244, 0, number])), TABLE, PRIORITY)
        for number in range(100)
    ]
    assert rules().by_mark() == []
    listed.append(message(SOURCE, TABLE, PRIORITY))
    assert [each.source for _, each in rules().by_mark()] == [f"{own}/32"]


def test_rules_of_our_own(listed: list[bytes]) -> None:
    link = netlink.text(netlink.FRA_IIFNAME, "natns-host")
    mark = netlink.u32(netlink.FRA_FWMARK, MARKS[1])
    listed.append(message(TABLE, PRIORITY, link, mark, length=0))
    assert rules().marked() == {MarkRule(4, 500, "natns-host", MARKS[1], 100)}
