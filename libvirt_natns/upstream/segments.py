# SPDX-License-Identifier: LGPL-2.1-or-later
"""From an upstream to its segment, for each kind of upstream."""

from contextlib import suppress

from libvirt_natns.errors import NatnsError
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import BridgeSegment, DhcpSegment, Segment
from libvirt_natns.model.upstream import (
    BridgeUpstream,
    DhcpUpstream,
    HostUpstream,
    RouterUpstream,
    Upstream,
)
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import dhcp, routers, selection, transit


def of_network(kernel: Kernel, store: Store, network: Network, upstream: Upstream) -> Segment:
    """Return a network's segment; choose a transit subnet at its first use.

    Raises UpstreamError.
    """
    match upstream:
        case HostUpstream():
            return transit.choose(kernel, store, network, upstream)
        case RouterUpstream():
            return routers.complete(upstream)
        case DhcpUpstream() if selection.has_family(network, 4):
            return dhcp.complete(network, upstream)
        case BridgeUpstream():
            # DHCP leases IPv4 addresses, and a network without IPv4 has no use for any.
            return BridgeSegment.of(upstream)


def of_upstream(store: Store, upstream: Upstream, *, ipv6: bool = True) -> Segment | None:
    """Return the segment of an upstream, as it is known without any network.

    None where a transit subnet was never chosen, or where a router is not up.  ``ipv6``:
    the host has IPv6, and with it its transit bridges.
    """
    match upstream:
        case HostUpstream():
            return transit.chosen(store, upstream, ipv6=ipv6)
        case RouterUpstream():
            with suppress(NatnsError):
                return routers.complete(upstream)
            return None
        case DhcpUpstream():
            return DhcpSegment.of(upstream)
        case BridgeUpstream():
            return BridgeSegment.of(upstream)


def as_configured(network: Network, upstream: Upstream) -> Segment:
    """Return the segment of a network's upstream as the configuration alone tells it.

    A transit bridge has the subnet that the configuration names, or one that is far from the
    network's. The NIC and the lease of a router, and a DHCP lease, are unknown.
    """
    match upstream:
        case HostUpstream() | RouterUpstream():
            return transit.as_configured(network, upstream)
        case DhcpUpstream() if selection.has_family(network, 4):
            return DhcpSegment.of(upstream)
        case BridgeUpstream():
            return BridgeSegment.of(upstream)
