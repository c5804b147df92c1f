# SPDX-License-Identifier: LGPL-2.1-or-later
"""Needs of each network towards the host: transit, forwards, routes and accepted packets."""

from collections import defaultdict
from ipaddress import IPv6Address, IPv6Network

from libvirt_natns import names
from libvirt_natns.addresses import Address, IPNetwork, host_network, is_placeholder
from libvirt_natns.engine.facts.planner import Planner
from libvirt_natns.engine.host.needs import Needs
from libvirt_natns.engine.operations.addresses import Route
from libvirt_natns.firewall.host_policy import HostForward, Private, Provider
from libvirt_natns.model.publication import Forward
from libvirt_natns.model.upstream import Upstream
from libvirt_natns.records import replace
from libvirt_natns.state.host_records import User
from libvirt_natns.state.leases import Leased
from libvirt_natns.upstream import transit


def host_needs(planner: Planner, network: str | None = None) -> dict[str, Needs]:
    """Return the needs of each network that runs or starts, or of the given one, by uuid."""
    upstreams = {name: _transit(planner, each) for name, each in planner.config.upstreams.items()}
    forwards: defaultdict[str, list[Forward]] = defaultdict(list)
    statics: defaultdict[str, list[Address]] = defaultdict(list)
    for forward in planner.store.claims.forwards(network):
        forwards[forward.network].append(forward)
    for static in planner.store.claims.static_nats(network):
        statics[static.network].append(static.address)
    return {
        user.uuid: needs_of(planner, user, upstream, forwards[user.uuid], statics[user.uuid])
        for user in planner.store.host.users(network)
        if (upstream := upstreams.get(user.upstream)) is not None
    }


def needs_of(
    planner: Planner,
    user: User,
    upstream: Upstream,
    forwards: list[Forward],
    statics: list[Address],
) -> Needs:
    """Return the needs of one network towards the host."""
    needs = Needs(private=(Private(user.bridge, user.subnets),))
    leased, bridge = _in_use(user, upstream), upstream.bridge or ""
    if upstream.kind == "host" and upstream.subnet is not None:
        host_forwards = [_host_forward(each, upstream, leased) for each in forwards if not each.own]
        routes = _routes(bridge, leased.prefix, leased.address6)
        routes += _proxied_routes(planner, user, upstream)
        return replace(
            needs,
            transits=(upstream,),
            forwards=tuple(each for each in host_forwards if each),
            public=tuple(Provider(bridge, route.destination) for route in routes if route.gateway),
            routes=routes,
            routes6=leased.address6 is not None,
        )
    if upstream.is_transit or not bridge or upstream.attach == "macvlan":
        # No bridge of the host forwards a macvlan's frames, so the host's rules see none.
        return needs
    if upstream.by_dhcp:
        needs = replace(needs, dhcp=(bridge,))
    routes = _routes(bridge, leased.prefix, _own_address(user.uuid))
    if routes and planner.kernel.host.sysctls.get(f"net/ipv6/conf/{bridge}/disable_ipv6") != "0":
        routes = ()
    there = (each for each in (*leased.addresses, *statics) if not is_placeholder(each))
    provider = [Provider(bridge, each) for each in there]
    provider += [Provider(bridge, route.destination, routed=True) for route in routes]
    return replace(needs, provider=tuple(provider), routes=routes, routes6=bool(routes))


def _proxied_routes(planner: Planner, user: User, upstream: Upstream) -> tuple[Route, ...]:
    """Return the host's routes to a network's part of the host's own subnet."""
    whole, gateway, bridge = upstream.host6, user.leased.address6, upstream.bridge or ""
    if whole is None or gateway is None:
        return ()
    parts: list[IPNetwork] = []
    for subnet in user.subnets:
        if isinstance(subnet, IPv6Network) and subnet.subnet_of(whole):
            # A longer prefix wins over the route of the host's own link.
            parts += subnet.subnets() if subnet == whole else [subnet]
    routes = [Route(None, part, gateway, bridge) for part in parts]
    link = planner.kernel.host.addresses.link_in(whole) if parts else None
    for router in planner.kernel.host.routes.default_gateways(6) if link else ():
        if link and any(router in part for part in parts):
            routes.append(Route(None, host_network(router), None, link))
    return tuple(routes)


def _transit(planner: Planner, upstream: Upstream) -> Upstream:
    """Return the upstream, completed if its transit subnet is chosen already."""
    if upstream.kind != "host":
        return upstream
    subnet = upstream.subnet or planner.store.transit.subnet(upstream.name)
    if subnet is None:
        return upstream
    six = transit.has_ipv6(planner.kernel)
    return transit.complete(
        upstream, subnet, planner.store.transit.prefix(upstream.name) if six else None
    )


def _in_use(user: User, upstream: Upstream) -> Leased:
    """Return a network's leases without those that it has no use for any more."""
    leased = user.leased
    if not any(subnet.version == 6 for subnet in user.subnets):
        return Leased(leased.address)
    prefix = leased.prefix
    if prefix is not None and not any(prefix.subnet_of(each) for each in upstream.prefixes6):
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


def _host_forward(forward: Forward, upstream: Upstream, leased: Leased) -> HostForward | None:
    """Return the host's part of a forward to a transit bridge; None without an address."""
    address = leased.address if forward.target.version == 4 else leased.address6
    if address is None:
        return None
    return HostForward(
        forward.proto,
        forward.address if int(forward.address) else None,
        forward.first,
        forward.last,
        address,
        upstream.bridge or "",
        forward.sources,
    )
