# SPDX-License-Identifier: LGPL-2.1-or-later
"""Deletes the conntrack entries of forwards and addresses that are published no more.

A translation outlives its rule for as long as its conntrack entry does.  A guest that has
stopped would still be answered for, or its successor at the same address get its traffic.

An entry is deleted by the attributes with which the kernel names it, octet by octet.  The
kernel refuses to delete an entry without its protocol's key (of GRE, for one), and we know
no such keys.  Source: linux/netfilter/nfnetlink_conntrack.h.

The kernel filters the dump by address and protocol (since Linux 5.8): a table may have
hundreds of thousands of entries, and libvirt waits.  An older kernel sends all entries.
"""

import socket
import struct
from collections.abc import Iterable, Sequence
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

TUPLE_ORIG, TUPLE_REPLY, ID, ZONE = 1, 2, 12, 18
NAMING = (TUPLE_ORIG, ID, ZONE)
"""The attributes that name one entry, and no later entry with the same addresses and ports."""
TUPLE_IP, TUPLE_PROTO = 1, 2
ENDS = ((1, 2, IPv4Address), (3, 4, IPv6Address))
"""By family: the attributes of source and target, and the type of their addresses."""
SOCKET_FAMILY: dict[Family, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
PROTO_NUMBER, PROTO_TARGET_PORT = 1, 3
FILTER, FILTER_FLAGS = 25, {TUPLE_ORIG: 1, TUPLE_REPLY: 2}
"""The attribute that makes a filter of a tuple, and its own attributes by direction."""
BY_ADDRESS, BY_PROTOCOL = (1 << 0, 1 << 1), 1 << 3
"""Flags of a filter: the source and the target count, and the protocol does."""

MOST_FILTERS = 16
"""Filtered dumps above which one whole dump takes their place."""


@dataclass(frozen=True, slots=True)
class ConntrackEntry:
    """A conntrack entry; ``port`` is the target port, 0 for a protocol without ports.

    ``asked`` is the target of the first packet.  ``answered`` are source and target of the
    replies.  ``name`` are the attributes that delete the entry.
    """

    protocol: int
    asked: Address
    port: int
    answered: tuple[Address, Address]
    name: bytes


@dataclass(frozen=True, slots=True)
class DumpFilter:
    """A filter of a dump: one address in one direction of a flow.

    ``end`` is 0 for the direction's source and 1 for its target; ``protocol`` 0 is any.
    """

    direction: int
    end: int
    address: Address
    protocol: int = 0

    @property
    def attributes(self) -> bytes:
        """The attributes of the request."""
        address = self.address
        source, target, _ = next(ends for ends in ENDS if isinstance(address, ends[2]))
        kind = target if self.end else source
        content = [(TUPLE_IP | NLA_NESTED, netlink.pack([(kind, address.packed)]))]
        flags = BY_ADDRESS[self.end]
        if self.protocol:
            number = netlink.pack([(PROTO_NUMBER, bytes([self.protocol]))])
            content.append((TUPLE_PROTO | NLA_NESTED, number))
            flags |= BY_PROTOCOL
        mask = netlink.pack([netlink.u32(FILTER_FLAGS[self.direction], flags)])
        return netlink.pack(
            [(self.direction | NLA_NESTED, netlink.pack(content)), (FILTER | NLA_NESTED, mask)]
        )


def filters(claim: Forward | StaticNat) -> tuple[DumpFilter, ...]:
    """Return the filters that find all entries of a claim, and few others."""
    if isinstance(claim, StaticNat):
        return (
            DumpFilter(TUPLE_ORIG, 1, claim.address),
            DumpFilter(TUPLE_REPLY, 1, claim.address),
        )
    return (DumpFilter(TUPLE_REPLY, 0, claim.target, PROTOCOLS[claim.proto]),)


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
            candidates = _candidates(sock, claims)
            _delete(
                sock,
                [e for e in candidates if any(concerns(c, e, addresses) for c in claims)],
            )
    except OSError as error:
        where = namespace or "the host"
        raise KernelError(
            f"cannot delete conntrack entries in {where}", error.strerror or str(error)
        ) from error


def _delete(sock: Socket, entries: Iterable[ConntrackEntry]) -> None:
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


def _candidates(sock: Socket, claims: Sequence[Forward | StaticNat]) -> Iterable[ConntrackEntry]:
    """Return all entries that may be a claim's, each once.  Raises OSError."""
    wanted = dict.fromkeys(each for claim in claims for each in filters(claim))
    try:
        if len(wanted) <= MOST_FILTERS:
            entries = [
                entry
                for dump_filter in wanted
                for entry in _entries(sock, dump_filter.address.version, dump_filter.attributes)
            ]
            return {entry.name: entry for entry in entries}.values()
    except OSError as error:
        # A kernel that cannot filter.
        if error.errno not in (EINVAL, EOPNOTSUPP):
            raise
    families = sorted({claim.target.version for claim in claims})
    return [entry for family in families for entry in _entries(sock, family)]


def _header(family: Family) -> bytes:
    return struct.pack("!BBH", SOCKET_FAMILY[family], 0, 0)


def _entries(sock: Socket, family: Family, attributes: bytes = b"") -> list[ConntrackEntry]:
    """Return the entries of a family that a filter's attributes match.  Raises OSError."""
    return [parse_entry(body[HEADER:]) for body in sock.dump(GET, _header(family) + attributes)]


def parse_entry(body: bytes) -> ConntrackEntry:
    """Return the entry in a message's body."""
    attributes = Attrs.parse(body)
    original = attributes.nested(TUPLE_ORIG)
    protocol = original.nested(TUPLE_PROTO)
    port = protocol.get(PROTO_TARGET_PORT) or bytes(2)
    by_type = {kind & NLA_TYPE: (kind, value) for kind, value in attributes}
    return ConntrackEntry(
        (protocol.get(PROTO_NUMBER) or b"")[0],
        _addresses(original)[1],
        struct.unpack("!H", port)[0],
        _addresses(attributes.nested(TUPLE_REPLY)),
        netlink.pack(by_type[kind] for kind in NAMING if kind in by_type),
    )


def _addresses(direction: Attrs) -> tuple[Address, Address]:
    """Return the source and the target of one direction."""
    pair = direction.nested(TUPLE_IP)
    source, target, address = next(ends for ends in ENDS if pair.get(ends[0]) is not None)
    return address(pair.get(source) or b""), address(pair.get(target) or b"")
