# SPDX-License-Identifier: LGPL-2.1-or-later
"""Published ports and one-to-one addresses against real packets, on both backends.

The small world of ``packets``, with more guests of network a, and the host itself a
neighbour with 192.168.0.2.  Each guest answers on the same ports with who it
is, where it was asked and whom it saw.

    virbr10: guest-a 10.0.0.5, guest-c .6 (192.168.0.110), guest-d .7 (192.168.0.111)
    virbr11: guest-b 10.0.0.5
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from packets import (
    DATAGRAM,
    FAR,
    GATEWAY,
    GUEST,
    KINDS,
    NAT,
    NEIGHBOUR,
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
    inside,
    ip_packet,
    mac,
    node,
    opened,
    patch,
    pings,
    sctp_init,
    sh,
    silent,
    small_world,
    udp,
)

from libvirt_natns.firewall import backends

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[2]))

from libvirt_natns.firewall.namespace_policy import Policy
from libvirt_natns.firewall.namespace_rules import ruleset
from libvirt_natns.model.publication import PortSet, StaticNat

HOST = "192.168.0.2"
GUEST_C, GUEST_D = "10.0.0.6", "10.0.0.7"
OWN_C, OWN_D = "192.168.0.110", "192.168.0.111"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


# -- the world -------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    with small_world() as stack:
        sh(f"ip address add {HOST}/24 dev br0")
        for letter, address in (("c", GUEST_C), ("d", GUEST_D)):
            node(stack, f"guest-{letter}")
            patch("virbr10", f"p-{letter}", f"guest-{letter}", "eth0", f"{address}/24")
            in_node(f"guest-{letter}", f"ip route add default via {GATEWAY}")
        for letter in NAT:
            harden(f"nat-{letter}")
        for address in (OWN_C, OWN_D):
            in_node("nat-a", f"ip address add {address}/32 dev upstream")
        yield


def static(address: str, target: str, *ports: PortSet) -> StaticNat:
    return StaticNat("", "", "", IPv4Address(address), IPv4Address(target), ports)


FORWARDS = (
    forward("tcp", "2222", "22"),
    forward("udp", "2222", "22"),
    forward("sctp", "2222", "22"),
    forward("tcp", "8000-8002"),
    forward("udp", "8000-8002"),
    forward("tcp", "9000-9002", "7000-7002"),
    forward("tcp", "9100-9102", "7000"),
    forward("tcp", "3000", "22", sources=(f"{NEIGHBOUR}/32", f"{GUEST_C}/32")),
    forward("tcp", "3100-3101", "22-23", sources=("192.168.0.48/28",)),
    forward("udp", "8003", sources=("192.168.0.48/28", "10.0.0.6/31")),
    forward("tcp", "2222", "23", address=OWN_C, target=GUEST),
)
STATICS = (
    static(OWN_C, GUEST_C),
    static(OWN_D, GUEST_D, PortSet("tcp", 80, 80), PortSet("udp", 7000, 7001)),
)
POLICY = Policy(
    inner="virbr10",
    upstream="upstream",
    subnets=(IPv4Network("10.0.0.0/24"),),
    gateways=(IPv4Address(GATEWAY),),
    address=IPv4Address(NAT["a"]),
    forwards=FORWARDS,
    statics=STATICS,
)
TWIN = replace(
    POLICY,
    inner="virbr11",
    address=IPv4Address(NAT["b"]),
    forwards=(forward("tcp", "2222", "22", address=NAT["b"]),),
    statics=(),
)


@pytest.fixture(scope="module", params=["nftables", "iptables"])
def backend(request: pytest.FixtureRequest, world: None) -> Iterator[backends.Backend]:
    """The backend of that name, with its rules in both namespaces, and all services."""
    chosen = backends.named(request.param)
    chosen.require()
    chosen.apply("nat-a", ruleset(POLICY))
    chosen.apply("nat-b", ruleset(TWIN))
    with answering("guest-a", "guest-b", "guest-c", "guest-d", "server"):
        yield chosen
    for letter in NAT:
        chosen.clear(f"nat-{letter}")


# -- forwards --------------------------------------------------------------------


SEEN = {
    "neighbour": NEIGHBOUR,
    "server": SERVER,
    None: HOST,
    "guest-b": NAT["b"],
    "guest-c": GATEWAY,
    "guest-a": GATEWAY,
}
"""Whom the service sees: its client; a gateway where guest and client are neighbours."""


def test_from_everywhere(backend: backends.Backend) -> None:
    """Neighbours, the host, a guest of a twin network, a sibling, the guest itself."""
    for client, seen in SEEN.items():
        for kind in KINDS:
            assert asked(client, NAT["a"], 2222, kind) == f"guest-a:22 saw {seen}", client


def test_from_far_away(backend: backends.Backend) -> None:
    assert asked("far", NAT["a"], 2222, STREAM) == f"guest-a:22 saw {FAR}"


def test_twins_publish_the_same_port(backend: backends.Backend) -> None:
    assert asked("neighbour", NAT["b"], 2222, STREAM) == f"guest-b:22 saw {NEIGHBOUR}"
    # Both have the very same private address.
    assert asked("guest-a", NAT["b"], 2222, STREAM) == f"guest-b:22 saw {NAT['a']}"


@pytest.mark.parametrize("client", ["neighbour", "guest-c"])
def test_ranges(backend: backends.Backend, client: str) -> None:
    for offset in range(3):
        for kind in KINDS:
            port = 8000 + offset
            assert asked(client, NAT["a"], port, kind) == f"guest-a:{port} saw {SEEN[client]}"
        shifted, one = asked(client, NAT["a"], 9000 + offset, STREAM), 9100 + offset
        assert shifted == f"guest-a:{7000 + offset} saw {SEEN[client]}"
        assert asked(client, NAT["a"], one, STREAM) == f"guest-a:7000 saw {SEEN[client]}"


def test_what_is_not_published_is_closed(backend: backends.Backend) -> None:
    unpublished = (22, 23, 80, 2221, 2223, 7000, 7999, 8003, 8999, 9003, 9099, 9103, 40000)
    assert silent("neighbour", *((NAT["a"], port, STREAM) for port in unpublished)) == []
    assert silent("neighbour", *((NAT["a"], port, DATAGRAM) for port in (22, 7999, 9000))) == []
    # No proxy for the twin: only its own is there.
    assert silent("neighbour", (NAT["b"], 2222, DATAGRAM), (NAT["b"], 8000, STREAM)) == []
    for kind in KINDS:
        assert closed("guest-c", NAT["a"], 22, kind)
        assert closed("guest-a", GATEWAY, 2222, kind)


def test_a_strangers_port_is_not_caught(backend: backends.Backend) -> None:
    for kind in KINDS:
        for port in (2222, 8000):
            assert asked("guest-a", SERVER, port, kind) == f"server:{port} saw {NAT['a']}"
            assert asked("guest-b", SERVER, port, kind) == f"server:{port} saw {NAT['b']}"
    # Nor what only passes by, on its way to an address that is nobody's here.
    with Capture("guest-a", "eth0") as wire:
        frame = ("eth0", mac("nat-a", "upstream"))
        inject("neighbour", ip_packet(NEIGHBOUR, FAR, 17, udp(9, 2222)), frame=frame)
        assert [p for p in wire.packets() if p.source == NEIGHBOUR] == []


def test_sources(backend: backends.Backend) -> None:
    assert asked("neighbour", NAT["a"], 3000, STREAM) == f"guest-a:22 saw {NEIGHBOUR}"
    assert asked("neighbour", NAT["a"], 3101, STREAM) == f"guest-a:23 saw {NEIGHBOUR}"
    assert asked("neighbour", NAT["a"], 8003, DATAGRAM) == f"guest-a:8003 saw {NEIGHBOUR}"
    assert silent("server", (NAT["a"], 3000, STREAM), (NAT["a"], 8003, DATAGRAM)) == []
    assert silent("guest-b", (NAT["a"], 3000, STREAM), (NAT["a"], 3101, STREAM)) == []
    # A sibling counts with its private address.
    assert asked("guest-c", NAT["a"], 3000, STREAM) == f"guest-a:22 saw {GATEWAY}"
    assert closed("guest-d", NAT["a"], 3000, STREAM)
    assert closed("guest-a", NAT["a"], 8003, DATAGRAM)


# -- SCTP ------------------------------------------------------------------------

SCTP = 132


def test_sctp(backend: backends.Backend) -> None:
    """The first packets of both directions; kernels with SCTP sockets are rare."""
    if "sctp" not in inside("nat-a", "sysctl -a -r nf_conntrack_sctp"):
        pytest.skip("this kernel's conntrack does not know SCTP")
    with Capture("guest-a", "eth0") as inner, Capture("neighbour", "eth0") as outer:
        inject("neighbour", ip_packet(NEIGHBOUR, NAT["a"], SCTP, sctp_init(5000, 2222)))
        (arrived,) = [p for p in inner.packets() if p.protocol == SCTP]
        assert (arrived.source, arrived.destination) == (NEIGHBOUR, GUEST)
        assert arrived.payload == sctp_init(5000, 22)
        answer = sctp_init(22, 5000, answer_to=77)
        inject("guest-a", ip_packet(GUEST, NEIGHBOUR, SCTP, answer))
        (back,) = [p for p in outer.packets() if p.protocol == SCTP and p.source != NEIGHBOUR]
        assert back.source == NAT["a"]
        assert back.payload == sctp_init(2222, 5000, answer_to=77)


# -- one-to-one addresses --------------------------------------------------------


def test_an_address_of_ones_own(backend: backends.Backend) -> None:
    for client, seen in SEEN.items():
        for kind in KINDS:
            assert asked(client, OWN_C, 40000, kind) == f"guest-c:40000 saw {seen}", client
    assert asked("guest-c", OWN_C, 40000, STREAM) == f"guest-c:40000 saw {GATEWAY}"
    # It leaves with that address, its siblings with the network's.
    for kind in KINDS:
        assert asked("guest-c", SERVER, 22, kind) == f"server:22 saw {OWN_C}"
        assert asked("guest-a", SERVER, 22, kind) == f"server:22 saw {NAT['a']}"
        assert asked("guest-d", SERVER, 22, kind) == f"server:22 saw {OWN_D}"
    # A forward may take a port of it away.
    assert asked("neighbour", OWN_C, 2222, STREAM) == f"guest-a:23 saw {NEIGHBOUR}"


def test_icmp_of_an_address_of_ones_own(backend: backends.Backend) -> None:
    with Capture("guest-c", "eth0") as its, Capture("guest-d", "eth0") as others:
        assert pings("neighbour", OWN_C)
        assert pings("guest-a", OWN_C)
        # Where only some ports are the guest's, the namespace answers, as for its own.
        assert pings("neighbour", OWN_D)
        seen = {p.source for p in its.packets() if p.protocol == 1 and p.destination == GUEST_C}
        assert seen == {NEIGHBOUR, GATEWAY}
        assert [p for p in others.packets() if p.protocol == 1] == []
    assert pings("guest-c", SERVER)
    # The guest's own refusal comes through.
    for kind in KINDS:
        assert closed("neighbour", OWN_C, 9, kind)


def test_an_address_limited_to_some_ports(backend: backends.Backend) -> None:
    for client in ("neighbour", "guest-a", "guest-b"):
        assert asked(client, OWN_D, 80, STREAM) == f"guest-d:80 saw {SEEN[client]}"
        assert asked(client, OWN_D, 7001, DATAGRAM) == f"guest-d:7001 saw {SEEN[client]}"
    others = ((22, STREAM), (7000, STREAM), (80, DATAGRAM), (7002, DATAGRAM))
    assert silent("neighbour", *((OWN_D, port, kind) for port, kind in others)) == []


# -- what stays as it was --------------------------------------------------------


def test_replacing_rules_cuts_no_connection(backend: backends.Backend) -> None:
    """Not even of a forward that is gone: whoever withdraws it cuts its flows."""
    paths = [("neighbour", NAT["a"], 2222), ("guest-c", NAT["a"], 2222), ("guest-b", OWN_C, 22)]
    with ExitStack() as stack:
        flows = []
        for client, target, port in paths:
            for kind in KINDS:
                flow = stack.enter_context(opened(client, kind))
                flow.connect((target, port))
                if kind == STREAM:
                    flow.recv(64)
                flows.append((flow, again(flow)))
        changed = replace(POLICY, forwards=FORWARDS[2:], statics=STATICS)
        try:
            for policy in (POLICY, changed, replace(POLICY, forwards=FORWARDS[::-1])):
                backend.apply("nat-a", ruleset(policy))
                assert [again(flow) for flow, _ in flows] == [said for _, said in flows]
                if policy is changed:
                    assert silent("neighbour", (NAT["a"], 2222, STREAM)) == []
        finally:
            backend.apply("nat-a", ruleset(POLICY))


def test_nothing_leaves_untranslated(backend: backends.Backend) -> None:
    """What a service says after its connection was forgotten, and answers to nobody."""
    with Capture("neighbour", "eth0") as wire, Capture("server", "eth0") as other:
        with opened("neighbour", STREAM) as client:
            client.connect((NAT["a"], 2222))
            assert client.recv(64)
            inside("nat-a", "conntrack -F")
            client.send(b"makes it answer")
        inject("guest-a", ip_packet(GUEST, NEIGHBOUR, 17, udp(22, 5000)))
        inject("guest-c", ip_packet(GUEST_C, SERVER, 17, udp(22, 5000)))
        private = IPv4Network("10.0.0.0/24")
        for capture in (wire, other):
            assert [p for p in capture.packets() if IPv4Address(p.source) in private] == []


def test_the_digest_changes_only_with_the_rules(backend: backends.Backend) -> None:
    before = backend.digest("nat-a")
    for forwards in (FORWARDS, FORWARDS[::-1]):
        backend.apply("nat-a", ruleset(replace(POLICY, forwards=forwards)))
        assert backend.digest("nat-a") == before
    other = replace(POLICY, forwards=(*FORWARDS[1:], forward("tcp", "2222", "23")))
    backend.apply("nat-a", ruleset(other))
    assert backend.digest("nat-a") != before
    backend.apply("nat-a", ruleset(POLICY))


@pytest.mark.parametrize("backend", ["nftables"], indirect=True)
def test_ten_thousand_forwards(backend: backends.Backend) -> None:
    """Each one works, ports and ranges alike."""
    many = tuple(forward("tcp", f"{port}", "22") for port in range(10000, 20000))
    spans = tuple(forward("udp", f"{port}-{port + 1}") for port in range(30000, 50000, 2))
    backend.apply("nat-a", ruleset(replace(POLICY, forwards=(*many, *spans), statics=())))
    for port in (10000, 14999, 19999):
        assert asked("neighbour", NAT["a"], port, STREAM) == f"guest-a:22 saw {NEIGHBOUR}"
    assert asked("guest-c", NAT["a"], 40000, DATAGRAM) == f"guest-a:40000 saw {GATEWAY}"
    assert silent("neighbour", (NAT["a"], 20000, STREAM), (NAT["a"], 29999, DATAGRAM)) == []
    backend.apply("nat-a", ruleset(POLICY))
