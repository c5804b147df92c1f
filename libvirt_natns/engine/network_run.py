# SPDX-License-Identifier: LGPL-2.1-or-later
"""Facts of one network for one verb: read once, and passed from step to step.

The network's row and its leases are read under the network's lock, as other processes
change them.  A lease that a verb takes on its way replaces the run by another one with
that lease.  So all steps decide on the same facts.

Limits: the part of the host, which networks share, reads its needs under the host's lock.
The lease of a DHCP client is a file that the client may replace at any time.  Each step that
needs more of it than the segment has reads the file, and another event follows each change.
"""

from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Network

from libvirt_natns import names
from libvirt_natns.addresses import FAMILIES
from libvirt_natns.engine.facts.outside import completed_by, in_force, outside_of
from libvirt_natns.engine.network_record import state_of
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import Segment
from libvirt_natns.model.upstream import Outside
from libvirt_natns.state.leases import Leasable, Leased
from libvirt_natns.state.networks import NetworkRecord, NetworkState
from libvirt_natns.upstream import selection


@dataclass(frozen=True, slots=True)
class NetworkRun:
    """A network with all that a verb decides by.

    ``record`` is the network's row as the verb has read it, None for a network without
    one.  ``segment`` is the segment of the network's upstream.  ``leased`` are the
    network's leases there.
    """

    network: Network
    xml: bytes
    record: NetworkRecord | None
    segment: Segment
    leased: Leased = Leased()

    @property
    def uuid(self) -> str:
        return self.network.uuid

    @property
    def namespace(self) -> str:
        """The namespace by the network's name today."""
        return names.namespace(self.network.name)

    @property
    def state(self) -> NetworkState:
        """The state that the verb has found."""
        return state_of(self.record)

    @property
    def outside(self) -> Outside:
        """The network's addresses on its upstream, placeholder addresses included."""
        return outside_of(self.network, self.segment, self.leased)

    @property
    def in_force(self) -> Outside:
        """The network's addresses on its upstream, without placeholder addresses."""
        return in_force(self.outside)

    @property
    def whole(self) -> Network:
        """The network with its leased prefix as one more subnet."""
        return completed_by(self.network, self.segment, self.leased)

    @property
    def lacks(self) -> list[str]:
        """The leases that the network lacks, in words."""
        missing = [
            "address" if family == 4 else "IPv6 address"
            for family in FAMILIES
            if selection.leases_address(self.network, self.segment, family)
            and self.leased.of(family) is None
        ]
        if selection.leases_prefix(self.network, self.segment) and self.leased.prefix is None:
            missing.append("prefix")
        return missing

    def with_lease(self, lease: Leasable) -> "NetworkRun":
        """Return the run after a lease was taken, in place of the lease of that kind."""
        if isinstance(lease, IPv6Network):
            leased = replace(self.leased, prefix=lease)
        elif isinstance(lease, IPv4Address):
            leased = replace(self.leased, address=lease)
        else:
            leased = replace(self.leased, address6=lease)
        return replace(self, leased=leased)
