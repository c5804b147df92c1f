# SPDX-License-Identifier: LGPL-2.1-or-later
"""Facts on ndppd: prefixes that it answers for, and addresses that it must leave out."""

from dataclasses import replace
from ipaddress import IPv6Network

from libvirt_natns import names
from libvirt_natns.addresses import Address, AddressRange, by_family, host_network
from libvirt_natns.daemons.ndppd import Proxy
from libvirt_natns.engine import proxied_addresses
from libvirt_natns.engine.plan.upstream_side import has_ipv6
from libvirt_natns.errors import DocumentError
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import Segment
from libvirt_natns.model.transit_segment import HostSegment, RouterSegment
from libvirt_natns.model.upstream import Outside
from libvirt_natns.operations.addressing import Route
from libvirt_natns.operations.daemon_operations import NeighbourProxy
from libvirt_natns.operations.operation import Operation, Plan
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import routers, selection
from libvirt_natns.values import quoted


def without_others(kernel: Kernel, operation: Operation, segment: Segment) -> Operation:
    """Return an operation without the addresses of others, if the provider hears its ndppd."""
    if not isinstance(operation, NeighbourProxy) or not operation.daemon.prefixes:
        return operation
    daemon = operation.daemon
    if segment.shares_addresses and not daemon.in_host:
        # The host, or the router, alone asks this ndppd.
        return operation
    others = {*proxied_addresses.known(daemon.uuid), *kernel.host.addresses.beyond_link()}
    spans = tuple(AddressRange(each, each) for each in sorted(others, key=by_family))
    return NeighbourProxy(replace(daemon, without=(*daemon.without, *spans)))


def proxy_beyond(kernel: Kernel, network: Network, segment: Segment, outside: Outside) -> Plan:
    """Return the ndppd on the host's, or router's, own link for guests behind a transit bridge.

    Routes to the stations of that link come with it.
    """
    if not has_ipv6(network):
        return ()
    link, outside_addresses = _beyond(kernel, segment) if outside.proxied else (None, set())
    prefixes = outside.proxied if link else ()
    without = tuple(AddressRange(each, each) for each in sorted(outside_addresses, key=by_family))
    daemon = Proxy(network.uuid, segment.namespace, link or "", segment.bridge, prefixes, without)
    # The host and its routers have addresses in the guests' prefix, but are outside.
    namespace, here = names.namespace(network.name), names.UPSTREAM_LINK
    beyond = (
        Route(namespace, host_network(each), segment.gateway6, here)
        for each in sorted(outside_addresses, key=by_family)
        if any(each in prefix for prefix in prefixes)
    )
    return (*beyond, NeighbourProxy(daemon))


def _beyond(kernel: Kernel, segment: Segment) -> tuple[str | None, set[Address]]:
    """Return the link beyond a transit bridge, and the addresses of stations on that link."""
    match segment:
        case RouterSegment():
            return segment.upstream.nic, routers.neighbours(segment.upstream)
        case HostSegment(host6=IPv6Network() as own):
            return kernel.host.addresses.link_in(
                own
            ), kernel.host.addresses.beyond_link() | kernel.host.routes.default_gateways(6)
        case _:
            return None, set()


def check_proxied(config: Config, store: Store, network: Network, segment: Segment) -> None:
    """Refuse a part of the host's, or router's, own subnet that another network has.

    Raises DocumentError.
    """
    mine = selection.proxied(network, segment) if segment.shares_addresses else ()
    for user in store.host.users() if mine else ():
        theirs = config.upstreams.get(user.upstream)
        if user.uuid == network.uuid or theirs is None or not theirs.shares_addresses:
            continue
        for subnet in mine:
            if any(subnet.overlaps(other) for other in user.subnets):
                raise DocumentError(
                    f"network {quoted(network.name)}: another network has a part of {subnet}",
                    "give each network its own part",
                )
