# SPDX-License-Identifier: LGPL-2.1-or-later
"""The firewall against real packets, on both backends.

Needs root and a /run/netns of its own, as contrib/sandbox gives; neither libvirt
nor anything else of the lab but the small world of ``packets``.
"""

import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from packets import (
    FAR,
    FOREIGN,
    GATEWAY,
    GUEST,
    NAT,
    NEIGHBOUR,
    PORT,
    QUIET,
    SERVER,
    Capture,
    Packet,
    checksum,
    ignored,
    in_node,
    inject,
    inside,
    ip_packet,
    mac,
    node,
    opened,
    patch,
    pings,
    refused,
    seen_by,
    serving,
    sh,
    small_world,
    state,
    tcp,
    udp,
)

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[2]))

from libvirt_natns.firewall import (
    backends,
    host_accepts,
    host_firewall,
    host_policy,
    stopping_chains,
)
from libvirt_natns.firewall.namespace_policy import Policy
from libvirt_natns.firewall.namespace_rules import ruleset

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def world() -> Iterator[None]:
    with small_world():
        yield


def policy(letter: str, *subnets: str) -> Policy:
    return Policy(
        inner="virbr10" if letter == "a" else "virbr11",
        upstream="upstream",
        subnets=tuple(map(IPv4Network, ("10.0.0.0/24", *subnets))),
        gateways=(IPv4Address(GATEWAY),),
        address=IPv4Address(NAT[letter]),
    )


@pytest.fixture(params=["nftables", "iptables"])
def backend(request: pytest.FixtureRequest, world: None) -> backends.Backend:
    """The backend of that name, with its rules in both namespaces."""
    chosen = backends.named(request.param)
    chosen.require()
    for letter in NAT:
        chosen.apply(f"nat-{letter}", ruleset(policy(letter)))
    return chosen


# -- a namespace ---------------------------------------------------------------


def test_twins_go_out_masqueraded(backend: backends.Backend) -> None:
    with serving("server"):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            for letter, address in NAT.items():
                # The same five-tuple from both.
                assert seen_by(SERVER, f"guest-{letter}", kind, source=40000) == address
    assert all(pings(f"guest-{letter}", SERVER) for letter in NAT)


def test_neighbour_with_a_route_reaches_nothing(backend: backends.Backend) -> None:
    in_node("neighbour", f"ip route add 10.0.0.0/24 via {NAT['a']}")
    with serving("guest-a"), serving("nat-a"), Capture("guest-a", "eth0") as inner:
        with Capture("neighbour", "eth0") as outer:
            for target in (GUEST, GATEWAY):
                assert not pings("neighbour", target)
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    assert ignored(target, "neighbour", kind)
            # Neither a redirect nor an error gives away that somebody is there.
            for ttl in (1, 2):
                inject("neighbour", ip_packet(NEIGHBOUR, GUEST, 17, udp(9, 9), ttl))
            assert [p for p in outer.packets() if p.destination == NEIGHBOUR] == []
        assert [p for p in inner.packets() if NEIGHBOUR in (p.source, p.destination)] == []


def test_forged_packets_of_a_known_flow_go_nowhere(backend: backends.Backend) -> None:
    with serving("server"), opened("guest-a", socket.SOCK_DGRAM, port=40001) as client:
        client.connect((SERVER, PORT))
        client.send(b"?")
        assert client.recv(64).decode() == NAT["a"]
        frame = ("eth0", mac("nat-a", "upstream"))
        with Capture("server", "eth0") as wire, Capture("guest-a", "eth0") as inner:
            inject("neighbour", ip_packet(GUEST, SERVER, 17, udp(40001, PORT)), frame=frame)
            inject("neighbour", ip_packet(SERVER, GUEST, 17, udp(PORT, 40001)), frame=frame)
            assert [p for p in wire.packets() if b"forged" in p.payload] == []
            assert inner.packets() == []


def test_no_port_is_offered_upstream(backend: backends.Backend) -> None:
    assert pings("neighbour", NAT["a"])
    for port in (53, 67, 69, PORT):
        with serving("nat-a", port):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                assert ignored(NAT["a"], "neighbour", kind, port)


def test_guests_reach_the_services_and_are_told_of_the_rest(backend: backends.Backend) -> None:
    stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
    assert pings("guest-a", GATEWAY)
    with serving("nat-a", 53), serving("nat-a", 69), serving("nat-a", PORT):
        assert seen_by(GATEWAY, "guest-a", stream, 53) == GUEST
        assert seen_by(GATEWAY, "guest-a", datagram, 53) == GUEST
        assert seen_by(GATEWAY, "guest-a", datagram, 69) == GUEST
        for kind in (stream, datagram):
            assert refused(lambda kind=kind: seen_by(GATEWAY, "guest-a", kind, PORT))  # type: ignore[misc]
    # An answer to a forged question would leave by the default route.
    with serving("nat-a", 53), Capture("server", "eth0") as wire:
        inject("guest-a", ip_packet("172.16.0.9", GATEWAY, 17, udp(9, 53)))
        assert [p for p in wire.packets() if p.destination == "172.16.0.9"] == []


def test_the_namespace_itself_asks_and_is_answered(backend: backends.Backend) -> None:
    """As its dnsmasq does, upstream and in local."""
    with serving("server"), serving("nat-a"):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            assert seen_by(SERVER, "nat-a", kind) == NAT["a"]
            assert seen_by("127.0.0.1", "nat-a", kind) == "127.0.0.1"


def test_a_guest_without_address_asks_for_one(backend: backends.Backend) -> None:
    with opened("nat-a", socket.SOCK_DGRAM, port=67) as dhcp:
        broadcast = ip_packet("0.0.0.0", "255.255.255.255", 17, udp(68, 67, b"discover"))
        inject("guest-a", broadcast, frame=("eth0", b"\xff" * 6))
        assert dhcp.recv(64) == b"discover"


def test_forged_sources_stay_in(backend: backends.Backend) -> None:
    with Capture("server", "eth0") as wire, Capture("neighbour", "eth0") as other:
        for source in ("172.16.0.9", NEIGHBOUR, NAT["a"], NAT["b"], GATEWAY, "0.0.0.0"):
            for payload, protocol in (
                (udp(9, PORT), 17),
                (tcp(2), 6),
                (b"\x08\0\xf7\xff" + b"\0" * 4, 1),
            ):
                inject(
                    "guest-a",
                    ip_packet(source, SERVER, protocol, payload),
                    frame=("eth0", mac("nat-a", "virbr10")),
                )
        assert wire.packets() == []
        assert other.packets() == []


def test_nothing_leaves_untranslated(backend: backends.Backend) -> None:
    """Out of state, after a lost connection table, and resets after the end."""
    with ExitStack() as stack:
        stack.enter_context(serving("server"))
        wire, near = (stack.enter_context(Capture(n, "eth0")) for n in ("server", "guest-a"))
        with opened("guest-a", socket.SOCK_STREAM) as client:
            client.connect((SERVER, PORT))
            assert client.recv(64).decode() == NAT["a"]
            inside("nat-a", "conntrack -F")
            client.send(b"after the flush")
        # RST, FIN, FIN/ACK, ACK, SYN/ACK, RST/ACK, nothing, everything.
        for number, flags in enumerate((4, 1, 17, 16, 18, 20, 0, 63)):
            inject("guest-a", ip_packet(GUEST, SERVER, 6, tcp(flags, source=5000 + number)))
        # ICMP errors about flows that never were.
        inner = ip_packet(SERVER, GUEST, 17, udp(PORT, 9))[:28]
        error = struct.pack("!BBHI", 3, 3, 0, 0) + inner
        error = error[:2] + struct.pack("!H", checksum(error)) + error[4:]
        inject("guest-a", ip_packet(GUEST, SERVER, 1, error))
        time.sleep(QUIET)
        leaked = [p for p in wire.packets() if p.source not in (SERVER, NAT["a"])]
        assert leaked == []
        # Nor is the guest told that anything was wrong.
        assert [
            p
            for p in near.packets()
            if p.protocol == socket.IPPROTO_ICMP and p.destination == GUEST
        ] == []


def test_a_flow_older_than_the_rules_does_not_leak(backend: backends.Backend) -> None:
    backend.clear("nat-a")
    # Anything that asks for a state makes the kernel remember connections.
    inside("nat-a", "iptables-legacy -A FORWARD -m conntrack --ctstate NEW -j ACCEPT")
    inside(
        "nat-a",
        "nft 'table ip t { chain f { type filter hook forward priority 0;"
        " ct state new accept; }; }'",
    )
    in_node("server", f"ip route add 10.0.0.0/24 via {NAT['a']}")
    with serving("server"), opened("guest-a", socket.SOCK_DGRAM, port=40002) as client:
        client.connect((SERVER, PORT))
        client.send(b"?")
        assert client.recv(64).decode() == GUEST
        backend.apply("nat-a", ruleset(policy("a")))
        with Capture("server", "eth0") as wire:
            client.send(b"?")
            assert [p for p in wire.packets() if p.source == GUEST] == []
        inside("nat-a", "conntrack -F")
        client.send(b"?")
        assert client.recv(64).decode() == NAT["a"]


def test_an_older_upstream_address_does_not_leak(backend: backends.Backend) -> None:
    with serving("server"), opened("guest-a", socket.SOCK_DGRAM, port=40003) as client:
        client.connect((SERVER, PORT))
        client.send(b"?")
        assert client.recv(64).decode() == NAT["a"]
        moved = Policy(
            "virbr10",
            "upstream",
            policy("a").subnets,
            policy("a").gateways,
            IPv4Address("192.168.0.199"),
        )
        backend.apply("nat-a", ruleset(moved))
        with Capture("server", "eth0") as wire:
            client.send(b"?")
            assert [p for p in wire.packets() if p.source == NAT["a"]] == []


def segment_sizes(packets: list[Packet]) -> set[int]:
    syns = [p.payload for p in packets if p.protocol == 6 and p.payload[13] & 2]
    return {struct.unpack("!H", syn[22:24])[0] for syn in syns if syn[20:22] == b"\x02\x04"}


@pytest.mark.parametrize(("outside", "inner"), [(1400, 1500), (1500, 1300)])
def test_segments_fit_both_sides(backend: backends.Backend, outside: int, inner: int) -> None:
    in_node("nat-a", f"ip link set upstream mtu {outside}", f"ip link set virbr10 mtu {inner}")
    with serving("server"), Capture("server", "eth0") as wire, Capture("guest-a", "eth0") as near:
        assert seen_by(SERVER, "guest-a", socket.SOCK_STREAM) == NAT["a"]
        sizes = {min(segment_sizes(capture.packets())) for capture in (wire, near)}
        assert sizes == {min(outside, inner) - 40}


def path_mtu(node: str, target: str) -> int:
    with opened(node, socket.SOCK_DGRAM) as client:
        client.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
        client.connect((target, PORT))
        for _ in range(2):
            try:
                client.send(b"x" * 1400)
            except OSError:
                break
            time.sleep(QUIET)
        return client.getsockopt(socket.IPPROTO_IP, 14)  # IP_MTU


def test_too_big_is_told(backend: backends.Backend) -> None:
    in_node("server", "ip link set eth1 mtu 1300")
    assert path_mtu("guest-a", FAR) == 1300
    in_node("nat-b", "ip link set upstream mtu 1350")
    assert path_mtu("guest-b", SERVER) == 1350


def test_errors_about_a_flow_come_back(backend: backends.Backend) -> None:
    assert refused(lambda: seen_by(SERVER, "guest-a", socket.SOCK_DGRAM, port=9))
    assert refused(lambda: seen_by(SERVER, "guest-a", socket.SOCK_STREAM, port=9))


def test_routed_subnets(backend: backends.Backend) -> None:
    backend.apply("nat-a", ruleset(policy("a", "10.9.0.0/24")))
    in_node("nat-a", f"ip route add 10.9.0.0/24 via {GUEST}")
    in_node("guest-a", "ip address add 10.9.0.1/24 dev lo")
    with serving("server"), opened("guest-a", socket.SOCK_DGRAM, "10.9.0.1") as client:
        client.connect((SERVER, PORT))
        client.send(b"?")
        assert client.recv(64).decode() == NAT["a"]


def test_between_private_subnets(backend: backends.Backend, world: None) -> None:
    """Also where replies do not come back this way."""
    backend.apply("nat-a", ruleset(policy("a", "10.9.0.0/24")))
    in_node("nat-a", "ip address add 10.9.0.1/24 dev virbr10")
    with ExitStack() as stack:
        node(stack, "guest-c")
        patch("virbr10", "p-c", "guest-c", "eth0", "10.9.0.5/24")
        in_node("guest-c", "ip route add 10.0.0.0/24 dev eth0")
        in_node("guest-a", "sysctl -qw net.ipv4.conf.all.accept_redirects=0")
        in_node("guest-a", "sysctl -qw net.ipv4.conf.eth0.accept_redirects=0")
        in_node("nat-a", "sysctl -qw net.ipv4.conf.all.send_redirects=0")
        stack.enter_context(serving("guest-c"))
        assert seen_by("10.9.0.5", "guest-a", socket.SOCK_STREAM) == GUEST


def test_the_digest_tells_an_alteration(backend: backends.Backend) -> None:
    before = backend.digest("nat-a")
    with serving("server"):
        seen_by(SERVER, "guest-a", socket.SOCK_STREAM)
    backend.apply("nat-a", ruleset(policy("a")))
    assert backend.digest("nat-a") == before
    inside(
        "nat-a",
        "nft insert rule inet natns forward accept"
        if backend.name == "nftables"
        else "iptables-legacy -I FORWARD -j ACCEPT",
    )
    assert backend.digest("nat-a") != before
    for _ in range(2):
        backend.clear("nat-a")
        assert backend.digest("nat-a") == ""


def test_reloading_cuts_no_connection(backend: backends.Backend) -> None:
    with serving("server"), opened("guest-a", socket.SOCK_DGRAM, port=40004) as client:
        client.connect((SERVER, PORT))
        for _ in range(3):
            client.send(b"?")
            assert client.recv(64).decode() == NAT["a"]
            backend.apply("nat-a", ruleset(policy("a")))


# -- the host ------------------------------------------------------------------

TRANSIT = "192.168.150.0/24"


@pytest.fixture(params=list(FOREIGN))
def foreign(request: pytest.FixtureRequest, world: None) -> str:
    sh(FOREIGN[request.param])
    return str(request.param)


@pytest.fixture
def transit(world: None) -> Iterator[None]:
    """nat-t on a transit bridge, and the host a router with 192.168.0.2 on br0."""
    with ExitStack() as stack:
        sh("ip address add 192.168.0.2/24 dev br0; sysctl -qw net.ipv4.ip_forward=1")
        sh("ip link add natns-host type bridge; ip link set natns-host up")
        sh("ip address add 192.168.150.1/24 dev natns-host")
        node(stack, "nat-t")
        patch("natns-host", "p-up-t", "nat-t", "upstream", "192.168.150.2/24")
        in_node("nat-t", "ip route add default via 192.168.150.1")
        yield


HOST_POLICY = host_policy.HostPolicy(
    transits=(host_policy.Transit("natns-host", IPv4Network(TRANSIT)),)
)


def stopping() -> str:
    """The chains of others that stop packets of the networks, in words."""
    accepts = host_accepts.accepts(HOST_POLICY)
    return "; ".join(map(str, stopping_chains.find(accepts, (), {4: "br0", 6: None})))


@pytest.mark.parametrize("name", ["nftables", "iptables"])
def test_transit_is_masqueraded(name: str, foreign: str, transit: None) -> None:
    if name == "iptables":
        # A legacy table once used stays for good: have them before.
        for table in ("nat", "raw", "mangle", "filter"):
            sh(f"iptables-legacy -t {table} -S")
    before = state()
    assert host_firewall.differences(HOST_POLICY, name)
    for _ in range(2):
        host_firewall.ensure(HOST_POLICY, name)
        assert host_firewall.differences(HOST_POLICY, name) == ()
    with serving("server"):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            if foreign == "nft":
                # An administrator's own chain: what it drops stays dropped.
                assert ignored(SERVER, "nat-t", kind)
                continue
            if foreign == "firewalld":
                # A zone lets it pass, and no rule of ours.
                with pytest.raises(OSError):
                    seen_by(SERVER, "nat-t", kind)
                continue
            assert seen_by(SERVER, "nat-t", kind) == "192.168.0.2"
    if foreign == "nft":
        assert "inet filter forward (policy drop) stops" in stopping()
        sh('nft add rule inet filter forward iifname "natns-host" accept')
        sh('nft add rule inet filter forward oifname "natns-host" accept')
        assert stopping() == ""
        with serving("server"):
            assert seen_by(SERVER, "nat-t", socket.SOCK_STREAM) == "192.168.0.2"
        sh(
            "nft flush chain inet filter forward; nft add rule inet filter forward iifname"
            " docker0 accept"
        )
    else:
        assert stopping() == ""
        # firewalld's zones are no business of rules.
        assert "NATNS" not in sh("nft list table inet firewalld", check=False)
    in_node("server", f"ip route add {TRANSIT} via 192.168.0.2")
    with serving("nat-t"):
        assert ignored("192.168.150.2", "server", socket.SOCK_DGRAM)
    with Capture("server", "eth0") as wire:
        inject("nat-t", ip_packet("10.0.0.5", SERVER, 17, udp(9, 9)))
        assert wire.packets() == []
    if foreign == "iptables-nft":
        assert "NATNS-FORWARD" in sh("iptables-nft -S")
        assert "NATNS-FORWARD" in sh("iptables-nft -L")
    host_firewall.remove()
    assert state() == before
    host_firewall.remove()
    assert state() == before


def test_nothing_is_created_by_looking(world: None) -> None:
    before = state()
    host_firewall.differences(HOST_POLICY, "nftables")
    host_firewall.remove()
    assert state() == before
    assert Path("/proc/thread-self/net/ip_tables_names").read_text() == ""


TAMPERING = {
    "nftables": "nft flush chain ip filter NATNS-FORWARD; nft delete table inet natns;"
    " iptables-nft -A FORWARD -i docker1 -j DROP;"
    " iptables-legacy -D FORWARD 2; iptables-legacy -I FORWARD -j NATNS-FORWARD",
    "iptables": "iptables-legacy -t nat -F NATNS-POSTROUTING;"
    " iptables-legacy -I NATNS-FORWARD -j DROP; iptables-nft -F FORWARD",
}


@pytest.mark.parametrize("name", list(TAMPERING))
def test_alterations_are_named_and_mended(name: str, transit: None) -> None:
    sh(FOREIGN["iptables-nft"])
    sh(FOREIGN["iptables-legacy"])
    host_firewall.ensure(HOST_POLICY, name)
    sh(TAMPERING[name])
    found = host_firewall.differences(HOST_POLICY, name)
    assert len(found) >= 3
    host_firewall.ensure(HOST_POLICY, name)
    assert host_firewall.differences(HOST_POLICY, name) == ()
    host_firewall.ensure(host_policy.HostPolicy(), name)
    assert "NATNS" not in state()
    assert "natns" not in state()


@pytest.mark.parametrize("name", ["nftables", "iptables"])
@pytest.mark.parametrize("drop", ["iptables-nft", "iptables-legacy"])
def test_twins_where_bridged_frames_are_filtered(name: str, drop: str, world: None) -> None:
    """bridge-nf-call-iptables=1, FORWARD drops, and a NAT rule that would hit private frames."""
    switch = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if not switch.exists():
        pytest.skip("this kernel has no br_netfilter")
    switch.write_text("1")
    nat = backends.named(name)
    for letter in NAT:
        nat.apply(f"nat-{letter}", ruleset(policy(letter)))
    sh(FOREIGN[drop])
    # The order that leaves most to us: of two tables of NAT, the later one comes first.
    sh("iptables-legacy -t raw -S; iptables-legacy -S; iptables-legacy -t nat -S")
    # Translation that would hit private frames, on their arrival too.
    sh(f"{drop} -t nat -A PREROUTING -s 10.0.0.0/24 -p tcp -j DNAT --to-destination 10.0.0.78")
    sh(f"{drop} -t nat -A POSTROUTING -s 10.0.0.0/24 -j SNAT --to-source 10.0.0.77")
    with serving("server"):
        assert ignored(SERVER, "guest-a", socket.SOCK_STREAM)
    wanted = host_policy.HostPolicy(
        private=(host_policy.Private("virbr10"), host_policy.Private("virbr11")),
        provider=tuple(
            host_policy.Provider("br0", IPv4Address(address)) for address in NAT.values()
        ),
        bridge_nf=True,
    )
    before = state()
    host_firewall.ensure(wanted, name)
    assert host_firewall.differences(wanted, name) == ()
    with serving("server"), serving("nat-a", 53), Capture("nat-a", "virbr10") as inner:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            for letter, address in NAT.items():
                assert seen_by(SERVER, f"guest-{letter}", kind, source=40005) == address
        assert seen_by(GATEWAY, "guest-a", socket.SOCK_DGRAM, 53) == GUEST
        assert "10.0.0.77" not in {packet.source for packet in inner.packets()}
    # Each of the twins in a zone of its own, untranslated.
    known = sh(f"conntrack -L -p tcp -s {GUEST} 2>/dev/null", check=False).splitlines()
    assert len(known) == len(NAT)
    assert len({line.partition("zone=")[2].split()[0] for line in known}) == len(NAT)
    assert switch.read_text().strip() == "1"
    host_firewall.remove()
    assert state() == before
