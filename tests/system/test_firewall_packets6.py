# SPDX-License-Identifier: LGPL-2.1-or-later
"""The firewall against real packets of IPv6, on both backends.

Needs root and a /run/netns of its own, as contrib/sandbox gives.
"""

import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv6Address, IPv6Network
from itertools import product
from pathlib import Path

import pytest
from lab import wait_for
from packets import (
    DATAGRAM,
    KINDS,
    PORT,
    QUIET,
    STREAM,
    again,
    answering,
    asked,
    closed,
    datagram_refused,
    forward,
    in_node,
    inside,
    mac,
    opened,
    seen_by,
    serving,
    silent,
)
from packets6 import (
    FAR,
    GATEWAY,
    GUEST,
    NAT,
    NEIGHBOUR,
    OPEN,
    OPEN_OTHER,
    OTHER,
    OWN,
    PRIVATE,
    PUBLIC,
    PUBLIC_GATEWAY,
    SERVER,
    Capture,
    icmpv6,
    index,
    inject,
    ip_packet,
    link_local,
    pings,
    small_world,
    udp,
)

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[2]))

from dataclasses import replace

from libvirt_natns.firewall import backends
from libvirt_natns.firewall.namespace_policy import Policy
from libvirt_natns.firewall.namespace_rules import ruleset
from libvirt_natns.kernel import conntrack
from libvirt_natns.model.publication import PortProtocol, StaticNat

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DO, IPV6_MTU, IPV6_RECVERR = 23, 2, 24, 25

POLICY = Policy(
    inner="virbr10",
    upstream="upstream",
    subnets=(IPv6Network(f"{PRIVATE}::/64"), IPv6Network(f"{PUBLIC}::/64")),
    gateways=(IPv6Address(GATEWAY), IPv6Address(PUBLIC_GATEWAY)),
    address=None,
    address6=IPv6Address(NAT),
    public=(IPv6Network(f"{PUBLIC}::/64"),),
)


@pytest.fixture(scope="module", params=["nftables", "iptables"])
def world(request: pytest.FixtureRequest) -> Iterator[backends.Backend]:
    """One world a backend: its rules are replaced, which leaves nothing of a test behind."""
    chosen = backends.named(request.param)
    chosen.require(6)
    with small_world():
        yield chosen


@pytest.fixture
def backend(world: backends.Backend) -> backends.Backend:
    world.apply("nat-a", ruleset(POLICY))
    inside("nat-a", "conntrack -F 2>/dev/null")
    return world


# -- a namespace ---------------------------------------------------------------


def test_private_subnets_leave_by_the_upstream_address(backend: backends.Backend) -> None:
    with serving("server", address="::"):
        for kind in KINDS:
            assert seen_by(SERVER, "guest", kind, address=GUEST) == NAT
            assert seen_by(SERVER, "nat-a", kind) == NAT
    assert pings("guest", SERVER, GUEST)


def test_public_subnets_leave_as_they_are(backend: backends.Backend) -> None:
    with serving("server", address="::"):
        for kind in KINDS:
            assert seen_by(SERVER, "guest", kind, address=OPEN) == OPEN
    assert pings("guest", FAR, OPEN)


def test_only_what_is_published_gets_in(world: backends.Backend) -> None:
    limited = (f"{NEIGHBOUR}/128",)
    world.apply(
        "nat-a",
        ruleset(
            replace(
                POLICY,
                forwards=(
                    forward("tcp", "22", address=OPEN, target=OPEN),
                    forward("udp", "7000-7002", address=OPEN, target=OPEN),
                    forward("tcp", "80", address=OPEN, target=OPEN, sources=limited),
                ),
            )
        ),
    )
    in_node("neighbour", f"ip route replace {PUBLIC}::/64 via {NAT}")
    in_node("neighbour", f"ip route replace {PRIVATE}::/64 via {NAT}")
    with answering("guest", address="::"):
        assert asked("far", OPEN, 22, STREAM) == f"guest:22 saw {FAR}"
        assert asked("far", OPEN, 7002, DATAGRAM) == f"guest:7002 saw {FAR}"
        assert asked("neighbour", OPEN, 80, STREAM) == f"guest:80 saw {NEIGHBOUR}"
        unpublished = ((OPEN, 80, STREAM), (OPEN, 22, DATAGRAM), (OPEN, 7000, STREAM))
        assert silent("far", *unpublished, (OPEN_OTHER, 22, STREAM)) == []
        assert silent("neighbour", (GUEST, 22, STREAM), (GUEST, 7000, DATAGRAM)) == []
    # What RFC 4890 wants to be answered, to what is known outside.
    assert pings("far", OPEN)
    assert pings("far", NAT)
    assert pings("far", PUBLIC_GATEWAY)
    assert not pings("neighbour", GUEST)


SEEN = {"neighbour": NEIGHBOUR, "far": FAR, "guest": GATEWAY, "other": GATEWAY}
"""Who asks, and whom the service sees: a sibling or the guest itself comes by the gateway."""


def test_published_ports(world: backends.Backend) -> None:
    forwards = (
        forward("tcp", "2222", "22", address=NAT, target=GUEST),
        forward("udp", "9000-9002", "7000-7002", address=NAT, target=GUEST),
        forward("tcp", "8000-8002", address=NAT, target=GUEST),
        forward("udp", "53", "80", address=NAT, target=GUEST, sources=("2001:db8::/32", GUEST)),
    )
    world.apply("nat-a", ruleset(replace(POLICY, forwards=forwards)))
    own = {"guest": GUEST, "other": OTHER}
    with answering("guest", address=GUEST):
        for client, seen in SEEN.items():
            source = own.get(client, "")
            for port, kind, there in (
                (2222, STREAM, 22),
                (9001, DATAGRAM, 7001),
                (8002, STREAM, 8002),
            ):
                said = asked(client, NAT, port, kind, source)
                assert said == f"guest:{there} saw {seen}"
            if client != "other":
                said = asked(client, NAT, 53, DATAGRAM, source)
                assert said == f"guest:80 saw {seen}"
        assert datagram_refused("other", NAT, 53, OTHER)


def test_an_address_of_ones_own(world: backends.Backend) -> None:
    static = StaticNat("", "", "", IPv6Address(OWN), IPv6Address(OTHER))
    in_node("nat-a", f"ip address replace {OWN}/128 dev upstream nodad")
    world.apply("nat-a", ruleset(replace(POLICY, statics=(static,))))
    inside("nat-a", "conntrack -F")
    with answering("server", "other", address="::"):
        assert asked("neighbour", OWN, 22, STREAM) == f"other:22 saw {NEIGHBOUR}"
        assert asked("guest", OWN, 22, STREAM, GUEST) == f"other:22 saw {GATEWAY}"
        for client, source, seen in (("other", OTHER, OWN), ("guest", GUEST, NAT)):
            assert asked(client, SERVER, 22, DATAGRAM, source) == f"server:22 saw {seen}"
        # A namespace with several addresses picks any: the rules do not.
        assert asked("nat-a", SERVER, 22, STREAM) == f"server:22 saw {NAT}"
    assert pings("neighbour", OWN)
    in_node("nat-a", f"ip address del {OWN}/128 dev upstream")


def test_guests_reach_the_services_and_are_told_of_the_rest(backend: backends.Backend) -> None:
    for target in (GATEWAY, PUBLIC_GATEWAY):
        assert pings("guest", target)
    assert pings("guest", link_local("nat-a", "virbr10"), scope=index("guest", "eth0"))
    with answering("nat-a", ports=(53, 69, PORT), address="::"):
        assert asked("guest", GATEWAY, 53, STREAM, GUEST) == f"nat-a:53 saw {GUEST}"
        for port in (53, 69):
            assert asked("guest", GATEWAY, port, DATAGRAM, GUEST) == f"nat-a:{port} saw {GUEST}"
        for kind in KINDS:
            assert closed("guest", GATEWAY, PORT, kind)
        upstream = [(NAT, port, kind) for port in (53, 69, PORT) for kind in KINDS]
        assert silent("neighbour", *upstream) == []


def test_a_guest_asks_for_an_address(backend: backends.Backend) -> None:
    with opened("nat-a", DATAGRAM, "::", 547) as dhcp, opened("guest", DATAGRAM, "::", 546) as asks:
        join(dhcp, "nat-a", "virbr10", "ff02::1:2")
        asks.sendto(b"solicit", ("ff02::1:2", 547, 0, index("guest", "eth0")))
        told, client = dhcp.recvfrom(64)
        assert told == b"solicit"
        dhcp.sendto(b"advertise", client)
        assert asks.recv(64) == b"advertise"


def join(member: socket.socket, node: str, link: str, group: str) -> None:
    request = socket.inet_pton(socket.AF_INET6, group) + struct.pack("@I", index(node, link))
    member.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)


def test_too_big_is_told(backend: backends.Backend) -> None:
    """By a router far away, about a flow of either sort of subnet."""
    in_node("server", "ip link set eth1 mtu 1300")
    for source in (GUEST, OPEN):
        learns_mtu(source)
    in_node("server", "ip link set eth1 mtu 1500")


def learns_mtu(source: str) -> None:
    in_node("guest", "ip -6 route flush cache")
    with opened("guest", DATAGRAM, source) as client:
        client.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DO)
        client.connect((FAR, PORT))
        client.send(b"x" * 1400)
        wait_for(lambda: client.getsockopt(socket.IPPROTO_IPV6, IPV6_MTU) == 1300)


def test_errors_about_a_flow_come_back(backend: backends.Backend) -> None:
    for source in (GUEST, OPEN):
        for kind in KINDS:
            with pytest.raises(ConnectionRefusedError):
                seen_by(SERVER, "guest", kind, port=9, address=source)
    # Time exceeded, of which the second router tells.
    with pytest.raises(OSError, match="No route to host"):
        one_hop_short("guest", OPEN)


def one_hop_short(node: str, source: str) -> None:
    with opened(node, DATAGRAM, source) as client:
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 2)
        client.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
        client.connect((FAR, PORT))
        client.send(b"?")
        client.recv(64)


def advertisement(source: str, prefix: str) -> bytes:
    option = struct.pack("!BBBBIII", 3, 4, 64, 0xC0, 9000, 9000, 0)
    option += socket.inet_pton(socket.AF_INET6, f"{prefix}::")
    return icmpv6(source, "ff02::1", 134, struct.pack("!BBHII", 64, 0, 1800, 0, 0) + option)


def learns(link: str, sender: tuple[str, str], prefix: str, hops: int = 255) -> bool:
    """Whether the namespace takes a prefix from a router's advertisement."""
    source = link_local(*sender)
    packet = ip_packet(source, "ff02::1", 58, advertisement(source, prefix), hops)
    inject(sender[0], packet, sender[1], bytes.fromhex("333300000001"))
    deadline = time.monotonic() + QUIET
    while time.monotonic() < deadline:
        if prefix in inside("nat-a", f"ip -6 address show dev {link}"):
            return True
        time.sleep(0.02)
    return False


def test_only_the_upstream_has_routers(backend: backends.Backend) -> None:
    for link in ("virbr10", "upstream"):
        in_node("nat-a", f"sysctl -qw net.ipv6.conf.{link}.accept_ra=2")
    assert learns("upstream", ("server", "eth0"), "2001:db8:201")
    assert not learns("upstream", ("server", "eth0"), "2001:db8:202", hops=64)
    assert not learns("virbr10", ("guest", "eth0"), "fd00:bad")
    # That the kernel would have taken it is what makes this a test.
    backend.clear("nat-a")
    assert learns("virbr10", ("guest", "eth0"), "fd00:bad")
    in_node("nat-a", "sysctl -qw net.ipv6.conf.upstream.accept_ra=0")
    in_node("nat-a", "sysctl -qw net.ipv6.conf.virbr10.accept_ra=0")


def redirected(node: str) -> bool:
    """Whether a redirect by the router changes where the namespace sends to."""
    router, other = link_local("server", "eth0"), link_local("neighbour", "eth0")
    target = "2001:db8:204::9"
    packet = ip_packet(NAT, target, 17, udp(NAT, target, (9, 9)))
    ends = b"".join(socket.inet_pton(socket.AF_INET6, each) for each in (other, target))
    option = struct.pack("!BB6x", 4, 1 + len(packet) // 8) + packet[: len(packet) // 8 * 8]
    message = icmpv6(router, NAT, 137, bytes(4) + ends + option)
    with opened(node, DATAGRAM, NAT, 9) as flow:
        # A flow that the redirect could be related to.
        flow.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"upstream")
        flow.connect((target, 9))
        flow.send(b"forged")
        found = ip_packet(router, NAT, 58, message, 255)
        inject("server", found, "eth0", mac(node, "upstream"))
        time.sleep(QUIET)
    return other in inside(node, f"ip -6 route get {target}")


def test_redirects_go_nowhere(backend: backends.Backend) -> None:
    router = link_local("server", "eth0")
    in_node(
        "nat-a",
        f"ip route replace 2001:db8:204::/64 via {router} dev upstream",
        "sysctl -qw net.ipv6.conf.upstream.accept_redirects=1",
        "sysctl -qw net.ipv6.conf.upstream.forwarding=0",
    )
    try:
        assert not redirected("nat-a")
        backend.clear("nat-a")
        assert redirected("nat-a")
    finally:
        in_node(
            "nat-a",
            "ip route del 2001:db8:204::/64",
            "sysctl -qw net.ipv6.conf.upstream.forwarding=1",
        )


def test_forged_sources_stay_in(backend: backends.Backend) -> None:
    target = mac("nat-a", "virbr10")
    with Capture("server", "eth0") as wire:
        for source in ("fd00:77::9", NEIGHBOUR, NAT, GATEWAY, "2001:db8:99::1"):
            for body, protocol in (
                (udp(source, SERVER, (9, PORT)), 17),
                (icmpv6(source, SERVER, 128, bytes(4)), 58),
            ):
                inject("guest", ip_packet(source, SERVER, protocol, body), "eth0", target)
        assert wire.packets() == []


def test_nothing_private_leaves(backend: backends.Backend) -> None:
    """Out of state, and after a lost connection table; errors about no flow, too."""
    with serving("server", address="::"), Capture("server", "eth0") as wire:
        with opened("guest", STREAM, GUEST) as client:
            client.connect((SERVER, PORT))
            assert client.recv(64).decode() == NAT
            inside("nat-a", "conntrack -F")
            client.send(b"after the flush")
        target = mac("nat-a", "virbr10")
        for kind, body in ((1, 4), (2, 4), (3, 4), (4, 4), (129, 4), (135, 20), (200, 4)):
            message = icmpv6(GUEST, SERVER, kind, bytes(body))
            inject("guest", ip_packet(GUEST, SERVER, 58, message), "eth0", target)
        leaked = [p for p in wire.packets() if p.source not in (SERVER, NAT)]
        assert leaked == []


def test_a_network_that_stays_inside(world: backends.Backend) -> None:
    """No address, no public subnet: the namespace serves its guests and nothing else."""
    closed_policy = replace(
        POLICY, subnets=POLICY.subnets[:1], gateways=POLICY.gateways[:1], address6=None, public=()
    )
    world.apply("nat-a", ruleset(closed_policy))
    inside("nat-a", "conntrack -F")
    assert pings("guest", GATEWAY)
    with serving("nat-a", 53, "::"), Capture("server", "eth0") as wire:
        assert seen_by(GATEWAY, "guest", DATAGRAM, 53, address=GUEST) == GUEST
        for node, source in (("guest", GUEST), ("guest", OPEN), ("nat-a", NAT), ("nat-a", GATEWAY)):
            assert not pings(node, SERVER, source)
        assert [p for p in wire.packets() if p.destination == SERVER] == []
    assert not pings("neighbour", NAT)


def test_what_is_published_no_more_ends(world: backends.Backend) -> None:
    protocols: tuple[PortProtocol, ...] = ("tcp", "udp")
    gone = [forward(each, "2222", "22", address=NAT, target=GUEST) for each in protocols]
    gone += [forward(each, "80", address=OPEN, target=OPEN) for each in protocols]
    stays = tuple(forward(each, "8000", address=NAT, target=GUEST) for each in protocols)
    world.apply("nat-a", ruleset(replace(POLICY, forwards=(*gone, *stays))))
    inside("nat-a", "conntrack -F")
    with (
        answering("guest", ports=(22, 8000), address=GUEST),
        answering("guest", ports=(80,), address=OPEN),
        ExitStack() as stack,
    ):
        flows: dict[int, list[socket.socket]] = {2222: [], 80: [], 8000: []}
        for port, kind in product(flows, KINDS):
            flow = stack.enter_context(opened("far", kind, "::"))
            flow.connect((OPEN if port == 80 else NAT, port))
            if kind == STREAM:
                flow.recv(64)
            assert again(flow)
            flows[port].append(flow)
        world.apply("nat-a", ruleset(replace(POLICY, forwards=stays)))
        conntrack.cut("nat-a", gone, IPv6Address(NAT))
        assert all(again(flow) for flow in flows[8000])
        for flow in (*flows[2222], *flows[80]):
            flow.settimeout(QUIET)
            with pytest.raises(OSError):
                again(flow)


def test_segments_fit(backend: backends.Backend) -> None:
    in_node("nat-a", "ip link set upstream mtu 1400")
    with serving("server", address="::"), Capture("server", "eth0") as wire:
        for source in (GUEST, OPEN):
            seen_by(SERVER, "guest", STREAM, address=source)
        syns = [p.payload for p in wire.packets() if p.protocol == 6 and p.payload[13] == 2]
    in_node("nat-a", "ip link set upstream mtu 1500")
    assert {struct.unpack("!H", syn[22:24])[0] for syn in syns} == {1340}


def test_the_digest_tells_an_alteration(backend: backends.Backend) -> None:
    before = backend.digest("nat-a")
    backend.apply("nat-a", ruleset(POLICY))
    assert backend.digest("nat-a") == before
    inside(
        "nat-a",
        "nft insert rule inet natns forward ip6 saddr ::1 accept"
        if backend.name == "nftables"
        else "ip6tables-legacy -I FORWARD -j ACCEPT",
    )
    assert backend.digest("nat-a") != before
    backend.clear("nat-a")
    assert backend.digest("nat-a") == ""
