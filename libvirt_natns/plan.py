# SPDX-License-Identifier: LGPL-2.1-or-later
"""What must exist for a network, as data: decided here, made elsewhere.

``make`` turns a network, its upstream and its lease into a list of operations
in the order in which they are carried out.  The same list serves everything:
``up`` makes it so, ``check`` compares it with the kernel, ``sync`` repairs what
differs, ``describe`` is what ``virt-natns plan`` prints.  Nothing here looks at
the machine.
"""

from collections.abc import Iterable
from ipaddress import IPv4Interface, IPv4Network

from libvirt_natns import names
from libvirt_natns.addresses import Address, Interface, IPNetwork
from libvirt_natns.dnsmasq import Daemon
from libvirt_natns.firewall.rules import Policy, Rule, ruleset
from libvirt_natns.model import Forward, Network, StaticNat, StaticRoute, Upstream
from libvirt_natns.records import dataclass


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace; ``owner`` is the uuid of the network it belongs to."""

    name: str
    owner: str

    def describe(self) -> str:
        return f"namespace {self.name}"


@dataclass(frozen=True, slots=True)
class Sysctl:
    """A value below /proc/sys/net; ``namespace`` None is the host's own."""

    namespace: str | None
    key: str
    value: str

    def describe(self) -> str:
        return f"sysctl {self.key} = {self.value} in {self.namespace or 'the host'}"


@dataclass(frozen=True, slots=True)
class Settings:
    """Values below /proc/sys/net of a namespace, in the order in which they are set."""

    namespace: str
    values: tuple[tuple[str, str], ...]

    def describe(self) -> str:
        return "\n".join(
            f"sysctl {key} = {value} in {self.namespace}" for key, value in self.values
        )


@dataclass(frozen=True, slots=True)
class Patch:
    """A veth pair: ``port`` in the host, ``link`` in the namespace.

    ``mtu``, in octets, is that of the bridge whose port it becomes.
    """

    namespace: str
    link: str
    mac: str
    port: str
    port_mac: str
    altname: str
    mtu: int

    def describe(self) -> str:
        return (
            f"patch {self.port} ({self.altname}) to {self.link} in {self.namespace}, MTU {self.mtu}"
        )


@dataclass(frozen=True, slots=True)
class Macvlan:
    """A link of the namespace with a MAC address of its own on a link of the host.

    In macvlan's mode "bridge": those on one ``parent`` reach each other, but
    not the host.  ``mtu``, in octets, is at most the parent's.
    """

    namespace: str
    link: str
    mac: str
    parent: str
    mtu: int

    def describe(self) -> str:
        return f"macvlan {self.link} on {self.parent} in {self.namespace}, MTU {self.mtu}"


@dataclass(frozen=True, slots=True)
class Port:
    """The host end of a patch, which is up and a port of a bridge.

    ``hairpin``: the bridge may send back through it what came in by it.
    """

    port: str
    bridge: str
    hairpin: bool = False

    def describe(self) -> str:
        return f"patch {self.port} on bridge {self.bridge}{', hairpin' if self.hairpin else ''}"


@dataclass(frozen=True, slots=True)
class Firewall:
    """The whole rule set of a namespace."""

    namespace: str
    owner: str
    backend: str
    rules: tuple[Rule, ...]

    def describe(self) -> str:
        return f"firewall of {self.namespace}: {len(self.rules)} rules, {self.backend}"


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """An address that libvirt set on its bridge and that moves into the namespace."""

    bridge: str
    address: Interface

    def describe(self) -> str:
        return f"no address {self.address} on {self.bridge} in the host"


@dataclass(frozen=True, slots=True)
class Addresses:
    """All IPv4 addresses of a link; any other is removed."""

    namespace: str | None
    link: str
    addresses: tuple[Interface, ...]

    def describe(self) -> str:
        listed = ", ".join(map(str, self.addresses))
        return f"address {listed} on {self.link} in {self.namespace or 'the host'}"


@dataclass(frozen=True, slots=True)
class LinkUp:
    """A link of a namespace that is up."""

    namespace: str
    link: str

    def describe(self) -> str:
        return f"link {self.link} up in {self.namespace}"


@dataclass(frozen=True, slots=True)
class Route:
    """A route of a namespace through a gateway."""

    namespace: str
    destination: IPNetwork
    gateway: Address
    link: str

    def describe(self) -> str:
        default = self.destination.prefixlen == 0
        destination = "default" if default else str(self.destination)
        return f"route {destination} via {self.gateway} on {self.link} in {self.namespace}"


@dataclass(frozen=True, slots=True)
class SendLimit:
    """How large packets from the namespace to the private side may be.

    ``mtu``, in octets, is less than the MTU of ``link``, or None for just that.  What
    comes from there may be larger: a guest that was never told goes on.  A smaller
    MTU of the link itself would drop it, as a veth pair takes from its other end
    what it would send.
    """

    namespace: str
    link: str
    subnets: tuple[Interface, ...]
    routes: tuple[StaticRoute, ...]
    mtu: int | None

    @property
    def destinations(self) -> tuple[IPNetwork, ...]:
        """All that lies on the private side."""
        direct = (subnet.network for subnet in self.subnets)
        return (*direct, *(route.destination for route in self.routes))

    def describe(self) -> str:
        if self.mtu is None:
            return ""
        listed = ", ".join(map(str, self.destinations))
        return f"packets to {listed} of at most {self.mtu} octets in {self.namespace}"


@dataclass(frozen=True, slots=True)
class Announcement:
    """Gratuitous ARP for a link's address, each time it is set up.

    ``probing``: seconds for which the neighbours are asked first by who has
    not had the time before.
    """

    namespace: str
    link: str
    address: Address
    mac: str
    probing: float = 0.0

    def describe(self) -> str:
        return f"announce {self.address} to the neighbours on {self.link}"


@dataclass(frozen=True, slots=True)
class Dnsmasq:
    """The dnsmasq of a namespace, or that there is none."""

    daemon: Daemon

    def describe(self) -> str:
        none = "" if self.daemon.files else "no "
        return f"{none}dnsmasq in {self.daemon.namespace} on {self.daemon.bridge}"


@dataclass(frozen=True, slots=True)
class IdleDnsmasq:
    """libvirt's own dnsmasq of a network, without the helper that writes leases."""

    network: str

    def describe(self) -> str:
        return f"libvirt's own dnsmasq of network {self.network} writes no leases"


@dataclass(frozen=True, slots=True)
class TransitBridge:
    """The host's private bridge to which namespaces of an upstream "host" attach."""

    name: str
    altname: str
    mac: str

    def describe(self) -> str:
        return f"transit bridge {self.name} ({self.altname})"


Operation = (
    Namespace
    | Sysctl
    | Settings
    | Patch
    | Macvlan
    | Port
    | Firewall
    | Withdrawal
    | Addresses
    | LinkUp
    | Route
    | SendLimit
    | Announcement
    | Dnsmasq
    | IdleDnsmasq
    | TransitBridge
)
Plan = tuple[Operation, ...]

DEFAULT_ROUTE = IPv4Network("0.0.0.0/0")

# A namespace starts with a copy of the host's settings, so none is left to
# chance.  ip_forward comes first: writing it resets the others.
SYSCTLS = (
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv4/conf/all/rp_filter", "1"),
    ("net/ipv4/conf/default/rp_filter", "1"),
    # The gateway's address must not be answered for on the upstream's side.
    ("net/ipv4/conf/all/arp_ignore", "1"),
    ("net/ipv4/conf/all/arp_announce", "2"),
    # A router that serves one bridge never knows a better one for its guests,
    # and believes no neighbour who says so.
    ("net/ipv4/conf/all/accept_redirects", "0"),
    ("net/ipv4/conf/default/accept_redirects", "0"),
    ("net/ipv4/conf/all/send_redirects", "0"),
    ("net/ipv4/conf/default/send_redirects", "0"),
    ("net/ipv4/conf/all/accept_source_route", "0"),
    ("net/ipv4/conf/default/accept_source_route", "0"),
    # IPv6 stays as libvirt has it for an isolated network: inside the bridge.
    ("net/ipv6/conf/all/disable_ipv6", "1"),
    ("net/ipv6/conf/default/disable_ipv6", "1"),
)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What ``make`` must know of the machine.

    Both patches' MTU in octets, the firewall's backend, dnsmasq's configuration
    (None where there is none), and whether libvirt runs a dnsmasq that has
    nothing to do any more.  ``carried`` is the MTU of the private bridge where it is
    smaller than that of its patch.
    """

    private_mtu: int
    upstream_mtu: int
    backend: str
    dnsmasq: Daemon | None
    idle: bool = False
    carried: int | None = None


def path_mtu(private: int, upstream: int, assumed: int) -> int | None:
    """The MTU that guests must be told: the smallest, unless it is what they assume."""
    smallest = min(private, upstream)
    return smallest if smallest < assumed else None


@dataclass(frozen=True, slots=True)
class Published:
    """What guests, and the network itself, offer to the upstream."""

    forwards: tuple[Forward, ...] = ()
    statics: tuple[StaticNat, ...] = ()

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Upstream addresses of guests' own."""
        return tuple(dict.fromkeys(static.address for static in self.statics))


def make(
    network: Network,
    upstream: Upstream,
    address: Address,
    around: Surroundings,
    published: Published = Published(),
) -> Plan:
    """All that a network needs, in order.

    ``upstream`` is complete here: its bridge and subnet are known, also for the
    kind "host".  The firewall is loaded before any link of the namespace is up,
    so not one packet passes unfiltered.
    """
    namespace = names.namespace(network.name)
    inner = network.bridge or ""
    mac = names.mac(network.uuid, "upstream")
    outside = (address, *published.addresses)
    # Without the subnet's prefix, or masquerading might take one of them.
    own = (IPv4Interface(each) for each in published.addresses)
    rules = ruleset(policy(network, address, published))
    return (
        Namespace(namespace, network.uuid),
        Settings(namespace, SYSCTLS),
        _private_patch(network, namespace, around.private_mtu),
        _upstream_link(network, upstream, around.upstream_mtu),
        private_port(network),
        *_upstream_port(network, upstream),
        Firewall(namespace, network.uuid, around.backend, rules),
        *withdrawals(network),
        Addresses(namespace, inner, tuple(subnet.interface for subnet in network.subnets)),
        Addresses(namespace, names.UPSTREAM_LINK, (_on(upstream, address), *own)),
        *(LinkUp(namespace, link) for link in ("lo", inner, names.UPSTREAM_LINK)),
        *_routes(network, upstream, namespace),
        _send_limit(network, namespace, around.carried),
        *(
            Announcement(namespace, names.UPSTREAM_LINK, each, mac, upstream.probe)
            for each in outside
        ),
        *([Dnsmasq(around.dnsmasq)] if around.dnsmasq else []),
        *([IdleDnsmasq(network.name)] if around.idle else []),
    )


def withdrawals(network: Network) -> tuple[Withdrawal, ...]:
    """What must go from a network's bridge before another can have that subnet."""
    taken = network.subnets if network.taken_over else ()
    return tuple(Withdrawal(network.bridge or "", subnet.interface) for subnet in taken)


def policy(network: Network, address: Address, published: Published) -> Policy:
    """What the firewall of a network's namespace must do."""
    routed = tuple(route.destination for route in network.routes)
    return Policy(
        inner=network.bridge or "",
        upstream=names.UPSTREAM_LINK,
        subnets=(*(subnet.network for subnet in network.subnets), *routed),
        gateways=tuple(subnet.gateway for subnet in network.subnets),
        address=address,
        forwards=published.forwards,
        statics=published.statics,
    )


def _on(upstream: Upstream, address: Address) -> Interface:
    assert upstream.subnet is not None
    return IPv4Interface((address, upstream.subnet.prefixlen))


def _private_patch(network: Network, namespace: str, mtu: int) -> Patch:
    return Patch(
        namespace=namespace,
        # libvirt's lease helper files leases under the name of the interface
        # that dnsmasq serves, and virsh looks for them under the bridge's.
        link=network.bridge or "",
        mac=names.mac(network.uuid, "inner"),
        port=names.private_patch(network.uuid),
        port_mac=names.mac(network.uuid, "private-port"),
        altname=names.altname("private", network.name),
        mtu=mtu,
    )


def private_port(network: Network) -> Port:
    """What connects a network's bridge with its namespace."""
    return Port(names.private_patch(network.uuid), network.bridge or "")


def _upstream_port(network: Network, upstream: Upstream) -> Iterable[Port]:
    if upstream.attach == "macvlan":
        return
    # Hairpin: a forward of one's own, asked for by the host's address.  Where bridged
    # frames pass through iptables, the host translates on the bridge itself.
    hairpin = upstream.kind == "host"
    yield Port(names.upstream_patch(network.uuid), upstream.bridge or "", hairpin)


def _upstream_link(network: Network, upstream: Upstream, mtu: int) -> Patch | Macvlan:
    namespace = names.namespace(network.name)
    mac = names.mac(network.uuid, "upstream")
    if upstream.attach == "macvlan":
        return Macvlan(namespace, names.UPSTREAM_LINK, mac, upstream.bridge or "", mtu)
    return Patch(
        namespace=namespace,
        link=names.UPSTREAM_LINK,
        mac=mac,
        port=names.upstream_patch(network.uuid),
        port_mac=names.mac(network.uuid, "upstream-port"),
        altname=names.altname("upstream", network.name),
        mtu=mtu,
    )


def _routes(network: Network, upstream: Upstream, namespace: str) -> Iterable[Route]:
    for route in network.routes:
        yield Route(namespace, route.destination, route.gateway, network.bridge or "")
    if upstream.gateway is not None:
        yield Route(namespace, DEFAULT_ROUTE, upstream.gateway, names.UPSTREAM_LINK)


def _send_limit(network: Network, namespace: str, mtu: int | None) -> SendLimit:
    # Of IPv4 alone: in IPv6, a link has an MTU of its own for what is sent.
    subnets = tuple(each.interface for each in network.subnets if each.interface.version == 4)
    routes = tuple(each for each in network.routes if each.destination.version == 4)
    return SendLimit(namespace, network.bridge or "", subnets, routes, mtu)


def transit(upstream: Upstream, forwarding: Iterable[str]) -> Plan:
    """What the host itself needs for a completed upstream of kind "host".

    ``forwarding`` names the interfaces that must forward besides the bridge:
    those that the host's own routes to the outside use.
    """
    assert upstream.bridge and upstream.subnet and upstream.gateway
    gateway = IPv4Interface((upstream.gateway, upstream.subnet.prefixlen))
    keys = [f"net/ipv4/conf/{link}/forwarding" for link in (upstream.bridge, *forwarding)]
    return (
        TransitBridge(
            upstream.bridge,
            f"natns-transit-{upstream.name}",
            names.mac(upstream.name, "transit"),
        ),
        Addresses(None, upstream.bridge, (gateway,)),
        *(Sysctl(None, key, "1") for key in keys),
        # So that forwards answer on 127.0.0.1, too; the rules keep the bridge's
        # other side from using it.
        Sysctl(None, f"net/ipv4/conf/{upstream.bridge}/route_localnet", "1"),
    )


def describe(plan: Iterable[Operation]) -> str:
    """The plan in words, an operation a line."""
    told = (operation.describe() for operation in plan)
    return "".join(f"{text}\n" for text in told if text)
