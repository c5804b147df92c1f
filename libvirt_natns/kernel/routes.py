# SPDX-License-Identifier: LGPL-2.1-or-later
"""Routes of one namespace: those of the main table, and the links of any table's routes."""

import socket
from collections.abc import Collection, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from libvirt_natns.addresses import FAMILIES, Address, Family, IPNetwork
from libvirt_natns.kernel import netlink, netns
from libvirt_natns.kernel.channel import NetlinkChannel
from libvirt_natns.kernel.links import Links
from libvirt_natns.kernel.rtnetlink import Hop, RouteEntry

METRICS: dict[Family, int | None] = {4: None, 6: 1024}
"""The metric, as the kernel tells it, of a route that was made without a metric."""

LEAST_SPECIFIC: dict[Family, int] = {4: 8, 6: 7}
"""Prefix lengths of the least specific routes to a network, such as 10.0.0.0/8 and fc00::/7."""


def family_of(destination: IPNetwork) -> Family:
    """Return the family of a destination."""
    return 4 if destination.version == 4 else 6


def main_routes(channel: NetlinkChannel, *families: Family) -> list[RouteEntry]:
    """Return all routes of the main table, of these families or of both."""
    return [
        route for route in _all_routes(channel, *families) if route.table == netlink.RT_TABLE_MAIN
    ]


def _all_routes(channel: NetlinkChannel, *families: Family) -> list[RouteEntry]:
    return channel.listed(
        f"IPv{families[0]} routes" if families else "routes",
        lambda: channel.reader.routes(*families, local=False),
    )


class Routes:
    """The main table's routes of one namespace."""

    __slots__ = ("_channel",)

    def __init__(self, channel: NetlinkChannel) -> None:
        self._channel = channel

    def has(self, destination: IPNetwork, gateway: Address | None, link: str) -> bool:
        """Return True if ``destination`` is reached through this gateway alone.

        ``gateway`` None: directly, over the link.
        """
        index = self._channel.index(link)
        ways = [
            (route.gateway, route.link)
            for route in main_routes(self._channel, family_of(destination))
            if route.destination == destination
        ]
        return ways == [(gateway, index)]

    def replace(
        self,
        destination: IPNetwork,
        gateway: Address | None,
        link: str,
        *,
        alone: bool = False,
    ) -> None:
        """Lead ``destination`` through this gateway, or directly, and in no other way.

        ``alone``: there is no other way, as the namespace is new.
        """
        family = family_of(destination)
        index = self._channel.index(link)
        metric = METRICS[family]
        request: dict[str, Any] = {"dst": str(destination), "oif": index}
        if gateway is not None:
            request["gateway"] = str(gateway)
        if metric is not None:
            request["priority"] = metric
        self._channel.change(
            f"the route to {destination}{f' via {gateway}' if gateway else ''}",
            lambda: self._channel.writer.route("replace", **request),
        )
        for route in [] if alone else main_routes(self._channel, family):
            way = (route.gateway, route.link, route.priority)
            if route.destination == destination and way != (gateway, index, metric):
                self._delete(route)

    def remove(self, destination: IPNetwork, link: str) -> None:
        """Remove the routes to ``destination`` over a link; missing is success."""
        present = Links(self._channel).get(link)
        if present is None:
            return
        for route in main_routes(self._channel, family_of(destination)):
            if (route.destination, route.link) == (destination, present.index):
                self._delete(route)

    def add_as_libvirt(self, destination: IPNetwork, gateway: Address, link: str) -> None:
        """Add a route as libvirt does for ``<route>``, with its metric and origin."""
        index = self._channel.index(link)
        self._channel.attempt(
            lambda: self._channel.writer.route(
                "add",
                dst=str(destination),
                gateway=str(gateway),
                oif=index,
                priority=1,
                proto=netlink.RTPROT_BOOT,
            )
        )

    def gateways(self, link: str) -> set[tuple[IPNetwork, Address]]:
        """Return all IPv4 routes through gateways on a link."""
        return {(route.destination, gateway) for route, gateway in self._through(link)}

    def _through(self, link: str) -> list[tuple[RouteEntry, Address]]:
        index = self._channel.index(link)
        routes = ((route, route.gateway) for route in main_routes(self._channel, 4))
        return [(route, by) for route, by in routes if by is not None and route.link == index]

    def replace_gateways(self, link: str, wanted: Collection[tuple[IPNetwork, Address]]) -> None:
        """Have exactly these IPv4 routes through gateways on a link, in its subnet or not."""
        index = self._channel.index(link)
        for route, by in self._through(link):
            if (route.destination, by) not in wanted:
                self._delete(route)
        for destination, gateway in wanted:
            way: dict[str, Any] = {"dst": str(destination), "gateway": str(gateway)}
            replace = partial(self._channel.writer.route, "replace", **way, oif=index)
            self._channel.change(
                f"the route to {destination} via {gateway}",
                partial(replace, flags=netlink.RTNH_F_ONLINK),
            )

    def _delete(self, route: RouteEntry) -> None:
        """Delete one route as the kernel listed it; missing is success."""
        # A route that leads nowhere has a type of its own, and no other is deleted.
        same: dict[str, Any] = {
            "type": route.kind, "scope": route.scope, "tos": route.tos, "proto": route.protocol,
        }  # fmt: skip
        if route.priority is not None:
            same["priority"] = route.priority
        if route.destination.version == 6:
            # There may be several with one metric.
            same |= {"oif": route.link} if route.link else {}
            same |= {"gateway": str(route.gateway)} if route.gateway else {}
        self._channel.attempt(
            lambda: self._channel.writer.route("del", dst=str(route.destination), **same)
        )

    def default_gateways(self, family: Family) -> set[Address]:
        """Return the routers of the ways out of a family, such as ::/0 or 2000::/3."""
        routes = main_routes(self._channel, family)
        return {
            hop.gateway
            for route in routes
            for hop in route.hops
            if is_way_out(route.destination) and hop.gateway is not None
        }

    def destinations(self, without: Iterable[str] = ()) -> set[IPNetwork]:
        """Return the destinations of the routes of both families.

        Ways out and routes within a link do not count, nor do links named in ``without``.
        """
        links = Links(self._channel)
        ignored = {link.index for name in without if (link := links.get(name))}
        return {
            route.destination
            for route in main_routes(self._channel)
            if route.link not in ignored
            and not is_way_out(route.destination)
            and not _within_link(route.destination)
        }

    def links(self, family: Family = 4) -> set[str]:
        """Return the names of the links that any route of a family leads over.

        Rules may lead to routes of any table: VPNs and policies have tables of their own.
        """
        routes = _all_routes(self._channel, family)
        return {
            link
            for link in self._by_link(
                hop for route in routes if not _within_link(route.destination) for hop in route.hops
            )
            if link != "lo"
        }

    def leading(self) -> dict[str, bool]:
        """Return all links of routes, each with True if a router is reached by the link."""
        return self._by_link(
            hop
            for family in FAMILIES
            for hop in self._channel.listed(
                f"IPv{family} routes", partial(self._channel.reader.hops, family)
            )
        )

    def _by_link(self, hops: Iterable[Hop]) -> dict[str, bool]:
        leading: dict[int, bool] = {}
        for hop in hops:
            leading[hop.link] = leading.get(hop.link, False) or hop.gateway is not None
        # By name at once; listing all links takes 0.2 s with a few hundred of them.
        with netns.entered(self._channel.namespace):
            names = {index: _link_name(index) for index in leading}
        return {names[index]: routed for index, routed in leading.items() if names[index]}


def is_way_out(destination: IPNetwork) -> bool:
    """True if a route to this destination leads to all the world, or to a part of it.

    VPNs replace the default route by its two halves (OpenVPN's redirect-gateway def1).
    """
    return destination.prefixlen < LEAST_SPECIFIC[family_of(destination)]


def _link_name(index: int) -> str:
    """Return the name of a link of the calling thread's namespace; "" if it is gone by now."""
    with suppress(OSError):
        return socket.if_indextoname(index)
    return ""


def _within_link(destination: IPNetwork) -> bool:
    """Return True if the kernel makes a route to this destination on every link."""
    return destination.version == 6 and (destination.is_link_local or destination.is_multicast)
