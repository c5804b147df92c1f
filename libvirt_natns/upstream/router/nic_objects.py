# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses, routes, neighbours and rules of one link, kept so that they can be made again.

Each is the kernel's own message (see ``wire``) with the link's number left out and
without what only the kernel says of it.  Lifetimes are kept beside it: two objects
are the same whatever is left of theirs.
"""

import struct
from ipaddress import ip_address, ip_network

from libvirt_natns.kernel import wire
from libvirt_natns.kernel.wire import Attribute
from libvirt_natns.records import dataclass, replace

AF_INET = 2
AF_INET6 = 10
FOREVER = 0xFFFFFFFF
SOON = 120
"""Seconds that an address gets which would have expired meanwhile: until somebody renews it."""

IFA_ADDRESS, IFA_LOCAL, IFA_LABEL, IFA_CACHEINFO, IFA_FLAGS = 1, 2, 3, 6, 8
IFA_F_NODAD = 2
# NODAD, HOMEADDRESS, MANAGETEMPADDR, NOPREFIXROUTE, MCAUTOJOIN: what a request may say.
ADDRESS_FLAGS = 0x02 | 0x10 | 0x100 | 0x200 | 0x400

RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC = 1, 4, 5, 6, 7
RTA_MULTIPATH, RTA_CACHEINFO, RTA_TABLE, RTA_EXPIRES, RTA_NH_ID = 9, 12, 15, 23, 30
RTNH_F_ONLINK = 4
RTPROT_KERNEL = 2
RTN_UNICAST = 1
KERNELS_OWN = (2, 3, 4, 5)
"""Types local, broadcast, anycast and multicast: the kernel makes them with the address."""
USER_HZ = 100
MAIN_TABLE = 254

NDA_CACHEINFO, NDA_PROBES, NDA_DST = 3, 4, 1
NUD_PERMANENT = 0x80
NTF_PROXY = 8

FRA_IIFNAME, FRA_PRIORITY, FRA_TABLE, FRA_OIFNAME = 3, 6, 15, 17
NAMES_OF_LINKS = (FRA_IIFNAME, FRA_OIFNAME)
FIB_RULE_INVERT = 2
DEFAULT_PRIORITIES = (0, 32766, 32767)


@dataclass(frozen=True, slots=True)
class Address:
    """An address; lifetimes in seconds, as they were when it was looked at."""

    body: str
    preferred: int = FOREVER
    valid: int = FOREVER

    @property
    def family(self) -> int:
        return bytes.fromhex(self.body)[0]

    @property
    def prefix(self) -> int:
        return bytes.fromhex(self.body)[1]

    @property
    def ip(self) -> str:
        found = wire.attributes(bytes.fromhex(self.body)[8:])
        local = wire.value(found, IFA_LOCAL) or wire.value(found, IFA_ADDRESS)
        return str(ip_address(local or bytes(4)))

    @property
    def is_global(self) -> bool:
        """Whether others than neighbours can use it."""
        return bytes.fromhex(self.body)[3] == 0 and not ip_address(self.ip).is_link_local

    @property
    def leased(self) -> bool:
        """Whether it ends by itself."""
        return self.valid != FOREVER

    def for_good(self) -> "Address":
        """The same without an end; one that is not to be used any more stays so."""
        return replace(self, preferred=self.preferred and FOREVER, valid=FOREVER)

    def relabelled(self, old: str, new: str) -> "Address":
        """The same on a link of another name, which its label (``ens3:1``) starts with."""
        body = bytes.fromhex(self.body)
        kept = [
            (kind, _relabel(data, old.encode(), new.encode()))
            if kind & wire.NLA_TYPE == IFA_LABEL
            else (kind, data)
            for kind, data in wire.attributes(body[8:])
        ]
        return replace(self, body=(body[:8] + wire.packed(kept)).hex())

    def __str__(self) -> str:
        return f"address {self.ip}/{self.prefix}"

    def request(self, link: int, elapsed: float) -> bytes:
        """What makes it again on a link, ``elapsed`` seconds later."""
        body = bytes.fromhex(self.body)
        times = [_left(each, elapsed) for each in (self.preferred, self.valid)]
        lifetimes = struct.pack("=IIII", *times, 0, 0)
        return (
            body[:4]
            + struct.pack("=I", link)
            + body[8:]
            + wire.packed([(IFA_CACHEINFO, lifetimes)])
        )


LABEL_LENGTH = 15


def _relabel(label: bytes, old: bytes, new: bytes) -> bytes:
    text = label.rstrip(b"\0")
    if text != old and not text.startswith(old + b":"):
        return label
    return (new + text[len(old) :])[:LABEL_LENGTH] + b"\0"


def _left(seconds: int, elapsed: float) -> int:
    """What is left of a lifetime; one that was over already stays so."""
    if seconds in (0, FOREVER):
        return seconds
    return max(SOON, int(seconds - elapsed))


def address(body: bytes) -> Address:
    """An address as the kernel lists it."""
    found = wire.attributes(body[8:])
    flags = (wire.number(found, IFA_FLAGS) or 0) & ADDRESS_FLAGS
    times = wire.value(found, IFA_CACHEINFO)
    preferred, valid = struct.unpack_from("=II", times) if times else (FOREVER, FOREVER)
    kept = [*wire.without(found, IFA_CACHEINFO, IFA_FLAGS), (IFA_FLAGS, struct.pack("=I", flags))]
    header = bytes([body[0], body[1], 0, body[3]]) + bytes(4)
    return Address((header + wire.packed(kept)).hex(), preferred, valid)


def single(ip: str, length: int = 128) -> Address:
    """An IPv6 address, without a subnet by default, that nobody need be asked about.

    As the kernel lists it.
    """
    header = struct.pack("=BBBBI", AF_INET6, length, 0, 0, 0)
    said = [
        (IFA_ADDRESS, ip_address(ip).packed),
        (IFA_FLAGS, struct.pack("=I", IFA_F_NODAD)),
    ]
    return Address((header + wire.packed(said)).hex())


@dataclass(frozen=True, slots=True)
class Route:
    """A route, in any table; ``expires`` in seconds, 0 for never."""

    body: str
    expires: int = 0

    @property
    def attributes(self) -> list[Attribute]:
        return wire.attributes(bytes.fromhex(self.body)[12:])

    @property
    def family(self) -> int:
        return bytes.fromhex(self.body)[0]

    @property
    def table(self) -> int:
        return wire.number(self.attributes, RTA_TABLE) or bytes.fromhex(self.body)[4]

    @property
    def lasts(self) -> bool:
        """Whether it does not end by itself, unless whoever told of it tells again."""
        return not self.expires

    @property
    def is_default(self) -> bool:
        return bytes.fromhex(self.body)[1] == 0 and self.table == MAIN_TABLE

    @property
    def is_way(self) -> bool:
        """Whether it leads to others, in the main table, and not only for link-local use."""
        to = ip_network(self.destination)
        unicast = bytes.fromhex(self.body)[7] == RTN_UNICAST
        return unicast and self.table == MAIN_TABLE and not (to.is_link_local or to.is_multicast)

    @property
    def destination(self) -> str:
        """With its prefix length."""
        length = bytes.fromhex(self.body)[1]
        data = wire.value(self.attributes, RTA_DST) or bytes(4 if self.family == AF_INET else 16)
        return f"{ip_address(data)}/{length}"

    @property
    def gateway(self) -> str | None:
        data = wire.value(self.attributes, RTA_GATEWAY)
        return str(ip_address(data)) if data else None

    @property
    def links(self) -> set[int]:
        """The other links that it leads over."""
        return links_of_route(bytes.fromhex(self.body))

    @property
    def source(self) -> str | None:
        """The address that packets bear which leave by it."""
        data = wire.value(self.attributes, RTA_PREFSRC)
        return str(ip_address(data)) if data else None

    def without_source(self) -> "Route":
        """The same with no say in the address that packets bear."""
        kept = wire.without(self.attributes, RTA_PREFSRC)
        return replace(self, body=(bytes.fromhex(self.body)[:12] + wire.packed(kept)).hex())

    def __str__(self) -> str:
        through = f" via {self.gateway}" if self.gateway else ""
        table = f" in table {self.table}" if self.table != MAIN_TABLE else ""
        return f"route {self.destination}{through}{table}"

    def request(self, link: int, elapsed: float = 0.0) -> bytes:
        """What makes it again over a link."""
        body = bytes.fromhex(self.body)
        attributes = [_onto(each, link) for each in self.attributes]
        if self.expires:
            left = max(SOON, int(self.expires - elapsed))
            attributes.append((RTA_EXPIRES, struct.pack("=I", left)))
        return body[:12] + wire.packed(attributes)


def _onto(attribute: Attribute, link: int) -> Attribute:
    """An attribute that names no link made to name this one."""
    kind, data = attribute
    if kind & wire.NLA_TYPE == RTA_OIF and not any(data):
        return kind, struct.pack("=i", link)
    if kind & wire.NLA_TYPE == RTA_MULTIPATH:
        return kind, _renumbered(data, 0, link)
    return attribute


def _renumbered(hops: bytes, old: int, new: int) -> bytes:
    """Next hops over the link ``old``, moved to ``new``, and without their state."""
    found = b""
    for index, text in wire.nested(hops):
        header = struct.pack(
            "=HBBi", len(text), text[2] & RTNH_F_ONLINK, text[3], new if index == old else index
        )
        found += header + text[8:] + bytes(-len(text) % 4)
    return found


def route(body: bytes, link: int) -> Route:
    """A route as the kernel lists it, with ``link`` left open."""
    found = wire.attributes(body[12:])
    expires = 0
    times = wire.value(found, RTA_CACHEINFO)
    if times and body[0] == AF_INET6:
        (ticks,) = struct.unpack_from("=i", times, 8)
        # 0 is never, so none in its last second.
        expires = max(1, ticks // USER_HZ) if ticks else 0
    kept = []
    for kind, data in wire.without(found, RTA_CACHEINFO, RTA_EXPIRES):
        if kind & wire.NLA_TYPE == RTA_OIF and struct.unpack("=i", data)[0] == link:
            kept.append((kind, bytes(4)))
        elif kind & wire.NLA_TYPE == RTA_MULTIPATH:
            kept.append((kind, _renumbered(data, link, 0)))
        else:
            kept.append((kind, data))
    (flags,) = struct.unpack_from("=I", body, 8)
    header = body[:8] + struct.pack("=I", flags & RTNH_F_ONLINK)
    return Route((header + wire.packed(kept)).hex(), expires)


def links_of_route(body: bytes) -> set[int]:
    """The links that a listed route leads over."""
    found = wire.attributes(body[12:])
    single = wire.number(found, RTA_OIF)
    hops = wire.value(found, RTA_MULTIPATH)
    several = {index for index, _ in wire.nested(hops)} if hops else set()
    return several | ({single} if single else set())


def is_kernels_route(body: bytes) -> bool:
    """Whether the kernel makes a listed route by itself, with an address."""
    return body[7] in KERNELS_OWN and body[5] == RTPROT_KERNEL


def has_next_hop_object(body: bytes) -> bool:
    """Whether a listed route leads where an object of its own says (ip-nexthop(8))."""
    return wire.value(wire.attributes(body[12:]), RTA_NH_ID) is not None


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A neighbour that somebody entered by hand, or an address that is answered for."""

    body: str

    @property
    def ip(self) -> str:
        data = wire.value(wire.attributes(bytes.fromhex(self.body)[12:]), NDA_DST)
        return str(ip_address(data or bytes(4)))

    @property
    def is_proxy(self) -> bool:
        return bool(bytes.fromhex(self.body)[10] & NTF_PROXY)

    def __str__(self) -> str:
        return f"{'proxy for' if self.is_proxy else 'neighbour'} {self.ip}"

    def request(self, link: int) -> bytes:
        """What makes it again on a link."""
        body = bytes.fromhex(self.body)
        return body[:4] + struct.pack("=i", link) + body[8:]


def neighbour(body: bytes) -> Neighbour | None:
    """A neighbour as the kernel lists it; None for one that it has found out itself."""
    state, flags = struct.unpack_from("=HB", body, 8)
    if not (state & NUD_PERMANENT or flags & NTF_PROXY):
        return None
    found = wire.attributes(body[12:])
    if flags & NTF_PROXY:
        return proxy(str(ip_address(wire.value(found, NDA_DST) or bytes(4))))
    kept = wire.without(found, NDA_CACHEINFO, NDA_PROBES)
    return Neighbour((body[:4] + bytes(4) + body[8:12] + wire.packed(kept)).hex())


def proxy(ip: str) -> Neighbour:
    """That an address is answered for to the neighbours of a link."""
    address = ip_address(ip)
    family = AF_INET if address.version == 4 else AF_INET6
    header = struct.pack("=BxxxiHBB", family, 0, NUD_PERMANENT, NTF_PROXY, 0)
    return Neighbour((header + wire.packed([(NDA_DST, address.packed)])).hex())


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule that tells which table a packet is routed by (ip-rule(8))."""

    body: str

    @property
    def table(self) -> int:
        body = bytes.fromhex(self.body)
        return wire.number(wire.attributes(body[12:]), FRA_TABLE) or body[4]

    @property
    def priority(self) -> int:
        return wire.number(wire.attributes(bytes.fromhex(self.body)[12:]), FRA_PRIORITY) or 0

    def __str__(self) -> str:
        return f"rule {self.priority} for table {self.table}"

    def renamed(self, old: str, new: str) -> "Rule":
        """The same about a link that has another name."""
        body = bytes.fromhex(self.body)
        before, after = old.encode() + b"\0", new.encode() + b"\0"
        kept = [
            (kind, after if kind & wire.NLA_TYPE in NAMES_OF_LINKS and data == before else data)
            for kind, data in wire.attributes(body[12:])
        ]
        return Rule((body[:12] + wire.packed(kept)).hex())

    def names(self, link: str) -> bool:
        """Whether it is about a link, given by its name."""
        found = wire.attributes(bytes.fromhex(self.body)[12:])
        named = {wire.value(found, kind) for kind in (FRA_IIFNAME, FRA_OIFNAME)}
        return link.encode() + b"\0" in named


def rule(body: bytes) -> Rule:
    """A rule as the kernel lists it."""
    (flags,) = struct.unpack_from("=I", body, 8)
    return Rule((body[:8] + struct.pack("=I", flags & FIB_RULE_INVERT) + body[12:]).hex())
