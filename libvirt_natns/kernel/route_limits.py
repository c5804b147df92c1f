# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits of packet sizes on routes of one namespace, below the MTU of their link."""

from collections.abc import Iterable
from typing import Any

from libvirt_natns.addresses import Address, Family, Interface, IPNetwork
from libvirt_natns.kernel import netlink
from libvirt_natns.kernel.channel import NetlinkChannel
from libvirt_natns.kernel.routes import METRICS, family_of, main_routes
from libvirt_natns.kernel.rtnetlink import RouteEntry

SUBNET_METRICS: dict[Family, int | None] = {4: None, 6: 256}
"""The metric of the route to a link's own subnet, which the kernel makes."""


class RouteLimits:
    """The packet sizes of one namespace's routes."""

    __slots__ = ("_channel",)

    def __init__(self, channel: NetlinkChannel) -> None:
        self._channel = channel

    def differing(
        self, destinations: Iterable[IPNetwork], link: str, mtu: int | None
    ) -> list[IPNetwork]:
        """Return the destinations with routes of another limit than ``mtu``.

        ``mtu`` is in octets; None is the link's own.
        """
        index = self._channel.index(link)
        limits = {
            route.destination: route.mtu
            for route in main_routes(self._channel)
            if route.link == index and route.priority == _usual_metric(route)
        }
        return [destination for destination in destinations if limits.get(destination) != mtu]

    def set_subnet(self, subnet: Interface, link: str, mtu: int | None) -> None:
        """Send packets of at most ``mtu`` octets (None: the link's own) to a link's subnet."""
        how: dict[str, Any] = {"proto": netlink.RTPROT_KERNEL}
        if subnet.version == 4:
            how |= {"prefsrc": str(subnet.ip), "scope": netlink.RT_SCOPE_LINK}
        else:
            # Another metric would make a second route, which is never used.
            how["priority"] = SUBNET_METRICS[6]
        self._set(subnet.network, link, mtu, how)

    def set_route(
        self, destination: IPNetwork, gateway: Address, link: str, mtu: int | None
    ) -> None:
        """Send packets of at most ``mtu`` octets through a gateway; None is the link's own."""
        how: dict[str, Any] = {"gateway": str(gateway)}
        if destination.version == 6:
            how["priority"] = METRICS[6]
        self._set(destination, link, mtu, how)

    def _set(self, destination: IPNetwork, link: str, mtu: int | None, how: dict[str, Any]) -> None:
        index = self._channel.index(link)
        metrics = {"metrics": {"mtu": mtu}} if mtu else {}
        self._channel.change(
            f"the route to {destination} with MTU {mtu or 'of its link'}",
            lambda: self._channel.writer.route(
                "replace", dst=str(destination), oif=index, **how, **metrics
            ),
        )


def _usual_metric(route: RouteEntry) -> int | None:
    metrics = SUBNET_METRICS if route.gateway is None else METRICS
    return metrics[family_of(route.destination)]
