# SPDX-License-Identifier: LGPL-2.1-or-later
"""Needs of each network towards the host: transit, forwards, routes and accepted packets."""

from collections import defaultdict
from dataclasses import replace
from ipaddress import IPv6Address, IPv6Network

from libvirt_natns import names
from libvirt_natns.addresses import Address, host_network, inside, is_placeholder
from libvirt_natns.engine.facts.planner import Planner
from libvirt_natns.engine.host.needs import Needs
from libvirt_natns.firewall.host_policy import HostForward, Private, Provider, host_forward
from libvirt_natns.model.publication import Forward
from libvirt_natns.model.segment import BridgeSegment, DhcpSegment, Segment
from libvirt_natns.model.transit_segment import HostSegment
from libvirt_natns.model.upstream import RouterUpstream
from libvirt_natns.operations.addressing import Route
from libvirt_natns.state.host_records import User
from libvirt_natns.state.leases import Leased
from libvirt_natns.upstream import followed_flows, segments, transit


def host_needs(planner: Planner, network: str | None = None) -> dict[str, Needs]:
    """Return the needs of each network that runs or starts, or of the given one, by uuid."""
    ipv6 = transit.has_ipv6(planner.kernel)
    upstreams = planner.config.upstreams
    served = {
        name: segments.of_upstream(planner.store, upstream, ipv6=ipv6)
        for name, upstream in upstreams.items()
        # A router serves its networks itself.
        if not isinstance(upstream, RouterUpstream)
    }
    forwards: defaultdict[str, list[Forward]] = defaultdict(list)
    statics: defaultdict[str, list[Address]] = defaultdict(list)
    for forward in planner.store.claims.forwards(network):
        forwards[forward.network].append(forward)
    for static in planner.store.claims.static_nats(network):
        statics[static.network].append(static.address)
    return {
        user.uuid: needs_of(
            planner, user, served.get(user.upstream), forwards[user.uuid], statics[user.uuid]
        )
        for user in planner.store.host.users(network)
        if user.upstream in upstreams
    }


def needs_of(
    planner: Planner,
    user: User,
    segment: Segment | None,
    forwards: list[Forward],
    statics: list[Address],
) -> Needs:
    """Return the needs of one network towards the host; without a segment, of its own bridge."""
    needs = Needs(private=(Private(user.bridge, user.subnets),))
    if isinstance(segment, HostSegment):
        return _on_transit(planner, user, segment, forwards, needs)
    if not isinstance(segment, BridgeSegment) or segment.is_macvlan:
        # No bridge of the host forwards a macvlan's frames, so the host's rules see none.
        return needs
    leased, bridge = _in_use(user, segment), segment.bridge
    if isinstance(segment, DhcpSegment):
        needs = replace(needs, dhcp=(bridge,))
    routes = _routes(bridge, leased.prefix, _own_address(user.uuid))
    if routes and planner.kernel.host.sysctls.get(f"net/ipv6/conf/{bridge}/disable_ipv6") != "0":
        routes = ()
    there = (each for each in (*leased.addresses, *statics) if not is_placeholder(each))
    provider = [Provider(bridge, each) for each in there]
    provider += [Provider(bridge, route.destination, routed=True) for route in routes]
    return replace(needs, provider=tuple(provider), routes=routes, routes6=bool(routes))


def _on_transit(
    planner: Planner, user: User, segment: HostSegment, forwards: list[Forward], needs: Needs
) -> Needs:
    """Return the needs of a network on a transit bridge that the host routes."""
    leased, bridge = _in_use(user, segment), segment.bridge
    host_forwards = [_host_forward(each, segment, leased) for each in forwards if not each.own]
    routes = _routes(bridge, leased.prefix, leased.address6)
    routes += _proxied_routes(planner, user, segment)
    return replace(
        needs,
        transits=(segment,),
        forwards=tuple(each for each in host_forwards if each),
        public=tuple(Provider(bridge, route.destination) for route in routes if route.gateway),
        routes=routes,
        routes6=leased.address6 is not None,
        followed=followed_flows.of_user(user, segment.upstream, bridge, leased, planner.backend),
    )


def _proxied_routes(planner: Planner, user: User, segment: HostSegment) -> tuple[Route, ...]:
    """Return the host's routes to a network's part of the host's own subnet."""
    whole, gateway, bridge = segment.host6, user.leased.address6, segment.bridge
    if whole is None or gateway is None:
        return ()
    parts = inside(user.subnets, whole)
    routes = [Route(None, part, gateway, bridge) for part in parts]
    link = planner.kernel.host.addresses.link_in(whole) if parts else None
    for router in planner.kernel.host.routes.default_gateways(6) if link else ():
        if link and any(router in part for part in parts):
            routes.append(Route(None, host_network(router), None, link))
    return tuple(routes)


def _in_use(user: User, segment: Segment) -> Leased:
    """Return a network's leases without those that it has no use for any more."""
    leased = user.leased
    if not any(subnet.version == 6 for subnet in user.subnets):
        return Leased(leased.address)
    prefix = leased.prefix
    if prefix is not None and not any(prefix.subnet_of(each) for each in segment.prefixes6):
        return replace(leased, prefix=None)
    return leased


def _routes(
    bridge: str, prefix: IPv6Network | None, gateway: IPv6Address | None
) -> tuple[Route, ...]:
    """Return the host's route to a network's prefix, by the namespace's address on a bridge."""
    if prefix is None or gateway is None:
        return ()
    return (Route(None, prefix, gateway, bridge),)


def _own_address(uuid: str) -> IPv6Address:
    """Return the link-local address of a network's namespace on its upstream.

    The kernel makes it of the MAC address (RFC 4291, appendix A).
    """
    octets = bytearray.fromhex(names.mac(uuid, "upstream").replace(":", ""))
    octets[0] ^= 2
    return IPv6Address(b"\xfe\x80" + bytes(6) + octets[:3] + b"\xff\xfe" + octets[3:])


def _host_forward(forward: Forward, segment: HostSegment, leased: Leased) -> HostForward | None:
    """Return the host's part of a forward to a transit bridge; None without an address."""
    address = leased.of(forward.target.version)
    return None if address is None else host_forward(forward, address, segment.bridge)
