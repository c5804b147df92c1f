# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses that a network's own XML, or a reservation, gives to guests."""

from libvirt_natns.addresses import FAMILIES, Address, AddressRange, Family
from libvirt_natns.model.network import Network
from libvirt_natns.state.store import Store


def ranges_of(network: Network, family: Family) -> list[AddressRange]:
    """Return a network's DHCP ranges of a family."""
    spans = [span for subnet in network.subnets for span in subnet.ranges]
    return [span for span in spans if span.first.version == family]


def fixed_address(
    network: Network, mac: str, family: Family = 4, name: str | None = None
) -> Address | None:
    """Return the address that a network's own XML gives a NIC; None for none.

    DHCPv6 has no MAC addresses.  There the entry has the guest's ``name``, or an
    identifier that was made from the NIC's MAC address.
    """
    hosts = [host for subnet in network.subnets for host in subnet.hosts]
    own = [host for host in hosts if host.ip.version == family]
    matching = [host for host in own if host.mac == mac or _is_made_of(mac, host.id)]
    if family == 6:
        by_name = [host for host in own if host.mac is None and host.id is None]
        matching += [host for host in by_name if name and host.name == name]
    return next((host.ip for host in matching), None)


def _is_made_of(mac: str, identifier: str | None) -> bool:
    """True if a DUID holds that link-layer address (RFC 8415, 11.2, 11.4)."""
    if identifier is None or not identifier.lower().endswith(mac):
        return False
    return identifier.startswith(("00:01:00:01:", "00:03:00:01:", "0:1:0:1:", "0:3:0:1:"))


def known_addresses(store: Store, network: Network, mac: str, name: str) -> set[Address]:
    """Return the DHCP addresses of a NIC: by the network's XML, else reserved ones."""
    addresses = {
        fixed_address(network, mac, family, name)
        or store.reservations.get(network.uuid, mac, family)
        for family in FAMILIES
    }
    return {each for each in addresses if each is not None}


def fixed_macs(network: Network) -> set[str]:
    """Return the MAC addresses in the network's own XML."""
    return {host.mac for subnet in network.subnets for host in subnet.hosts if host.mac}


def fixed_addresses(network: Network) -> set[Address]:
    """Return the addresses in the network's own XML: its hosts' and its gateways'."""
    hosts = {host.ip for subnet in network.subnets for host in subnet.hosts}
    return hosts | {subnet.gateway for subnet in network.subnets}
