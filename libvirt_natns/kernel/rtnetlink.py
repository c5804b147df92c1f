# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looking at links, addresses, routes and neighbours, and nothing else (rtnetlink(7)).

pyroute2 takes 0.3 ms of computing to tell of a link all that can be told; what
is asked here, of every network again and again, takes 0.03 ms.  A change is
never made here.
"""

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from libvirt_natns.addresses import FAMILIES, Address, Family, Interface, IPNetwork, on_link
from libvirt_natns.records import dataclass

NLMSG_ERROR = 2
NLMSG_DONE = 3
RTM_GETLINK = 18
RTM_GETADDR = 22
RTM_GETROUTE = 26
RTM_GETNEIGH = 30
NLM_F_REQUEST = 1
NLM_F_DUMP = 0x300
NLM_F_DUMP_INTR = 0x10
NLA_TYPE_MASK = 0x3FFF

IFLA_ADDRESS = 1
IFLA_IFNAME = 3
IFLA_MTU = 4
IFLA_LINK = 5
IFLA_MASTER = 10
IFLA_LINKINFO = 18
IFLA_IFALIAS = 20
IFLA_EXT_MASK = 29
SKIP_STATISTICS = 8
IFLA_INFO_KIND = 1
IFLA_INFO_SLAVE_DATA = 5
IFLA_BRPORT_MODE = 4
IFLA_BRPORT_MULTICAST_ROUTER = 25
MULTICAST_ROUTER_ALWAYS = 2

IFA_ADDRESS = 1
IFA_LOCAL = 2

RTA_DST = 1
RTA_OIF = 4
RTA_GATEWAY = 5
RTA_PRIORITY = 6
RTA_METRICS = 8
RTA_TABLE = 15
RTAX_MTU = 2
RTM_F_CLONED = 0x200
RT_SCOPE_LINK = 253

NDA_DST = 1
NTF_PROXY = 8
NUD_KNOWN = 0x02 | 0x04 | 0x08 | 0x10
"""Reachable, stale, delay or probe: the neighbour has answered, or has spoken."""

IFF_UP = 1
IFNAMSIZ = 16
LARGEST = 1 << 16
"""Octets that are received at once: more than the kernel puts into a message."""

TIME_LIMIT = 10.0
"""Seconds after which the kernel counts as stuck; it answers at once."""

Attributes = dict[int, bytes]


class InterruptedDumpError(Exception):
    """What was listed has changed meanwhile, so the list may lack something."""


@dataclass(frozen=True, slots=True)
class Link:
    """A link: the indexes of its bridge and of its peer, if any; ``mtu`` in octets.

    ``hairpin``: it is a bridge's port that may send back what came in by it;
    ``all_multicast``: one that gets all multicast, whether it asked for it or not.
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
class Route:
    """A route; ``kind``, ``scope``, ``tos`` and ``protocol`` are the kernel's numbers.

    ``mtu``, in octets, limits what is sent by it to less than its link takes.
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


@dataclass(frozen=True, slots=True)
class ProxiedNeighbour:
    """An address that neighbours on a link are answered for, in somebody else's place."""

    link: int
    address: Address


_SOCKET_FAMILIES: dict[Family, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
_VERSIONS = {number: version for version, number in _SOCKET_FAMILIES.items()}


class Session:
    """A socket in the namespace in which it was made; for one thread at a time."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self._socket.settimeout(TIME_LIMIT)
        self._number = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def link(self, name: str) -> Link | None:
        """A link by its name, or None.  Raises OSError."""
        if not 0 < len(name) < IFNAMSIZ:
            return None
        request = bytes(16) + _attribute(IFLA_IFNAME, name.encode() + b"\0") + _NO_STATISTICS
        try:
            (answer,) = self._ask(RTM_GETLINK, request, 0)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        return _link(answer)

    def links(self) -> list[Link]:
        """All links.  Raises OSError and InterruptedDumpError."""
        return [_link(each) for each in self._ask(RTM_GETLINK, bytes(16) + _NO_STATISTICS)]

    def addresses(self, link: int | None = None, *, link_local: bool = True) -> list[LinkAddress]:
        """All addresses of both families, or of one link, or without those for one link alone.

        Raises OSError and InterruptedDumpError.
        """
        request = struct.pack("=BBBBI", socket.AF_UNSPEC, 0, 0, 0, 0)
        answers = self._ask(RTM_GETADDR, request)
        return [
            _address(each)
            for each in answers
            if each[0] in _VERSIONS
            and (link_local or each[3] != RT_SCOPE_LINK)
            and link in (None, int.from_bytes(each[4:8], sys.byteorder))
        ]

    def routes(self, *families: Family) -> list[Route]:
        """All routes of all tables, of these families or both.

        Raises OSError and InterruptedDumpError.
        """
        return [route for family in families or FAMILIES for route in self._routes(family)]

    def _routes(self, family: Family) -> Iterator[Route]:
        request = struct.pack("=BBBBBBBBI", _SOCKET_FAMILIES[family], *[0] * 8)
        for each in self._ask(RTM_GETROUTE, request):
            # What the kernel has noted of a single destination, as its path's MTU.
            if not struct.unpack_from("=8xI", each)[0] & RTM_F_CLONED:
                yield _route(each)

    def proxied_neighbours(self) -> list[ProxiedNeighbour]:
        """All IPv6 addresses that are answered for.  Raises OSError and InterruptedDumpError."""
        request = struct.pack("=BxxxiHBB", socket.AF_INET6, 0, 0, NTF_PROXY, 0)
        return [
            ProxiedNeighbour(
                struct.unpack_from("=4xi", each)[0], IPv6Address(_attributes(each[12:])[NDA_DST])
            )
            for each in self._ask(RTM_GETNEIGH, request)
        ]

    def neighbours(self, link: int) -> list[Address]:
        """The IPv6 neighbours on a link that have answered.  Raises as above."""
        request = struct.pack("=BxxxiHBB", socket.AF_INET6, 0, 0, 0, 0)
        found = []
        for each in self._ask(RTM_GETNEIGH, request):
            index, state = struct.unpack_from("=4xiH", each)
            if index == link and state & NUD_KNOWN:
                found.append(_packed(_attributes(each[12:])[NDA_DST]))
        return found

    def _ask(self, kind: int, request: bytes, how: int = NLM_F_DUMP) -> list[bytes]:
        """The bodies of all messages that the kernel answers with."""
        self._number += 1
        header = (16 + len(request), kind, NLM_F_REQUEST | how, self._number, 0)
        self._socket.send(struct.pack("=IHHII", *header) + request)
        found = []
        interrupted = False
        for answer, flags, body in self._answers():
            interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
            if answer == NLMSG_DONE:
                break
            if answer == NLMSG_ERROR:
                code = -struct.unpack_from("=i", body)[0]
                raise OSError(code, os.strerror(code))
            found.append(body)
            if not how:
                break
        if interrupted:
            raise InterruptedDumpError
        return found

    def _answers(self) -> Iterator[tuple[int, int, bytes]]:
        """Type, flags and body of each message to the request of this moment."""
        while True:
            packet = self._socket.recv(LARGEST)
            start = 0
            while start + 16 <= len(packet):
                length, kind, flags, number, _ = struct.unpack_from("=IHHII", packet, start)
                if number == self._number:
                    yield kind, flags, packet[start + 16 : start + length]
                start += (length + 3) & ~3


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(-length % 4)


_NO_STATISTICS = _attribute(IFLA_EXT_MASK, struct.pack("=I", SKIP_STATISTICS))


def _attributes(body: bytes) -> Attributes:
    """Attributes by their type, as the kernel has them."""
    found = {}
    start = 0
    while start + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, start)
        if length < 4:
            break
        found[kind & NLA_TYPE_MASK] = body[start + 4 : start + length]
        start += (length + 3) & ~3
    return found


def _number(attributes: Attributes, kind: int) -> int | None:
    value = attributes.get(kind)
    return int.from_bytes(value, sys.byteorder) if value is not None else None


def _text(attributes: Attributes, kind: int) -> str:
    return os.fsdecode(attributes.get(kind, b"").rstrip(b"\0"))


def _link(body: bytes) -> Link:
    index, flags = struct.unpack_from("=4xiI", body)
    found = _attributes(body[16:])
    info = _attributes(found.get(IFLA_LINKINFO, b""))
    slave = _attributes(info.get(IFLA_INFO_SLAVE_DATA, b""))
    return Link(
        index=index,
        name=_text(found, IFLA_IFNAME),
        up=bool(flags & IFF_UP),
        mtu=_number(found, IFLA_MTU) or 0,
        mac=found.get(IFLA_ADDRESS, b"").hex(":"),
        alias=_text(found, IFLA_IFALIAS),
        kind=_text(info, IFLA_INFO_KIND),
        master=_number(found, IFLA_MASTER),
        peer=_number(found, IFLA_LINK),
        hairpin=bool(_number(slave, IFLA_BRPORT_MODE)),
        all_multicast=_number(slave, IFLA_BRPORT_MULTICAST_ROUTER) == MULTICAST_ROUTER_ALWAYS,
    )


def _address(body: bytes) -> LinkAddress:
    prefix, link = struct.unpack_from("=xBxxI", body)
    found = _attributes(body[8:])
    # IPv6 tells of a local address only where there is a peer.
    own = found.get(IFA_LOCAL) or found[IFA_ADDRESS]
    return LinkAddress(link, on_link(_packed(own), prefix))


def _packed(address: bytes) -> Address:
    return IPv4Address(address) if len(address) == 4 else IPv6Address(address)


def _destination(family: int, address: bytes | None, length: int) -> IPNetwork:
    """A default route's destination is told by its length alone."""
    if family == socket.AF_INET:
        return IPv4Network((address or bytes(4), length))
    return IPv6Network((address or bytes(16), length))


def _route(body: bytes) -> Route:
    family, length, tos, table, protocol, scope, kind = struct.unpack_from("=BBxBBBBB", body)
    found = _attributes(body[12:])
    gateway = found.get(RTA_GATEWAY)
    return Route(
        destination=_destination(family, found.get(RTA_DST), length),
        gateway=_packed(gateway) if gateway is not None else None,
        link=_number(found, RTA_OIF),
        priority=_number(found, RTA_PRIORITY),
        table=_number(found, RTA_TABLE) or table,
        kind=kind,
        scope=scope,
        tos=tos,
        protocol=protocol,
        mtu=_number(_attributes(found.get(RTA_METRICS, b"")), RTAX_MTU),
    )
