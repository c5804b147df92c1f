# SPDX-License-Identifier: LGPL-2.1-or-later
"""Subnets of networks, fixed DHCP addresses in them, and static routes."""

from dataclasses import dataclass

from libvirt_natns.addresses import Address, AddressRange, Interface, IPNetwork


@dataclass(frozen=True, slots=True)
class DhcpHost:
    """A fixed DHCP address: libvirt's ``<host>``.

    ``id`` is the client's DUID, in DHCPv6.
    """

    ip: Address
    mac: str | None = None
    name: str | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Subnet:
    """An ``<ip>`` of a network, of either family: the gateway's address with its prefix.

    ``ranges`` and ``hosts`` are filled for ``<natns:ip>`` and for libvirt's own
    ``<ip>`` alike.
    """

    interface: Interface
    ranges: tuple[AddressRange, ...] = ()
    hosts: tuple[DhcpHost, ...] = ()

    @property
    def network(self) -> IPNetwork:
        return self.interface.network

    @property
    def gateway(self) -> Address:
        return self.interface.ip

    @property
    def dhcp(self) -> bool:
        """True if DHCP has an address to give; an empty ``<dhcp>`` has none."""
        return bool(self.ranges or self.hosts)

    @property
    def autonomous(self) -> bool:
        """True if guests make their own addresses (SLAAC), which IPv6 allows for a /64 alone."""
        return self.network.version == 6 and self.network.prefixlen == 64 and not self.dhcp


@dataclass(frozen=True, slots=True)
class StaticRoute:
    """libvirt's ``<route>``: a further private subnet behind a guest."""

    destination: IPNetwork
    gateway: Address
