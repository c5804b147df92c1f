# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ending the flows of what is published no more.

A translation outlives the rule that began it for as long as its conntrack entry
does: a guest that has stopped would still be answered for, or its successor at
the same address get its traffic.

An entry is deleted by the very attributes with which the kernel names it, not by
what we understand of them: it refuses to delete one whose protocol has a key (of
GRE, for one) that is not given.  Source: linux/netfilter/nfnetlink_conntrack.h.
"""

import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from errno import ENOENT
from ipaddress import IPv4Address

from libvirt_natns import netns
from libvirt_natns.addresses import Address
from libvirt_natns.errors import KernelError
from libvirt_natns.model import Forward, StaticNat
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
NLA_TYPE = 0x3FFF
BUFFER = 1 << 18

TUPLE_ORIG, TUPLE_REPLY, ID, ZONE = 1, 2, 12, 18
NAMING = (TUPLE_ORIG, ID, ZONE)
"""The attributes that name one entry, and no later one with the same addresses and ports."""
TUPLE_IP, TUPLE_PROTO = 1, 2
IP_SOURCE, IP_TARGET = 1, 2
PROTO_NUMBER, PROTO_TARGET_PORT = 1, 3


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


def cut(namespace: str, gone: Iterable[Forward | StaticNat], address: Address) -> None:
    """Delete the conntrack entries of these forwards and addresses, and no others.

    ``address`` is the network's upstream address: where a forward that listens on
    the host's own arrives in the namespace.  Raises KernelError.
    """
    _cut(namespace, tuple(gone), address)


def cut_on_host(gone: Iterable[Forward | StaticNat], address: Address) -> None:
    """The same in the host, which leads them to a network's upstream address."""
    moved = [replace(claim, target=address) for claim in gone if isinstance(claim, Forward)]
    _cut(None, moved, None)


def _cut(
    namespace: str | None, claims: Sequence[Forward | StaticNat], address: Address | None
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
                    for entry in _entries(session)
                    if any(_concerns(claim, entry, address) for claim in claims)
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
            for _ in _request(session, DELETE, REQUEST_ACK, entry.name):
                pass
        except OSError as error:
            if error.errno != ENOENT:  # it has ended by itself
                errors.append(error)
    if errors:
        raise errors[0]


def _concerns(claim: Forward | StaticNat, entry: Entry, address: Address | None) -> bool:
    source, target = entry.answered
    if isinstance(claim, StaticNat):
        return claim.address in (entry.asked, target)
    if entry.protocol != PROTOCOLS[claim.proto]:
        return False
    if not claim.first <= entry.port <= claim.last:
        return False
    # What answers is the target, not what was asked.
    if source != claim.target or entry.asked == source:
        return False
    return address is None or entry.asked in (claim.address, address)


# -- the kernel's messages -------------------------------------------------------


def _entries(session: socket.socket) -> list[Entry]:
    """All flows of IPv4.  Raises OSError."""
    return [_entry(body) for body in _request(session, GET, REQUEST_DUMP)]


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
    return IPv4Address(pair[IP_SOURCE][4:]), IPv4Address(pair[IP_TARGET][4:])


def _request(
    session: socket.socket, what: int, flags: int, attributes: bytes = b""
) -> Iterator[bytes]:
    """The attributes of each entry of the answer.  Raises OSError."""
    kind = NFNL_SUBSYS_CTNETLINK << 8 | what
    header = struct.pack("=IHHII", 20 + len(attributes), kind, flags, 1, 0)
    session.sendto(header + struct.pack("!BBH", socket.AF_INET, 0, 0) + attributes, (0, 0))
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


def _padded(attribute: bytes) -> bytes:
    return attribute + bytes(-len(attribute) % 4)


def _aligned(length: int) -> int:
    return length + 3 & ~3
