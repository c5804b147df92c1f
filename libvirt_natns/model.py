# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libvirt's XML and the configuration say, as plain values.

Everything here is frozen and already validated by its maker: ``documents.libvirt_xml`` for
networks, ``config`` for upstreams.
"""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import Literal

from libvirt_natns import names
from libvirt_natns.addresses import Address, Family, Interface, IPNetwork
from libvirt_natns.records import dataclass, field

Protocol = Literal["tcp", "udp", "sctp"]
UpstreamKind = Literal["bridge", "host", "router"]
Attach = Literal["bridge", "macvlan"]
Scope = Literal["isolated", "annotated"]
DhcpMode = Literal["required", "background"]
FirewallChoice = Literal["auto", "nftables", "iptables"]
LinkLocal = Literal["reject", "forward"]


STAND_INS = range(1, 1 << 24)
"""As addresses 0.0.0.1 to 0.255.255.255, which no machine can have (RFC 1122)."""


def is_stand_in(address: Address) -> bool:
    """Whether an address only stands for one that a DHCP server has yet to lease.

    What is published on it comes into force when the address is known.
    """
    return address.version == 4 and int(address) in STAND_INS


def known(address: IPv4Address | None) -> IPv4Address | None:
    """A leased address; None where it is not known yet."""
    return None if address is None or is_stand_in(address) else address


@dataclass(frozen=True, slots=True)
class AddressRange:
    """Addresses from ``first`` to ``last``, both included, of one family."""

    first: Address
    last: Address

    def __contains__(self, address: object) -> bool:
        if not isinstance(address, IPv4Address | IPv6Address):
            return False
        same = address.version == self.first.version
        return same and int(self.first) <= int(address) <= int(self.last)

    @property
    def size(self) -> int:
        """How many addresses these are."""
        return int(self.last) - int(self.first) + 1

    def __str__(self) -> str:
        return f"{self.first}-{self.last}" if self.first != self.last else str(self.first)


@dataclass(frozen=True, slots=True)
class DhcpHost:
    """A fixed DHCP address: libvirt's ``<host>``.

    ``id`` is the client's DUID, in DHCPv6.
    """

    ip: Address
    mac: str | None = None
    name: str | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Subnet:
    """One ``<ip>`` of a network, of either family: the gateway's address with its prefix.

    ``ranges`` and ``hosts`` are filled for ``<natns:ip>`` and for libvirt's own
    ``<ip>`` alike.
    """

    interface: Interface
    ranges: tuple[AddressRange, ...] = ()
    hosts: tuple[DhcpHost, ...] = ()

    @property
    def network(self) -> IPNetwork:
        return self.interface.network

    @property
    def gateway(self) -> Address:
        return self.interface.ip

    @property
    def dhcp(self) -> bool:
        """Whether anybody can get an address: an empty ``<dhcp>`` serves nobody."""
        return bool(self.ranges or self.hosts)

    @property
    def autonomous(self) -> bool:
        """Whether guests make their own addresses, as IPv6 has it for 64 bits alone."""
        return self.network.version == 6 and self.network.prefixlen == 64 and not self.dhcp


@dataclass(frozen=True, slots=True)
class Forwarder:
    """libvirt's ``<forwarder>``: who is asked for a domain's names.

    ``domain`` None means all names, ``address`` None the default servers.
    """

    domain: str | None = None
    address: Address | None = None


@dataclass(frozen=True, slots=True)
class DnsHost:
    """libvirt's ``<host>`` in ``<dns>``: names for an address."""

    ip: Address
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TextRecord:
    """libvirt's ``<txt>``."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class ServiceRecord:
    """libvirt's ``<srv>``; ``target`` None or "." means that there is no such service."""

    service: str
    protocol: str
    domain: str | None = None
    target: str | None = None
    port: int = 0
    priority: int = 0
    weight: int = 0


@dataclass(frozen=True, slots=True)
class Dns:
    """libvirt's ``<dns>``.

    ``forward_plain_names`` tells whether names without a dot are asked outside.
    """

    forward_plain_names: bool = True
    forwarders: tuple[Forwarder, ...] = ()
    hosts: tuple[DnsHost, ...] = ()
    texts: tuple[TextRecord, ...] = ()
    services: tuple[ServiceRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class StaticRoute:
    """libvirt's ``<route>``: a further private subnet behind a guest."""

    destination: IPNetwork
    gateway: Address


@dataclass(frozen=True, slots=True)
class PortRange:
    """libvirt's ``<range>``: ports ``start`` to ``end``, onto ``to`` upwards.

    With ``onto_one`` (``toEnd`` equals ``to``) all of them lead to the port ``to``.
    With ``auto`` (``start="auto"``) a free port is chosen for ``to``; ``start`` and
    ``end`` are 0 until then.
    """

    start: int
    end: int
    to: int
    exclude: bool = False
    auto: bool = False
    onto_one: bool = False


@dataclass(frozen=True, slots=True)
class PortForward:
    """libvirt's ``<portForward>``, in our namespace."""

    proto: Protocol
    ranges: tuple[PortRange, ...]
    address: Address | None = None
    network: str | None = None
    mac: str | None = None
    guest_address: Address | None = None
    sources: tuple[IPNetwork, ...] = ()

    @property
    def family(self) -> Family | None:
        """The one family of all its addresses; None where it names none."""
        named = (self.address, self.guest_address, *self.sources)
        return next((each.version for each in named if each is not None), None)


@dataclass(frozen=True, slots=True)
class PortSet:
    """Ports of one protocol, ``first`` to ``last``, both included."""

    proto: Protocol
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class AddressRequest:
    """``<natns:address>``: an upstream address of a guest's own.

    ``address`` None is "auto": one from the upstream's pool.  ``ports`` limits
    what comes in; empty means everything.
    """

    address: Address | None = None
    network: str | None = None
    mac: str | None = None
    ports: tuple[PortSet, ...] = ()


@dataclass(frozen=True, slots=True)
class NatMetadata:
    """The ``<natns:nat>`` element of a network or a domain.

    ``subnets`` are its ``<natns:ip>`` elements, one a family at most.
    """

    enabled: bool = True
    upstream: str | None = None
    address: Address | None = None
    address6: IPv6Address | None = None
    subnets: tuple[Subnet, ...] = ()
    forwards: tuple[PortForward, ...] = ()
    addresses: tuple[AddressRequest, ...] = ()


@dataclass(frozen=True, slots=True)
class Nic:
    """A guest's network interface: in a libvirt network, or on a bridge by name."""

    mac: str
    network: str | None = None
    bridge: str | None = None


@dataclass(frozen=True, slots=True)
class Domain:
    """A guest, as far as it concerns us."""

    uuid: str
    name: str
    nics: tuple[Nic, ...] = ()
    nat: NatMetadata | None = None


@dataclass(frozen=True, slots=True)
class Forward:
    """A published range of ports, with nothing left to look up.

    ``network`` is the uuid of the network whose namespace translates: ports
    ``first`` to ``last`` of ``address`` go to ports ``to`` to ``to_last`` of
    ``target``, one by one or all of them onto the single port ``to``.
    ``owner`` is the uuid of the guest, or of the network itself.  Where ``address``
    and ``target`` are the same, that is a guest's own address, in a public subnet.
    """

    owner: str
    owner_name: str
    network: str
    proto: Protocol
    address: Address
    first: int
    last: int
    target: Address
    to: int
    to_last: int
    sources: tuple[IPNetwork, ...] = ()

    @property
    def own(self) -> bool:
        """Whether it lets in what is addressed to the guest's own address, untranslated."""
        return self.address == self.target

    @property
    def shifts(self) -> bool:
        """Whether each port has its own at the target, rather than all of them one."""
        return self.to_last - self.to == self.last - self.first


@dataclass(frozen=True, slots=True)
class StaticNat:
    """An upstream address that belongs to one guest, in both directions.

    ``ports`` limits what comes in; empty means everything.
    """

    owner: str
    owner_name: str
    network: str
    address: Address
    target: Address
    ports: tuple[PortSet, ...] = ()


@dataclass(frozen=True, slots=True)
class Network:
    """A libvirt network, as far as it concerns us.

    ``forward_mode`` is None where there is no ``<forward>`` element.  ``subnets``
    holds the ``<ip>`` elements of both families, or the ``<natns:ip>`` elements where
    libvirt has none; ``taken_over`` tells the two apart: True when libvirt sets the
    addresses on the bridge and we move them.  ``dns`` is None where the network
    turns DNS off; what is in it is read for ``<natns:ip>`` only, otherwise
    libvirt translates it.  ``dnsmasq_options`` are the user's own.
    """

    uuid: str
    name: str
    bridge: str | None
    forward_mode: str | None = None
    mtu: int | None = None
    domain: str | None = None
    domain_local: bool = False
    dns: Dns | None = Dns()
    dnsmasq_options: tuple[str, ...] = ()
    subnets: tuple[Subnet, ...] = ()
    routes: tuple[StaticRoute, ...] = ()
    taken_over: bool = True
    nat: NatMetadata | None = None

    def next_hop(self, route: StaticRoute) -> Address | None:
        """Return the gateway of a route; None where the gateway is the network's own.

        The destination then lies on the private link itself: so the kernel reads such a
        route of IPv4, while it refuses one of IPv6.
        """
        own = any(route.gateway == subnet.gateway for subnet in self.subnets)
        return None if own else route.gateway

    @property
    def has_dnsmasq(self) -> bool:
        """Whether libvirt's rule gives this network a dnsmasq.

        libvirt starts none for a network without an address, nor for one with
        DNS turned off and no DHCP.
        """
        return any(self.dns or subnet.dhcp for subnet in self.subnets)

    @property
    def needs_dnsmasq(self) -> bool:
        """Whether we give it one: in IPv6 guests are not told of their router otherwise."""
        return self.has_dnsmasq or any(subnet.autonomous for subnet in self.subnets)

    @property
    def writes_dnsmasq(self) -> bool:
        """True if its dnsmasq's configuration is ours, not derived from libvirt's."""
        return self.needs_dnsmasq and not (self.taken_over and self.has_dnsmasq)


@dataclass(frozen=True, slots=True)
class Side:
    """An upstream in one family; without a subnet it has no addresses of that family."""

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
    own resolvers.  ``probe`` is how long, in seconds, an address is asked for
    by ARP before it is handed out.  ``attach`` tells what a namespace has on
    ``bridge``: a port of it, or a macvlan, for which it may be a NIC as well.  ``host6`` is
    the own subnet of the host, or of the router, behind whose transit bridge namespaces are;
    ``subnet6`` is that bridge's then.

    Where ``pool`` is "dhcp", ``dhcp`` says whether a network starts without a
    lease, and ``dhcp_timeout`` for how many seconds its start waits for one.
    ``leased`` is the address of one network's lease; then ``subnet``, ``gateway``,
    ``routes``, ``dns`` and ``mtu``, in octets, are that lease's, too.

    ``link_local`` says what becomes of packets to link-local addresses outside, and
    ``max_flows`` how many flows a network may have at one time.

    ``host_subnet`` lies between a router namespace and the host, ``host_ports`` are
    what it forwards there; ``host_address6`` None are all of the NIC's.
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
        """What namespaces are attached to, for messages."""
        what = "interface" if self.attach == "macvlan" else "bridge"
        return f"{what} {self.bridge}"

    @property
    def bridge_namespace(self) -> str | None:
        """The namespace that has ``bridge``; None for the host."""
        return names.router_namespace(self.name) if self.kind == "router" else None

    @property
    def by_dhcp(self) -> bool:
        """Whether the provider leases the addresses itself."""
        return self.pool == "dhcp"

    @property
    def known(self) -> bool:
        """Whether its subnet and resolvers are known by now: a lease may have to name them."""
        return not self.by_dhcp or self.leased is not None

    @property
    def own6(self) -> IPv6Network | None:
        """The outside's own subnet in IPv6, a part of which a network may be."""
        return self.host6 if self.is_transit else self.subnet6

    @property
    def is_transit(self) -> bool:
        """Whether its bridge is ours, and somebody else translates to the outside once more."""
        return self.kind in ("host", "router")

    @property
    def ranges(self) -> tuple[AddressRange, ...]:
        """The pool's ranges; none where the provider leases addresses itself."""
        return self.pool if isinstance(self.pool, tuple) else ()

    def side(self, family: Family) -> Side:
        """What it has in one family."""
        if family == 4:
            return Side(4, self.subnet, self.gateway, self.ranges)
        return Side(6, self.subnet6, self.gateway6, self.pool6)


@dataclass(frozen=True, slots=True)
class Outside:
    """What a network has on its upstream.

    ``address`` and ``address6`` are the namespace's own there, which private
    subnets of that family leave by; None: nothing of that family, or not yet.
    The network's own subnets that leave as they are, untranslated: ``routed``
    ones, which somebody routes to the namespace, and ``proxied`` ones, for whose
    addresses it answers on the upstream's link.
    """

    address: IPv4Address | None = None
    address6: IPv6Address | None = None
    routed: tuple[IPv6Network, ...] = ()
    proxied: tuple[IPv6Network, ...] = ()

    @property
    def public(self) -> tuple[IPv6Network, ...]:
        """The subnets of which the outside knows each address."""
        return (*self.routed, *self.proxied)

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The namespace's own addresses there."""
        return tuple(each for each in (self.address, self.address6) if each is not None)

    def of(self, family: Family) -> Address | None:
        """The address of one family."""
        return self.address if family == 4 else self.address6


HOST_UPSTREAM = Upstream(name="host", kind="host")
"""Built in: the host itself routes and masquerades a private transit bridge."""


DEFAULT_AUTO_PORTS = (20000, 29999)


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration; without a file, the defaults below.

    ``auto_ports`` are the first and the last port that start="auto" chooses from.
    """

    scope: Scope = "isolated"
    firewall: FirewallChoice = "auto"
    upstream: str = "host"
    upstreams: dict[str, Upstream] = field(default_factory=lambda: {"host": HOST_UPSTREAM})
    auto_ports: tuple[int, int] = DEFAULT_AUTO_PORTS


__all__ = [
    "DEFAULT_AUTO_PORTS",
    "DEFAULT_HOST_PORTS",
    "DEFAULT_HOST_SUBNET",
    "DEFAULT_MAX_FLOWS",
    "HOST_UPSTREAM",
    "AddressRange",
    "AddressRequest",
    "Attach",
    "Config",
    "DhcpHost",
    "DhcpMode",
    "Dns",
    "DnsHost",
    "Domain",
    "FirewallChoice",
    "Forward",
    "Forwarder",
    "IPv6Interface",
    "LinkLocal",
    "NatMetadata",
    "Network",
    "Nic",
    "Outside",
    "PortForward",
    "PortRange",
    "PortSet",
    "Protocol",
    "Scope",
    "ServiceRecord",
    "Side",
    "StaticNat",
    "StaticRoute",
    "Subnet",
    "TextRecord",
    "Upstream",
    "UpstreamKind",
    "is_stand_in",
    "known",
]
