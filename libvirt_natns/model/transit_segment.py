# SPDX-License-Identifier: LGPL-2.1-or-later
"""The transit bridge of the host or of a router, as the segment of the networks on it."""

from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Self

from libvirt_natns import names
from libvirt_natns.addresses import AddressRange, Interface, host_network, on_link
from libvirt_natns.model.publication import Forward
from libvirt_natns.model.segment import Segment
from libvirt_natns.model.upstream import HostUpstream, Outside, RouterUpstream

POOL6_SIZE = 0xFFFF

RELAY_PORT = 305
"""The port at which the host's DNS relay listens on its transit bridge.

A DNS server of the host's may listen at port 53 of all addresses, and a published port 53
of all addresses would take the networks' own questions.  Only root can listen at a
port below 1024.  No service is registered for this port.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitSegment(Segment):
    """A transit bridge of ours, behind which the host or a router translates once more.

    ``host6`` is the own subnet of that host or router.
    """

    upstream: HostUpstream | RouterUpstream
    subnet: IPv4Network
    gateway: IPv4Address
    host6: IPv6Network | None = None

    @classmethod
    def of(
        cls,
        upstream: HostUpstream | RouterUpstream,
        bridge: str,
        subnet: IPv4Network,
        subnet6: IPv6Network | None,
        host6: IPv6Network | None,
    ) -> Self:
        """Return the segment with all values that follow from its subnets."""
        gateway = subnet.network_address + 1
        last = gateway + (subnet.num_addresses - 3)
        segment = cls(
            upstream=upstream,
            bridge=bridge,
            subnet=subnet,
            gateway=gateway,
            pool=(AddressRange(gateway + 1, last),),
            dns=upstream.dns,
        )
        if subnet6 is None:
            # A host without IPv6 routes no prefix, and answers for no address.
            return segment
        first, last6 = subnet6[1], subnet6[POOL6_SIZE]
        return replace(
            segment,
            subnet6=subnet6,
            gateway6=first,
            pool6=(AddressRange(IPv6Address(first + 1), IPv6Address(last6)),),
            prefixes6=upstream.prefixes6,
            host6=host6,
        )

    @property
    def own6(self) -> IPv6Network | None:
        """Return the own subnet of the host or router; a network may be a part of it."""
        return self.host6

    @property
    def transit_gateways(self) -> tuple[Interface, ...]:
        """Return the addresses of the transit bridge, with prefixes."""
        four = on_link(self.gateway, self.subnet.prefixlen)
        if self.subnet6 is None or self.gateway6 is None:
            return (four,)
        return (four, on_link(self.gateway6, self.subnet6.prefixlen))

    def inside(self, forward: Forward, outside: Outside) -> Forward:
        """Return a forward as the rules of a namespace with these addresses have it.

        The host, or router, has matched the address, and masquerades some clients.
        """
        side = self.side_of(forward.target)
        address, gateway = outside.of(side.family), side.gateway
        if forward.own or address is None:
            return forward
        sources = forward.sources
        if sources and gateway is not None:
            sources = (*sources, host_network(gateway))
        return replace(forward, address=address, sources=sources)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSegment(TransitSegment):
    """The transit bridge in the host."""

    upstream: HostUpstream

    @property
    def has_relay(self) -> bool:
        """True if networks ask the host's DNS relay, as the upstream names no resolver."""
        return not self.dns


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSegment(TransitSegment):
    """The transit bridge in a router namespace."""

    upstream: RouterUpstream

    @property
    def namespace(self) -> str:
        """Return the router namespace, which has ``bridge``."""
        return names.router_namespace(self.name)
