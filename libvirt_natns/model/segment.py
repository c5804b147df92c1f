# SPDX-License-Identifier: LGPL-2.1-or-later
"""The segment of an upstream: its bridge, and the subnets, gateways and pools there.

A segment has all that the configuration leaves open, such as the lease of a DHCP server.
Each kind of upstream has a type of segment: a provider's is here, and a transit bridge in
``model/transit_segment.py``.
"""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Self

from libvirt_natns.addresses import (
    Address,
    AddressRange,
    Family,
    Interface,
    IPNetwork,
    default_route,
)
from libvirt_natns.model.publication import Forward
from libvirt_natns.model.subnet import StaticRoute
from libvirt_natns.model.upstream import (
    BridgeUpstream,
    DhcpUpstream,
    Outside,
    Upstream,
    UpstreamKind,
)

LearntRoute = tuple[IPNetwork, Address]
"""The destination and the gateway of a route."""


@dataclass(frozen=True, slots=True)
class SegmentSide:
    """A segment in one family; without ``subnet`` and ``ranges`` it has no addresses of it.

    Without ``subnet`` each address of ``ranges`` stands alone: the gateway is on-link, and
    all other stations are behind the gateway.  ``by_dhcp``: the provider's DHCP server leases
    the addresses of that family, not we.
    """

    family: Family
    subnet: IPNetwork | None
    gateway: Address | None
    ranges: tuple[AddressRange, ...]
    by_dhcp: bool = False

    @property
    def prefix_length(self) -> int | None:
        """Return the length of an address's prefix there; None where there are no addresses."""
        if self.subnet is None and self.ranges:
            return self.ranges[0].first.max_prefixlen
        return self.subnet.prefixlen if self.subnet else None

    @property
    def is_off_link(self) -> bool:
        """True if the gateway is outside of the subnet; it is on the link nevertheless."""
        return self.gateway is not None and self.gateway not in (self.subnet or ())

    def holds(self, address: Address) -> bool:
        """True if a network may have the address, were it free."""
        if self.subnet is None:
            return any(address in span for span in self.ranges)
        return address in self.subnet


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The Ethernet of ``bridge``, on which a network of ``upstream`` has its addresses.

    ``dns`` are the segment's resolvers; empty for the host's own.
    """

    upstream: Upstream
    bridge: str
    subnet: IPv4Network | None = None
    gateway: IPv4Address | None = None
    pool: tuple[AddressRange, ...] = ()
    subnet6: IPv6Network | None = None
    gateway6: IPv6Address | None = None
    pool6: tuple[AddressRange, ...] = ()
    prefixes6: tuple[IPv6Network, ...] = ()
    dns: tuple[Address, ...] = ()

    @property
    def name(self) -> str:
        """Return the upstream's name."""
        return self.upstream.name

    @property
    def kind(self) -> UpstreamKind:
        """Return the upstream's kind."""
        return self.upstream.kind

    @property
    def namespace(self) -> str | None:
        """Return the namespace that has ``bridge``; None for the host."""
        return None

    @property
    def in_words(self) -> str:
        """Return the bridge or interface that namespaces attach to, in words for messages."""
        return f"{'interface' if self.is_macvlan else 'bridge'} {self.bridge}"

    @property
    def is_macvlan(self) -> bool:
        """True if a namespace has a macvlan on ``bridge``, and no port of it."""
        return self.upstream.is_macvlan

    @property
    def shares_addresses(self) -> bool:
        """True if all networks publish on the same addresses, those of the host or router."""
        return self.upstream.shares_addresses

    @property
    def probe(self) -> float:
        """Return the time, in seconds, to ask for an address before it is leased."""
        return self.upstream.probe

    @property
    def known(self) -> bool:
        """True if the segment's subnet and resolvers are known."""
        return True

    @property
    def own6(self) -> IPv6Network | None:
        """Return the outside's own subnet in IPv6; a network may be a part of that subnet."""
        return self.subnet6

    @property
    def transit_gateways(self) -> tuple[Interface, ...]:
        """Return the addresses of a transit bridge, with prefixes; none on a provider's segment."""
        return ()

    @property
    def learnt_routes(self) -> tuple[LearntRoute, ...] | None:
        """Return the routes of a DHCP lease in force; None where no lease tells routes."""
        return None

    def inside(self, forward: Forward, outside: Outside) -> Forward:
        """Return a forward as the rules of a namespace with these addresses have it."""
        return forward

    def carried(self, mtu: int) -> int:
        """Return the MTU of packets, in octets, for the ``mtu`` of ``bridge``."""
        return mtu

    def side(self, family: Family) -> SegmentSide:
        """Return the segment's part of one family."""
        if family == 4:
            return SegmentSide(4, self.subnet, self.gateway, self.pool)
        return SegmentSide(6, self.subnet6, self.gateway6, self.pool6)

    def side_of(self, address: Address) -> SegmentSide:
        """Return the segment's part of an address's family."""
        return self.side(4 if address.version == 4 else 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeSegment(Segment):
    """A provider's segment."""

    upstream: BridgeUpstream

    @classmethod
    def of(cls, upstream: BridgeUpstream) -> Self:
        """Return the segment as the configuration tells it."""
        return cls(
            upstream=upstream,
            bridge=upstream.bridge,
            subnet=upstream.subnet,
            gateway=upstream.gateway,
            pool=upstream.pool,
            subnet6=upstream.subnet6,
            gateway6=upstream.gateway6,
            pool6=upstream.pool6,
            prefixes6=upstream.prefixes6,
            dns=upstream.dns,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DhcpSegment(BridgeSegment):
    """A provider's segment with a DHCP server that leases the addresses.

    The server has leased the network no address yet, unless this is a ``LeasedSegment``.
    """

    upstream: DhcpUpstream

    @property
    def known(self) -> bool:
        """True if the segment's subnet and resolvers are known: a lease names them."""
        return False

    @property
    def learnt_routes(self) -> tuple[LearntRoute, ...]:
        """Return the routes of a DHCP lease in force: there is none yet."""
        return ()

    def side(self, family: Family) -> SegmentSide:
        """Return the segment's part of one family."""
        if family == 4:
            return SegmentSide(4, self.subnet, self.gateway, (), by_dhcp=True)
        return SegmentSide(6, self.subnet6, self.gateway6, self.pool6)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedSegment(DhcpSegment):
    """A provider's segment as the DHCP lease of one network tells it.

    ``leased`` is the lease's address.  ``mtu``, in octets, and ``routes`` are the lease's, too.
    """

    subnet: IPv4Network
    leased: IPv4Address
    mtu: int | None = None
    routes: tuple[StaticRoute, ...] = ()

    @property
    def known(self) -> bool:
        """True if the segment's subnet and resolvers are known."""
        return True

    @property
    def learnt_routes(self) -> tuple[LearntRoute, ...]:
        """Return the routes of the lease."""
        default = [(default_route(4), self.gateway)] if self.gateway else []
        return (*default, *((route.destination, route.gateway) for route in self.routes))

    def carried(self, mtu: int) -> int:
        """Return the MTU of packets, in octets: the lease's may be less than the bridge's."""
        return min(mtu, self.mtu or mtu)
