# SPDX-License-Identifier: LGPL-2.1-or-later
"""A static neighbour, or an address that the NIC answers for, captured to be made again.

The body is the kernel's own message (see ``nic_addresses``).
Known limit: a neighbour that the kernel has found out by itself is not captured.
"""

import struct
from dataclasses import dataclass
from ipaddress import ip_address
from socket import AF_INET, AF_INET6

from libvirt_natns.kernel import netlink
from libvirt_natns.kernel.netlink import Attrs

HEADER = 12
"""Octets of struct ndmsg: family, padding, index, state, flags, type."""


@dataclass(frozen=True, slots=True)
class NicNeighbour:
    """A neighbour that an administrator entered, or a proxied address."""

    body: str

    @property
    def ip(self) -> str:
        address = Attrs.parse(bytes.fromhex(self.body), HEADER).get(netlink.NDA_DST)
        return str(ip_address(address or bytes(4)))

    @property
    def is_proxy(self) -> bool:
        """True if the NIC answers for the address."""
        return bool(bytes.fromhex(self.body)[10] & netlink.NTF_PROXY)

    def __str__(self) -> str:
        return f"{'proxy for' if self.is_proxy else 'neighbour'} {self.ip}"

    def request(self, link: int) -> bytes:
        """Return the request that makes the neighbour on a link."""
        body = bytes.fromhex(self.body)
        return body[:4] + struct.pack("=i", link) + body[8:]


def parse(body: bytes) -> NicNeighbour | None:
    """Return a neighbour from the kernel's listing; None where the kernel has found it out."""
    state, flags = struct.unpack_from("=HB", body, 8)
    if not (state & netlink.NUD_PERMANENT or flags & netlink.NTF_PROXY):
        return None
    attributes = Attrs.parse(body, HEADER)
    if flags & netlink.NTF_PROXY:
        return proxy(str(ip_address(attributes.get(netlink.NDA_DST) or bytes(4))))
    kept = attributes.without(netlink.NDA_CACHEINFO, netlink.NDA_PROBES)
    return NicNeighbour((body[:4] + bytes(4) + body[8:HEADER] + kept.pack()).hex())


def proxy(ip: str) -> NicNeighbour:
    """Return the entry by which a link answers its neighbours for an address."""
    address = ip_address(ip)
    family = AF_INET if address.version == 4 else AF_INET6
    header = struct.pack("=BxxxiHBB", family, 0, netlink.NUD_PERMANENT, netlink.NTF_PROXY, 0)
    return NicNeighbour((header + netlink.pack([(netlink.NDA_DST, address.packed)])).hex())
