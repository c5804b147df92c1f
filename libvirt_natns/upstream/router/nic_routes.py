# SPDX-License-Identifier: LGPL-2.1-or-later
"""A route over a NIC, captured so that it can be made again.

The body is the kernel's own message (see ``nic_addresses``).  The NIC's index is left out of
it, also as a next hop of a multipath route; indexes of other links stay.

Known limit: a route by a nexthop object (ip-nexthop(8)) cannot be made again.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from socket import AF_INET, AF_INET6

from libvirt_natns.kernel import netlink
from libvirt_natns.kernel.netlink import NLA_TYPE, Attrs, aligned
from libvirt_natns.upstream.router.nic_addresses import SOON

HEADER = 12
"""Octets of struct rtmsg: family, lengths, tos, table, protocol, scope, type, flags."""

KERNEL_TYPES = (
    netlink.RTN_LOCAL,
    netlink.RTN_BROADCAST,
    netlink.RTN_ANYCAST,
    netlink.RTN_MULTICAST,
)
"""Types of routes that the kernel makes with an address."""

LINK_LOCAL_ROUTES = ("fe80::/64", "ff00::/8")
"""Destinations of routes that the kernel makes for each link with IPv6."""

USER_HZ = 100
NEXT_HOP = 8
"""Octets of struct rtnexthop: length, flags, hops, index."""


@dataclass(frozen=True, slots=True)
class NicRoute:
    """A route, in any table; ``expires`` in seconds, 0 for never."""

    body: str
    expires: int = 0

    @property
    def attributes(self) -> Attrs:
        return Attrs.parse(bytes.fromhex(self.body), HEADER)

    @property
    def family(self) -> int:
        return bytes.fromhex(self.body)[0]

    @property
    def table(self) -> int:
        return self.attributes.number(netlink.RTA_TABLE) or bytes.fromhex(self.body)[4]

    @property
    def protocol(self) -> int:
        """The route's origin, RTPROT_*."""
        return bytes.fromhex(self.body)[5]

    @property
    def kind(self) -> int:
        """The route's type, RTN_*."""
        return bytes.fromhex(self.body)[7]

    @property
    def metric(self) -> int:
        return self.attributes.number(netlink.RTA_PRIORITY) or 0

    @property
    def lasts(self) -> bool:
        """True if the route does not expire; an advertised route does, unless it is renewed."""
        return not self.expires

    @property
    def is_default(self) -> bool:
        return bytes.fromhex(self.body)[1] == 0 and self.table == netlink.RT_TABLE_MAIN

    @property
    def is_link_local(self) -> bool:
        """True if the kernel makes the route for each link that has IPv6."""
        return self.destination in LINK_LOCAL_ROUTES

    @property
    def is_way(self) -> bool:
        """True if the main table leads to other stations by it, not only on the link."""
        to = ip_network(self.destination)
        unicast = self.kind == netlink.RTN_UNICAST and self.table == netlink.RT_TABLE_MAIN
        return unicast and not (to.is_link_local or to.is_multicast)

    @property
    def destination(self) -> str:
        """The destination with its prefix length."""
        length = bytes.fromhex(self.body)[1]
        empty = bytes(4 if self.family == AF_INET else 16)
        return f"{ip_address(self.attributes.get(netlink.RTA_DST) or empty)}/{length}"

    @property
    def gateway(self) -> str | None:
        address = self.attributes.get(netlink.RTA_GATEWAY)
        return str(ip_address(address)) if address else None

    @property
    def links(self) -> set[int]:
        """The indexes of the other links that the route leads over."""
        return links_of(bytes.fromhex(self.body))

    @property
    def source(self) -> str | None:
        """The source address of packets that leave by the route."""
        address = self.attributes.get(netlink.RTA_PREFSRC)
        return str(ip_address(address)) if address else None

    def without_source(self) -> "NicRoute":
        """Return the route with no source address for packets."""
        kept = self.attributes.without(netlink.RTA_PREFSRC)
        return replace(self, body=(bytes.fromhex(self.body)[:HEADER] + kept.pack()).hex())

    def __str__(self) -> str:
        through = f" via {self.gateway}" if self.gateway else ""
        table = f" in table {self.table}" if self.table != netlink.RT_TABLE_MAIN else ""
        return f"route {self.destination}{through}{table}"

    def request(self, link: int, elapsed: float = 0.0) -> bytes:
        """Return the request that makes the route over a link, ``elapsed`` seconds later."""
        body = bytes.fromhex(self.body)
        attributes = [_with_link(kind, value, link) for kind, value in self.attributes]
        if self.expires:
            left = max(SOON, int(self.expires - elapsed))
            attributes.append(netlink.u32(netlink.RTA_EXPIRES, left))
        return body[:HEADER] + netlink.pack(attributes)


def _with_link(kind: int, value: bytes, link: int) -> netlink.Attribute:
    """Return an attribute with the index of a link where the index was left out."""
    if kind & NLA_TYPE == netlink.RTA_OIF and not any(value):
        return kind, struct.pack("=i", link)
    if kind & NLA_TYPE == netlink.RTA_MULTIPATH:
        return kind, _renumbered(value, 0, link)
    return kind, value


def _renumbered(hops: bytes, old: int, new: int) -> bytes:
    """Return next hops with another index in place of ``old``, and without their state."""
    renumbered = b""
    for index, hop in _next_hops(hops):
        flags, weight = hop[2] & netlink.RTNH_F_ONLINK, hop[3]
        header = struct.pack("=HBBi", len(hop), flags, weight, new if index == old else index)
        renumbered += header + hop[NEXT_HOP:] + bytes(-len(hop) % 4)
    return renumbered


def _next_hops(hops: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the link of each next hop of a multipath route, and all octets of the next hop."""
    start = 0
    while start + NEXT_HOP <= len(hops):
        length, _, _, index = struct.unpack_from("=HBBi", hops, start)
        if length < NEXT_HOP:
            return
        yield index, hops[start : start + length]
        start += aligned(length)


def parse(body: bytes, link: int) -> NicRoute:
    """Return a route from the kernel's listing, without the index of ``link``."""
    attributes = Attrs.parse(body, HEADER)
    expires = 0
    times = attributes.get(netlink.RTA_CACHEINFO)
    if times and body[0] == AF_INET6:
        (ticks,) = struct.unpack_from("=i", times, 8)
        # 0 is never, so a route in its last second has one second left.
        expires = max(1, ticks // USER_HZ) if ticks else 0
    kept = []
    for kind, value in attributes.without(netlink.RTA_CACHEINFO, netlink.RTA_EXPIRES):
        if kind & NLA_TYPE == netlink.RTA_OIF and struct.unpack("=i", value)[0] == link:
            kept.append((kind, bytes(4)))
        elif kind & NLA_TYPE == netlink.RTA_MULTIPATH:
            kept.append((kind, _renumbered(value, link, 0)))
        else:
            kept.append((kind, value))
    (flags,) = struct.unpack_from("=I", body, 8)
    header = body[:8] + struct.pack("=I", flags & netlink.RTNH_F_ONLINK)
    return NicRoute((header + netlink.pack(kept)).hex(), expires)


def links_of(body: bytes) -> set[int]:
    """Return the indexes of the links that a listed route leads over."""
    attributes = Attrs.parse(body, HEADER)
    single = attributes.number(netlink.RTA_OIF)
    hops = {index for index, _ in _next_hops(attributes.get(netlink.RTA_MULTIPATH) or b"")}
    return hops | ({single} if single else set())


def is_by_kernel(body: bytes) -> bool:
    """True if the kernel makes a listed route by itself, with an address."""
    return body[7] in KERNEL_TYPES and body[5] == netlink.RTPROT_KERNEL


def has_next_hop_object(body: bytes) -> bool:
    """True if a listed route leads where a nexthop object says (ip-nexthop(8))."""
    return Attrs.parse(body, HEADER).get(netlink.RTA_NH_ID) is not None
