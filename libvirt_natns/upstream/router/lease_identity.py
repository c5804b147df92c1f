# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client identifier with which a router's DHCP client asks: that of the host's own client.

A server may give another address to another identifier, and the server's public address would
change.  So a router is refused if the identifier of the host's client cannot be found out.
"""

from ipaddress import IPv4Address

from libvirt_natns import names
from libvirt_natns.daemons import host_dhcp
from libvirt_natns.daemons.dhclient_files import ETHERNET
from libvirt_natns.daemons.host_dhcp import LeasedNic
from libvirt_natns.errors import RouterError
from libvirt_natns.model.upstream import RouterUpstream
from libvirt_natns.upstream.router.nic_snapshot import Capture

BY_MAC = ""
"""In place of an identifier: the NIC's own MAC address, also where the hardware changes."""


def of_mac(mac: str) -> str:
    """Return the identifier that is a MAC address, in hexadecimal digits."""
    return ETHERNET + mac.replace(":", "")


def choose(wanted: RouterUpstream, before: Capture, *, boot: bool) -> str:
    """Return the identifier for the lease of a NIC; BY_MAC for a NIC without a lease.

    At a ``boot`` no client of the host has asked, and the upstream has the confirmed
    identifier.  Raises RouterError where the host's client does not tell its identifier.
    """
    leased = next((address.ip for address in before.ipv4 if address.leased), None)
    if leased is None:
        return BY_MAC
    chosen = wanted.client_id
    if not chosen and not boot:
        nic = LeasedNic(before.name, before.index, before.mac, IPv4Address(leased))
        chosen = _of_host(wanted.name, nic)
    return BY_MAC if chosen == of_mac(before.mac) else chosen


def _of_host(router: str, nic: LeasedNic) -> str:
    client = host_dhcp.holder(nic)
    if client is None:
        return BY_MAC
    if client.client_id is None:
        raise RouterError(
            f"router {router}: {client.name} does not tell the DHCP client identifier of"
            f" {nic.name}, so the server might give it another address than {nic.address}",
            f'set client_id = "ff:..." in [upstreams.{router}] of {names.CONFIG_FILE}',
        )
    return client.client_id
