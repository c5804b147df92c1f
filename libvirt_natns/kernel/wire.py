# SPDX-License-Identifier: LGPL-2.1-or-later
"""Objects of rtnetlink(7) as the kernel lists them, and made again by giving it the same back.

An address or a route has more properties than any description of it names
(lifetimes, metrics, origins, encapsulations ...), and each kernel adds some.  So
none is taken apart here: the listing's own message, without what only the kernel
can say, is the request that makes the object again.

Numbers of links are left out of what is kept: a link that moves between
namespaces may come back with another one.
"""

import struct
from collections.abc import Iterable, Iterator

from libvirt_natns.kernel.netlink import Socket

NLM_F_ACK = 4
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
REPLACE = NLM_F_CREATE | 0x100

RTM_NEWLINK = 16
RTM_GETLINK = 18
RTM_NEWADDR = 20
RTM_DELADDR = 21
RTM_GETADDR = 22
RTM_NEWROUTE = 24
RTM_DELROUTE = 25
RTM_GETROUTE = 26
RTM_NEWNEIGH = 28
RTM_DELNEIGH = 29
RTM_GETNEIGH = 30
RTM_NEWRULE = 32
RTM_DELRULE = 33
RTM_GETRULE = 34
RTM_GETQDISC = 38
RTM_NEWLINKPROP = 108
RTM_DELLINKPROP = 109

NLA_TYPE = 0x3FFF
NLA_NESTED = 0x8000

Attribute = tuple[int, bytes]
"""A type, with its flags, and a value."""


def attributes(data: bytes) -> list[Attribute]:
    """Attributes one after the other, as they stand in a message."""
    found = []
    start = 0
    while start + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, start)
        if length < 4:
            break
        found.append((kind, data[start + 4 : start + length]))
        start += (length + 3) & ~3
    return found


def packed(each: Iterable[Attribute]) -> bytes:
    """The same, as they stand in a message."""
    return b"".join(
        struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
        for kind, value in each
    )


def value(found: Iterable[Attribute], kind: int) -> bytes | None:
    """The value of the first attribute of a type."""
    return next((data for number, data in found if number & NLA_TYPE == kind), None)


def number(found: Iterable[Attribute], kind: int) -> int | None:
    """The same as a number of the machine's byte order; None where it is missing."""
    data = value(found, kind)
    return None if data is None else struct.unpack("=I", data)[0] if len(data) == 4 else data[0]


def without(found: Iterable[Attribute], *kinds: int) -> list[Attribute]:
    """All attributes but those of some types."""
    return [each for each in found if each[0] & NLA_TYPE not in kinds]


class Wire(Socket):
    """A socket that also changes things; belongs to the namespace in which it was made."""

    def listing(self, kind: int, header: bytes) -> list[bytes]:
        """The bodies of all objects of a kind.  Raises OSError and InterruptedDumpError."""
        return self.dump(kind, header)

    def one(self, kind: int, body: bytes) -> bytes | None:
        """The body of one object; None where there is no such.  Raises OSError."""
        return self.get(kind, body)


def set_link(
    index: int, attributes: Iterable[Attribute] = (), flags: int = 0, mask: int = 0
) -> bytes:
    """The body of a request that changes a link: attributes, and flags where ``mask`` has them."""
    return struct.pack("=BxHiII", 0, 0, index, flags, mask) + packed(attributes)


def nested(bodies: bytes) -> Iterator[tuple[int, bytes]]:
    """Next hops of a multipath route: each one's link, and its whole text."""
    start = 0
    while start + 8 <= len(bodies):
        length, _, _, index = struct.unpack_from("=HBBi", bodies, start)
        if length < 8:
            return
        yield index, bodies[start : start + length]
        start += (length + 3) & ~3
