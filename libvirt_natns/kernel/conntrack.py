# SPDX-License-Identifier: LGPL-2.1-or-later
"""Deletes the conntrack entries of forwards and addresses that are published no more.

A translation outlives its rule for as long as its conntrack entry does.  A guest that has
stopped would still be answered for, or its successor at the same address get its traffic.

An entry is deleted by the attributes with which the kernel names it, octet by octet.  The
kernel refuses to delete an entry without its protocol's key (of GRE, for one), and we know
no such keys.  Source: linux/netfilter/nfnetlink_conntrack.h.

The kernel filters the dump by address and protocol (since Linux 5.8): a table may have
hundreds of thousands of entries, and libvirt waits.  An older kernel sends all entries.
In IPv6 the kernel filters by protocol and port alone.
"""

import socket
import struct
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from errno import EINVAL, ENOENT, EOPNOTSUPP
from ipaddress import IPv4Address, IPv6Address

from libvirt_natns.addresses import Address, Family
from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netlink, netns
from libvirt_natns.kernel.netlink import NLA_NESTED, NLA_TYPE, Attrs, Socket
from libvirt_natns.model.publication import Forward, StaticNat

PROTOCOLS = {
    "tcp": socket.IPPROTO_TCP,
    "udp": socket.IPPROTO_UDP,
    "sctp": socket.IPPROTO_SCTP,
}

NFNL_SUBSYS_CTNETLINK = 1
GET, DELETE = NFNL_SUBSYS_CTNETLINK << 8 | 1, NFNL_SUBSYS_CTNETLINK << 8 | 2
HEADER = 4
"""Octets of struct nfgenmsg: family, version, resource id."""

TUPLE_ORIG, TUPLE_REPLY, STATUS, ID, ZONE = 1, 2, 3, 12, 18
NAMING = (TUPLE_ORIG, ID, ZONE)
"""The attributes that name one entry, and no later entry with the same addresses and ports."""
TUPLE_IP, TUPLE_PROTO = 1, 2
ENDS = ((1, 2, IPv4Address), (3, 4, IPv6Address))
"""By family: the attributes of source and target, and the type of their addresses."""
SOCKET_FAMILY: dict[Family, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
PROTO_NUMBER, PROTO_SOURCE_PORT, PROTO_TARGET_PORT = 1, 2, 3
ASSURED = 1 << 2
"""The bit of the status of a flow that has had an answer, and more than one exchange."""
FILTER, FILTER_FLAGS = 25, {TUPLE_ORIG: 1, TUPLE_REPLY: 2}
"""The attribute that makes a filter of a tuple, and its own attributes by direction."""
BY_ADDRESS, BY_PROTOCOL, BY_TARGET_PORT = (1 << 0, 1 << 1), 1 << 3, 1 << 5
"""Flags of a filter: the source and the target count, the protocol, and the target's port."""

MOST_FILTERS = 16
"""Filtered dumps above which one whole dump takes their place."""


@dataclass(frozen=True, slots=True)
class ConntrackEntry:
    """A conntrack entry; ``port`` is the target port, 0 for a protocol without ports.

    ``client`` is the source of the first packet, and ``asked`` its target.  ``answered`` are
    source and target of the replies, which come from ``answering_port``.  ``name`` are the
    attributes that delete the entry.  ``zone`` is 0 for all flows that NAT looks at.
    """

    protocol: int
    client: Address
    asked: Address
    port: int
    answered: tuple[Address, Address]
    answering_port: int
    assured: bool
    zone: int
    name: bytes

    @property
    def keeps_destination(self) -> bool:
        """True if no rule has translated the destination of the flow."""
        return (self.asked, self.port) == (self.answered[0], self.answering_port)


@dataclass(frozen=True, slots=True)
class DumpFilter:
    """A filter of a dump: one address in one direction of a flow, or a protocol's port.

    ``end`` is 0 for the direction's source and 1 for its target; ``protocol`` 0 is any, and
    ``port`` 0 is any target port.
    """

    family: Family
    direction: int
    end: int
    address: Address | None
    protocol: int = 0
    port: int = 0

    @property
    def attributes(self) -> bytes:
        """The attributes of the request."""
        content, flags = [], 0
        # Kernels compare addresses of IPv6 the wrong way round (seen in Linux 6.18): they
        # hand out all entries but those with the address.
        if self.address is not None and self.family == 4:
            source, target, _ = ENDS[0]
            kind = target if self.end else source
            content.append((TUPLE_IP | NLA_NESTED, netlink.pack([(kind, self.address.packed)])))
            flags |= BY_ADDRESS[self.end]
        if self.protocol:
            numbers = [(PROTO_NUMBER, bytes([self.protocol]))]
            flags |= BY_PROTOCOL
            if self.port:
                numbers.append((PROTO_TARGET_PORT, struct.pack("!H", self.port)))
                flags |= BY_TARGET_PORT
            content.append((TUPLE_PROTO | NLA_NESTED, netlink.pack(numbers)))
        mask = netlink.pack([netlink.u32(FILTER_FLAGS[self.direction], flags)])
        return netlink.pack(
            [(self.direction | NLA_NESTED, netlink.pack(content)), (FILTER | NLA_NESTED, mask)]
        )


def filters(claim: Forward | StaticNat) -> tuple[DumpFilter, ...]:
    """Return the filters that find all entries of a claim, and few others."""
    if isinstance(claim, StaticNat):
        return (
            DumpFilter(claim.address.version, TUPLE_ORIG, 1, claim.address),
            DumpFilter(claim.address.version, TUPLE_REPLY, 1, claim.address),
        )
    target = claim.target
    return (DumpFilter(target.version, TUPLE_REPLY, 0, target, PROTOCOLS[claim.proto]),)


def cut(namespace: str, gone: Iterable[Forward | StaticNat], *addresses: Address) -> None:
    """Delete the conntrack entries of these forwards and addresses, and no others.

    ``addresses`` are the network's upstream addresses, at which a forward that listens on
    the host's own address arrives in the namespace.  Raises KernelError.
    """
    _cut(namespace, tuple(gone), frozenset(addresses))


def cut_on_host(
    gone: Iterable[Forward | StaticNat], *addresses: Address, router: str | None = None
) -> None:
    """Delete the entries in the host or a router namespace, which forwards to the ``addresses``.

    Raises KernelError.
    """
    moved = [
        replace(claim, target=address)
        for claim in gone
        for address in addresses
        if isinstance(claim, Forward) and claim.target.version == address.version
    ]
    _cut(router, moved, None)


def _cut(
    namespace: str | None,
    claims: Sequence[Forward | StaticNat],
    addresses: frozenset[Address] | None,
) -> None:
    if not claims:
        return
    try:
        with netns.entered(namespace):
            sock = Socket(netlink.NETLINK_NETFILTER)
        with sock:
            wanted = dict.fromkeys(each for claim in claims for each in filters(claim))
            candidates = entries_of(sock, wanted)
            delete(
                sock,
                [e for e in candidates if any(concerns(c, e, addresses) for c in claims)],
            )
    except OSError as error:
        where = namespace or "the host"
        raise KernelError(
            f"cannot delete conntrack entries in {where}", error.strerror or str(error)
        ) from error


def delete(sock: Socket, entries: Iterable[ConntrackEntry]) -> None:
    """Delete all entries that can be deleted; the first error is raised after the last entry."""
    errors = []
    for entry in entries:
        try:
            sock.change(DELETE, _header(entry.asked.version) + entry.name)
        except OSError as error:
            if error.errno != ENOENT:  # it has ended by itself
                errors.append(error)
    if errors:
        raise errors[0]


def concerns(
    claim: Forward | StaticNat, entry: ConntrackEntry, addresses: frozenset[Address] | None
) -> bool:
    """True if an entry is of a claim; without ``addresses`` at any address."""
    source, target = entry.answered
    if isinstance(claim, StaticNat):
        return claim.address in (entry.asked, target)
    if entry.protocol != PROTOCOLS[claim.proto]:
        return False
    if not claim.first <= entry.port <= claim.last:
        return False
    if source != claim.target:
        return False
    if claim.address == claim.target:
        # A guest's own address is reached without a translation.
        return entry.asked == source
    # With a translation, the target that answers is not the target that was asked.
    if entry.asked == source:
        return False
    return addresses is None or entry.asked == claim.address or entry.asked in addresses


# -- the kernel's messages -------------------------------------------------------


def entries_of(sock: Socket, filters: Collection[DumpFilter]) -> Collection[ConntrackEntry]:
    """Return the entries that filters find, each once; others may be among them.

    Raises OSError.
    """
    try:
        if len(filters) <= MOST_FILTERS:
            entries = [
                entry
                for dump_filter in filters
                for entry in _entries(sock, dump_filter.family, dump_filter.attributes)
            ]
            return {entry.name: entry for entry in entries}.values()
    except OSError as error:
        # A kernel that cannot filter.
        if error.errno not in (EINVAL, EOPNOTSUPP):
            raise
    families = sorted({dump_filter.family for dump_filter in filters})
    return [entry for family in families for entry in _entries(sock, family)]


def _header(family: Family) -> bytes:
    return struct.pack("!BBH", SOCKET_FAMILY[family], 0, 0)


def _entries(sock: Socket, family: Family, attributes: bytes = b"") -> list[ConntrackEntry]:
    """Return the entries of a family that a filter's attributes match.  Raises OSError."""
    return [parse_entry(body[HEADER:]) for body in sock.dump(GET, _header(family) + attributes)]


def parse_entry(body: bytes) -> ConntrackEntry:
    """Return the entry in a message's body."""
    attributes = Attrs.parse(body)
    original, reply = attributes.nested(TUPLE_ORIG), attributes.nested(TUPLE_REPLY)
    protocol = original.nested(TUPLE_PROTO)
    by_type = {kind & NLA_TYPE: (kind, value) for kind, value in attributes}
    client, asked = _addresses(original)
    status = int.from_bytes(attributes.get(STATUS) or b"", "big")
    return ConntrackEntry(
        protocol=(protocol.get(PROTO_NUMBER) or b"")[0],
        client=client,
        asked=asked,
        port=_port(protocol, PROTO_TARGET_PORT),
        answered=_addresses(reply),
        answering_port=_port(reply.nested(TUPLE_PROTO), PROTO_SOURCE_PORT),
        assured=bool(status & ASSURED),
        zone=int.from_bytes(attributes.get(ZONE) or b"", "big"),
        name=netlink.pack(by_type[kind] for kind in NAMING if kind in by_type),
    )


def _port(protocol: Attrs, kind: int) -> int:
    return int.from_bytes(protocol.get(kind) or b"", "big")


def _addresses(direction: Attrs) -> tuple[Address, Address]:
    """Return the source and the target of one direction."""
    pair = direction.nested(TUPLE_IP)
    source, target, address = next(ends for ends in ENDS if pair.get(ends[0]) is not None)
    return address(pair.get(source) or b""), address(pair.get(target) or b"")
