# SPDX-License-Identifier: LGPL-2.1-or-later
"""Upstreams of kind "host": the private transit bridge that the host itself routes.

Such an upstream needs no configuration: its bridge is ours, its subnet is the
first of a few that the host has no route into, chosen once and kept.  The
subnets are from the block set aside for benchmarks (RFC 2544) and from
private ones that home routers rarely use; each holds 1021 namespaces, nearly
as many as a bridge has ports (1023).
"""

from ipaddress import IPv4Network

from libvirt_natns import names
from libvirt_natns.addresses import IPNetwork
from libvirt_natns.errors import UpstreamError
from libvirt_natns.kernel import Kernel
from libvirt_natns.model import AddressRange, Network, Upstream
from libvirt_natns.records import replace
from libvirt_natns.store import Store

CANDIDATES = tuple(
    map(IPv4Network, ("198.19.252.0/22", "198.19.248.0/22", "172.31.252.0/22", "10.213.252.0/22"))
)


def choose(kernel: Kernel, store: Store, network: Network, upstream: Upstream) -> Upstream:
    """An upstream of kind "host", completed with bridge, subnet, gateway and pool.

    Raises UpstreamError where every candidate subnet is in use on this host.
    """
    known = upstream.subnet or store.transit(upstream.name)
    if known is None or (upstream.subnet is None and _stale(kernel, store, upstream, known)):
        known = _choose(kernel, store, network, upstream, known)
    return complete(upstream, known)


def complete(upstream: Upstream, subnet: IPv4Network) -> Upstream:
    """The upstream with all that follows from its transit subnet."""
    hosts = subnet.num_addresses - 2
    first = subnet.network_address + 1
    return replace(
        upstream,
        bridge=names.transit_bridge(upstream.name),
        subnet=subnet,
        gateway=upstream.gateway or first,
        pool=upstream.ranges or (AddressRange(first + 1, first + hosts - 1),),
        # Nobody but our own namespaces is on that bridge.
        probe=0.0,
    )


def _stale(kernel: Kernel, store: Store, upstream: Upstream, subnet: IPv4Network) -> bool:
    """Whether the host has learnt a route into a transit subnet that nobody uses."""
    if store.in_use(upstream.name):
        return False
    return any(map(subnet.overlaps, _routes(kernel, upstream)))


def _routes(kernel: Kernel, upstream: Upstream) -> set[IPNetwork]:
    """Where the host has routes to, those of the transit bridge itself apart."""
    return kernel.host_routes(without=[names.transit_bridge(upstream.name)])


def _choose(
    kernel: Kernel, store: Store, network: Network, upstream: Upstream, stale: IPv4Network | None
) -> IPv4Network:
    return store.choose_transit(upstream.name, free(kernel, network, upstream), instead_of=stale)


def free(kernel: Kernel, network: Network, upstream: Upstream) -> list[IPv4Network]:
    """Candidate subnets that neither the host nor the network has a route into.

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
