# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads links, addresses, routes and neighbours from the kernel (rtnetlink(7)).

pyroute2 computes for 0.3 ms to describe a link with all its attributes.  The few that each
network is asked for, again and again, take 0.03 ms here.  This module changes nothing.
"""

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from libvirt_natns.addresses import FAMILIES, Address, Family, Interface, IPNetwork, on_link
from libvirt_natns.kernel import netlink
from libvirt_natns.kernel.netlink import Attrs

NUD_ANSWERED = netlink.NUD_REACHABLE | netlink.NUD_STALE | netlink.NUD_DELAY | netlink.NUD_PROBE
"""The neighbour has answered, or has spoken."""

SKIP_STATISTICS = netlink.pack(
    [netlink.u32(netlink.IFLA_EXT_MASK, netlink.RTEXT_FILTER_SKIP_STATS)]
)
"""Attributes of a request for links without their counters."""


@dataclass(frozen=True, slots=True)
class Link:
    """A link with the indexes of its bridge and peer, if any; ``mtu`` in octets.

    ``hairpin``: the link is a bridge port that may send a frame back where it came in.
    ``all_multicast``: the link is a bridge port that gets all multicast, asked for or not.
    """

    index: int
    name: str
    up: bool
    mtu: int
    mac: str
    alias: str
    kind: str
    master: int | None
    peer: int | None
    hairpin: bool
    all_multicast: bool = False


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """An address of a link."""

    link: int
    interface: Interface


@dataclass(frozen=True, slots=True)
class Hop:
    """A way that a route leads: the index of its link, and the router there, if any."""

    link: int
    gateway: Address | None


@dataclass(frozen=True, slots=True)
class RouteEntry:
    """A route; ``kind``, ``scope``, ``tos`` and ``protocol`` are the kernel's numbers.

    ``mtu``, in octets, is a limit below that of the link.  ``hops`` are all ways of a
    route; ``gateway`` and ``link`` are None where it has several.
    """

    destination: IPNetwork
    gateway: Address | None
    link: int | None
    priority: int | None
    table: int
    kind: int
    scope: int
    tos: int
    protocol: int
    mtu: int | None = None
    hops: tuple[Hop, ...] = ()


@dataclass(frozen=True, slots=True)
class ProxiedNeighbour:
    """An address for which the link answers its neighbours in place of its owner."""

    link: int
    address: Address


ROUTE_HEADER = 12
"""Octets ahead of a route's attributes: struct rtmsg."""

_SOCKET_FAMILIES: dict[Family, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
_VERSIONS = {number: version for version, number in _SOCKET_FAMILIES.items()}


class Session(netlink.Socket):
    """A socket in the namespace in which it was made; for one thread at a time."""

    def link(self, name: str) -> Link | None:
        """Return a link by its name, or None.  Raises OSError."""
        if not 0 < len(name) < netlink.IFNAMSIZ:
            return None
        wanted = netlink.pack([netlink.text(netlink.IFLA_IFNAME, name)])
        body = self.get(netlink.RTM_GETLINK, bytes(16) + wanted + SKIP_STATISTICS)
        return _link(body) if body else None

    def links(self) -> list[Link]:
        """Return all links.  Raises OSError and InterruptedDumpError."""
        request = bytes(16) + SKIP_STATISTICS
        return [_link(body) for body in self.dump(netlink.RTM_GETLINK, request)]

    def addresses(self, link: int | None = None, *, link_local: bool = True) -> list[LinkAddress]:
        """Return all addresses of both families, or those of one link.

        Without ``link_local``, addresses that are valid on one link alone are left out.
        Raises OSError and InterruptedDumpError.
        """
        request = struct.pack("=BBBBI", socket.AF_UNSPEC, 0, 0, 0, 0)
        return [
            _address(body)
            for body in self.dump(netlink.RTM_GETADDR, request)
            if body[0] in _VERSIONS
            and (link_local or body[3] != netlink.RT_SCOPE_LINK)
            and link in (None, int.from_bytes(body[4:8], sys.byteorder))
        ]

    def routes(self, *families: Family, local: bool = True) -> list[RouteEntry]:
        """Return all routes of all tables, of some families or of both.

        Without ``local``, routes to the machine itself are left out (the table "local").
        Raises OSError and InterruptedDumpError.
        """
        return [
            _route(body)
            for family in families or FAMILIES
            for body in self._route_bodies(family, local=local)
        ]

    def hops(self, family: Family) -> list[Hop]:
        """Return the ways of a family's routes, without local ones.  Raises as ``routes`` does."""
        bodies = self._route_bodies(family, local=False)
        return [hop for body in bodies for hop in hops(Attrs.parse(body, ROUTE_HEADER))]

    def _route_bodies(self, family: Family, *, local: bool) -> Iterator[bytes]:
        request = struct.pack("=BBBBBBBBI", _SOCKET_FAMILIES[family], *[0] * 8)
        for body in self.dump(netlink.RTM_GETROUTE, request):
            # The kernel notes a single destination, such as its path's MTU, as a cloned route.
            table, flags = struct.unpack_from("=4xB3xI", body)
            if (local or table != netlink.RT_TABLE_LOCAL) and not flags & netlink.RTM_F_CLONED:
                yield body

    def route_of(
        self, destination: Address, source: Address | None = None, inward: int | None = None
    ) -> RouteEntry:
        """Return the route of one packet, which the kernel looks up and does not send.

        ``inward`` is the index of the link that the packet comes in by; None is a packet of
        the namespace's own.  Raises OSError with the reason why the packet goes nowhere.
        """
        ends = [(netlink.RTA_DST, destination.packed)]
        if source is not None:
            ends.append((netlink.RTA_SRC, source.packed))
        if inward is not None:
            ends.append(netlink.u32(netlink.RTA_IIF, inward))
        family: Family = 4 if destination.version == 4 else 6
        bits = destination.max_prefixlen
        from_bits = bits if source is not None else 0
        header = struct.pack("=BBBBBBBBI", _SOCKET_FAMILIES[family], bits, from_bits, *[0] * 6)
        body = self.get(netlink.RTM_GETROUTE, header + netlink.pack(ends))
        if body is None:
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        return _route(body)

    def has_answered(self, link: int, address: Address) -> bool:
        """True if the kernel knows the MAC address of a neighbour.  Raises OSError."""
        family: Family = 4 if address.version == 4 else 6
        request = struct.pack("=BxxxiHBB", _SOCKET_FAMILIES[family], link, 0, 0, 0)
        body = self.get(
            netlink.RTM_GETNEIGH, request + netlink.pack([(netlink.NDA_DST, address.packed)])
        )
        known = NUD_ANSWERED | netlink.NUD_PERMANENT
        return body is not None and bool(struct.unpack_from("=8xH", body)[0] & known)

    def proxied_neighbours(self) -> list[ProxiedNeighbour]:
        """Return all IPv6 addresses that are answered for.

        Raises OSError and InterruptedDumpError.
        """
        request = struct.pack("=BxxxiHBB", socket.AF_INET6, 0, 0, netlink.NTF_PROXY, 0)
        proxied = []
        for body in self.dump(netlink.RTM_GETNEIGH, request):
            address = Attrs.parse(body, 12).get(netlink.NDA_DST)
            proxied.append(
                ProxiedNeighbour(struct.unpack_from("=4xi", body)[0], IPv6Address(address or b""))
            )
        return proxied

    def neighbours(self, link: int) -> list[Address]:
        """Return the IPv6 neighbours on a link that have answered.

        Raises OSError and InterruptedDumpError.
        """
        request = struct.pack("=BxxxiHBB", socket.AF_INET6, 0, 0, 0, 0)
        addresses = []
        for body in self.dump(netlink.RTM_GETNEIGH, request):
            index, state = struct.unpack_from("=4xiH", body)
            if index == link and state & NUD_ANSWERED:
                addresses.append(ip(Attrs.parse(body, 12).get(netlink.NDA_DST) or b""))
        return addresses


def _link(body: bytes) -> Link:
    _, _, index, flags, _ = netlink.LINK_HEADER.unpack_from(body)
    attributes = Attrs.parse(body, 16)
    info = attributes.nested(netlink.IFLA_LINKINFO)
    port = info.nested(netlink.IFLA_INFO_SLAVE_DATA)
    multicast = port.number(netlink.IFLA_BRPORT_MULTICAST_ROUTER)
    return Link(
        index=index,
        name=attributes.text(netlink.IFLA_IFNAME),
        up=bool(flags & netlink.IFF_UP),
        mtu=attributes.number(netlink.IFLA_MTU) or 0,
        mac=(attributes.get(netlink.IFLA_ADDRESS) or b"").hex(":"),
        alias=attributes.text(netlink.IFLA_IFALIAS),
        kind=info.text(netlink.IFLA_INFO_KIND),
        master=attributes.number(netlink.IFLA_MASTER),
        peer=attributes.number(netlink.IFLA_LINK),
        hairpin=bool(port.number(netlink.IFLA_BRPORT_MODE)),
        all_multicast=multicast == netlink.MULTICAST_ROUTER_ALWAYS,
    )


def _address(body: bytes) -> LinkAddress:
    prefix, link = struct.unpack_from("=xBxxI", body)
    attributes = Attrs.parse(body, 8)
    # IPv6 has a local address in its message only where there is a peer.
    local = attributes.get(netlink.IFA_LOCAL) or attributes.get(netlink.IFA_ADDRESS)
    return LinkAddress(link, on_link(ip(local or b""), prefix))


def ip(packed: bytes) -> Address:
    """Return an address of either family from its octets.  Raises ValueError."""
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def _destination(family: int, address: bytes | None, length: int) -> IPNetwork:
    """Return a route's destination; a default route has its length alone."""
    if family == socket.AF_INET:
        return IPv4Network((address or bytes(4), length))
    return IPv6Network((address or bytes(16), length))


def _route(body: bytes) -> RouteEntry:
    family, length, tos, table, protocol, scope, kind = struct.unpack_from("=BBxBBBBB", body)
    attributes = Attrs.parse(body, ROUTE_HEADER)
    return RouteEntry(
        destination=_destination(family, attributes.get(netlink.RTA_DST), length),
        gateway=_gateway(attributes),
        link=attributes.number(netlink.RTA_OIF),
        priority=attributes.number(netlink.RTA_PRIORITY),
        table=attributes.number(netlink.RTA_TABLE) or table,
        kind=kind,
        scope=scope,
        tos=tos,
        protocol=protocol,
        mtu=attributes.nested(netlink.RTA_METRICS).number(netlink.RTAX_MTU),
        hops=tuple(hops(attributes)),
    )


def _gateway(attributes: Attrs) -> Address | None:
    """Return the router of a route or hop, which may be of the other family (RTA_VIA)."""
    gateway = attributes.get(netlink.RTA_GATEWAY)
    if gateway is None:
        gateway = (attributes.get(netlink.RTA_VIA) or b"")[2:]
    return ip(gateway) if gateway else None


def hops(attributes: Attrs) -> Iterator[Hop]:
    """Yield the ways that a route with these attributes leads; none for one that refuses."""
    link = attributes.number(netlink.RTA_OIF)
    if link is not None:
        yield Hop(link, _gateway(attributes))
    several = attributes.get(netlink.RTA_MULTIPATH) or b""
    start, least = 0, netlink.ROUTE_HOP.size
    while start + least <= len(several):
        length, link = netlink.ROUTE_HOP.unpack_from(several, start)
        if length < least:
            return
        yield Hop(link, _gateway(Attrs.parse(several[start : start + length], least)))
        start += netlink.aligned(length)
