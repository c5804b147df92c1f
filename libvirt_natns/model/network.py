# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks and guests of libvirt, with their part of our metadata."""

from dataclasses import dataclass

from libvirt_natns.addresses import Address
from libvirt_natns.model.bandwidth import Bandwidth
from libvirt_natns.model.dns import Dns
from libvirt_natns.model.metadata import NatMetadata
from libvirt_natns.model.subnet import StaticRoute, Subnet


@dataclass(frozen=True, slots=True)
class Nic:
    """A guest's network interface: in a libvirt network, or on a bridge by name."""

    mac: str
    network: str | None = None
    bridge: str | None = None


@dataclass(frozen=True, slots=True)
class Domain:
    """A guest: libvirt's ``<domain>``, without the parts that do not concern us.

    ``outward``: it has a NIC that leads outside without a network or a bridge of the host,
    such as a macvtap.
    """

    uuid: str
    name: str
    nics: tuple[Nic, ...] = ()
    nat: NatMetadata | None = None
    outward: bool = False

    @property
    def has_choice(self) -> bool:
        """True if another NIC than a network's own may be the guest's way out."""
        return len(self.nics) + self.outward > 1


@dataclass(frozen=True, slots=True)
class LibvirtNetwork:
    """libvirt's ``<network>``, without the parts that do not concern us.

    ``bridge`` is None where libvirt makes no bridge, or has not named it yet.
    ``forward_mode`` is None without a ``<forward>`` element.  ``subnets`` holds the
    ``<ip>`` elements of both families, or the ``<natns:ip>`` elements where libvirt
    has none.  ``taken_over`` is True when libvirt sets the addresses on the bridge
    and we move them; False for ``<natns:ip>``.

    ``dns`` is None where the network turns DNS off.  Its content is read for
    ``<natns:ip>`` only; otherwise libvirt translates it.  ``dnsmasq_options`` are the
    user's own.  ``bandwidth`` limits what guests send to other links, and get from there.
    """

    uuid: str
    name: str
    bridge: str | None
    forward_mode: str | None = None
    mtu: int | None = None
    domain: str | None = None
    domain_local: bool = False
    dns: Dns | None = Dns()
    dnsmasq_options: tuple[str, ...] = ()
    subnets: tuple[Subnet, ...] = ()
    routes: tuple[StaticRoute, ...] = ()
    taken_over: bool = True
    nat: NatMetadata | None = None
    bandwidth: Bandwidth | None = None

    def next_hop(self, route: StaticRoute) -> Address | None:
        """Return the gateway of a route; None where the gateway is the network's own.

        The destination then lies on the private link itself.  The kernel reads such a
        route of IPv4 in this way, but refuses such a route of IPv6.
        """
        own = any(route.gateway == subnet.gateway for subnet in self.subnets)
        return None if own else route.gateway

    @property
    def has_dnsmasq(self) -> bool:
        """True if libvirt's rule gives this network a dnsmasq.

        libvirt starts none for a network without an address, nor for a network with
        DNS turned off and no DHCP.
        """
        return any(self.dns or subnet.dhcp for subnet in self.subnets)

    @property
    def needs_dnsmasq(self) -> bool:
        """True if we give the network a dnsmasq.

        In IPv6 only its router advertisements tell guests of their router.
        """
        return self.has_dnsmasq or any(subnet.autonomous for subnet in self.subnets)

    @property
    def writes_dnsmasq(self) -> bool:
        """True if its dnsmasq's configuration is ours, not derived from libvirt's."""
        return self.needs_dnsmasq and not (self.taken_over and self.has_dnsmasq)


@dataclass(frozen=True, slots=True)
class Network(LibvirtNetwork):
    """A network that we can handle: it has a bridge, known by its name."""

    bridge: str
