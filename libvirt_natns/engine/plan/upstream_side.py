# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses on an upstream's segment: the namespace's own, and those of other stations."""

from collections.abc import Container, Iterable
from ipaddress import IPv6Address

from libvirt_natns.addresses import Interface, IPNetwork, on_link
from libvirt_natns.engine.plan.surroundings import Published
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import Segment
from libvirt_natns.model.upstream import Outside


def segments(segment: Segment, outside: Outside) -> tuple[IPNetwork, ...]:
    """Return the subnets that are on-link for the namespace on its upstream."""
    segments: list[IPNetwork] = []
    if segment.subnet is not None and outside.address is not None:
        segments.append(segment.subnet)
    if segment.subnet6 is not None and shares_subnet6(segment, outside):
        segments.append(segment.subnet6)
    return tuple(segments)


def addresses_on_upstream(
    segment: Segment, outside: Outside, published: Published
) -> tuple[Interface, ...]:
    """Return all addresses of the namespace on its upstream."""
    own = []
    length = segment.side(4).prefix_length
    if outside.address is not None and length is not None:
        own.append(on_link(outside.address, length))
    if outside.address6 is not None:
        on = segment.subnet6 if shares_subnet6(segment, outside) else None
        own.append(on_link(outside.address6, on.prefixlen if on else 128))
    # Guests' addresses have no subnet, or masquerading might take one of them.
    return (*own, *(on_link(each, each.max_prefixlen) for each in published.addresses))


def shares_subnet6(segment: Segment, outside: Outside) -> bool:
    """True if the upstream's IPv6 subnet is on-link on the upstream's side.

    False if guests have all of the subnet: then it leads to them.
    """
    subnet = segment.subnet6
    return subnet is not None and not any(map(subnet.subnet_of, outside.proxied))


def stations(segment: Segment, outside: Outside) -> Iterable[IPv6Address]:
    """Yield known stations on the upstream that are in no on-link prefix of the namespace."""
    subnet: Container[object] = segment.subnet6 or ()
    covered = outside.address6 is not None and shares_subnet6(segment, outside)
    candidates = (segment.gateway6, *(each for each in segment.dns if each in subnet))
    for each in dict.fromkeys(candidates):
        if not isinstance(each, IPv6Address) or each.is_link_local:
            continue
        if not (covered and each in subnet):
            yield each


def answered_stations(
    network: Network, segment: Segment, outside: Outside
) -> Iterable[IPv6Address]:
    """Yield stations outside that guests believe to be on their own link."""
    for station in stations(segment, outside):
        if any(station in prefix for prefix in outside.proxied):
            yield station


def has_ipv6(network: Network) -> bool:
    """True if a network's namespace speaks IPv6 at all."""
    return any(subnet.interface.version == 6 for subnet in network.subnets)


def leaves_by_ipv6(network: Network, outside: Outside) -> bool:
    """True if the network's IPv6 packets leave, or arrive."""
    own = outside.address6 or outside.routed or outside.proxied
    return has_ipv6(network) and bool(own)
