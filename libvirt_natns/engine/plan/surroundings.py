# SPDX-License-Identifier: LGPL-2.1-or-later
"""Facts about the machine, and about guests, from which a plan is made."""

from libvirt_natns.addresses import Address
from libvirt_natns.daemons.dnsmasq import Daemon
from libvirt_natns.engine.operations.daemons import Leasing
from libvirt_natns.model import Forward, StaticNat
from libvirt_natns.records import dataclass


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What ``make`` must know of the machine.

    Both patches' MTU in octets, the firewall's backend, dnsmasq's configuration
    (None where there is none), and whether libvirt runs a dnsmasq that has
    nothing to do any more.  ``carried`` is the MTU of the private bridge where it is
    smaller than that of its patch, ``leasing`` the DHCP client, where the upstream
    asks for one.
    """

    private_mtu: int
    upstream_mtu: int
    backend: str
    dnsmasq: Daemon | None
    idle: bool = False
    carried: int | None = None
    leasing: Leasing | None = None


def path_mtu(private: int, upstream: int, assumed: int) -> int | None:
    """The MTU that guests must be told: the smallest, unless it is what they assume."""
    smallest = min(private, upstream)
    return smallest if smallest < assumed else None


@dataclass(frozen=True, slots=True)
class Published:
    """What guests, and the network itself, offer to the upstream."""

    forwards: tuple[Forward, ...] = ()
    statics: tuple[StaticNat, ...] = ()

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Upstream addresses of guests' own."""
        return tuple(dict.fromkeys(static.address for static in self.statics))
