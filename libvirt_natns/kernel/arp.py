# SPDX-License-Identifier: LGPL-2.1-or-later
"""ARP frames about an IPv4 address (RFC 5227), for sockets elsewhere."""

import struct
from collections.abc import Collection
from ipaddress import IPv4Address

from libvirt_natns.addresses import Address

ETHERTYPE = 0x0806
BROADCAST = b"\xff" * 6
IPV4_ON_ETHERNET = (1, 0x0800, 6, 4)
REQUEST = 1
ARP_FORMAT = "!HHBBH6s4s6s4s"
FRAME_LENGTH = 14 + struct.calcsize(ARP_FORMAT)


def _frame(mac: bytes, sender: Address, target: Address) -> bytes:
    """Return a broadcast ARP request of 42 octets, Ethernet header included."""
    ethernet = BROADCAST + mac + struct.pack("!H", ETHERTYPE)
    return ethernet + struct.pack(
        ARP_FORMAT, *IPV4_ON_ETHERNET, REQUEST, mac, sender.packed, bytes(6), target.packed
    )


def question(mac: bytes, address: Address) -> bytes:
    """Return the frame that asks whether a station has an address."""
    return _frame(mac, IPv4Address(0), address)


def announcement(mac: bytes, address: Address) -> bytes:
    """Return the frame that announces an address."""
    return _frame(mac, address, address)


def claimed(frame: bytes, own: bytes, wanted: Collection[Address]) -> Address | None:
    """Return the wanted address that a received frame shows to be another station's.

    RFC 5227, 2.1.1: any ARP packet with the wanted address as its sender, or another station's
    probe for it.
    """
    if len(frame) < FRAME_LENGTH or frame[12:14] != struct.pack("!H", ETHERTYPE):
        return None
    fields = struct.unpack(ARP_FORMAT, frame[14:FRAME_LENGTH])
    if fields[:4] != IPV4_ON_ETHERNET:
        return None
    mac, sender, target = fields[5], IPv4Address(fields[6]), IPv4Address(fields[8])
    if sender in wanted:
        return sender
    probe = int(sender) == 0 and mac != own
    return target if probe and target in wanted else None
