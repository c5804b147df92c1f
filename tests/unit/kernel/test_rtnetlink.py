# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is read of the kernel's answers: its own words of this very machine."""

import socket
import struct
from ipaddress import IPv4Interface, ip_address
from pathlib import Path

import pytest

from libvirt_natns.kernel import netlink, rtnetlink

IF_INET6 = Path("/proc/net/if_inet6")
IPV6_ROUTE = Path("/proc/net/ipv6_route")
RTF_CACHE = 0x01000000


@pytest.fixture
def session() -> rtnetlink.Session:
    return rtnetlink.Session()


def test_the_loopback_interface(session: rtnetlink.Session) -> None:
    link = session.link("lo")
    assert link is not None
    assert (link.index, link.name, link.master, link.peer) == (1, "lo", None, None)
    assert link.mac == "00:00:00:00:00:00"
    assert link.mtu == int(Path("/sys/class/net/lo/mtu").read_text())
    assert link.up == bool(int(Path("/sys/class/net/lo/flags").read_text(), 16) & 1)
    assert link in session.links()
    assert {link.name for link in session.links()} == {name for _, name in socket.if_nameindex()}
    if link.up:
        loopback = rtnetlink.LinkAddress(1, IPv4Interface("127.0.0.1/8"))
        assert loopback in session.addresses()


def test_addresses_of_ipv6_as_the_kernel_shows_them_to_all(session: rtnetlink.Session) -> None:
    shown = set()
    for line in IF_INET6.read_text().splitlines() if IF_INET6.exists() else []:
        address, index, length, *_ = line.split()
        shown.add((int(index, 16), bytes.fromhex(address), int(length, 16)))
    found = {
        (each.link, each.interface.packed, each.interface.network.prefixlen)
        for each in session.addresses()
        if each.interface.version == 6
    }
    assert found == shown


@pytest.mark.parametrize("name", ["", "no-such-link", "longer than fifteen characters"])
def test_links_that_are_not_there(name: str, session: rtnetlink.Session) -> None:
    assert session.link(name) is None


def test_routes_as_the_kernel_shows_them_to_all(session: rtnetlink.Session) -> None:
    lines = Path("/proc/net/route").read_text().splitlines()[1:]
    shown = set()
    for name, destination, gateway, *_, mask, _, _, _ in map(str.split, lines):
        length = bin(int(mask, 16)).count("1")
        shown.add((name, bytes.fromhex(destination)[::-1], length, bytes.fromhex(gateway)[::-1]))
    found = {
        (
            socket.if_indextoname(route.link),
            route.destination.network_address.packed,
            route.destination.prefixlen,
            (route.gateway or ip_address("0.0.0.0")).packed,
        )
        for route in session.routes(4)
        if route.table == 254 and route.link is not None
    }
    assert found == shown


def test_routes_of_ipv6_as_the_kernel_shows_them_to_all(session: rtnetlink.Session) -> None:
    shown = set()
    for line in IPV6_ROUTE.read_text().splitlines() if IPV6_ROUTE.exists() else []:
        destination, length, _, _, gateway, metric, _, _, flags, link = line.split()
        there = bytes.fromhex(destination), int(length, 16)
        # What is led nowhere is led to lo here, and what the kernel notes of a path is left out.
        if link != "lo" and not int(flags, 16) & RTF_CACHE:
            shown.add((link, *there, bytes.fromhex(gateway), int(metric, 16)))
    found = {
        (
            socket.if_indextoname(route.link),
            route.destination.network_address.packed,
            route.destination.prefixlen,
            (route.gateway or ip_address("::")).packed,
            route.priority or 0,
        )
        for route in session.routes(6)
        if route.link is not None and socket.if_indextoname(route.link) != "lo"
    }
    assert found == shown
    both = session.routes()
    assert both == [*session.routes(4), *session.routes(6)]


def test_an_answer_to_an_earlier_question_is_passed_over(session: rtnetlink.Session) -> None:
    first = session.link("lo")
    # A listing of which nobody has read the rest.
    request = struct.pack("=IHHII", 32, netlink.RTM_GETLINK, 0x301, 9999, 0) + bytes(16)
    session._socket.send(request)
    assert session.link("lo") == first


def test_all_ways_of_a_route() -> None:
    """By one router, by several, by one of the other family, and by none."""

    def hops(*attributes: netlink.Attribute) -> list[tuple[int, str]]:
        found = rtnetlink.hops(netlink.Attrs.parse(netlink.pack(attributes)))
        return [(hop.link, str(hop.gateway)) for hop in found]

    def hop(link: int, *attributes: netlink.Attribute) -> bytes:
        packed = netlink.pack(attributes)
        return netlink.ROUTE_HOP.pack(netlink.ROUTE_HOP.size + len(packed), link) + packed

    by = (netlink.RTA_GATEWAY, ip_address("192.0.2.1").packed)
    other = (netlink.RTA_VIA, struct.pack("=H", socket.AF_INET6) + ip_address("fe80::1").packed)
    link = netlink.u32(netlink.RTA_OIF, 5)
    assert hops(link, by) == [(5, "192.0.2.1")]
    assert hops(link, other) == [(5, "fe80::1")]
    assert hops(link) == [(5, "None")]
    assert hops() == []
    several = hop(6, by) + hop(7, other) + hop(8)
    assert hops((netlink.RTA_MULTIPATH, several)) == [(6, "192.0.2.1"), (7, "fe80::1"), (8, "None")]
    # Cut short.
    assert hops((netlink.RTA_MULTIPATH, several + bytes(8))) == hops((9, several))
