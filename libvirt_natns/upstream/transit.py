# SPDX-License-Identifier: LGPL-2.1-or-later
"""Upstreams of kind "host": the private transit bridge that the host itself routes.

The upstream needs no configuration, and its bridge is ours.  Its subnet is the first of a
few candidates that the host has no route into, chosen once and kept.  The candidates are
from the block for benchmarks (RFC 2544), and from private blocks that home routers rarely
use.  Each holds 1021 namespaces, nearly as many as a bridge has ports (1023).

In IPv6 the subnet is a prefix of unique local addresses (RFC 4193), made up once and kept.
Only a network with IPv6 gets IPv6, and only where the host has it.
"""

import os
from ipaddress import IPv4Network, IPv6Network

from libvirt_natns import names
from libvirt_natns.addresses import IPNetwork
from libvirt_natns.errors import UpstreamError
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.network import Network
from libvirt_natns.model.transit_segment import HostSegment, RouterSegment, TransitSegment
from libvirt_natns.model.upstream import HostUpstream, RouterUpstream
from libvirt_natns.state.store import Store

CANDIDATES = tuple(
    map(IPv4Network, ("198.19.252.0/22", "198.19.248.0/22", "172.31.252.0/22", "10.213.252.0/22"))
)


PREFIXES6 = IPv6Network("fd00::/8")
SUBNET6_LENGTH = 64
DISABLED = "net/ipv6/conf/all/disable_ipv6"


def choose(kernel: Kernel, store: Store, network: Network, upstream: HostUpstream) -> HostSegment:
    """Return the segment of an upstream; choose its subnets at their first use.

    Raises UpstreamError where every candidate subnet is in use on this host.
    """
    subnet = _chosen(kernel, store, network, upstream)
    subnet6 = store.transit.prefix(upstream.name)
    if subnet6 is None and needs_ipv6(kernel, network):
        subnet6 = store.transit.choose_prefix(upstream.name, free6(network))
    return complete(upstream, subnet, subnet6 if needs_ipv6(kernel, network) else None)


def needs_ipv6(kernel: Kernel, network: Network) -> bool:
    """True if both a network and the host have IPv6."""
    has = any(subnet.network.version == 6 for subnet in network.subnets)
    return has and has_ipv6(kernel)


def has_ipv6(kernel: Kernel) -> bool:
    """True if the host has IPv6 at all."""
    return kernel.host.sysctls.get(DISABLED) == "0"


def free6(network: Network) -> IPv6Network:
    """Return a prefix made of 40 random bits (RFC 4193, 3.2.2).

    It overlaps no subnet of the network, although that is hardly possible.
    """
    private = [subnet.network for subnet in network.subnets]
    private += [route.destination for route in network.routes]
    while True:
        chosen = int(PREFIXES6.network_address) | int.from_bytes(os.urandom(5)) << 80
        prefix = IPv6Network((chosen, SUBNET6_LENGTH))
        if not any(map(prefix.overlaps, private)):
            return prefix


def _chosen(kernel: Kernel, store: Store, network: Network, upstream: HostUpstream) -> IPv4Network:
    """Return the transit subnet in IPv4; choose it unless it is chosen."""
    subnet = upstream.subnet or store.transit.subnet(upstream.name)
    if subnet is None or (upstream.subnet is None and _stale(kernel, store, upstream, subnet)):
        candidates = free(kernel, network, upstream)
        subnet = store.transit.choose_subnet(upstream.name, candidates, instead_of=subnet)
    return subnet


def preview(kernel: Kernel, store: Store, network: Network, upstream: HostUpstream) -> HostSegment:
    """Return the segment that ``choose`` would return, and choose nothing.

    Raises UpstreamError.
    """
    subnet = upstream.subnet or store.transit.subnet(upstream.name)
    if subnet is None:
        subnet = free(kernel, network, upstream)[0]
    subnet6 = None
    if needs_ipv6(kernel, network):
        subnet6 = store.transit.prefix(upstream.name) or free6(network)
    return complete(upstream, subnet, subnet6)


def chosen(store: Store, upstream: HostUpstream, *, ipv6: bool = True) -> HostSegment | None:
    """Return the segment of an upstream if its subnet was chosen already, else None.

    ``ipv6``: with the prefix that was chosen.
    """
    subnet = upstream.subnet or store.transit.subnet(upstream.name)
    if subnet is None:
        return None
    return complete(upstream, subnet, store.transit.prefix(upstream.name) if ipv6 else None)


def complete(
    upstream: HostUpstream, subnet: IPv4Network, subnet6: IPv6Network | None = None
) -> HostSegment:
    """Return the segment with all values that follow from its transit subnets."""
    bridge = names.transit_bridge(upstream.name)
    return HostSegment.of(upstream, bridge, subnet, subnet6, upstream.subnet6)


def as_configured(network: Network, upstream: HostUpstream | RouterUpstream) -> TransitSegment:
    """Return the segment as the configuration tells it, on a machine with IPv6.

    Subnets that a machine would choose overlap no subnet of the network, if possible.
    """
    own = {subnet.network for subnet in network.subnets}
    apart = [subnet for subnet in CANDIDATES if not any(map(subnet.overlaps, own))]
    subnet = upstream.subnet or (*apart, *CANDIDATES)[0]
    if isinstance(upstream, HostUpstream):
        return complete(upstream, subnet, free6(network))
    bridge = names.ROUTER_TRANSIT
    return RouterSegment.of(upstream, bridge, subnet, free6(network), upstream.subnet6)


def _stale(kernel: Kernel, store: Store, upstream: HostUpstream, subnet: IPv4Network) -> bool:
    """True if the host has learnt a route into a transit subnet that no network uses."""
    if store.networks.in_use(upstream.name):
        return False
    return any(map(subnet.overlaps, _routes(kernel, upstream)))


def _routes(kernel: Kernel, upstream: HostUpstream) -> set[IPNetwork]:
    """Return the host's routes, except those of the transit bridge itself."""
    return kernel.host.routes.destinations(without=[names.transit_bridge(upstream.name)])


def free(kernel: Kernel, network: Network, upstream: HostUpstream) -> list[IPv4Network]:
    """Return the candidate subnets that neither host nor network has a route into.

    Raises UpstreamError where there is none.
    """
    taken = _routes(kernel, upstream)
    taken |= {subnet.network for subnet in network.subnets}
    taken |= {route.destination for route in network.routes}
    unused = [subnet for subnet in CANDIDATES if not any(map(subnet.overlaps, taken))]
    if not unused:
        raise UpstreamError(
            f"upstream {upstream.name}: the host has routes into every transit subnet"
            f" ({', '.join(map(str, CANDIDATES))})",
            f"choose one with 'subnet' in [upstreams.{upstream.name}] of {names.CONFIG_FILE}",
        )
    return unused
