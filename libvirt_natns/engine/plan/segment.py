# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses on an upstream's segment: the namespace's own, and those of other stations."""

from collections.abc import Container, Iterable
from ipaddress import IPv6Address

from libvirt_natns.addresses import FAMILIES, Interface, IPNetwork, on_link
from libvirt_natns.engine.plan.surroundings import Published
from libvirt_natns.model import Network, Outside, Upstream


def segments(upstream: Upstream, outside: Outside) -> tuple[IPNetwork, ...]:
    """The subnets whose stations the namespace asks for on its upstream."""
    segments: list[IPNetwork] = []
    if upstream.subnet is not None and outside.address is not None:
        segments.append(upstream.subnet)
    if upstream.subnet6 is not None and shares_subnet6(upstream, outside):
        segments.append(upstream.subnet6)
    return tuple(segments)


def transit_gateways(upstream: Upstream) -> tuple[Interface, ...]:
    """The gateway's addresses, each with the upstream's subnet of that family."""
    return tuple(
        on_link(side.gateway, side.subnet.prefixlen)
        for side in map(upstream.side, FAMILIES)
        if side.gateway is not None and side.subnet is not None
    )


def addresses_on_upstream(
    upstream: Upstream, outside: Outside, published: Published
) -> tuple[Interface, ...]:
    """All addresses of the namespace on its upstream."""
    own = []
    if outside.address is not None and upstream.subnet is not None:
        own.append(on_link(outside.address, upstream.subnet.prefixlen))
    if outside.address6 is not None:
        on = upstream.subnet6 if shares_subnet6(upstream, outside) else None
        own.append(on_link(outside.address6, on.prefixlen if on else 128))
    # Guests' ones are without the subnet's prefix, or masquerading might take one of them.
    return (*own, *(on_link(each, each.max_prefixlen) for each in published.addresses))


def shares_subnet6(upstream: Upstream, outside: Outside) -> bool:
    """Whether the upstream's IPv6 subnet is the upstream link's alone.

    It is not where guests have all of it: then it leads to them.
    """
    subnet = upstream.subnet6
    return subnet is not None and not any(map(subnet.subnet_of, outside.proxied))


def stations(upstream: Upstream, outside: Outside) -> Iterable[IPv6Address]:
    """Known stations on the upstream that the namespace has no on-link prefix for."""
    subnet = _subnet6(upstream)
    covered = outside.address6 is not None and shares_subnet6(upstream, outside)
    known = (upstream.gateway6, *(each for each in upstream.dns if each in subnet))
    for each in dict.fromkeys(known):
        if not isinstance(each, IPv6Address) or each.is_link_local:
            continue
        if not (covered and each in subnet):
            yield each


def _subnet6(upstream: Upstream) -> Container[object]:
    return upstream.subnet6 if upstream.subnet6 is not None else ()


def answered_stations(
    network: Network, upstream: Upstream, outside: Outside
) -> Iterable[IPv6Address]:
    """Stations outside that guests believe to be on their own link."""
    for station in stations(upstream, outside):
        if any(station in prefix for prefix in outside.proxied):
            yield station


def has_ipv6(network: Network) -> bool:
    """Whether a network's namespace speaks IPv6 at all."""
    return any(subnet.interface.version == 6 for subnet in network.subnets)


def leaves_by_ipv6(network: Network, outside: Outside) -> bool:
    """Whether anything of the network leaves, or arrives, in IPv6."""
    own = outside.address6 or outside.routed or outside.proxied
    return has_ipv6(network) and bool(own)
