# SPDX-License-Identifier: LGPL-2.1-or-later
"""Upstreams, ``[upstreams.NAME]`` of the configuration, and what a network has on its upstream."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal

from libvirt_natns import names
from libvirt_natns.addresses import Address, AddressRange, Family, IPNetwork
from libvirt_natns.model.publication import PortSet
from libvirt_natns.model.subnet import StaticRoute
from libvirt_natns.records import dataclass

UpstreamKind = Literal["bridge", "host", "router"]
Attach = Literal["bridge", "macvlan"]
DhcpMode = Literal["required", "background"]
LinkLocal = Literal["reject", "forward"]


@dataclass(frozen=True, slots=True)
class UpstreamSide:
    """An upstream in one family; without ``subnet`` it has no addresses of that family."""

    family: Family
    subnet: IPNetwork | None = None
    gateway: Address | None = None
    ranges: tuple[AddressRange, ...] = ()


DEFAULT_MAX_FLOWS = 32768
DEFAULT_HOST_SUBNET = IPv4Network("192.168.158.0/24")
DEFAULT_HOST_PORTS = (PortSet("tcp", 22, 22),)


@dataclass(frozen=True, slots=True)
class Upstream:
    """A way to the outside: ``[upstreams.NAME]`` of the configuration.

    ``pool`` is a tuple of ranges, or "dhcp".  ``dns`` empty means the host's
    own resolvers.  ``probe`` is the time, in seconds, to ask for an address by ARP
    before it is leased.  ``attach``: a namespace has a port of ``bridge``, or a macvlan
    on it; for a macvlan, ``bridge`` may be a NIC as well.  ``host6`` is the own subnet of
    the host or router that has the transit bridge; ``subnet6`` is that bridge's then.

    With ``pool`` "dhcp", ``dhcp`` says whether a network starts without a lease.
    Its start waits ``dhcp_timeout`` seconds for a lease.  ``leased`` is the address of
    one network's lease; then ``subnet``, ``gateway``, ``routes``, ``dns`` and ``mtu``,
    in octets, are that lease's, too.

    ``link_local`` says whether packets to link-local addresses outside are forwarded.
    A network may have ``max_flows`` flows at one time.

    ``host_subnet`` lies between a router namespace and the host, which gets the router's
    ``host_ports``.  ``host_address6`` None means all addresses of the NIC.
    """

    name: str
    kind: UpstreamKind
    bridge: str | None = None
    nic: str | None = None
    subnet: IPv4Network | None = None
    gateway: IPv4Address | None = None
    pool: tuple[AddressRange, ...] | Literal["dhcp"] = ()
    dns: tuple[Address, ...] = ()
    probe: float = 0.2
    subnet6: IPv6Network | None = None
    gateway6: IPv6Address | None = None
    pool6: tuple[AddressRange, ...] = ()
    prefixes6: tuple[IPv6Network, ...] = ()
    attach: Attach = "bridge"
    dhcp: DhcpMode = "required"
    dhcp_timeout: float = 10.0
    leased: IPv4Address | None = None
    mtu: int | None = None
    routes: tuple[StaticRoute, ...] = ()
    host6: IPv6Network | None = None
    link_local: LinkLocal = "reject"
    max_flows: int = DEFAULT_MAX_FLOWS
    host_subnet: IPv4Network = DEFAULT_HOST_SUBNET
    host_ports: tuple[PortSet, ...] = DEFAULT_HOST_PORTS
    host_address6: IPv6Address | None = None

    @property
    def segment(self) -> str:
        """Return the bridge or interface that namespaces attach to, in words for messages."""
        what = "interface" if self.attach == "macvlan" else "bridge"
        return f"{what} {self.bridge}"

    @property
    def bridge_namespace(self) -> str | None:
        """Return the namespace that has ``bridge``; None for the host."""
        return names.router_namespace(self.name) if self.kind == "router" else None

    @property
    def by_dhcp(self) -> bool:
        """True if the provider leases the addresses itself."""
        return self.pool == "dhcp"

    @property
    def known(self) -> bool:
        """True if its subnet and resolvers are known; with DHCP, a lease names them."""
        return not self.by_dhcp or self.leased is not None

    @property
    def own6(self) -> IPv6Network | None:
        """Return the outside's own subnet in IPv6; a network may be a part of that subnet."""
        return self.host6 if self.is_transit else self.subnet6

    @property
    def is_transit(self) -> bool:
        """True if its bridge is ours, and the host or router translates once more."""
        return self.kind in ("host", "router")

    @property
    def ranges(self) -> tuple[AddressRange, ...]:
        """Return the pool's ranges; none where the provider leases addresses itself."""
        return self.pool if isinstance(self.pool, tuple) else ()

    def side(self, family: Family) -> UpstreamSide:
        """Return the upstream's part of one family."""
        if family == 4:
            return UpstreamSide(4, self.subnet, self.gateway, self.ranges)
        return UpstreamSide(6, self.subnet6, self.gateway6, self.pool6)


@dataclass(frozen=True, slots=True)
class Outside:
    """Addresses and public subnets of a network on its upstream.

    ``address`` and ``address6`` are the namespace's own there.  Private subnets of
    that family are translated to them.  None: no address of that family, or not yet.

    Public subnets of the network leave untranslated.  The provider routes ``routed``
    subnets to the namespace.  The namespace answers for the addresses of ``proxied``
    subnets on the upstream's link.
    """

    address: IPv4Address | None = None
    address6: IPv6Address | None = None
    routed: tuple[IPv6Network, ...] = ()
    proxied: tuple[IPv6Network, ...] = ()

    @property
    def public(self) -> tuple[IPv6Network, ...]:
        """Return the subnets that the outside reaches without translation."""
        return (*self.routed, *self.proxied)

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Return the namespace's own addresses there."""
        return tuple(each for each in (self.address, self.address6) if each is not None)

    def of(self, family: Family) -> Address | None:
        """Return the address of one family."""
        return self.address if family == 4 else self.address6


HOST_UPSTREAM = Upstream(name="host", kind="host")
"""Built in: the host itself routes and masquerades a private transit bridge."""
