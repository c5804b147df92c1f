# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one network may take of the machine's neighbour and conntrack tables.

Each probe sends PACKETS packets, and its control is the same probe through a namespace
without rules: no more, as the neighbour tables are the whole machine's.

    guest 10.0.0.5/16, 10.9.0.5/16       server 192.168.0.1/16, 2001:db8:77::1
          fd00:10::5                        |
        | virbr10                           |
      nat .1 ------- 192.168.0.100 ------- br0     2001:db8:100::/64 is routed to nat
"""

import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path

import packets
import packets6
import pytest
from packets import PORT, in_node, inside, mac, opened, own_network, seen_by, serving, sh

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[2]))

from dataclasses import replace

from libvirt_natns.engine.plan.sysctls import SYSCTLS, SYSCTLS_WITH_IPV6
from libvirt_natns.firewall import backends, limits
from libvirt_natns.firewall.namespace_policy import Policy
from libvirt_natns.firewall.namespace_rules import ruleset
from libvirt_natns.kernel import conntrack, netns
from libvirt_natns.model.publication import Forward

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PACKETS = 250
GROUP, REST = 50, 0.01
"""Packets that are sent at once, and the seconds after each group of them."""
MOST = limits.BURST + 30
"""Entries that a burst may make, with the seconds that the packets take."""

GUEST, SECOND, GATEWAY = "10.0.0.5", "10.9.0.5", "10.0.0.1"
SERVER, OUTSIDE = "192.168.0.1", "192.168.0.100"
GUEST6, GATEWAY6 = "fd00:10::5", "fd00:10::1"
SERVER6, OUTSIDE6 = "2001:db8:77::1", "2001:db8:77::100"
ARP, IPV6 = 0x0806, 0x86DD

POLICY = Policy(
    inner="virbr10",
    upstream="upstream",
    subnets=(
        IPv4Network("10.0.0.0/16"),
        IPv4Network("10.9.0.0/16"),
        IPv6Network("fd00:10::/64"),
        IPv6Network("2001:db8:100::/64"),
    ),
    gateways=(IPv4Address(GATEWAY), IPv4Address("10.9.0.1"), IPv6Address(GATEWAY6)),
    address=IPv4Address(OUTSIDE),
    address6=IPv6Address(OUTSIDE6),
    public=(IPv6Network("2001:db8:100::/64"),),
    segments=(IPv4Network("192.168.0.0/16"), IPv6Network("2001:db8:77::/64")),
)


@contextmanager
def world() -> Iterator[None]:
    """A fresh one has empty tables: flushing keeps what a route refers to."""
    with own_network(), ExitStack() as stack:
        sh("ip link set lo up; sysctl -qw net.ipv6.conf.default.disable_ipv6=1")
        for bridge in ("br0", "virbr10"):
            sh(f"ip link add {bridge} type bridge mcast_snooping 0; ip link set {bridge} up")
        for name in ("server", "nat", "guest"):
            packets6.node(stack, name)
        for key, value in (*SYSCTLS, *SYSCTLS_WITH_IPV6):
            in_node("nat", f"sysctl -qw {key.replace('/', '.')}={value}")
        link("virbr10", "nat", "virbr10", f"{GATEWAY}/16", "10.9.0.1/16", f"{GATEWAY6}/64",
             "2001:db8:100::1/64")  # fmt: skip
        link("br0", "nat", "upstream", f"{OUTSIDE}/16", f"{OUTSIDE6}/64")
        link("br0", "server", "eth0", f"{SERVER}/16", f"{SERVER6}/64")
        link("virbr10", "guest", "eth0", f"{GUEST}/16", f"{GUEST6}/64")
        in_node("server", f"ip route add 2001:db8:100::/64 via {OUTSIDE6}")
        # Without rules nothing is translated.
        in_node("server", f"ip route add 10.0.0.0/16 via {OUTSIDE}")
        in_node("guest", f"ip route add default via {GATEWAY}")
        in_node("guest", f"ip route add default via {GATEWAY6}")
        yield


def link(bridge: str, node: str, name: str, *addresses: str) -> None:
    port = f"p-{node[:3]}-{name[:3]}"
    sh(f"ip link add {port} type veth peer name {name} netns {node}")
    sh(f"ip link set {port} master {bridge} up")
    in_node(node, f"ip link set {name} up")
    for address in addresses:
        in_node(node, f"ip address add {address} dev {name}{' nodad' if ':' in address else ''}")


@pytest.fixture(params=["nftables", "iptables"])
def backend(request: pytest.FixtureRequest) -> backends.Backend:
    return backends.named(request.param)


def entries() -> int:
    """How many neighbours the namespace has asked for, or knows."""
    found = inside("nat", "ip neigh show nud all").splitlines()
    return len([line for line in found if "NOARP" not in line])


# -- probes ---------------------------------------------------------------------


def frames(node: str, ethertype: int, target: bytes, made: Iterator[bytes]) -> None:
    with netns.entered(node):
        out = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ethertype))
    with out:
        for number, packet in enumerate(made):
            out.sendto(packet, ("eth0", ethertype, 0, 0, target))
            if number % GROUP == GROUP - 1:
                time.sleep(REST)


def addresses(first: str) -> list[str]:
    return [str(ip_address(first) + number) for number in range(PACKETS)]


def by_ipv4(source: str, target: str, *, node: str = "guest", port: int = 9) -> None:
    """Packets from or to many addresses; the end that is many is given with a +."""
    ends = zip(*(many(end) for end in (source, target)), strict=True)
    udp, echo = packets.udp(9, port), b"\x08\0\xf7\xff" + bytes(4)
    protocol, payload = (1, echo) if target == GATEWAY else (17, udp)
    made = (packets.ip_packet(one, other, protocol, payload) for one, other in ends)
    frames(node, 0x0800, mac("nat", "virbr10" if node == "guest" else "upstream"), made)


def many(end: str) -> list[str]:
    return addresses(end[:-1]) if end.endswith("+") else [end] * PACKETS


def by_ipv6(source: str, target: str, *, node: str = "guest") -> None:
    made = (
        packets6.ip_packet(*pair, 58, packets6.icmpv6(*pair, 128, bytes(4)))
        for pair in zip(many(source), many(target), strict=True)
    )
    frames(node, IPV6, mac("nat", "virbr10" if node == "guest" else "upstream"), made)


def by_arp() -> None:
    own = mac("guest", "eth0")
    head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + own
    ends = ((socket.inet_aton(sender), socket.inet_aton(GATEWAY)) for sender in many("10.0.4.0+"))
    made = (head + sender + bytes(6) + target for sender, target in ends)
    frames("guest", ARP, b"\xff" * 6, made)


def by_solicitation() -> None:
    own = b"\x01\x01" + mac("guest", "eth0")
    body = bytes(4) + socket.inet_pton(socket.AF_INET6, GATEWAY6) + own
    made = (
        packets6.ip_packet(sender, GATEWAY6, 58, packets6.icmpv6(sender, GATEWAY6, 135, body), 255)
        for sender in many("fd00:10::4:0+")
    )
    frames("guest", IPV6, mac("nat", "virbr10"), made)


Probe = Callable[[], None]

PROBES: dict[str, tuple[Probe, tuple[str, ...]]] = {
    "subnet-to-subnet": (lambda: by_ipv4(GUEST, "10.9.4.0+"), ("nftables", "iptables")),
    "on-link-outside": (lambda: by_ipv4(GUEST, "192.168.4.0+"), ("nftables", "iptables")),
    "on-link-outside-6": (
        lambda: by_ipv6(GUEST6, "2001:db8:77::4:0+"),
        ("nftables", "iptables"),
    ),
    "pings-from-outside": (
        lambda: by_ipv6(SERVER6, "2001:db8:100::4:0+", node="server"),
        ("nftables", "iptables"),
    ),
    "solicitations": (by_solicitation, ("nftables", "iptables")),
    "arp": (by_arp, ("nftables",)),
    "senders-asking": (lambda: by_ipv4("10.0.4.0+", GATEWAY), ("nftables",)),
    "senders-asking-6": (lambda: by_ipv6("fd00:10::4:0+", GATEWAY6), ("nftables",)),
    "senders-answered-outside": (
        lambda: by_ipv4("10.0.4.0+", SERVER, port=PORT),
        ("nftables",),
    ),
}
"""Each with the backends that limit it."""


@pytest.mark.parametrize(
    ("backend", "name"),
    [(backend, name) for name, (_, backends) in PROBES.items() for backend in backends],
    indirect=["backend"],
)
def test_new_neighbours(backend: backends.Backend, name: str) -> None:
    probe, _ = PROBES[name]
    with world(), serving("server"):
        probe()
        time.sleep(0.2)
        # Of echo replies the kernel holds no more back.
        assert entries() > MOST, "the control: without rules nothing limits them"
    with world(), serving("server"), serving("nat", 53):
        backend.apply("nat", ruleset(POLICY))
        assert seen_by(SERVER, "guest", socket.SOCK_DGRAM) == OUTSIDE
        before = entries()
        probe()
        time.sleep(0.2)
        assert 10 < entries() - before < MOST
        # While the limit holds, who was met before is served.
        probe()
        for kind in packets.KINDS:
            assert seen_by(SERVER, "guest", kind) == OUTSIDE
        assert seen_by(GATEWAY, "guest", socket.SOCK_DGRAM, 53) == GUEST


@pytest.mark.parametrize(
    ("backend", "name", "known"),
    [
        ("nftables", "subnet-to-subnet", 32),
        ("nftables", "on-link-outside-6", 32),
        ("nftables", "on-link-outside", 32),
        # Nothing that a stranger outside names becomes known.
        ("nftables", "pings-from-outside", 0),
        ("iptables", "pings-from-outside", 0),
    ],
    indirect=["backend"],
)
def test_patience(
    backend: backends.Backend, name: str, known: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Addresses that were named one by one cannot all be asked for at once."""
    here = sys.modules[__name__]
    monkeypatch.setattr(here, "PACKETS", 150)
    # With the rate and the size of the product this would take minutes.
    monkeypatch.setattr(limits, "RATE", 100)
    monkeypatch.setattr(limits, "BURST", 40)
    monkeypatch.setattr(limits, "OVER", "limit rate over 100/second burst 40 packets")
    monkeypatch.setattr(limits, "KNOWN_SIZE", 32)
    probe, _ = PROBES[name]
    with world(), serving("server"):
        backend.apply("nat", ruleset(POLICY))
        assert seen_by(SERVER, "guest", socket.SOCK_DGRAM) == OUTSIDE
        with monkeypatch.context() as patiently:
            patiently.setattr(here, "GROUP", 8)
            patiently.setattr(here, "REST", 0.1)
            probe()
        assert entries() > 140, "the pace is that of the limit"
        for _ in range(50):
            if not asked():
                break
            time.sleep(0.1)
        probe()
        assert 10 < asked() < known + 40 + 30


def asked() -> int:
    """How many neighbours the namespace asks for now."""
    return len(inside("nat", "ip neigh show nud incomplete").splitlines())


def test_addresses_that_packets_bring_are_no_change_of_the_rules(
    backend: backends.Backend,
) -> None:
    with world():
        backend.apply("nat", ruleset(POLICY))
        before = backend.digest("nat")
        by_ipv4(GUEST, "10.9.4.0+")
        assert backend.digest("nat") == before
        if backend.name == "nftables":
            assert "10.9.4." in inside("nat", "nft list table inet natns")
            in_node("nat", "nft delete table arp natns")
            assert backend.digest("nat") != before


# -- flows ----------------------------------------------------------------------


def tracked() -> int:
    return int(inside("nat", "cat /proc/sys/net/netfilter/nf_conntrack_count"))


def send(count: int, first: int = 10_000) -> None:
    """As many flows, each of one packet."""
    with opened("guest", socket.SOCK_DGRAM) as out:
        for number in range(count):
            out.sendto(b"?", (SERVER, first + number))


@pytest.mark.parametrize("target", ["outside", "gateway"])
def test_number_of_flows(backend: backends.Backend, target: str) -> None:
    few = replace(POLICY, max_flows=256)
    with world(), serving("server"), opened("guest", socket.SOCK_STREAM) as client:
        backend.apply("nat", ruleset(POLICY))
        client.connect((SERVER, PORT))
        client.recv(64)
        send(1500)
        assert tracked() >= 1500, "the control: the default has room for them"
        inside("nat", "conntrack -D -p udp 2>/dev/null", check=False)
        backend.apply("nat", ruleset(few))
        if target == "outside":
            send(1500)
        else:
            for number in range(5):
                by_source_port(300, 2000 + 300 * number)
        assert 128 < tracked() < 512
        client.send(b"?")
        with pytest.raises(TimeoutError):
            seen_by(SERVER, "guest", socket.SOCK_DGRAM, patience=packets.QUIET)
        assert established(client)


def by_source_port(count: int, first: int) -> None:
    ports = range(first, first + count)
    made = (packets.ip_packet(GUEST, GATEWAY, 17, packets.udp(port, 53)) for port in ports)
    frames("guest", 0x0800, mac("nat", "virbr10"), made)


def established(client: socket.socket) -> bool:
    """Whether the other end acknowledges what is sent."""
    client.send(b"?")
    time.sleep(packets.QUIET)
    unacknowledged = struct.unpack_from("I", client.getsockopt(6, 11, 104), 24)[0]
    return bool(unacknowledged == 0)


def test_many_flows_cost_little(backend: backends.Backend) -> None:
    """An exact count in one list would cost half a minute here."""
    gone = Forward(
        "uuid", "guest web", "net", "udp", IPv4Address(OUTSIDE), 7, 7, IPv4Address(GUEST), 7, 7
    )
    with world():
        backend.apply("nat", ruleset(POLICY))
        start = time.monotonic()
        send(15_000)
        assert time.monotonic() - start < 8
        assert tracked() >= 15_000
        start = time.process_time()
        conntrack.cut("nat", (gone,), IPv4Address(OUTSIDE))
        assert time.process_time() - start < 0.2
        assert tracked() >= 15_000
