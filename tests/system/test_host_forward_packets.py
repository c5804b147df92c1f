# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports published on the host's own addresses (upstreams of kind "host"), by real packets.

The host has 192.168.0.2 on br0 and routes a transit bridge, 192.168.150.0/24, that
carries two networks of one subnet.  Foreign chains drop what they do not know,
and each backend is tried with and without bridged frames in iptables.

    guest-t 10.0.0.5, guest-v .6     guest-u 10.0.0.5
               | virbr20                | virbr21
             nat-t .2                 nat-u .3 ------- natns-host .1, the host, br0
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

import pytest
from packets import (
    DATAGRAM,
    FAR,
    FOREIGN,
    GATEWAY,
    GUEST,
    KINDS,
    NEIGHBOUR,
    QUIET,
    SERVER,
    STREAM,
    Capture,
    again,
    answering,
    asked,
    closed,
    forward,
    harden,
    in_node,
    inject,
    ip_packet,
    mac,
    node,
    opened,
    patch,
    sh,
    silent,
    small_world,
    state,
    tcp,
    udp,
)

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[2]))

from libvirt_natns.firewall import backends, host_firewall
from libvirt_natns.firewall.host_policy import HostForward, HostPolicy, Private, Transit
from libvirt_natns.firewall.namespace_policy import Policy
from libvirt_natns.firewall.namespace_rules import ruleset
from libvirt_natns.model.publication import PortProtocol

HOST = "192.168.0.2"
SECOND = "192.168.0.3"
"""Another address of the host, on br0."""
BRIDGE = "natns-host"
TRANSIT = "192.168.150.1"
NAT_T, NAT_U = "192.168.150.2", "192.168.150.3"
BRIDGE_NF = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    with small_world() as stack:
        for address in (HOST, SECOND):
            sh(f"ip address add {address}/24 dev br0")
        sh(f"ip route add default via {SERVER}; sysctl -qw net.ipv4.ip_forward=1")
        sh(f"ip link add {BRIDGE} type bridge; ip link set {BRIDGE} up")
        sh(f"ip address add {TRANSIT}/24 dev {BRIDGE}")
        sh(f"sysctl -qw net.ipv4.conf.{BRIDGE}.route_localnet=1")
        for letter, number, address in (("t", 20, NAT_T), ("u", 21, NAT_U)):
            network(stack, letter, f"virbr{number}", address)
        guest(stack, "v", "virbr20", "10.0.0.6")
        for drop in ("iptables-nft", "iptables-legacy"):
            sh(FOREIGN[drop])
        for table in ("nat", "raw", "mangle"):
            # A legacy table once used stays for good: have them before.
            sh(f"iptables-legacy -t {table} -S")
        yield


def network(stack: ExitStack, letter: str, bridge: str, address: str) -> None:
    sh(f"ip link add {bridge} type bridge; ip link set {bridge} up")
    node(stack, f"nat-{letter}")
    patch(bridge, f"p-in-{letter}", f"nat-{letter}", bridge, f"{GATEWAY}/24")
    patch(BRIDGE, f"p-up-{letter}", f"nat-{letter}", "upstream", f"{address}/24")
    # What iptables sends back to where it came from, the bridge does by itself.
    sh(f"bridge link set dev p-up-{letter} hairpin on")
    in_node(f"nat-{letter}", f"ip route add default via {TRANSIT}")
    harden(f"nat-{letter}")
    guest(stack, letter, bridge, GUEST)


def guest(stack: ExitStack, letter: str, bridge: str, address: str) -> None:
    node(stack, f"guest-{letter}")
    patch(bridge, f"p-{letter}", f"guest-{letter}", "eth0", f"{address}/24")
    in_node(f"guest-{letter}", f"ip route add default via {GATEWAY}")


POLICY = Policy(
    inner="virbr20",
    upstream="upstream",
    subnets=(IPv4Network("10.0.0.0/24"),),
    gateways=(IPv4Address(GATEWAY),),
    address=IPv4Address(NAT_T),
    segments=(IPv4Network("192.168.150.0/24"),),
    transit=(IPv4Interface(f"{TRANSIT}/24"),),
    forwards=(
        forward("tcp", "2222", "22", address=NAT_T),
        forward("udp", "2222", "22", address=NAT_T),
        forward("tcp", "3000-3002", "22", address=NAT_T),
        forward("tcp", "8000-8002", "", address=NAT_T),
        forward("udp", "9000-9002", "7000-7002", address=NAT_T),
    ),
)
TWIN = replace(
    POLICY,
    inner="virbr21",
    address=IPv4Address(NAT_U),
    forwards=(forward("tcp", "2223", "22", address=NAT_U),),
)


def published(
    proto: PortProtocol, first: int, last: int, address: str = "", *sources: str, at: str = NAT_T
) -> HostForward:
    return HostForward(
        proto,
        IPv4Address(address) if address else None,
        first,
        last,
        IPv4Address(at),
        BRIDGE,
        tuple(map(IPv4Network, sources)),
    )


HOST_POLICY = HostPolicy(
    transits=(Transit(BRIDGE, IPv4Network("192.168.150.0/24")),),
    private=(Private("virbr20"), Private("virbr21")),
    forwards=(
        published("tcp", 2222, 2222),
        published("udp", 2222, 2222),
        published("tcp", 2223, 2223, at=NAT_U),
        published("tcp", 3000, 3000, "", f"{NEIGHBOUR}/32", f"{NAT_U}/32"),
        published("tcp", 3001, 3001, SECOND),
        published("tcp", 3002, 3002, "127.0.0.1"),
        published("tcp", 8000, 8002),
        published("udp", 9000, 9002, SECOND),
    ),
)


@dataclass(frozen=True)
class Chosen:
    """A backend and the host's policy, both in force."""

    name: str
    policy: HostPolicy


@pytest.fixture(
    scope="module",
    params=["nftables", "iptables", "nftables-bridge-nf", "iptables-bridge-nf"],
)
def chosen(request: pytest.FixtureRequest, world: None) -> Iterator[Chosen]:
    name, bridge_nf = request.param.split("-")[0], "bridge-nf" in request.param
    if BRIDGE_NF.exists():
        BRIDGE_NF.write_text(f"{bridge_nf:d}")
    elif bridge_nf:
        pytest.skip("this kernel has no br_netfilter")
    policy = replace(HOST_POLICY, bridge_nf=bridge_nf)
    nat = backends.named(name)
    nat.apply("nat-t", ruleset(POLICY))
    nat.apply("nat-u", ruleset(TWIN))
    before = state()
    host_firewall.ensure(policy, name)
    assert host_firewall.differences(policy, name) == ()
    with answering("guest-t", "guest-u", "server"), answering(None, ports=(22, 5353)):
        yield Chosen(name, policy)
    host_firewall.remove()
    assert state() == before
    for space in ("nat-t", "nat-u"):
        nat.clear(space)


def test_from_outside(chosen: Chosen) -> None:
    for kind in KINDS:
        for client, seen in (("neighbour", NEIGHBOUR), ("far", FAR)):
            for address in (HOST, SECOND):
                assert asked(client, address, 2222, kind) == f"guest-t:22 saw {seen}"
    # The twin has the same private address.
    assert asked("neighbour", HOST, 2223, STREAM) == f"guest-u:22 saw {NEIGHBOUR}"


def test_from_the_host_itself(chosen: Chosen) -> None:
    for kind in KINDS:
        for address in (HOST, SECOND, TRANSIT):
            # The second one is what the kernel calls a secondary address.
            seen = HOST if address == SECOND else address
            assert asked(None, address, 2222, kind) == f"guest-t:22 saw {seen}"
        for address in ("127.0.0.1", "127.0.0.5"):
            assert asked(None, address, 2222, kind) == f"guest-t:22 saw {TRANSIT}"
    assert asked(None, "127.0.0.1", 2223, STREAM) == f"guest-u:22 saw {TRANSIT}"


@pytest.mark.parametrize("client", ["guest-u", "guest-v", "guest-t"])
def test_from_guests(chosen: Chosen, client: str) -> None:
    """Of the twin network, a sibling, and the guest itself."""
    for kind in KINDS:
        for address in (HOST, TRANSIT):
            assert asked(client, address, 2222, kind) == f"guest-t:22 saw {TRANSIT}"
    assert asked(client, HOST, 2223, STREAM) == f"guest-u:22 saw {TRANSIT}"


def test_ranges(chosen: Chosen) -> None:
    for port in (8000, 8002):
        assert asked("neighbour", HOST, port, STREAM) == f"guest-t:{port} saw {NEIGHBOUR}"
    for port in (9000, 9002):
        asked_of = f"guest-t:{port - 2000} saw {NEIGHBOUR}"
        assert asked("neighbour", SECOND, port, DATAGRAM) == asked_of


def test_an_address_that_comes_later(chosen: Chosen) -> None:
    sh("ip address add 192.168.0.77/24 dev br0")
    try:
        assert asked("neighbour", "192.168.0.77", 2222, STREAM) == f"guest-t:22 saw {NEIGHBOUR}"
    finally:
        sh("ip address del 192.168.0.77/24 dev br0")


def test_one_address_only(chosen: Chosen) -> None:
    assert asked("neighbour", SECOND, 3001, STREAM) == f"guest-t:22 saw {NEIGHBOUR}"
    assert asked(None, SECOND, 3001, STREAM) == f"guest-t:22 saw {HOST}"
    assert asked(None, "127.0.0.1", 3002, STREAM) == f"guest-t:22 saw {TRANSIT}"
    assert closed("neighbour", HOST, 3001, STREAM)
    assert closed("neighbour", HOST, 3002, STREAM)
    assert closed(None, "127.0.0.1", 3001, STREAM)
    assert closed("neighbour", HOST, 9000, DATAGRAM)


def test_sources(chosen: Chosen) -> None:
    assert asked("neighbour", HOST, 3000, STREAM) == f"guest-t:22 saw {NEIGHBOUR}"
    # A guest counts with its network's transit address.
    assert asked("guest-u", HOST, 3000, STREAM) == f"guest-t:22 saw {TRANSIT}"
    for client in ("server", "guest-v", None):
        assert closed(client, HOST, 3000, STREAM)


@pytest.mark.parametrize("client", ["guest-u", "guest-v", "nat-u"])
def test_the_transit_address_is_the_gateways_alone(chosen: Chosen, client: str) -> None:
    """A listen address and a list of sources hold beside the host, too."""
    targets = [(NAT_T, port, kind) for port in (2222, 3000, 3001, 3002) for kind in KINDS]
    assert silent(client, *targets) == []
    assert asked(client, HOST, 2222, STREAM) == f"guest-t:22 saw {TRANSIT}"


def test_everything_else_is_as_it_was(chosen: Chosen) -> None:
    """The host's own services, strangers' ports, and ports that are not published."""
    for client in ("neighbour", None):
        assert asked(client, HOST, 22, STREAM).startswith("host:22 saw")
        for port in (2221, 7999, 8003):
            assert closed(client, HOST, port, STREAM)
        for port in (2223, 8000):
            assert closed(client, HOST, port, DATAGRAM)
    for client in ("guest-u", None):
        assert asked(client, SERVER, 2222, STREAM) == f"server:2222 saw {HOST}"
    # Not even with a route, and although the port is published.
    in_node("neighbour", f"ip route add 192.168.150.0/24 via {HOST}")
    try:
        assert silent("neighbour", (NAT_T, 2222, STREAM), (NAT_T, 2222, DATAGRAM)) == []
    finally:
        in_node("neighbour", f"ip route del 192.168.150.0/24 via {HOST}")


def arrives(source: str, target: str) -> bool:
    """Whether a namespace gets a packet to a service on an address of the host."""
    with opened(None, DATAGRAM, target, 5354, patience=QUIET) as service:
        packet = ip_packet(source, target, 17, udp(9, 5354))
        inject("nat-u", packet, frame=("upstream", mac(None, BRIDGE)))
        try:
            return bool(service.recv(64))
        except TimeoutError:
            return False


def test_port_of_127_0_0_1_is_nothing_to_neighbours(chosen: Chosen) -> None:
    """A frame to the host may bear any address; translation comes before the kernel looks."""
    for address, port in (("127.0.0.1", 3002), ("127.0.0.5", 2222)):
        with Capture("guest-t", "eth0") as seen:
            packet = ip_packet(NEIGHBOUR, address, 6, tcp(0x02, target=port))
            inject("neighbour", packet, frame=("eth0", mac(None, "br0")))
            assert asked("neighbour", HOST, 2222, STREAM) == f"guest-t:22 saw {NEIGHBOUR}"
            found = [each for each in seen.packets() if each.payload[:2] == b"\x11\x5c"]
        assert not found


def test_loopback_stays_the_hosts(chosen: Chosen) -> None:
    forged = ((NAT_U, "127.0.0.1"), ("127.0.0.9", TRANSIT))
    assert not any(arrives(*ends) for ends in forged)
    host_firewall.remove()
    try:
        # What the rules are for: the kernel alone lets it in.
        assert all(arrives(*ends) for ends in forged)
    finally:
        host_firewall.ensure(chosen.policy, chosen.name)


def test_replacing_rules_cuts_no_connection(chosen: Chosen) -> None:
    with ExitStack() as stack:
        flows = []
        for client, address in (("neighbour", HOST), (None, "127.0.0.1"), ("guest-t", HOST)):
            for kind in KINDS:
                flow = stack.enter_context(opened(client, kind))
                flow.connect((address, 2222))
                if kind == STREAM:
                    flow.recv(64)
                flows.append((flow, again(flow)))
        for forwards in (HOST_POLICY.forwards[2:], HOST_POLICY.forwards):
            host_firewall.ensure(replace(chosen.policy, forwards=forwards), chosen.name)
            assert [again(flow) for flow, _ in flows] == [said for _, said in flows]


TAMPERING = {
    "nftables": "nft delete element inet natns local_ports '{ tcp . 2222 }'",
    "iptables": "iptables-legacy -t nat -D OUTPUT -m comment --comment libvirt-natns -j NATNS-DNAT",
}


def test_alterations_are_named_and_mended(chosen: Chosen) -> None:
    sh(TAMPERING[chosen.name])
    (line,) = host_firewall.differences(chosen.policy, chosen.name)
    assert chosen.name in line
    host_firewall.ensure(chosen.policy, chosen.name)
    assert host_firewall.differences(chosen.policy, chosen.name) == ()
    assert asked(None, HOST, 2222, STREAM) == f"guest-t:22 saw {HOST}"
