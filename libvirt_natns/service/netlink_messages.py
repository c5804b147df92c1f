# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages of rtnetlink and nftables: whether a change of the kernel may be damage.

The module reads the few attributes that the kernel watch needs, and changes nothing.
"""

import socket
import struct
from typing import NamedTuple

from libvirt_natns.addresses import Family
from libvirt_natns.kernel.netlink import (
    IFA_ADDRESS,
    IFF_UP,
    IFLA_BRPORT_MODE,
    IFLA_IFNAME,
    IFLA_MASTER,
    IFLA_MTU,
    IFLA_PROTINFO,
    LINK_HEADER,
    NLA_TYPE,
    RT_TABLE_LOCAL,
    RTA_DST,
    RTM_DELADDR,
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNETCONF,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    RTPROT_RA,
    RTPROT_STATIC,
    Attrs,
)
from libvirt_natns.kernel.routes import LEAST_SPECIFIC
from libvirt_natns.kernel.rtnetlink import hops

NETCONFA_IFINDEX = 1
NETCONFA_FORWARDING = 2
NETCONFA_IFINDEX_ALL = 0xFFFFFFFF
"""-1, as an unsigned number."""

ELEMENTS_AND_GENERATIONS = (12, 14, 15)
"""Kinds of nftables' messages: NFT_MSG_NEWSETELEM, _DELSETELEM, _NEWGEN."""

LIBVIRTS = (b"libvirt_network\0", b"LIBVIRT_")
"""libvirt's table of nftables, and the beginning of its chains' names in other tables."""

SHARED = b"FORWARD\0"
"""The chain of iptables that libvirt shares with others."""

IFADDR = struct.Struct("=BBBBI")
RTMSG = struct.Struct("=BBBBBBBBI")


class LinkState(NamedTuple):
    """The properties of a link that damage may change: not its carrier or counters."""

    name: str
    up: bool
    master: int
    mtu: int
    hairpin: bool = False


def link_index(body: bytes) -> int:
    """Return the index of the link that a message is about."""
    return int(LINK_HEADER.unpack_from(body)[2])


def link_state(kind: int, body: bytes, before: LinkState | None) -> LinkState | None:
    """Return a link's state after a message, from its state before; None if it is gone."""
    family, _, _, flags, _ = LINK_HEADER.unpack_from(body)
    values = Attrs.parse(body, LINK_HEADER.size)
    if family != socket.AF_UNSPEC:
        # A bridge's message about its port.  A port that leaves sends one of the link, too.
        if before is None or kind != RTM_NEWLINK or values.get(IFLA_PROTINFO) is None:
            return before
        mode = values.nested(IFLA_PROTINFO).get(IFLA_BRPORT_MODE)
        return before._replace(hairpin=bool(mode and mode[0]))
    if kind != RTM_NEWLINK or values.get(IFLA_IFNAME) is None:
        return None
    master = values.number(IFLA_MASTER) or 0
    hairpin = before.hairpin if before and master else False
    mtu = values.number(IFLA_MTU) or 0
    return LinkState(values.text(IFLA_IFNAME), bool(flags & IFF_UP), master, mtu, hairpin)


def address_index(body: bytes) -> int:
    """Return the index of the link that an address came to or went from."""
    return int(IFADDR.unpack_from(body)[4])


def kernels_own(kind: int, body: bytes) -> bool:
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


def _within_link(body: bytes, start: int, kind: int) -> bool:
    """True if an address in a message is in fe80::/10 or ff00::/8."""
    address = (Attrs.parse(body, start).get(kind) or b"")[:2]
    return address[:1] == b"\xff" or (
        len(address) == 2 and address[0] == 0xFE and address[1] & 0xC0 == 0x80
    )


def alters_forwarding(body: bytes) -> bool:
    """True if a change of settings switches forwarding off somewhere, or on for all links.

    A single link that begins to forward takes nothing away, and frees no other link.
    """
    values = Attrs.parse(body, 4)
    # A new link comes with all of its settings.
    if {kind & NLA_TYPE for kind, _ in values} != {NETCONFA_IFINDEX, NETCONFA_FORWARDING}:
        return False
    is_on = values.number(NETCONFA_FORWARDING) != 0
    return not is_on or values.number(NETCONFA_IFINDEX) == NETCONFA_IFINDEX_ALL


def alters_routing(kind: int, body: bytes) -> bool:
    """True if the host may lead less to networks than before, or more to others."""
    if kind == RTM_NEWNETCONF:
        return alters_forwarding(body)
    if kind in (RTM_NEWRULE, RTM_DELRULE):
        return True
    if kind in (RTM_NEWROUTE, RTM_DELROUTE) and is_way_out(body):
        return True
    return kind == RTM_DELROUTE and loses_prefix(body)


def is_way_out(body: bytes) -> bool:
    """True if a route leads to all the world, or to a part of it, by any table."""
    family, length = RTMSG.unpack_from(body)[:2]
    families: dict[int, Family] = {socket.AF_INET: 4, socket.AF_INET6: 6}
    return family in families and bool(length < LEAST_SPECIFIC[families[family]])


def led_over(kind: int, body: bytes) -> list[int]:
    """Return the indexes of the links that a new IPv4 route leads over, of any table.

    IPv6 is forwarded on all links or on none.
    """
    if kind != RTM_NEWROUTE or body[0] != socket.AF_INET or body[4] == RT_TABLE_LOCAL:
        return []
    return [hop.link for hop in hops(Attrs.parse(body, RTMSG.size))]


def loses_prefix(body: bytes) -> bool:
    """True if a deleted route may have been one of ours to a network's prefix.

    A router's routes may come and go all day long; they are neither static nor that long.
    """
    fields = RTMSG.unpack_from(body)
    return bool(fields[0] == socket.AF_INET6 and fields[1] >= 64 and fields[5] == RTPROT_STATIC)


def alters_rules(kind: int, body: bytes) -> bool:
    """True if a change of nftables in the host may concern the rules that we need there.

    Elements of sets come and go all day long where a program bans attackers.
    libvirt's own chains do not touch our rules.  Its jumps in FORWARD do: they say that FORWARD
    is for networks of libvirt's as well.
    """
    if kind & 0xFF in ELEMENTS_AND_GENERATIONS:
        return False
    if SHARED in body:
        return True
    return not any(mark in body for mark in LIBVIRTS)
