# SPDX-License-Identifier: LGPL-2.1-or-later
"""Upstreams as configured, ``[upstreams.NAME]``, a type for each kind; and a network's outside.

``model/segment.py`` has what a network finds there.
"""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal, TypeAlias

from libvirt_natns import names
from libvirt_natns.addresses import Address, AddressRange, Family
from libvirt_natns.model.publication import PortSet

UpstreamKind = Literal["bridge", "host", "router"]
Attach = Literal["bridge", "macvlan"]
DhcpMode = Literal["required", "background"]
LinkLocal = Literal["reject", "forward"]
Helper = Literal["ftp", "tftp"]
"""Helpers of conntrack, which follow connections that a protocol announces."""

DEFAULT_MAX_FLOWS = 32768
DEFAULT_HOST_SUBNET = IPv4Network("192.168.158.0/24")
DEFAULT_HOST_PORTS = (PortSet("tcp", 22, 22),)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyUpstream:
    """The keys that an upstream of any kind can have.

    ``dns`` empty means the host's own resolvers.  ``link_local`` says whether packets to
    link-local addresses outside are forwarded.  A network may have ``max_flows`` flows at
    one time.  ``helpers`` follow connections that guests' flows announce.
    """

    name: str
    subnet: IPv4Network | None = None
    dns: tuple[Address, ...] = ()
    subnet6: IPv6Network | None = None
    prefixes6: tuple[IPv6Network, ...] = ()
    link_local: LinkLocal = "reject"
    max_flows: int = DEFAULT_MAX_FLOWS
    helpers: tuple[Helper, ...] = ()

    @property
    def place(self) -> str:
        """Return in words the place of its addresses, which others may have; "" for none."""
        return ""

    @property
    def routed_by(self) -> str:
        """Return in words the machine that translates once more; "" for none."""
        return ""

    @property
    def shares_addresses(self) -> bool:
        """True if all networks publish on the same addresses, those of the host or router."""
        return False

    @property
    def is_macvlan(self) -> bool:
        """True if a namespace has a macvlan on a bridge or NIC, and no port of a bridge."""
        return False

    @property
    def probe(self) -> float:
        """Return the time, in seconds, to ask for an address before it is leased."""
        return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeUpstream(AnyUpstream):
    """A provider's segment, by a bridge of the host; networks lease addresses of our pools.

    ``attach``: a namespace has a port of ``bridge``, or a macvlan on it; for a macvlan,
    ``bridge`` may be a NIC as well.  ``probe`` is the time, in seconds, to ask for an
    address by ARP before it is leased.
    """

    bridge: str
    attach: Attach = "bridge"
    gateway: IPv4Address | None = None
    pool: tuple[AddressRange, ...] = ()
    probe: float = 0.2
    gateway6: IPv6Address | None = None
    pool6: tuple[AddressRange, ...] = ()

    @property
    def kind(self) -> UpstreamKind:
        """Return the kind, as the configuration calls it."""
        return "bridge"

    @property
    def place(self) -> str:
        """Return in words the place of its addresses, which others may have."""
        return f"on {self.bridge}"

    @property
    def is_macvlan(self) -> bool:
        """True if a namespace has a macvlan on ``bridge``, and no port of it."""
        return self.attach == "macvlan"


@dataclass(frozen=True, slots=True, kw_only=True)
class DhcpUpstream(BridgeUpstream):
    """A provider's segment with a DHCP server that leases the addresses: ``pool = "dhcp"``.

    Our own ``pool`` is empty.  ``dhcp`` says whether a network starts without a lease.  Its
    start waits ``dhcp_timeout`` seconds for a lease.
    """

    dhcp: DhcpMode = "required"
    dhcp_timeout: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitUpstream(AnyUpstream):
    """A private transit bridge, behind which the host or a router translates once more."""

    @property
    def shares_addresses(self) -> bool:
        """True: all networks publish on the addresses of the host or router."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class HostUpstream(TransitUpstream):
    """A private transit bridge that the host itself routes and masquerades.

    ``subnet`` is the bridge's, if it is not ours to choose.  ``subnet6`` is the own subnet
    of the host.
    """

    @property
    def kind(self) -> UpstreamKind:
        """Return the kind, as the configuration calls it."""
        return "host"

    @property
    def place(self) -> str:
        """Return in words the place of its addresses, which others may have."""
        return "the host's"

    @property
    def routed_by(self) -> str:
        """Return in words the machine that translates once more."""
        return "the host"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterUpstream(TransitUpstream):
    """A router namespace that owns ``nic``, with a transit bridge in it.

    ``subnet`` and ``subnet6`` are as of ``HostUpstream``.  ``host_subnet`` lies between the
    router namespace and the host, which gets the router's ``host_ports``.
    ``host_address6`` None means all addresses of the NIC.  ``client_id`` is DHCP's option 61
    in hexadecimal digits; "" for the identifier of the host's own client.  The host keeps
    ``host_addresses`` behind the router; None for those on which its programs listen.
    """

    nic: str
    host_subnet: IPv4Network = DEFAULT_HOST_SUBNET
    host_ports: tuple[PortSet, ...] = DEFAULT_HOST_PORTS
    host_address6: IPv6Address | None = None
    client_id: str = ""
    host_addresses: tuple[IPv4Address, ...] | None = None

    @property
    def kind(self) -> UpstreamKind:
        """Return the kind, as the configuration calls it."""
        return "router"

    @property
    def routed_by(self) -> str:
        """Return in words the machine that translates once more."""
        return f"{names.router_namespace(self.name)} with {self.nic}"


Upstream: TypeAlias = BridgeUpstream | HostUpstream | RouterUpstream
"""A way to the outside: ``[upstreams.NAME]`` of the configuration."""

HOST_UPSTREAM = HostUpstream(name="host")
"""Built in: the host itself routes and masquerades a private transit bridge."""


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
