# SPDX-License-Identifier: LGPL-2.1-or-later
"""Neighbour Discovery frames about an IPv6 address, for sockets elsewhere.

A solicitation from no address asks whether an address is free (RFC 4862, 5.4.2).  An unsolicited
advertisement announces an address (RFC 4861, 7.2.6).
"""

import struct
from collections.abc import Collection
from ipaddress import IPv6Address

from libvirt_natns.addresses import Address

ETHERTYPE = 0x86DD
ICMPV6 = 58
SOLICITATION = 135
ADVERTISEMENT = 136
HOP_LIMIT = 255
"""A forwarded packet cannot have this hop limit."""

ROUTER_AND_OVERRIDE = 0xA0000000
TARGET_LINK_ADDRESS = 2

NOBODY = IPv6Address("::")
ALL_NODES = IPv6Address("ff02::1")
ALL_NODES_MAC = bytes.fromhex("333300000001")
SOLICITED_NODE = IPv6Address("ff02::1:ff00:0")

IPV6_FORMAT = "!IHBB16s16s"
ICMPV6_FORMAT = "!BBHI16s"
ICMPV6_START = 14 + struct.calcsize(IPV6_FORMAT)
FRAME_LENGTH = ICMPV6_START + struct.calcsize(ICMPV6_FORMAT)

NEXT_HEADER_AT, KIND_AT = 14 + 6, ICMPV6_START
_LOAD_BYTE, _EQUAL, _RETURN = 0x30, 0x15, 0x06
FILTER = b"".join(
    struct.pack("=HBBI", *each)
    for each in (
        (_LOAD_BYTE, 0, 0, NEXT_HEADER_AT),
        (_EQUAL, 0, 4, ICMPV6),
        (_LOAD_BYTE, 0, 0, KIND_AT),
        (_EQUAL, 1, 0, SOLICITATION),
        (_EQUAL, 0, 1, ADVERTISEMENT),
        (_RETURN, 0, 0, 0xFFFF),
        (_RETURN, 0, 0, 0),
    )
)
"""The types that a packet socket lets through, of all of IPv6, for the kernel's filter."""


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _frame(
    mac: bytes,
    source: Address,
    to: IPv6Address,
    kind: int,
    target: Address,
    options: bytes = b"",
) -> bytes:
    flags = ROUTER_AND_OVERRIDE if kind == ADVERTISEMENT else 0
    length = struct.calcsize(ICMPV6_FORMAT) + len(options)
    pseudo = source.packed + to.packed + struct.pack("!II", length, ICMPV6)
    unsummed = struct.pack(ICMPV6_FORMAT, kind, 0, 0, flags, target.packed) + options
    checksum = _checksum(pseudo + unsummed)
    ethernet = b"\x33\x33" + to.packed[-4:] + mac + struct.pack("!H", ETHERTYPE)
    header = struct.pack(IPV6_FORMAT, 6 << 28, length, ICMPV6, HOP_LIMIT, source.packed, to.packed)
    message = struct.pack(ICMPV6_FORMAT, kind, 0, checksum, flags, target.packed)
    return ethernet + header + message + options


def question(mac: bytes, address: Address) -> bytes:
    """Return the frame that asks whether a station has an address."""
    group = IPv6Address(int(SOLICITED_NODE) | int(address) & 0xFFFFFF)
    return _frame(mac, NOBODY, group, SOLICITATION, address)


def announcement(mac: bytes, address: Address) -> bytes:
    """Return the frame that announces an address, and its station as a router."""
    option = struct.pack("!BB6s", TARGET_LINK_ADDRESS, 1, mac)
    return _frame(mac, address, ALL_NODES, ADVERTISEMENT, address, option)


def claimed(frame: bytes, own: bytes, wanted: Collection[Address]) -> Address | None:
    """Return the wanted address that a received frame shows to be another station's.

    RFC 4862, 5.4: an advertisement of the address, or another station's probe for it.  A
    solicitation from the address counts, too.
    """
    if len(frame) < FRAME_LENGTH or frame[6:12] == own:
        return None
    if frame[12:14] != struct.pack("!H", ETHERTYPE):
        return None
    _, _, following, hops, packed, _ = struct.unpack_from(IPV6_FORMAT, frame, 14)
    kind, code, _, _, asked = struct.unpack_from(ICMPV6_FORMAT, frame, ICMPV6_START)
    if (following, hops, code) != (ICMPV6, HOP_LIMIT, 0):
        return None
    source, target = IPv6Address(packed), IPv6Address(asked)
    if kind == SOLICITATION and source in wanted:
        return source
    says = kind == ADVERTISEMENT or (kind == SOLICITATION and source == NOBODY)
    return target if says and target in wanted else None
