# SPDX-License-Identifier: LGPL-2.1-or-later
"""A policy routing rule (ip-rule(8)) about a NIC, captured so that it can be made again.

The body is the kernel's own message (see ``nic_addresses``).  Rules name links by their
names, not by their indexes.
"""

import struct
from dataclasses import dataclass

from libvirt_natns.kernel import netlink
from libvirt_natns.kernel.netlink import NLA_TYPE, Attrs

HEADER = 12
"""Octets of struct fib_rule_hdr: family, lengths, tos, table, reserved, action, flags."""

NAMES_OF_LINKS = (netlink.FRA_IIFNAME, netlink.FRA_OIFNAME)
DEFAULT_PRIORITIES = (0, 32766, 32767)
"""Each namespace has these rules from the start."""


@dataclass(frozen=True, slots=True)
class NicRule:
    """A rule that chooses the routing table for packets."""

    body: str

    @property
    def attributes(self) -> Attrs:
        return Attrs.parse(bytes.fromhex(self.body), HEADER)

    @property
    def table(self) -> int:
        return self.attributes.number(netlink.FRA_TABLE) or bytes.fromhex(self.body)[4]

    @property
    def priority(self) -> int:
        return self.attributes.number(netlink.FRA_PRIORITY) or 0

    @property
    def selectors(self) -> frozenset[tuple[int, bytes]]:
        """The attributes that choose packets by destination, protocol and port, with values."""
        chosen = (netlink.FRA_DST, netlink.FRA_IP_PROTO, netlink.FRA_DPORT_RANGE)
        return frozenset(
            (kind & NLA_TYPE, value) for kind, value in self.attributes if kind & NLA_TYPE in chosen
        )

    def __str__(self) -> str:
        return f"rule {self.priority} for table {self.table}"

    def renamed(self, old: str, new: str) -> "NicRule":
        """Return the rule for a link that has another name."""
        before, after = old.encode() + b"\0", new.encode() + b"\0"
        attributes = [
            (kind, after if kind & NLA_TYPE in NAMES_OF_LINKS and value == before else value)
            for kind, value in self.attributes
        ]
        return NicRule((bytes.fromhex(self.body)[:HEADER] + netlink.pack(attributes)).hex())

    def names(self, link: str) -> bool:
        """True if the rule names a link."""
        named = {self.attributes.get(kind) for kind in NAMES_OF_LINKS}
        return link.encode() + b"\0" in named


def parse(body: bytes) -> NicRule:
    """Return a rule from the kernel's listing."""
    (flags,) = struct.unpack_from("=I", body, 8)
    kept = struct.pack("=I", flags & netlink.FIB_RULE_INVERT)
    return NicRule((body[:8] + kept + body[HEADER:]).hex())
