# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plan of a network, as data: decided here, and made elsewhere.

``make`` turns a network, its upstream and its lease into an ordered list of operations.  ``up``
makes that list so, ``check`` compares it with the kernel, ``sync`` repairs differences, and
``virt-natns plan`` prints it.  The module does not look at the machine.
"""

from collections.abc import Iterable

from libvirt_natns import names
from libvirt_natns.addresses import default_route, host_network
from libvirt_natns.daemons.dnsmasq_options import listens_elsewhere, served_ports
from libvirt_natns.engine.plan.neighbours import announcements, neighbours
from libvirt_natns.engine.plan.surroundings import Published, Surroundings
from libvirt_natns.engine.plan.sysctls import link_settings, namespace_settings
from libvirt_natns.engine.plan.upstream_side import (
    addresses_on_upstream,
    has_ipv6,
    leaves_by_ipv6,
    segments,
    stations,
)
from libvirt_natns.firewall.namespace_policy import Policy
from libvirt_natns.firewall.namespace_rules import ruleset
from libvirt_natns.model.bandwidth import Bandwidth
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import DhcpSegment, Segment
from libvirt_natns.model.upstream import Outside
from libvirt_natns.operations.addressing import Addresses, Gateways, Route, SendLimit, Withdrawal
from libvirt_natns.operations.daemon_operations import (
    BoundDnsmasq,
    Dnsmasq,
    IdleDnsmasq,
    Leasing,
)
from libvirt_natns.operations.firewall_operations import Firewall
from libvirt_natns.operations.link_operations import LinkUp, Macvlan, Patch, Port
from libvirt_natns.operations.namespaces import HostTimeOuts, Namespace, Settings
from libvirt_natns.operations.neighbour_operations import Announcement
from libvirt_natns.operations.operation import Plan
from libvirt_natns.operations.rate_operations import SendRate
from libvirt_natns.upstream.selection import helpers


def make(
    network: Network,
    segment: Segment,
    outside: Outside,
    around: Surroundings,
    published: Published = Published(),
) -> Plan:
    """Return all operations of a network, in order.

    The firewall is loaded before any link of the namespace is up, so no packet passes
    unfiltered.  Without a lease, ``address`` is a placeholder address, and no packet gets
    in or out.
    """
    namespace = names.namespace(network.name)
    inner = network.bridge
    ipv6 = has_ipv6(network)
    rules = ruleset(policy(network, segment, outside, published))
    return (
        Namespace(namespace, network.uuid),
        namespace_settings(network),
        _private_patch(network, namespace, around.private_mtu),
        _upstream_link(network, segment, around.upstream_mtu),
        *_send_rates(network, namespace),
        private_port(network),
        *_upstream_port(network, segment),
        Firewall(namespace, network.uuid, around.backend, rules),
        HostTimeOuts(namespace),
        # A DHCP client's link is up already, and speaks no IPv6 before this.
        *([link_settings(network, segment, outside)] if ipv6 else []),
        *withdrawals(network),
        Addresses(namespace, inner, tuple(subnet.interface for subnet in network.subnets)),
        Addresses(
            namespace, names.UPSTREAM_LINK, addresses_on_upstream(segment, outside, published)
        ),
        *(LinkUp(namespace, link) for link in ("lo", inner, names.UPSTREAM_LINK)),
        *_routes(network, segment, outside),
        _send_limit(network, namespace, around.carried),
        *([around.leasing] if around.leasing else []),
        *(neighbours(network, segment, outside) if ipv6 else []),
        *announcements(network, segment, outside, published),
        *([Dnsmasq(around.dnsmasq)] if around.dnsmasq else []),
        *([IdleDnsmasq(network.name)] if around.idle else []),
    )


def ahead_of_lease(network: Network, segment: DhcpSegment, mtu: int, leasing: Leasing) -> Plan:
    """Return a DHCP client and the links that it needs.

    The link has no address yet, so there is nothing to filter.  IPv6 stays off until the
    rules are loaded: the link would take an address, and routes, from any advertisement.
    """
    namespace = names.namespace(network.name)
    silent = (f"net/ipv6/conf/{names.UPSTREAM_LINK}/disable_ipv6", "1")
    return (
        Namespace(namespace, network.uuid),
        namespace_settings(network),
        _upstream_link(network, segment, mtu),
        Settings(namespace, (silent,)),
        *_upstream_port(network, segment),
        LinkUp(namespace, names.UPSTREAM_LINK),
        leasing,
    )


def withdrawals(network: Network) -> Plan:
    """Return the addresses that must go from a network's bridge, before a twin can start.

    libvirt's own dnsmasq must not take them again when a twin's bridge has them.  Where
    libvirt sets no address, an administrator may have set one: guests would find two
    gateways.
    """
    bridge = network.bridge
    gateways = tuple(subnet.gateway for subnet in network.subnets)
    bound = (BoundDnsmasq(network.name, gateways),) if listens_elsewhere(network) else ()
    return (*(Withdrawal(bridge, subnet.interface) for subnet in network.subnets), *bound)


def claims_part(plan: Plan, published: Published) -> Plan:
    """Return the operations of a plan that claims and reservations decide."""
    return tuple(
        operation
        for operation in plan
        if isinstance(operation, Firewall | Dnsmasq)
        or (isinstance(operation, Addresses) and operation.link == names.UPSTREAM_LINK)
        or (isinstance(operation, Announcement) and operation.address in published.addresses)
    )


def policy(network: Network, segment: Segment, outside: Outside, published: Published) -> Policy:
    """Return the firewall policy of a network's namespace."""
    routed = tuple(route.destination for route in network.routes)
    return Policy(
        inner=network.bridge,
        upstream=names.UPSTREAM_LINK,
        subnets=(*(subnet.network for subnet in network.subnets), *routed),
        gateways=tuple(subnet.gateway for subnet in network.subnets),
        address=outside.address,
        forwards=published.forwards,
        statics=published.statics,
        address6=outside.address6,
        public=(*outside.routed, *outside.proxied),
        by_dhcp=segment.side(4).by_dhcp,
        segments=segments(segment, outside),
        transit=segment.transit_gateways,
        link_local=segment.upstream.link_local == "forward",
        max_flows=segment.upstream.max_flows,
        served=served_ports(network),
        helpers=helpers(network, segment.upstream),
    )


def _private_patch(network: Network, namespace: str, mtu: int) -> Patch:
    return Patch(
        namespace=namespace,
        # libvirt's lease helper files leases under the name of the interface
        # that dnsmasq serves, and virsh looks for them under the bridge's.
        link=network.bridge,
        mac=names.mac(network.uuid, "inner"),
        port=names.private_patch(network.uuid),
        port_mac=names.mac(network.uuid, "private-port"),
        altname=names.altname("private", network.name),
        mtu=mtu,
    )


def _send_rates(network: Network, namespace: str) -> Iterable[SendRate]:
    """Yield the limits of both ends of the private patch.

    libvirt limits its bridge's own end, which sees no packet of the router's.
    """
    limits = network.bandwidth or Bandwidth()
    if limits.inbound:
        yield SendRate(namespace, network.bridge, limits.inbound)
    if limits.outbound:
        yield SendRate(None, names.private_patch(network.uuid), limits.outbound)


def private_port(network: Network) -> Port:
    """Return the port that connects a network's bridge with its namespace."""
    return Port(names.private_patch(network.uuid), network.bridge)


def _upstream_port(network: Network, segment: Segment) -> Iterable[Port]:
    if segment.is_macvlan:
        return
    # Hairpin: a guest may use its own network's forward, by the host's address.  Where
    # bridged frames pass through iptables, the host translates on the bridge itself.
    port = names.upstream_patch(network.uuid)
    yield Port(port, segment.bridge, segment.shares_addresses, segment.namespace)


def _upstream_link(network: Network, segment: Segment, mtu: int) -> Patch | Macvlan:
    namespace = names.namespace(network.name)
    mac = names.mac(network.uuid, "upstream")
    # A lease's MTU may be less than that of the other end.
    least = segment.carried(mtu)
    if segment.is_macvlan:
        return Macvlan(namespace, names.UPSTREAM_LINK, mac, segment.bridge, least)
    return Patch(
        namespace=namespace,
        link=names.UPSTREAM_LINK,
        mac=mac,
        port=names.upstream_patch(network.uuid),
        port_mac=names.mac(network.uuid, "upstream-port"),
        altname=names.altname("upstream", network.name),
        mtu=mtu,
        link_mtu=least if least < mtu else None,
        outer=segment.namespace,
    )


def _routes(network: Network, segment: Segment, outside: Outside) -> Iterable[Route | Gateways]:
    namespace, out = names.namespace(network.name), names.UPSTREAM_LINK
    for route in network.routes:
        yield Route(namespace, route.destination, network.next_hop(route), network.bridge)
    if segment.learnt_routes is not None:
        yield Gateways(namespace, out, segment.learnt_routes)
    elif segment.gateway is not None and outside.address is not None:
        default = default_route(4)
        if segment.side(4).is_off_link:
            yield Gateways(namespace, out, ((default, segment.gateway),))
        else:
            yield Route(namespace, default, segment.gateway, out)
    if not leaves_by_ipv6(network, outside):
        return
    for station in stations(segment, outside):
        yield Route(namespace, host_network(station), None, out)
    if segment.gateway6 is not None:
        yield Route(namespace, default_route(6), segment.gateway6, out)


def _send_limit(network: Network, namespace: str, mtu: int | None) -> SendLimit:
    subnets = tuple(subnet.interface for subnet in network.subnets)
    routes = tuple(route for route in network.routes if network.next_hop(route))
    return SendLimit(namespace, network.bridge, subnets, routes, mtu)
