# SPDX-License-Identifier: LGPL-2.1-or-later
"""The IPv4 addresses by which packets leave a router's NIC, as routes and rules of the host said.

A masquerade takes the first address of the NIC that fits the gateway.  It ignores the source
that a route names (``ip route ... src ADDRESS``), so such routes become translations.  Routes
and rules are known when the router comes up.

Known limits: a rule counts if its only selector is the packet's destination.  A rule for a
source, a mark or a port does not say anything of packets from behind the router.
"""

import sys
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, ip_network
from socket import AF_INET

from libvirt_natns.kernel import netlink
from libvirt_natns.kernel.netlink import NLA_TYPE
from libvirt_natns.upstream.router.nic_addresses import NicAddress
from libvirt_natns.upstream.router.nic_routes import NicRoute
from libvirt_natns.upstream.router.nic_rules import NicRule
from libvirt_natns.upstream.router.nic_snapshot import Capture

MASQUERADE = ""
"""In place of a source: the address that a masquerade takes."""

EVERYTHING = IPv4Network("0.0.0.0/0")
MAIN_PRIORITY = 32766
UNSET = b"\xff" * 4
"""The kernel lists each rule with such values: no suppressed prefix length or group."""

SELECTORS_KNOWN = {
    netlink.FRA_DST,
    netlink.FRA_PRIORITY,
    netlink.FRA_TABLE,
    netlink.FRA_PROTOCOL,
    netlink.FRA_SUPPRESS_PREFIXLEN,
}

Sources = tuple[tuple[str, str], ...]
"""Destinations, each with the source of packets to it; the first that fits counts."""


def choose(before: Capture) -> Sources:
    """Return the sources by destination; empty where a masquerade takes the same for all."""
    static = {address.ip for address in before.addresses if not address.leased}
    default = _default(before)
    # The kernel names the address of the subnet, as a masquerade does without another order.
    fits = default is None or default.source is None or default.source in static
    chosen: dict[IPv4Network, str] = {}
    for destination, route in _ways(before):
        if not any(destination.subnet_of(earlier) for earlier in chosen):
            is_named = route.source in static
            by_masquerade = fits and route.protocol == netlink.RTPROT_KERNEL
            chosen[destination] = (is_named and not by_masquerade and route.source) or MASQUERADE
    if not any(chosen.values()):
        return ()
    return tuple((str(destination), source) for destination, source in chosen.items())


def leads_leased(before: Capture) -> bool:
    """True if packets of the default route leave by the leased address.

    The leased address must then come first on the NIC: a masquerade takes the first address
    that fits the gateway.
    """
    default = _default(before)
    if default is None:
        return False
    leased = {address.ip for address in before.ipv4 if address.leased}
    return (default.source or _by_masquerade(before, default.gateway)) in leased


def _default(before: Capture) -> NicRoute | None:
    """Return the route for all destinations that the kernel finds first, or None."""
    ways = (route for destination, route in _ways(before) if destination == EVERYTHING)
    return next(ways, None)


def _by_masquerade(before: Capture, gateway: str | None) -> str | None:
    """Return the address that a masquerade takes for a gateway; None without any address."""
    fitting = [
        address.ip
        for address in before.ipv4
        if gateway and IPv4Address(gateway) in _subnet(address)
    ]
    return next(iter([*fitting, *(address.ip for address in before.ipv4)]), None)


def _subnet(address: NicAddress) -> IPv4Network:
    return IPv4Network((address.ip, address.prefix), strict=False)


def _ways(before: Capture) -> Iterator[tuple[IPv4Network, NicRoute]]:
    """Yield the NIC's routes in the order in which the kernel finds them, with destinations.

    The destination is the part of the route's destination that the rule covers.
    """
    for covered, table, shortest in _tables(before.rules):
        for route in _in_table(before.routes, table):
            destination = ip_network(route.destination)
            assert isinstance(destination, IPv4Network)
            if destination.prefixlen < shortest:
                continue
            if destination.subnet_of(covered):
                yield destination, route
            elif covered.subnet_of(destination):
                yield covered, route


def _tables(rules: Iterable[NicRule]) -> Iterator[tuple[IPv4Network, int, int]]:
    """Yield covered destinations, table, and shortest prefix length, for each IPv4 rule."""
    found = [
        (rule.priority, *selected) for rule in rules if (selected := _selected(rule)) is not None
    ]
    found.append((MAIN_PRIORITY, EVERYTHING, netlink.RT_TABLE_MAIN, 0))
    for _, covered, table, shortest in sorted(found, key=lambda each: each[0]):
        yield covered, table, shortest


def _selected(rule: NicRule) -> tuple[IPv4Network, int, int] | None:
    """Return what a rule selects by the destination alone; None for any other rule."""
    body, attributes = bytes.fromhex(rule.body), rule.attributes
    kinds = {kind & NLA_TYPE for kind, value in attributes if value != UNSET}
    inverted = int.from_bytes(body[8:12], sys.byteorder) & netlink.FIB_RULE_INVERT
    if body[0] != AF_INET or body[7] != netlink.FR_ACT_TO_TBL or body[3] or inverted:
        return None
    if kinds - SELECTORS_KNOWN:
        return None
    address = attributes.get(netlink.FRA_DST)
    covered = IPv4Network((address, body[1])) if address else EVERYTHING
    suppressed = attributes.get(netlink.FRA_SUPPRESS_PREFIXLEN)
    shortest = 0 if suppressed in (None, UNSET) else int.from_bytes(suppressed, sys.byteorder) + 1
    return covered, rule.table, shortest


def _in_table(routes: Iterable[NicRoute], table: int) -> list[NicRoute]:
    """Return the IPv4 routes of a table, the longest prefix first, then the least metric."""
    unicast = (
        route
        for route in routes
        if route.family == AF_INET and route.table == table and route.kind == netlink.RTN_UNICAST
    )
    return sorted(
        unicast, key=lambda route: (-ip_network(route.destination).prefixlen, route.metric)
    )
