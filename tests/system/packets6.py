# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small world that speaks IPv6, in the manner of ``packets``.

A guest has a private address and a public one, whose prefix is routed to its namespace.

    guest, other (::5, ::6 of both subnets)    neighbour ::50    server ::1
        | virbr10                                 |                 |   | 2001:db8:203::1
      nat-a ------- 2001:db8:77::100 ------------br0 ---------------+    far 2001:db8:203::9
"""

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import packets
from lab_base import ip
from packets import QUIET, Packet, in_node, inside, own_network, sh, summed

from libvirt_natns.kernel import netns

PRIVATE, PUBLIC, OUTSIDE = "fd00:10", "2001:db8:100", "2001:db8:77"
GATEWAY, PUBLIC_GATEWAY = f"{PRIVATE}::1", f"{PUBLIC}::1"
GUEST, OTHER = f"{PRIVATE}::5", f"{PRIVATE}::6"
OPEN, OPEN_OTHER = f"{PUBLIC}::5", f"{PUBLIC}::6"
SERVER, NEIGHBOUR, NAT, OWN = (f"{OUTSIDE}::{host}" for host in ("1", "50", "100", "110"))
FAR = "2001:db8:203::9"
ETHERTYPE = 0x86DD
NEIGHBOUR_TYPES = range(130, 144)


def node(stack: ExitStack, name: str) -> None:
    ip(f"netns add {name}")
    stack.callback(ip, f"netns del {name}")
    quick = "net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0"
    inside(name, f"sysctl -qw {quick} net.ipv6.conf.default.accept_ra=0; ip link set lo up")


def patch(bridge: str, port: str, target: str, link: str, *addresses: str) -> None:
    """A veth pair from a bridge of the host into a node."""
    ip(
        f"link add {port} type veth peer name {link} netns {target}",
        f"link set {port} master {bridge} up",
    )
    given = (f"address add {address}/64 dev {link} nodad" for address in addresses)
    ip(f"link set {link} up", *given, namespace=target)


@contextmanager
def small_world() -> Iterator[ExitStack]:
    """A fresh host with the nodes above; what the stack is given ends with it."""
    with own_network(), ExitStack() as stack:
        quiet = "net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1"
        sh(f"ip link set lo up; sysctl -qw {quiet}")
        for bridge in ("br0", "virbr10"):
            sh(f"ip link add {bridge} type bridge mcast_snooping 0; ip link set {bridge} up")
        for name in ("server", "neighbour", "far", "nat-a", "guest", "other"):
            node(stack, name)
        patch("br0", "p-server", "server", "eth0", SERVER)
        patch("br0", "p-neighbour", "neighbour", "eth0", NEIGHBOUR)
        _beyond()
        patch("virbr10", "p-in", "nat-a", "virbr10", GATEWAY, PUBLIC_GATEWAY)
        patch("br0", "p-up", "nat-a", "upstream", NAT)
        in_node(
            "nat-a",
            "sysctl -qw net.ipv6.conf.all.forwarding=1",
            f"ip route add default via {SERVER}",
        )
        for name, *addresses in (("guest", GUEST, OPEN), ("other", OTHER, OPEN_OTHER)):
            patch("virbr10", f"p-{name}", name, "eth0", *addresses)
            in_node(name, f"ip route add default via {GATEWAY}")
        yield stack


def _beyond() -> None:
    """What is behind the provider's router, and what it routes to us."""
    inside("server", "ip link add eth1 type veth peer name eth0 netns far")
    in_node(
        "server",
        "sysctl -qw net.ipv6.conf.all.forwarding=1",
        "ip link set eth1 up",
        "ip address add 2001:db8:203::1/64 dev eth1 nodad",
        f"ip route add {PUBLIC}::/64 via {NAT}",
    )
    in_node(
        "far",
        "ip link set eth0 up",
        f"ip address add {FAR}/64 dev eth0 nodad",
        "ip route add default via 2001:db8:203::1",
    )


def icmpv6(source: str, target: str, kind: int, body: bytes, code: int = 0) -> bytes:
    """A message with its checksum; ``body`` is what follows that."""
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    message = struct.pack("!BBH", kind, code, 0) + body
    return summed(ends + struct.pack("!II", len(message), socket.IPPROTO_ICMPV6), message, 2)


def udp(source: str, target: str, ports: tuple[int, int], data: bytes = b"forged") -> bytes:
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    datagram = packets.udp(*ports, data)
    return summed(ends + struct.pack("!II", len(datagram), socket.IPPROTO_UDP), datagram, 6)


def ip_packet(source: str, target: str, protocol: int, payload: bytes, hops: int = 64) -> bytes:
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    return struct.pack("!IHBB", 6 << 28, len(payload), protocol, hops) + ends + payload


def inject(node: str | None, packet: bytes, link: str, target: bytes) -> None:
    """Send an IP packet as it is, in a frame to a MAC on a link."""
    with netns.entered(node):
        out = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETHERTYPE))
    with out:
        out.sendto(packet, (link, ETHERTYPE, 0, 0, target))


def index(node: str | None, link: str) -> int:
    """The number of an interface."""
    return int(inside(node, f"ip -o link show {link}").partition(":")[0])


def link_local(node: str | None, link: str) -> str:
    text = inside(node, f"ip -6 -brief address show dev {link} scope link")
    return next(word for word in text.split() if word.startswith("fe80")).partition("/")[0]


class Capture(packets.Capture):
    """All IPv6 packets that pass one interface of a node, but those among neighbours."""

    def parse(self, ethertype: int, data: bytes) -> Packet | None:
        """Return the packet, if it is one to look at."""
        if ethertype != ETHERTYPE or self._among_neighbours(data):
            return None
        source, target = (socket.inet_ntop(socket.AF_INET6, data[at : at + 16]) for at in (8, 24))
        return Packet(source, target, data[6], data[40:])

    @staticmethod
    def _among_neighbours(data: bytes) -> bool:
        # Reports of listeners have a hop-by-hop header ahead.
        return data[6] == 0 or (data[6] == 58 and data[40] in NEIGHBOUR_TYPES)


def pings(node: str | None, target: str, source: str = "", scope: int = 0) -> bool:
    """Whether it is answered; ``scope`` is the link of a link-local target, by number."""
    with netns.entered(node):
        raw = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    raw.settimeout(QUIET)
    with raw:
        if source:
            raw.bind((source, 0))
        try:
            raw.sendto(struct.pack("!BBHHH", 128, 0, 0, 77, 1), (target, 0, 0, scope))
            while raw.recv(2048)[0] != 129:
                pass
        except OSError:
            # Rules that drop what leaves are an error to who sends it.
            return False
        return True
