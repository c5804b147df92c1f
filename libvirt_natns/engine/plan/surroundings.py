# SPDX-License-Identifier: LGPL-2.1-or-later
"""Facts about the machine, and about guests, from which a plan is made."""

from dataclasses import dataclass

from libvirt_natns.addresses import Address
from libvirt_natns.daemons.dnsmasq import Daemon
from libvirt_natns.model.publication import Forward, StaticNat
from libvirt_natns.operations.daemon_operations import Leasing


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Facts about the machine that ``make`` needs.

    MTUs are in octets.  ``dnsmasq`` is None where there is none.  ``idle``: libvirt runs a
    dnsmasq that has nothing to do any more.  ``carried`` is the MTU of the private bridge
    if it is smaller than its patch's.  ``leasing`` is the DHCP client, if the upstream
    needs one.
    """

    private_mtu: int
    upstream_mtu: int
    backend: str
    dnsmasq: Daemon | None
    idle: bool = False
    carried: int | None = None
    leasing: Leasing | None = None


def path_mtu(private: int, upstream: int, assumed: int) -> int | None:
    """Return the MTU to announce to guests; None if they assume it anyway."""
    smallest = min(private, upstream)
    return smallest if smallest < assumed else None


@dataclass(frozen=True, slots=True)
class Published:
    """Forwards and static NAT of guests, and of the network itself."""

    forwards: tuple[Forward, ...] = ()
    statics: tuple[StaticNat, ...] = ()

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The addresses of static NAT."""
        return tuple(dict.fromkeys(static.address for static in self.statics))
