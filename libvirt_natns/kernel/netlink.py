# SPDX-License-Identifier: LGPL-2.1-or-later
"""Netlink messages and their attributes: the codec, a socket, and the numbers of rtnetlink(7).

Messages and attributes have a header with their length, and begin at multiples of four octets.
``Attrs`` keeps attributes in the kernel's order, with the flags in their types, and packs them
into the same octets again.  An attribute that nothing here names is kept as it is.

Known limit: the numbers of other netlink families stand in the modules that speak them.
Source: linux/netlink.h, rtnetlink.h, if_link.h, if_addr.h, neighbour.h, fib_rules.h.
"""

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x4, 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800
NLA_NESTED, NLA_TYPE = 0x8000, 0x3FFF

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
RTM_GETQDISC = 38
RTM_NEWNETCONF = 80
RTM_NEWNSID, RTM_GETNSID = 88, 90
RTM_NEWLINKPROP, RTM_DELLINKPROP = 108, 109

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER = 1, 3, 4, 5, 10
IFLA_PROTINFO, IFLA_TXQLEN, IFLA_LINKINFO, IFLA_IFALIAS, IFLA_GROUP = 12, 13, 18, 20, 27
IFLA_NET_NS_FD, IFLA_EXT_MASK, IFLA_LINK_NETNSID, IFLA_XDP = 28, 29, 37, 43
IFLA_NEW_IFINDEX, IFLA_PROP_LIST, IFLA_ALT_IFNAME, IFLA_PERM_ADDRESS = 49, 52, 53, 54
IFLA_INFO_KIND, IFLA_INFO_SLAVE_DATA = 1, 5
IFLA_BRPORT_MODE, IFLA_BRPORT_MULTICAST_ROUTER = 4, 25
IFLA_XDP_ATTACHED = 2
MULTICAST_ROUTER_ALWAYS = 2
RTEXT_FILTER_SKIP_STATS = 8
IFF_UP, IFF_NOARP, IFF_PROMISC, IFF_ALLMULTI, IFF_MULTICAST = 0x1, 0x80, 0x100, 0x200, 0x1000
IFNAMSIZ = 16

IFA_ADDRESS, IFA_LOCAL, IFA_LABEL, IFA_CACHEINFO, IFA_FLAGS = 1, 2, 3, 6, 8
IFA_F_NODAD, IFA_F_HOMEADDRESS, IFA_F_MANAGETEMPADDR = 0x02, 0x10, 0x100
IFA_F_NOPREFIXROUTE, IFA_F_MCAUTOJOIN = 0x200, 0x400

RTA_DST, RTA_SRC, RTA_IIF, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC = 1, 2, 3, 4, 5, 6, 7
RTA_METRICS, RTA_MULTIPATH, RTA_CACHEINFO, RTA_TABLE = 8, 9, 12, 15
RTA_VIA, RTA_EXPIRES, RTA_NH_ID = 18, 23, 30
RTAX_MTU = 2
RTM_F_CLONED = 0x200
RTNH_F_ONLINK = 4
RTN_UNICAST, RTN_LOCAL, RTN_BROADCAST, RTN_ANYCAST, RTN_MULTICAST = 1, 2, 3, 4, 5
RTPROT_KERNEL, RTPROT_BOOT, RTPROT_STATIC, RTPROT_RA = 2, 3, 4, 9
RT_SCOPE_LINK = 253
RT_TABLE_MAIN, RT_TABLE_LOCAL = 254, 255

ROUTE_HOP = struct.Struct("=HxxI")
"""struct rtnexthop, of RTA_MULTIPATH: length with attributes, index of the link."""

RULE_HEADER = struct.Struct("=BBBBBBBBI")
"""struct fib_rule_hdr: family, two lengths, tos, table, two reserved, action, flags."""

NDA_DST, NDA_CACHEINFO, NDA_PROBES = 1, 3, 4
NTF_PROXY = 8
NUD_REACHABLE, NUD_STALE, NUD_DELAY, NUD_PROBE, NUD_PERMANENT = 0x02, 0x04, 0x08, 0x10, 0x80

FRA_DST, FRA_SRC, FRA_IIFNAME, FRA_PRIORITY, FRA_FWMARK, FRA_REALMS = 1, 2, 3, 6, 10, 11
FRA_SUPPRESS_IFGROUP, FRA_SUPPRESS_PREFIXLEN, FRA_TABLE, FRA_OIFNAME = 13, 14, 15, 17
FRA_PROTOCOL, FRA_IP_PROTO = 21, 22
FRA_SPORT_RANGE, FRA_DPORT_RANGE = 23, 24
FIB_RULE_INVERT = 2
FR_ACT_TO_TBL = 1

HEADER = struct.Struct("=IHHII")
ATTRIBUTE = struct.Struct("=HH")
LINK_HEADER = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, hardware type, index, flags, mask of the flags to change."""

LARGEST = 1 << 16
"""Octets that are received at once: more than the kernel puts into a message."""

TIME_LIMIT = 10.0
"""Seconds after which the kernel counts as stuck; it answers at once."""

Attribute = tuple[int, bytes]
"""A type, with its flags, and a value."""

Message = tuple[int, int, int, bytes]
"""A message's type, flags, sequence number and body."""


class InterruptedDumpError(OSError):
    """An object changed while the kernel listed its kind, so the list may lack one."""


def aligned(length: int) -> int:
    """Return a length, rounded up to where the next message or attribute begins."""
    return (length + 3) & ~3


def messages(packet: bytes) -> Iterator[Message]:
    """Yield all messages of a packet that was received."""
    start, end = 0, len(packet)
    while start + HEADER.size <= end:
        length, kind, flags, number, _ = HEADER.unpack_from(packet, start)
        if length < HEADER.size:
            return
        yield kind, flags, number, packet[start + HEADER.size : start + length]
        start += aligned(length)


class Attrs:
    """The attributes of a message, or those that are nested in an attribute.

    Look-ups take a type without flags, and find the first attribute of that type.
    """

    __slots__ = ("_items", "_values")

    def __init__(self, items: Iterable[Attribute] = ()) -> None:
        self._items = list(items)
        self._values: dict[int, bytes] = {}
        for kind, value in self._items:
            self._values.setdefault(kind & NLA_TYPE, value)

    @classmethod
    def parse(cls, data: bytes, start: int = 0) -> Self:
        """Return the attributes that follow a message's fixed header of ``start`` octets."""
        items = []
        end, unpack = len(data), ATTRIBUTE.unpack_from
        while start + 4 <= end:
            length, kind = unpack(data, start)
            if length < 4:
                break
            items.append((kind, data[start + 4 : start + length]))
            start += (length + 3) & ~3
        return cls(items)

    def __iter__(self) -> Iterator[Attribute]:
        return iter(self._items)

    def get(self, kind: int) -> bytes | None:
        """Return a value; None where the attribute is missing."""
        return self._values.get(kind)

    def number(self, kind: int) -> int | None:
        """Return an unsigned number in the machine's byte order; None where it is missing."""
        value = self._values.get(kind)
        return int.from_bytes(value, sys.byteorder) if value is not None else None

    def text(self, kind: int) -> str:
        """Return a text that ends with a zero octet; "" where it is missing."""
        return os.fsdecode(self._values.get(kind, b"").rstrip(b"\0"))

    def nested(self, kind: int) -> "Attrs":
        """Return the attributes inside an attribute; no attributes where it is missing."""
        return Attrs.parse(self._values.get(kind, b""))

    def without(self, *kinds: int) -> "Attrs":
        """Return all attributes but those of some types."""
        return Attrs(item for item in self._items if item[0] & NLA_TYPE not in kinds)

    def pack(self) -> bytes:
        """Return the octets that the kernel sends or takes."""
        return pack(self._items)


def pack(items: Iterable[Attribute]) -> bytes:
    """Return attributes as they stand in a message."""
    return b"".join(
        ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)
        for kind, value in items
    )


def u32(kind: int, number: int) -> Attribute:
    """Return an attribute with an unsigned number of four octets."""
    return kind, struct.pack("=I", number)


def text(kind: int, value: str) -> Attribute:
    """Return an attribute with a text."""
    return kind, os.fsencode(value) + b"\0"


def change_link(
    index: int, attributes: Iterable[Attribute] = (), flags: int = 0, mask: int = 0
) -> bytes:
    """Return the body of a request that changes a link: attributes, and the flags in ``mask``."""
    return LINK_HEADER.pack(0, 0, index, flags, mask) + pack(attributes)


class Socket:
    """A socket in the network namespace in which it was made; for one thread at a time."""

    def __init__(self, protocol: int = NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        self._socket.settimeout(TIME_LIMIT)
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """Return the bodies of all objects of a kind.

        Raises OSError; an InterruptedDumpError where another program changed an object.
        """
        self._send(kind, NLM_F_DUMP, body)
        bodies = []
        interrupted = False
        for answer, flags, answer_body in self._answers():
            interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
            if answer == NLMSG_DONE:
                break
            bodies.append(answer_body)
        if interrupted:
            raise InterruptedDumpError(errno.EINTR, os.strerror(errno.EINTR))
        return bodies

    def get(self, kind: int, body: bytes) -> bytes | None:
        """Return the body of one object; None where it does not exist.  Raises OSError."""
        self._send(kind, 0, body)
        try:
            return next(answer_body for _, _, answer_body in self._answers())
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ENOENT):
                return None
            raise

    def change(self, kind: int, body: bytes, flags: int = 0) -> None:
        """Send a request and wait until the kernel confirms it.

        Raises OSError with the kernel's reason.
        """
        self._send(kind, NLM_F_ACK | flags, body)
        for answer, _, _ in self._answers():
            if answer == NLMSG_ERROR:
                return

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._number += 1
        length = HEADER.size + len(body)
        self._socket.send(HEADER.pack(length, kind, NLM_F_REQUEST | flags, self._number, 0) + body)

    def _answers(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield type, flags and body of each message that answers the last request.

        Raises OSError for an error; the end of a dump may carry an error as well.
        """
        while True:
            for kind, flags, number, body in messages(self._socket.recv(LARGEST)):
                if number != self._number:
                    continue
                if kind in (NLMSG_ERROR, NLMSG_DONE):
                    code = -struct.unpack_from("=i", body)[0]
                    if code > 0:
                        raise OSError(code, os.strerror(code))
                yield kind, flags, body
