# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's NIC in a network of ours."""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from libvirt_natns.addresses import Address, Family
from libvirt_natns.model.network import Network, Nic
from libvirt_natns.model.segment import Segment
from libvirt_natns.model.upstream import Outside

ANY = IPv4Address(0)
ANY6 = IPv6Address(0)
"""All addresses of the host, on which a forward of an upstream of kind "host" listens."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A guest's NIC in a network of ours, with the network's upstream addresses."""

    nic: Nic
    network: Network
    segment: Segment
    outside: Outside

    def is_public(self, address: Address) -> bool:
        """True if stations outside use an address in the network untranslated."""
        return any(address in subnet for subnet in self.outside.public)

    def reached_by(self, family: Family) -> bool:
        """True if the network is reached from outside in that family."""
        public = family == 6 and bool(self.outside.public)
        return public or self.outside.of(family) is not None
