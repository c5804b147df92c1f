# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses that a network has outside, by its leases."""

from dataclasses import replace

from libvirt_natns.addresses import FAMILIES, Family, on_link, unless_placeholder
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import Segment
from libvirt_natns.model.subnet import Subnet
from libvirt_natns.model.upstream import Outside
from libvirt_natns.state.leases import Leased
from libvirt_natns.upstream import selection


def in_force(outside: Outside) -> Outside:
    """Return the addresses without a placeholder address."""
    return replace(outside, address=unless_placeholder(outside.address))


def outside_of(network: Network, segment: Segment, leased: Leased) -> Outside:
    """Return a network's addresses on its upstream, by its leases."""
    routed = selection.routed(network, segment)
    if leased.prefix is not None and not routed and selection.leases_prefix(network, segment):
        routed = (leased.prefix,)
    has = {family: selection.leases_address(network, segment, family) for family in FAMILIES}
    return Outside(
        leased.address if has[4] else None,
        leased.address6 if has[6] else None,
        routed,
        selection.proxied(network, segment),
    )


def completed_by(network: Network, segment: Segment, leased: Leased) -> Network:
    """Return the network with its leased prefix as one more subnet."""
    if leased.prefix is None or not selection.leases_prefix(network, segment):
        return network
    if selection.wanted_prefix(network, segment) is not None:
        return network
    prefix = leased.prefix
    subnet = Subnet(on_link(prefix[1], prefix.prefixlen))
    return replace(network, subnets=(*network.subnets, subnet))


def families_of(outside: Outside) -> tuple[Family, ...]:
    """Return the families in which a network gets to the outside."""
    six = outside.address6 is not None or bool(outside.public)
    ways: tuple[tuple[Family, bool], ...] = ((4, outside.address is not None), (6, six))
    return tuple(family for family, way in ways if way)
