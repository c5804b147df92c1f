# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's NIC in a network of ours."""

from ipaddress import IPv4Address, IPv6Address

from libvirt_natns.addresses import Address, Family
from libvirt_natns.model import Network, Nic, Outside, Upstream
from libvirt_natns.records import dataclass

ANY = IPv4Address(0)


ANY6 = IPv6Address(0)
"""Stand for all addresses of the host, where an upstream of kind "host" listens."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A guest's NIC in a network of ours, and what that has on its upstream."""

    nic: Nic
    network: Network
    upstream: Upstream
    outside: Outside

    def is_public(self, address: Address) -> bool:
        """Whether the outside knows an address in the network as it is."""
        return any(address in subnet for subnet in self.outside.public)

    def reached_by(self, family: Family) -> bool:
        """Whether anybody outside gets to the network by that family."""
        public = family == 6 and bool(self.outside.public)
        return public or self.outside.of(family) is not None
