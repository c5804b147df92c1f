# SPDX-License-Identifier: LGPL-2.1-or-later
"""An address of a NIC, captured so that it can be made again.

The body is the kernel's own message.  It lacks the link's index, which another namespace may
change, and fields that only the kernel sets.  An address has more properties than any description
names, and each kernel adds some; they all stay in the body.  Lifetimes are kept beside the body:
two addresses are equal even with different lifetimes.
"""

import struct
from dataclasses import dataclass, replace
from ipaddress import ip_address
from socket import AF_INET6

from libvirt_natns.kernel import netlink
from libvirt_natns.kernel.netlink import Attrs

FOREVER = 0xFFFFFFFF
SOON = 120
"""Seconds for an address or route that would have expired by now: a program can renew it."""

HEADER = 8
"""Octets of struct ifaddrmsg: family, prefix length, flags, scope, index."""

REQUESTABLE_FLAGS = (
    netlink.IFA_F_NODAD
    | netlink.IFA_F_HOMEADDRESS
    | netlink.IFA_F_MANAGETEMPADDR
    | netlink.IFA_F_NOPREFIXROUTE
    | netlink.IFA_F_MCAUTOJOIN
)
"""Flags that a request may set; the kernel sets all others."""

LABEL_LENGTH = 15


@dataclass(frozen=True, slots=True)
class NicAddress:
    """An address; lifetimes in seconds, as they were at the capture."""

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
        attributes = Attrs.parse(bytes.fromhex(self.body), HEADER)
        local = attributes.get(netlink.IFA_LOCAL) or attributes.get(netlink.IFA_ADDRESS)
        return str(ip_address(local or bytes(4)))

    @property
    def is_global(self) -> bool:
        """True if stations beyond the NIC's own segment can use it."""
        return bytes.fromhex(self.body)[3] == 0 and not ip_address(self.ip).is_link_local

    @property
    def leased(self) -> bool:
        """True if the address expires."""
        return self.valid != FOREVER

    def for_good(self) -> "NicAddress":
        """Return the address without an end; a deprecated address stays deprecated."""
        return replace(self, preferred=self.preferred and FOREVER, valid=FOREVER)

    def relabelled(self, old: str, new: str) -> "NicAddress":
        """Return the address for a link of another name; its label (``ens3:1``) begins with it."""
        body = bytes.fromhex(self.body)
        attributes = [
            (kind, _relabel(value, old.encode(), new.encode()))
            if kind & netlink.NLA_TYPE == netlink.IFA_LABEL
            else (kind, value)
            for kind, value in Attrs.parse(body, HEADER)
        ]
        return replace(self, body=(body[:HEADER] + netlink.pack(attributes)).hex())

    def __str__(self) -> str:
        return f"address {self.ip}/{self.prefix}"

    def request(self, link: int, elapsed: float) -> bytes:
        """Return the request that makes the address on a link, ``elapsed`` seconds later."""
        body = bytes.fromhex(self.body)
        times = [_left(seconds, elapsed) for seconds in (self.preferred, self.valid)]
        lifetimes = (netlink.IFA_CACHEINFO, struct.pack("=IIII", *times, 0, 0))
        return body[:4] + struct.pack("=I", link) + body[8:] + netlink.pack([lifetimes])


def _relabel(label: bytes, old: bytes, new: bytes) -> bytes:
    text = label.rstrip(b"\0")
    if text != old and not text.startswith(old + b":"):
        return label
    return (new + text[len(old) :])[:LABEL_LENGTH] + b"\0"


def _left(seconds: int, elapsed: float) -> int:
    """Return the rest of a lifetime; a lifetime that was over stays so."""
    if seconds in (0, FOREVER):
        return seconds
    return max(SOON, int(seconds - elapsed))


def parse(body: bytes) -> NicAddress:
    """Return an address from the kernel's listing."""
    attributes = Attrs.parse(body, HEADER)
    flags = (attributes.number(netlink.IFA_FLAGS) or 0) & REQUESTABLE_FLAGS
    times = attributes.get(netlink.IFA_CACHEINFO)
    preferred, valid = struct.unpack_from("=II", times) if times else (FOREVER, FOREVER)
    kept = [
        *attributes.without(netlink.IFA_CACHEINFO, netlink.IFA_FLAGS),
        netlink.u32(netlink.IFA_FLAGS, flags),
    ]
    header = bytes([body[0], body[1], 0, body[3]]) + bytes(4)
    return NicAddress((header + netlink.pack(kept)).hex(), preferred, valid)


def oldest_first(listed: tuple[NicAddress, ...]) -> list[NicAddress]:
    """Return the addresses of a link in the order in which they must be made.

    The kernel lists IPv4 addresses from the oldest on, and IPv6 addresses of a scope from the
    newest on.  It prefers the address that it lists first as the source of packets.
    """
    four = [address for address in listed if address.family != AF_INET6]
    six = [address for address in listed if address.family == AF_INET6]
    return [*four, *reversed(six)]


def single(ip: str, length: int = 128) -> NicAddress:
    """Return an IPv6 address as the kernel would list it.

    It has no subnet by default, and the kernel does not ask neighbours whether it is taken.
    """
    header = struct.pack("=BBBBI", AF_INET6, length, 0, 0, 0)
    attributes = [
        (netlink.IFA_ADDRESS, ip_address(ip).packed),
        netlink.u32(netlink.IFA_FLAGS, netlink.IFA_F_NODAD),
    ]
    return NicAddress((header + netlink.pack(attributes)).hex())
