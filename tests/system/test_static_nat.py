# SPDX-License-Identifier: LGPL-2.1-or-later
"""Upstream addresses that belong to one guest, in both directions."""

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from lab import ECHO_PORT, FastGuest, Node, Provider, isolated, run, virsh, write_config
from lab_domains import (
    asked,
    create,
    define,
    destroy,
    domain,
    networks,
    nic,
    ports,
    provider_world,
    refusal,
    start,
    upstream,
)
from packets import sctp_init

from libvirt_natns.kernel.netns import entered

MAC, MAIL, THIRD = "52:54:00:00:00:05", "52:54:00:00:00:06", "52:54:00:00:00:07"
A, GIVEN, CLIENT = "192.168.0.150", "192.168.0.180", "192.168.0.77"
ROUTER = "192.168.0.1"
POOL = "192.168.0.150-192.168.0.155"
RAW = socket.SOCK_RAW
STRANGE = {
    47: struct.pack("!HHHHI", 0x2001, 0x880B, 4, 7, 1) + bytes(4),  # GRE, as of PPTP
    132: sctp_init(5000, 2222),
    136: struct.pack("!HHHH", 5000, 53, 8, 0),  # UDP-Lite
    112: b"VRRP or so",
}
AUTO = '<natns:address address="auto"/>'
LIMITED = (
    f'<natns:address address="{GIVEN}"><natns:allow start="25"/>'
    '<natns:allow proto="udp" start="5000" end="5010"/></natns:address>'
)

pytestmark = pytest.mark.usefixtures("installed")


@dataclass
class World:
    """web has an address from the pool, mail a given one, plain none."""

    provider: Provider
    client: Node
    web: FastGuest
    mail: FastGuest
    plain: FastGuest


@pytest.fixture(scope="module", params=["nftables", "iptables"])
def world(request: pytest.FixtureRequest, installed: None) -> Iterator[World]:
    with provider_world(request.param) as provider, ExitStack() as cleanup:
        write_config(provider.config(firewall=request.param, pool=POOL, more="probe = 0"))
        cleanup.enter_context(networks(isolated("a", "virbr10", metadata=upstream(A))))
        cleanup.callback(destroy, "web", "mail")
        create(domain("web", nic("a", MAC), publishes=AUTO + ports("start='2222' to='22'")))
        create(domain("mail", nic("a", MAIL), publishes=LIMITED))
        guests = []
        for name, mac in (("web", MAC), ("mail", MAIL), ("plain", THIRD)):
            guest = cleanup.enter_context(FastGuest("virbr10", mac, name))
            guest.dhcp()
            for port in (22, 25, 5005, 5011):
                guest.serve("tcp", port)
                guest.serve("udp", port)
            guests.append(guest)
        client = provider.neighbour("client", f"{CLIENT}/24")
        client.serve("tcp", 2222)
        yield World(provider, client, *guests)


def address_of(guest: FastGuest) -> str:
    """The address with which a guest leaves, as the provider's router sees it."""
    return asked(guest.name, "tcp", ROUTER, ECHO_PORT) or ""


def test_outbound_leaves_with_it(world: World) -> None:
    assert address_of(world.web) == "192.168.0.151"
    assert asked("web", "udp", ROUTER, ECHO_PORT) == "192.168.0.151"
    assert address_of(world.mail) == GIVEN
    assert address_of(world.plain) == A


def test_everything_comes_in_by_it(world: World) -> None:
    own = address_of(world.web)
    for port in (22, 5005):
        assert asked("client", "tcp", own, port) == CLIENT
        assert asked("client", "udp", own, port) == CLIENT
    assert world.client.ping(own)
    assert asked(None, "tcp", own, 22) == "192.168.0.2"
    # Published ports stay where they are; the network's address has no others.
    assert asked("client", "tcp", A, 2222) == CLIENT
    assert asked("client", "tcp", A, 22, timeout=0.5) is None


def test_only_some_ports_come_in(world: World) -> None:
    assert asked("client", "tcp", GIVEN, 25) == CLIENT
    assert asked("client", "udp", GIVEN, 5005) == CLIENT
    for proto, port in (("tcp", 22), ("tcp", 5005), ("udp", 25), ("udp", 5011)):
        assert asked("client", proto, GIVEN, port, timeout=0.5) is None  # type: ignore[arg-type]


def test_guests_reach_each_others(world: World) -> None:
    """And their own; the service sees that they are guests of its network."""
    own = address_of(world.web)
    assert asked("mail", "tcp", own, 22)
    assert asked("plain", "udp", own, 22)
    assert asked("web", "tcp", own, 22)
    assert asked("web", "tcp", GIVEN, 25)
    assert asked("web", "tcp", CLIENT, 2222) == own


def test_conflicts(world: World) -> None:
    own = address_of(world.web)
    for wanted in (own, GIVEN, A, ROUTER, "10.1.2.3", "192.168.0.2"):
        asking = f'<natns:address address="{wanted}"/>'
        said = refusal(domain("late", nic("a", THIRD), publishes=asking))
        assert said.startswith("guest late: "), wanted
        assert wanted in said
    said = refusal(domain("late", nic("a", THIRD), publishes=f'<natns:address address="{GIVEN}"/>'))
    assert "guest mail" in said
    # Nor is it given to a network, asked for or not.
    with pytest.raises(Exception, match=f"{GIVEN} of upstream provider belongs to guest mail: "):
        with networks(isolated("b", "virbr11", metadata=upstream(GIVEN))):
            pass
    with networks(isolated("b", "virbr11")):
        words = run("ip", "-o", "-4", "-n", "nat-b", "address", "show", "upstream").stdout
        assert words.split()[3].partition("/")[0] not in (A, own, GIVEN)
    assert address_of(world.mail) == GIVEN
    assert asked("client", "tcp", own, 22) == CLIENT


def test_sticky_and_cut_at_the_end(world: World) -> None:
    """The same after a restart; connections of either direction end with the guest."""
    define(domain("brief", nic("a", THIRD), publishes=AUTO))
    try:
        start("brief")
        own = address_of(world.plain)
        assert own not in (A, GIVEN, address_of(world.web))
        with (
            world.client.connect(own, 22) as inward,
            world.plain.connect(ROUTER, ECHO_PORT) as outward,
            world.client.connect(address_of(world.web), 22) as others,
        ):
            for stream in (inward, outward, others):
                stream.settimeout(0.7)
                assert stream.recv(100)
            # A neighbour's packets of protocols with and without ports, ahead of all others.
            for protocol, data in STRANGE.items():
                with entered("client"), socket.socket(socket.AF_INET, RAW, protocol) as raw:
                    raw.sendto(data, (own, 0))
            assert "gre " in tracked(own)
            virsh("destroy", "brief")
            assert tracked(own) == ""
            assert not carries(inward)
            assert not carries(outward)
            assert carries(others)
        assert asked("client", "tcp", own, 22, timeout=0.5) is None
        assert address_of(world.plain) == A
        start("brief")
        assert address_of(world.plain) == own
        virsh("destroy", "brief")
    finally:
        virsh("destroy", "brief", check=False)
        virsh("undefine", "brief")


def tracked(address: str) -> str:
    """The tracked flows that began towards an address, or whose answers go there."""
    lines = run("conntrack", "-L", namespace="nat-a").stdout.splitlines()
    return "\n".join(line for line in lines if f"dst={address} " in line)


def carries(stream: socket.socket) -> bool:
    try:
        stream.sendall(b"still there?")
        return stream.recv(100) == b"still there?"
    except OSError:
        return False
