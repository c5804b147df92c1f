# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is read of the kernel's answers: its own words of this very machine."""

import socket
import struct
from ipaddress import IPv4Interface, ip_address
from pathlib import Path

import pytest

from libvirt_natns import rtnetlink


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
        for route in session.routes()
        if route.table == 254 and route.link is not None
    }
    assert found == shown


def test_an_answer_to_an_earlier_question_is_passed_over(session: rtnetlink.Session) -> None:
    first = session.link("lo")
    # A listing of which nobody has read the rest.
    request = struct.pack("=IHHII", 32, rtnetlink.RTM_GETLINK, 0x301, 9999, 0) + bytes(16)
    session._socket.send(request)
    assert session.link("lo") == first
