# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ending the flows of what is published no more.

A translation outlives the rule that began it for as long as its conntrack entry
does: a guest that has stopped would still be answered for, or its successor at
the same address get its traffic.

An entry is deleted by the very attributes with which the kernel names it, not by
what we understand of them: it refuses to delete one whose protocol has a key (of
GRE, for one) that is not given.  Source: linux/netfilter/nfnetlink_conntrack.h.

The kernel filters the dump by address and protocol (since Linux 5.8): a table may have
hundreds of thousands of entries, and libvirt waits.  An older kernel sends all entries.
"""

import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from errno import EINVAL, ENOENT, EOPNOTSUPP
from ipaddress import IPv4Address, IPv6Address

from libvirt_natns.addresses import Address, Family
from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netns
from libvirt_natns.model.publication import Forward, StaticNat
from libvirt_natns.records import dataclass, replace

PROTOCOLS = {
    "tcp": socket.IPPROTO_TCP,
    "udp": socket.IPPROTO_UDP,
    "sctp": socket.IPPROTO_SCTP,
}

NETLINK_NETFILTER = 12
NFNL_SUBSYS_CTNETLINK = 1
GET, DELETE = 1, 2
REQUEST_DUMP, REQUEST_ACK = 0x301, 0x5
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLA_TYPE, NLA_NESTED = 0x3FFF, 0x8000
BUFFER = 1 << 18

TUPLE_ORIG, TUPLE_REPLY, ID, ZONE = 1, 2, 12, 18
NAMING = (TUPLE_ORIG, ID, ZONE)
"""The attributes that name one entry, and no later one with the same addresses and ports."""
TUPLE_IP, TUPLE_PROTO = 1, 2
ENDS = ((1, 2, IPv4Address), (3, 4, IPv6Address))
"""By family: the attributes of source and target, and what they hold."""
SOCKET_FAMILY: dict[Family, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
PROTO_NUMBER, PROTO_TARGET_PORT = 1, 3
FILTER, FILTER_FLAGS = 25, {TUPLE_ORIG: 1, TUPLE_REPLY: 2}
"""The attribute that makes a filter of a tuple, and its own attributes by direction."""
BY_ADDRESS, BY_PROTOCOL = (1 << 0, 1 << 1), 1 << 3
"""Flags of a filter: the source and the target count, and the protocol does."""

MOST_QUESTIONS = 16
"""Filtered dumps above which one whole dump is asked for."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tracked flow; ``port`` is the one that was asked for, 0 for a protocol without.

    ``asked`` and ``answered`` are where its first packet went and where the answers
    to it come from and go to; ``name`` is what deletes it.
    """

    protocol: int
    asked: Address
    port: int
    answered: tuple[Address, Address]
    name: bytes


@dataclass(frozen=True, slots=True)
class Question:
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
        content = _nested(TUPLE_IP, _attribute(kind, address.packed))
        flags = BY_ADDRESS[self.end]
        if self.protocol:
            number = _attribute(PROTO_NUMBER, bytes([self.protocol]))
            content += _nested(TUPLE_PROTO, number)
            flags |= BY_PROTOCOL
        mask = _attribute(FILTER_FLAGS[self.direction], struct.pack("=I", flags))
        return _nested(self.direction, content) + _nested(FILTER, mask)


def questions(claim: Forward | StaticNat) -> tuple[Question, ...]:
    """The filters that find all flows of a claim, and few others."""
    if isinstance(claim, StaticNat):
        return (
            Question(TUPLE_ORIG, 1, claim.address),
            Question(TUPLE_REPLY, 1, claim.address),
        )
    return (Question(TUPLE_REPLY, 0, claim.target, PROTOCOLS[claim.proto]),)


def cut(namespace: str, gone: Iterable[Forward | StaticNat], *addresses: Address) -> None:
    """Delete the conntrack entries of these forwards and addresses, and no others.

    ``addresses`` are the network's upstream addresses: where a forward that listens on
    the host's own arrives in the namespace.  Raises KernelError.
    """
    _cut(namespace, tuple(gone), frozenset(addresses))


def cut_on_host(
    gone: Iterable[Forward | StaticNat], *addresses: Address, router: str | None = None
) -> None:
    """The same in the host, or a router namespace, which leads them to a network's addresses."""
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
    with netns.entered(namespace):
        session = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    try:
        with session:
            _delete_all(
                session,
                [
                    entry
                    for entry in _candidates(session, claims)
                    if any(_concerns(claim, entry, addresses) for claim in claims)
                ],
            )
    except OSError as error:
        where = namespace or "the host"
        raise KernelError(f"cannot cut flows in {where}", error.strerror or str(error)) from error


def _delete_all(session: socket.socket, entries: Iterable[Entry]) -> None:
    """Delete all that can be; the first error is raised after the last one."""
    errors = []
    for entry in entries:
        try:
            family = entry.asked.version
            for _ in _request(session, DELETE, REQUEST_ACK, family, entry.name):
                pass
        except OSError as error:
            if error.errno != ENOENT:  # it has ended by itself
                errors.append(error)
    if errors:
        raise errors[0]


def _concerns(
    claim: Forward | StaticNat, entry: Entry, addresses: frozenset[Address] | None
) -> bool:
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
        # A guest's own address, which is let in to as it is.
        return entry.asked == source
    # What answers is the target, not what was asked.
    if entry.asked == source:
        return False
    return addresses is None or entry.asked == claim.address or entry.asked in addresses


# -- the kernel's messages -------------------------------------------------------


def _candidates(session: socket.socket, claims: Sequence[Forward | StaticNat]) -> Iterable[Entry]:
    """All flows that may be a claim's, each once.  Raises OSError."""
    asked = dict.fromkeys(question for claim in claims for question in questions(claim))
    try:
        if len(asked) <= MOST_QUESTIONS:
            found = [
                entry
                for question in asked
                for entry in _entries(session, question.address.version, question.attributes)
            ]
            return {entry.name: entry for entry in found}.values()
    except OSError as error:
        if error.errno not in (EINVAL, EOPNOTSUPP):
            raise
    families = sorted({claim.target.version for claim in claims})
    return [entry for family in families for entry in _entries(session, family)]


def _entries(session: socket.socket, family: Family, attributes: bytes = b"") -> list[Entry]:
    """The flows of a family that the attributes of a filter match.  Raises OSError."""
    return [_entry(body) for body in _request(session, GET, REQUEST_DUMP, family, attributes)]


def _entry(body: bytes) -> Entry:
    found = dict(_attributes(body))
    original = dict(_attributes(found[TUPLE_ORIG][4:]))
    protocol = dict(_attributes(original[TUPLE_PROTO][4:]))
    port = protocol.get(PROTO_TARGET_PORT, bytes(6))[4:]
    return Entry(
        protocol[PROTO_NUMBER][4],
        _addresses(original)[1],
        struct.unpack("!H", port)[0],
        _addresses(dict(_attributes(found[TUPLE_REPLY][4:]))),
        b"".join(_padded(found[kind]) for kind in NAMING if kind in found),
    )


def _addresses(direction: dict[int, bytes]) -> tuple[Address, Address]:
    """The source and the target of one direction."""
    pair = dict(_attributes(direction[TUPLE_IP][4:]))
    source, target, address = next(ends for ends in ENDS if ends[0] in pair)
    return address(pair[source][4:]), address(pair[target][4:])


def _request(
    session: socket.socket, what: int, flags: int, family: Family, attributes: bytes = b""
) -> Iterator[bytes]:
    """The attributes of each entry of the answer.  Raises OSError."""
    kind = NFNL_SUBSYS_CTNETLINK << 8 | what
    header = struct.pack("=IHHII", 20 + len(attributes), kind, flags, 1, 0)
    about = struct.pack("!BBH", SOCKET_FAMILY[family], 0, 0)
    session.sendto(header + about + attributes, (0, 0))
    while True:
        data = session.recv(BUFFER)
        offset = 0
        while offset < len(data):
            length, found = struct.unpack_from("=IH", data, offset)
            if found in (NLMSG_DONE, NLMSG_ERROR):
                code = -struct.unpack_from("=i", data, offset + 16)[0]
                if code > 0:
                    raise OSError(code, os.strerror(code))
                return
            yield data[offset + 20 : offset + length]
            offset += _aligned(length)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Netlink attributes by type, their headers included."""
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        yield kind & NLA_TYPE, data[offset : offset + length]
        offset += _aligned(max(length, 4))


def _attribute(kind: int, value: bytes) -> bytes:
    return _padded(struct.pack("=HH", 4 + len(value), kind) + value)


def _nested(kind: int, content: bytes) -> bytes:
    return _attribute(kind | NLA_NESTED, content)


def _padded(attribute: bytes) -> bytes:
    return attribute + bytes(-len(attribute) % 4)


def _aligned(length: int) -> int:
    return length + 3 & ~3
