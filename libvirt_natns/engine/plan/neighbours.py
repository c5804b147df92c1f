# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers to neighbours, and announcements to them."""

from collections.abc import Iterable

from libvirt_natns import names
from libvirt_natns.addresses import AddressRange
from libvirt_natns.daemons.ndppd import Proxy
from libvirt_natns.engine.plan.surroundings import Published
from libvirt_natns.engine.plan.upstream_side import answered_stations, stations
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import Segment
from libvirt_natns.model.upstream import Outside
from libvirt_natns.operations.daemon_operations import NeighbourProxy
from libvirt_natns.operations.link_operations import AllMulticast
from libvirt_natns.operations.neighbour_operations import Announcement, ProxiedNeighbours
from libvirt_natns.operations.operation import Operation


def neighbours(network: Network, segment: Segment, outside: Outside) -> Iterable[Operation]:
    """Yield the proxies between guests and the upstream's stations, in both directions."""
    namespace = names.namespace(network.name)
    inner = network.bridge
    if outside.proxied and not segment.is_macvlan:
        # Neighbours ask for guests' addresses in groups that no station on this side joins.
        yield AllMulticast(names.upstream_patch(network.uuid), segment.namespace)
    yield ProxiedNeighbours(namespace, inner, tuple(answered_stations(network, segment, outside)))
    own = (outside.address6, *stations(segment, outside), segment.gateway6)
    yield NeighbourProxy(
        Proxy(
            uuid=network.uuid,
            namespace=namespace,
            link=names.UPSTREAM_LINK,
            inner=inner,
            prefixes=outside.proxied,
            without=(
                *(AddressRange(each, each) for each in dict.fromkeys(own) if each is not None),
                *segment.pool6,
            ),
        )
    )


def announcements(
    network: Network, segment: Segment, outside: Outside, published: Published
) -> Iterable[Announcement]:
    """Yield an announcement for each address of the namespace on its upstream."""
    namespace, mac = names.namespace(network.name), names.mac(network.uuid, "upstream")
    for address in (outside.address, outside.address6, *published.addresses):
        if address is not None:
            # The DHCP client asks the neighbours before it takes an address.
            probing = 0.0 if segment.side_of(address).by_dhcp else segment.probe
            yield Announcement(namespace, names.UPSTREAM_LINK, address, mac, probing)
