# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages of rtnetlink and nftables: their parts, and whether a change may be damage.

The module reads the few attributes that the kernel watch needs, and changes nothing.
"""

import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

RTM_NEWLINK = 16
RTM_DELLINK = 17
RTM_GETLINK = 18
RTM_NEWADDR = 20
RTM_DELADDR = 21
RTM_NEWROUTE = 24
RTM_DELROUTE = 25
RTM_NEWNETCONF = 80

IFLA_IFNAME = 3
IFLA_MTU = 4
IFLA_MASTER = 10
IFLA_PROTINFO = 12
IFLA_BRPORT_MODE = 4
IFF_UP = 1
IFA_ADDRESS = 1
RTA_DST = 1
RTPROT_STATIC = 4
RTPROT_RA = 9
NETCONFA_IFINDEX = 1
NETCONFA_FORWARDING = 2
NETCONFA_IFINDEX_ALL = -1
NLA_TYPE_MASK = 0x3FFF

ELEMENTS_AND_GENERATIONS = (12, 14, 15)
"""Kinds of nftables' messages: NFT_MSG_NEWSETELEM, _DELSETELEM, _NEWGEN."""

LIBVIRTS = (b"libvirt_network\0", b"LIBVIRT_")
"""libvirt's table of nftables, and the beginning of its chains' names in other tables."""

HEADER = struct.Struct("=IHHII")
IFINFO = struct.Struct("=BxHiII")
IFADDR = struct.Struct("=BBBBI")
RTMSG = struct.Struct("=BBBBBBBBI")
ATTRIBUTE = struct.Struct("=HH")
NUMBER = struct.Struct("=i")


def messages(datagram: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the kind and the body of each message of a datagram."""
    while len(datagram) >= HEADER.size:
        length, kind, _, _, _ = HEADER.unpack_from(datagram)
        if length < HEADER.size:
            return
        yield kind, datagram[HEADER.size : length]
        datagram = datagram[_aligned(length) :]


def attributes(body: memoryview, start: int) -> dict[int, memoryview]:
    """Return a message's attributes, which begin at ``start``, by their kind."""
    values = {}
    rest = body[start:]
    while len(rest) >= ATTRIBUTE.size:
        length, kind = ATTRIBUTE.unpack_from(rest)
        if length < ATTRIBUTE.size:
            break
        values[kind & NLA_TYPE_MASK] = rest[ATTRIBUTE.size : length]
        rest = rest[_aligned(length) :]
    return values


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _number(value: memoryview | None) -> int:
    return int(NUMBER.unpack_from(value)[0]) if value is not None else 0


class LinkState(NamedTuple):
    """The properties of a link that damage may change: not its carrier or counters."""

    name: str
    up: bool
    master: int
    mtu: int
    hairpin: bool = False


def link_index(body: memoryview) -> int:
    """Return the index of the link that a message is about."""
    return int(IFINFO.unpack_from(body)[2])


def link_state(kind: int, body: memoryview, before: LinkState | None) -> LinkState | None:
    """Return a link's state after a message, from its state before; None if it is gone."""
    family, _, _, flags, _ = IFINFO.unpack_from(body)
    values = attributes(body, IFINFO.size)
    if family != socket.AF_UNSPEC:
        # A bridge's message about its port.  A port that leaves sends one of the link, too.
        settings = values.get(IFLA_PROTINFO)
        if before is None or kind != RTM_NEWLINK or settings is None:
            return before
        mode = attributes(settings, 0).get(IFLA_BRPORT_MODE)
        return before._replace(hairpin=bool(mode and mode[0]))
    if kind != RTM_NEWLINK or IFLA_IFNAME not in values:
        return None
    name = bytes(values[IFLA_IFNAME]).rstrip(b"\0").decode(errors="replace")
    master = _number(values.get(IFLA_MASTER))
    hairpin = before.hairpin if before and master else False
    return LinkState(name, bool(flags & IFF_UP), master, _number(values.get(IFLA_MTU)), hairpin)


def address_index(body: memoryview) -> int:
    """Return the index of the link that an address came to or went from."""
    return int(IFADDR.unpack_from(body)[4])


def kernels_own(kind: int, body: memoryview) -> bool:
    """True if a message tells of a change that the kernel makes in IPv6 by itself.

    Link-local addresses and multicast come and go with a link's carrier, and a
    default route as its router advertises it.
    """
    if kind in (RTM_NEWADDR, RTM_DELADDR):
        return body[0] == socket.AF_INET6 and _within_link(body, IFADDR.size, IFA_ADDRESS)
    if kind in (RTM_NEWROUTE, RTM_DELROUTE):
        advertised = RTMSG.unpack_from(body)[5] == RTPROT_RA
        return body[0] == socket.AF_INET6 and (
            advertised or _within_link(body, RTMSG.size, RTA_DST)
        )
    return False


def _within_link(body: memoryview, start: int, kind: int) -> bool:
    """True if an address in a message is in fe80::/10 or ff00::/8."""
    address = bytes(attributes(body, start).get(kind, b""))[:2]
    return address[:1] == b"\xff" or (
        len(address) == 2 and address[0] == 0xFE and address[1] & 0xC0 == 0x80
    )


def alters_forwarding(body: memoryview) -> bool:
    """True if a change of settings switches forwarding off somewhere, or on for all links.

    A single link that begins to forward takes nothing away, and frees no other link.
    """
    values = attributes(body, 4)
    # A new link comes with all of its settings.
    if values.keys() != {NETCONFA_IFINDEX, NETCONFA_FORWARDING}:
        return False
    on = _number(values[NETCONFA_FORWARDING]) != 0
    return not on or _number(values[NETCONFA_IFINDEX]) == NETCONFA_IFINDEX_ALL


def alters_routing(kind: int, body: memoryview) -> bool:
    """True if the host may lead less to networks than before, or more to others."""
    if kind == RTM_NEWNETCONF:
        return alters_forwarding(body)
    return kind == RTM_DELROUTE and loses_prefix(body)


def loses_prefix(body: memoryview) -> bool:
    """True if a deleted route may have been one of ours to a network's prefix.

    A router's routes may come and go all day long; they are neither static nor that long.
    """
    fields = RTMSG.unpack_from(body)
    return bool(fields[0] == socket.AF_INET6 and fields[1] >= 64 and fields[5] == RTPROT_STATIC)


def alters_rules(kind: int, body: memoryview) -> bool:
    """True if a change of nftables in the host may concern the rules that we need there.

    Elements of sets come and go all day long where a program bans attackers.
    libvirt's own chains do not touch our rules.
    """
    if kind & 0xFF in ELEMENTS_AND_GENERATIONS:
        return False
    octets = bytes(body)
    return not any(mark in octets for mark in LIBVIRTS)
