# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's part of an upstream of kind "host": its transit bridge, as data."""

from collections.abc import Iterable

from libvirt_natns import names
from libvirt_natns.daemons.dns_relay import Relay
from libvirt_natns.model.transit_segment import RELAY_PORT, HostSegment
from libvirt_natns.operations.addressing import Addresses
from libvirt_natns.operations.daemon_operations import DnsRelay
from libvirt_natns.operations.link_operations import TransitBridge
from libvirt_natns.operations.namespaces import Sysctl
from libvirt_natns.operations.operation import Plan


def transit(segment: HostSegment, forwarding: Iterable[str]) -> Plan:
    """Return the host's own part of an upstream of kind "host".

    ``forwarding`` names the interfaces that must forward IPv4 besides the bridge: the host's
    own routes to the outside use them.  IPv6 forwarding concerns the whole host, and is not
    decided here.
    """
    keys = [f"net/ipv4/conf/{link}/forwarding" for link in (segment.bridge, *forwarding)]
    return (
        TransitBridge(
            segment.bridge,
            f"natns-transit-{segment.name}",
            names.mac(segment.name, "transit"),
        ),
        *(_transit6(segment.bridge) if segment.subnet6 else []),
        Addresses(None, segment.bridge, segment.transit_gateways),
        *(Sysctl(None, key, "1") for key in keys),
        # Forwards answer on 127.0.0.1, too.  The rules keep the bridge's other side from
        # using that.
        Sysctl(None, f"net/ipv4/conf/{segment.bridge}/route_localnet", "1"),
        *([DnsRelay(relay_of(segment))] if segment.has_relay else []),
    )


def relay_of(segment: HostSegment) -> Relay:
    """Return the DNS relay that networks on a transit bridge ask."""
    addresses = tuple(interface.ip for interface in segment.transit_gateways)
    return Relay(segment.bridge, addresses, RELAY_PORT)


def _transit6(bridge: str) -> Iterable[Sysctl]:
    """Yield settings of a transit bridge that speaks IPv6 and accepts no advertisement.

    The bridge's addresses are unique.  Duplicate address detection begins with the first
    port, and would hold the addresses back from the first network's first packets.
    """
    for key, value in (
        ("accept_dad", "0"),
        ("accept_ra", "0"),
        ("accept_redirects", "0"),
        ("disable_ipv6", "0"),
    ):
        yield Sysctl(None, f"net/ipv6/conf/{bridge}/{key}", value)
