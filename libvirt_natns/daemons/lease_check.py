# SPDX-License-Identifier: LGPL-2.1-or-later
"""The values of a DHCP lease, judged by sense: refused as a whole, or cut to harmless values.

Any station of a segment can pose as its DHCP server.  A route must not lead into a private
subnet of this host: the kernel would replace its own route by it.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network

from libvirt_natns.addresses import IPNetwork
from libvirt_natns.daemons.dhcp_lease import DhcpLease
from libvirt_natns.model.subnet import StaticRoute

SHORTEST_PREFIX = 8
"""Bits of the widest leased subnet: no Ethernet has more stations, and 0 would hide all others."""

MOST_ROUTES = 64
MOST_SERVERS = 8
"""Resolvers that dnsmasq is told of: it asks all of them at times."""

MOST_SAID = 4
"""Cuts that are reported one by one."""

SPECIAL = tuple(
    map(
        IPv4Network,
        # This network, loopback, link-local, multicast, reserved: RFC 6890.
        ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4"),
    )
)


@dataclass(frozen=True, slots=True)
class Checked:
    """A lease with the values that are used, and in words each value that was left out."""

    lease: DhcpLease
    cuts: tuple[str, ...] = ()


def refused(lease: DhcpLease, private: Collection[IPNetwork]) -> str | None:
    """Return why a lease cannot be used at all, in words; None where it can.

    ``private`` are the subnets that only this side has.
    """
    address, subnet = lease.address.ip, lease.address.network
    if subnet.prefixlen < SHORTEST_PREFIX:
        return f"{lease.address} has a subnet wider than /{SHORTEST_PREFIX}"
    if any(address in network for network in SPECIAL):
        return f"{lease.address} is not a host address"
    if _is_edge(address, subnet):
        return f"{lease.address} is the network or broadcast address of its subnet"
    if hit := next((ours for ours in _fours(private) if ours.overlaps(subnet)), None):
        return f"{lease.address} overlaps the private subnet {hit}"
    return None


def bounded(lease: DhcpLease, private: Collection[IPNetwork]) -> Checked:
    """Return a lease without the values that must not be used."""
    ours = _fours(private)
    cuts: list[str] = []
    gateway = lease.gateway
    if gateway is not None and (why := _no_gateway(gateway, lease, ours)):
        cuts.append(f"gateway {gateway}: {why}")
        gateway = None
    routes = _routes(lease, ours, cuts)
    servers = _servers(lease, ours, cuts)
    return Checked(replace(lease, gateway=gateway, routes=routes, dns=servers), _summary(cuts))


def _fours(private: Collection[IPNetwork]) -> list[IPv4Network]:
    return [network for network in private if isinstance(network, IPv4Network)]


def _is_edge(address: IPv4Address, subnet: IPv4Network) -> bool:
    """True for the first and last address of a subnet; RFC 3021 has stations there in a /31."""
    edges = (subnet.network_address, subnet.broadcast_address)
    return subnet.prefixlen < 31 and address in edges


def _no_gateway(
    gateway: IPv4Address, lease: DhcpLease, ours: Collection[IPv4Network]
) -> str | None:
    """Return why an address cannot be a gateway, in words; None where it can."""
    subnet = lease.address.network
    if gateway == lease.address.ip:
        return "is the leased address itself"
    if any(gateway in network for network in SPECIAL if not network.is_link_local):
        return "is not a host address"
    if _is_edge(gateway, subnet):
        return "is the network or broadcast address of its subnet"
    if any(gateway in network for network in ours):
        return "is in a private subnet"
    # Clouds lease an address alone (/32), but their gateway is on the link.
    on_link = gateway in subnet or subnet.prefixlen == 32
    if not on_link and not any(gateway in network for network in lease.on_link):
        return f"is not in {subnet}"
    return None


def _routes(
    lease: DhcpLease, ours: Collection[IPv4Network], cuts: list[str]
) -> tuple[StaticRoute, ...]:
    kept: dict[IPNetwork, StaticRoute] = {}
    for route in lease.routes:
        why = _no_route(route, lease, ours)
        if why is None and route.destination in kept:
            why = "is a duplicate"
        if why is None and len(kept) == MOST_ROUTES:
            why = f"is beyond the first {MOST_ROUTES}"
        if why is None:
            kept[route.destination] = route
        else:
            cuts.append(f"route {route.destination} via {route.gateway}: {why}")
    return tuple(kept.values())


def _no_route(route: StaticRoute, lease: DhcpLease, ours: Collection[IPv4Network]) -> str | None:
    """Return why a route must not be set, in words.

    A wider route than a private subnet is harmless: the kernel prefers the longer prefix.
    """
    if not (isinstance(route.destination, IPv4Network) and isinstance(route.gateway, IPv4Address)):
        return "is not an IPv4 route"
    for name, networks in (
        ("the private subnet", ours),
        ("the leased subnet", [lease.address.network]),
        ("the special range", SPECIAL),
    ):
        if hit := next((n for n in networks if route.destination.subnet_of(n)), None):
            return f"leads into {name} {hit}"
    why = _no_gateway(route.gateway, lease, ours)
    return f"its gateway {why}" if why else None


def _servers(
    lease: DhcpLease, ours: Collection[IPv4Network], cuts: list[str]
) -> tuple[IPv4Address, ...]:
    kept: dict[IPv4Address, None] = {}
    for server in lease.dns:
        if server in kept:
            continue
        # Some clouds have their resolver at a link-local address.
        special = any(server in network for network in SPECIAL if not network.is_link_local)
        if server == lease.address.ip or special:
            cuts.append(f"DNS server {server}: is not the address of another host")
        elif len(kept) == MOST_SERVERS:
            cuts.append(f"DNS server {server}: is beyond the first {MOST_SERVERS}")
        else:
            kept[server] = None
    return tuple(kept)


def _summary(cuts: list[str]) -> tuple[str, ...]:
    """Return the first cuts and the number of others: a server may send a thousand routes."""
    more = len(cuts) - MOST_SAID
    return (*cuts[:MOST_SAID], *([f"{more} more"] if more > 0 else []))


def said(cuts: Collection[str]) -> Iterator[str]:
    """Yield the line for `check` and the log, if anything was left out."""
    if cuts:
        yield f"the DHCP lease is used without: {'; '.join(cuts)}"
