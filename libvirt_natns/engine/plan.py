# SPDX-License-Identifier: LGPL-2.1-or-later
"""What must exist for a network, as data: decided here, made elsewhere.

``make`` turns a network, its upstream and its lease into a list of operations
in the order in which they are carried out.  The same list serves everything:
``up`` makes it so, ``check`` compares it with the kernel, ``sync`` repairs what
differs, ``describe`` is what ``virt-natns plan`` prints.  Nothing here looks at
the machine.
"""

from collections.abc import Container, Iterable
from ipaddress import IPv4Address, IPv6Address

from libvirt_natns import names
from libvirt_natns.addresses import (
    FAMILIES,
    Address,
    AddressRange,
    Interface,
    IPNetwork,
    default_route,
    host_network,
    on_link,
)
from libvirt_natns.daemons.dnsmasq import Daemon
from libvirt_natns.daemons.ndppd import Proxy
from libvirt_natns.daemons.udhcpc import Client
from libvirt_natns.firewall.rules import Policy, Rule, ruleset
from libvirt_natns.model.network import Network
from libvirt_natns.model.publication import Forward, StaticNat
from libvirt_natns.model.subnet import StaticRoute
from libvirt_natns.model.upstream import Outside, Upstream
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

    ``mtu``, in octets, is that of the bridge whose port it becomes; ``link_mtu`` is
    the namespace's end's, where that must be less: a bridge takes the least of its ports'.
    ``outer`` is the namespace of the port, None for the host.
    """

    namespace: str
    link: str
    mac: str
    port: str
    port_mac: str
    altname: str
    mtu: int
    link_mtu: int | None = None
    outer: str | None = None

    def describe(self) -> str:
        less = f" ({self.link_mtu} there)" if self.link_mtu else ""
        where = f" in {self.outer}" if self.outer else ""
        return (
            f"patch {self.port} ({self.altname}){where} to {self.link} in {self.namespace},"
            f" MTU {self.mtu}{less}"
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
    """The outer end of a patch, which is up and a port of a bridge.

    ``hairpin``: the bridge may send back through it what came in by it.  Both are in
    the namespace ``outer``, None for the host.
    """

    port: str
    bridge: str
    hairpin: bool = False
    outer: str | None = None

    def describe(self) -> str:
        where = f" in {self.outer}" if self.outer else ""
        hairpin = ", hairpin" if self.hairpin else ""
        return f"patch {self.port} on bridge {self.bridge}{where}{hairpin}"


@dataclass(frozen=True, slots=True)
class AllMulticast:
    """A port that its bridge sends all multicast to, also what nobody there asked for."""

    port: str
    outer: str | None = None

    def describe(self) -> str:
        return f"all multicast to patch {self.port}"


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
    """An address of the namespace's that must not be on libvirt's bridge in the host."""

    bridge: str
    address: Interface

    def describe(self) -> str:
        return f"no address {self.address} on {self.bridge} in the host"


@dataclass(frozen=True, slots=True)
class Addresses:
    """All addresses of a link; any other is removed, but for those of the kernel's making."""

    namespace: str | None
    link: str
    addresses: tuple[Interface, ...]

    def describe(self) -> str:
        listed = ", ".join(map(str, self.addresses)) or "none"
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
    """A route through a gateway, or straight over a link; ``namespace`` None is the host."""

    namespace: str | None
    destination: IPNetwork
    gateway: Address | None
    link: str

    def describe(self) -> str:
        default = self.destination.prefixlen == 0
        single = self.destination.prefixlen == self.destination.max_prefixlen
        destination = self.destination.network_address if single else self.destination
        via = f" via {self.gateway}" if self.gateway else ""
        where = self.namespace or "the host"
        return f"route {'default' if default else destination}{via} on {self.link} in {where}"


@dataclass(frozen=True, slots=True)
class ProxiedNeighbours:
    """IPv6 addresses that the kernel answers for on a link, in their owners' place."""

    namespace: str | None
    link: str
    addresses: tuple[Address, ...]

    def describe(self) -> str:
        listed = ", ".join(map(str, self.addresses)) or "no neighbour"
        return f"answer for {listed} on {self.link} in {self.namespace or 'the host'}"


@dataclass(frozen=True, slots=True)
class NeighbourProxy:
    """The ndppd that answers on a link for guests behind another one, or that there is none."""

    daemon: Proxy

    def describe(self) -> str:
        return self.daemon.describe()


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
class Gateways:
    """All routes of a namespace through gateways on a link; any other there is removed.

    A gateway need not be in the link's subnet: some providers lease an address alone.
    """

    namespace: str
    link: str
    routes: tuple[tuple[IPNetwork, Address], ...]

    def describe(self) -> str:
        each = (Route(self.namespace, to, by, self.link).describe() for to, by in self.routes)
        return "\n".join(each) or f"no route through {self.link} in {self.namespace}"


@dataclass(frozen=True, slots=True)
class Leasing:
    """A DHCP client that runs; one that starts asks for the address ``request`` first."""

    client: Client
    request: IPv4Address | None = None

    def describe(self) -> str:
        return f"DHCP client on {self.client.link} in {self.client.namespace}"


@dataclass(frozen=True, slots=True)
class Announcement:
    """Tells the neighbours who has a link's address now, each time it is set up.

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
    | AllMulticast
    | Firewall
    | Withdrawal
    | Addresses
    | LinkUp
    | Route
    | SendLimit
    | Gateways
    | Leasing
    | ProxiedNeighbours
    | NeighbourProxy
    | Announcement
    | Dnsmasq
    | IdleDnsmasq
    | TransitBridge
)
Plan = tuple[Operation, ...]

# A namespace starts with a copy of the host's settings, so none is left to
# chance.  ip_forward comes first: writing it resets the others.  Those of "all" reach
# links that are there, and most take effect on any link where "all" has them; those of
# "default" reach links that are to come.
SYSCTLS = (
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv4/icmp_echo_ignore_broadcasts", "1"),
    *(
        (f"net/ipv4/conf/{which}/{key}", value)
        for key, value in (
            ("rp_filter", "1"),
            # The gateway's address must not be answered for on the upstream's side,
            # nor any private address.
            ("arp_ignore", "1"),
            ("arp_announce", "2"),
            ("arp_filter", "0"),
            ("proxy_arp", "0"),
            ("proxy_arp_pvlan", "0"),
            # No entry of a neighbour that was not asked for.
            ("arp_accept", "0"),
            ("accept_local", "0"),
            ("route_localnet", "0"),
            ("bc_forwarding", "0"),
            # A router that serves one bridge never knows a better one for its guests,
            # and believes no neighbour who says so.
            ("accept_redirects", "0"),
            ("secure_redirects", "0"),
            ("send_redirects", "0"),
            ("accept_source_route", "0"),
            # The kernel's log is the host's.
            ("log_martians", "0"),
        )
        for which in ("all", "default")
    ),
)

# Without a subnet of it, IPv6 stays as libvirt has it for an isolated network:
# inside the bridge.
SYSCTLS_WITHOUT_IPV6 = (
    ("net/ipv6/conf/all/disable_ipv6", "1"),
    ("net/ipv6/conf/default/disable_ipv6", "1"),
)

# Those of "all" reach links that are there; the others, links that are to come.
SYSCTLS_WITH_IPV6 = (
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    *(
        (f"net/ipv6/conf/{which}/{key}", "0")
        for key in ("accept_redirects", "accept_source_route", "proxy_ndp")
        for which in ("all", "default")
    ),
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/default/disable_ipv6", "0"),
)

# In this order: what counts when a link begins to speak IPv6 comes before that it does.
LINK_SYSCTLS = (
    # The link's own address follows from its MAC, which is nobody else's, and is
    # usable at once: whoever waits for it need not wait for two seconds more.
    ("addr_gen_mode", "0"),
    ("accept_dad", "0"),
    ("autoconf", "0"),
    ("accept_redirects", "0"),
)

# A router tells the way by its advertisements, and nothing else.
ADVERTISED = (
    ("accept_ra", "2"),
    ("accept_ra_defrtr", "1"),
    ("accept_ra_pinfo", "0"),
    # The first question may come before the bridge lets it through.
    ("router_solicitation_interval", "1"),
)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What ``make`` must know of the machine.

    Both patches' MTU in octets, the firewall's backend, dnsmasq's configuration
    (None where there is none), and whether libvirt runs a dnsmasq that has
    nothing to do any more.  ``carried`` is the MTU of the private bridge where it is
    smaller than that of its patch, ``leasing`` the DHCP client, where the upstream
    asks for one.
    """

    private_mtu: int
    upstream_mtu: int
    backend: str
    dnsmasq: Daemon | None
    idle: bool = False
    carried: int | None = None
    leasing: Leasing | None = None


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
    outside: Outside,
    around: Surroundings,
    published: Published = Published(),
) -> Plan:
    """All that a network needs, in order.

    ``upstream`` is complete here: its bridge and subnet are known, also for the
    kind "host".  The firewall is loaded before any link of the namespace is up,
    so not one packet passes unfiltered.  Without a lease, ``address`` is a stand-in:
    nothing gets in or out then.
    """
    namespace = names.namespace(network.name)
    inner = network.bridge or ""
    ipv6 = has_ipv6(network)
    rules = ruleset(policy(network, upstream, outside, published))
    return (
        Namespace(namespace, network.uuid),
        _settings(network),
        _private_patch(network, namespace, around.private_mtu),
        _upstream_link(network, upstream, around.upstream_mtu),
        private_port(network),
        *_upstream_port(network, upstream),
        Firewall(namespace, network.uuid, around.backend, rules),
        # A DHCP client's link is up by now, and speaks no IPv6 before this.
        *([_link_settings(network, upstream, outside)] if ipv6 else []),
        *withdrawals(network),
        Addresses(namespace, inner, tuple(subnet.interface for subnet in network.subnets)),
        Addresses(namespace, names.UPSTREAM_LINK, _on_upstream(upstream, outside, published)),
        *(LinkUp(namespace, link) for link in ("lo", inner, names.UPSTREAM_LINK)),
        *_routes(network, upstream, outside),
        _send_limit(network, namespace, around.carried),
        *([around.leasing] if around.leasing else []),
        *(_neighbours(network, upstream, outside) if ipv6 else []),
        *_announcements(network, upstream, outside, published),
        *([Dnsmasq(around.dnsmasq)] if around.dnsmasq else []),
        *([IdleDnsmasq(network.name)] if around.idle else []),
    )


def ahead_of_lease(network: Network, upstream: Upstream, mtu: int, leasing: Leasing) -> Plan:
    """What a DHCP client needs, and the client: no address yet, so nothing to filter.

    Nor in IPv6, of which the link speaks none until the rules are there: it would
    make itself an address, and routes, from whatever a router advertises.
    """
    namespace = names.namespace(network.name)
    silent = (f"net/ipv6/conf/{names.UPSTREAM_LINK}/disable_ipv6", "1")
    return (
        Namespace(namespace, network.uuid),
        _settings(network),
        _upstream_link(network, upstream, mtu),
        Settings(namespace, (silent,)),
        *_upstream_port(network, upstream),
        LinkUp(namespace, names.UPSTREAM_LINK),
        leasing,
    )


def _settings(network: Network) -> Settings:
    more = SYSCTLS_WITH_IPV6 if has_ipv6(network) else SYSCTLS_WITHOUT_IPV6
    return Settings(names.namespace(network.name), SYSCTLS + more)


def has_ipv6(network: Network) -> bool:
    """Whether a network's namespace speaks IPv6 at all."""
    return any(subnet.interface.version == 6 for subnet in network.subnets)


def _leaves(network: Network, outside: Outside) -> bool:
    """Whether anything of the network leaves, or arrives, in IPv6."""
    own = outside.address6 or outside.routed or outside.proxied
    return has_ipv6(network) and bool(own)


def withdrawals(network: Network) -> tuple[Withdrawal, ...]:
    """What must go from a network's bridge before another can have that subnet.

    Where libvirt sets no address, somebody else may have: guests would find two gateways.
    """
    bridge = network.bridge or ""
    return tuple(Withdrawal(bridge, subnet.interface) for subnet in network.subnets)


def policy(network: Network, upstream: Upstream, outside: Outside, published: Published) -> Policy:
    """What the firewall of a network's namespace must do."""
    routed = tuple(route.destination for route in network.routes)
    return Policy(
        inner=network.bridge or "",
        upstream=names.UPSTREAM_LINK,
        subnets=(*(subnet.network for subnet in network.subnets), *routed),
        gateways=tuple(subnet.gateway for subnet in network.subnets),
        address=outside.address,
        forwards=published.forwards,
        statics=published.statics,
        address6=outside.address6,
        public=(*outside.routed, *outside.proxied),
        by_dhcp=upstream.by_dhcp,
        segments=_segments(upstream, outside),
        transit=_gateways(upstream) if upstream.is_transit else (),
        link_local=upstream.link_local == "forward",
        max_flows=upstream.max_flows,
    )


def _segments(upstream: Upstream, outside: Outside) -> tuple[IPNetwork, ...]:
    """The subnets whose stations the namespace asks for on its upstream."""
    segments: list[IPNetwork] = []
    if upstream.subnet is not None and outside.address is not None:
        segments.append(upstream.subnet)
    if upstream.subnet6 is not None and _shares_subnet6(upstream, outside):
        segments.append(upstream.subnet6)
    return tuple(segments)


def _gateways(upstream: Upstream) -> tuple[Interface, ...]:
    """The gateway's addresses, each with the upstream's subnet of that family."""
    return tuple(
        on_link(side.gateway, side.subnet.prefixlen)
        for side in map(upstream.side, FAMILIES)
        if side.gateway is not None and side.subnet is not None
    )


def _on_upstream(
    upstream: Upstream, outside: Outside, published: Published
) -> tuple[Interface, ...]:
    """All addresses of the namespace on its upstream."""
    own = []
    if outside.address is not None and upstream.subnet is not None:
        own.append(on_link(outside.address, upstream.subnet.prefixlen))
    if outside.address6 is not None:
        on = upstream.subnet6 if _shares_subnet6(upstream, outside) else None
        own.append(on_link(outside.address6, on.prefixlen if on else 128))
    # Guests' ones are without the subnet's prefix, or masquerading might take one of them.
    return (*own, *(on_link(each, each.max_prefixlen) for each in published.addresses))


def _shares_subnet6(upstream: Upstream, outside: Outside) -> bool:
    """Whether the upstream's IPv6 subnet is the upstream link's alone.

    It is not where guests have all of it: then it leads to them.
    """
    subnet = upstream.subnet6
    return subnet is not None and not any(map(subnet.subnet_of, outside.proxied))


def _stations(upstream: Upstream, outside: Outside) -> Iterable[IPv6Address]:
    """Known stations on the upstream that the namespace has no on-link prefix for."""
    subnet = _subnet6(upstream)
    covered = outside.address6 is not None and _shares_subnet6(upstream, outside)
    known = (upstream.gateway6, *(each for each in upstream.dns if each in subnet))
    for each in dict.fromkeys(known):
        if not isinstance(each, IPv6Address) or each.is_link_local:
            continue
        if not (covered and each in subnet):
            yield each


def _subnet6(upstream: Upstream) -> Container[object]:
    return upstream.subnet6 if upstream.subnet6 is not None else ()


def _link_settings(network: Network, upstream: Upstream, outside: Outside) -> Settings:
    """How both links of a namespace speak IPv6."""
    advertised = upstream.gateway6 is None
    more = ADVERTISED if advertised else (("accept_ra", "0"),)
    off = "0" if _leaves(network, outside) else "1"
    inner, out = network.bridge or "", names.UPSTREAM_LINK
    proxy = "1" if any(_answered(network, upstream, outside)) else "0"
    # ndppd hears guests claim addresses; the kernel learns of them only so.
    heard = "1" if outside.proxied else "0"
    return Settings(
        names.namespace(network.name),
        (
            *_of_link(inner, (*LINK_SYSCTLS, ("accept_ra", "0"), ("proxy_ndp", proxy))),
            (f"net/ipv6/conf/{inner}/accept_untracked_na", heard),
            (f"net/ipv6/neigh/{inner}/proxy_delay", "0"),
            *_of_link(inner, (("disable_ipv6", "0"),)),
            *_of_link(out, (*LINK_SYSCTLS, *more, ("disable_ipv6", off))),
        ),
    )


def _of_link(link: str, values: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    return ((f"net/ipv6/conf/{link}/{key}", value) for key, value in values)


def _answered(network: Network, upstream: Upstream, outside: Outside) -> Iterable[IPv6Address]:
    """Stations outside that guests believe to be on their own link."""
    for station in _stations(upstream, outside):
        if any(station in prefix for prefix in outside.proxied):
            yield station


def _neighbours(network: Network, upstream: Upstream, outside: Outside) -> Iterable[Operation]:
    """What answers for guests to the upstream, and for the upstream's stations to them."""
    namespace = names.namespace(network.name)
    inner = network.bridge or ""
    if outside.proxied and upstream.attach != "macvlan":
        # Guests' addresses are asked for in groups that nobody on this side joins.
        yield AllMulticast(names.upstream_patch(network.uuid), upstream.bridge_namespace)
    yield ProxiedNeighbours(namespace, inner, tuple(_answered(network, upstream, outside)))
    own = (outside.address6, *_stations(upstream, outside), upstream.gateway6)
    yield NeighbourProxy(
        Proxy(
            uuid=network.uuid,
            namespace=namespace,
            link=names.UPSTREAM_LINK,
            inner=inner,
            prefixes=outside.proxied,
            without=(
                *(AddressRange(each, each) for each in dict.fromkeys(own) if each is not None),
                *upstream.pool6,
            ),
        )
    )


def _announcements(
    network: Network, upstream: Upstream, outside: Outside, published: Published
) -> Iterable[Announcement]:
    namespace, mac = names.namespace(network.name), names.mac(network.uuid, "upstream")
    for address in (outside.address, outside.address6, *published.addresses):
        if address is not None:
            # A DHCP client has asked the neighbours itself.
            probing = 0.0 if upstream.by_dhcp and address.version == 4 else upstream.probe
            yield Announcement(namespace, names.UPSTREAM_LINK, address, mac, probing)


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
    port = names.upstream_patch(network.uuid)
    yield Port(port, upstream.bridge or "", upstream.is_transit, upstream.bridge_namespace)


def _upstream_link(network: Network, upstream: Upstream, mtu: int) -> Patch | Macvlan:
    namespace = names.namespace(network.name)
    mac = names.mac(network.uuid, "upstream")
    # What a lease says is less than what the other end may send.
    least = upstream.mtu if upstream.mtu and upstream.mtu < mtu else None
    if upstream.attach == "macvlan":
        return Macvlan(namespace, names.UPSTREAM_LINK, mac, upstream.bridge or "", least or mtu)
    return Patch(
        namespace=namespace,
        link=names.UPSTREAM_LINK,
        mac=mac,
        port=names.upstream_patch(network.uuid),
        port_mac=names.mac(network.uuid, "upstream-port"),
        altname=names.altname("upstream", network.name),
        mtu=mtu,
        link_mtu=least,
        outer=upstream.bridge_namespace,
    )


def _routes(network: Network, upstream: Upstream, outside: Outside) -> Iterable[Route | Gateways]:
    namespace, out = names.namespace(network.name), names.UPSTREAM_LINK
    for route in network.routes:
        yield Route(namespace, route.destination, network.next_hop(route), network.bridge or "")
    if upstream.by_dhcp:
        yield Gateways(namespace, out, _learnt(upstream))
    elif upstream.gateway is not None and outside.address is not None:
        yield Route(namespace, default_route(4), upstream.gateway, out)
    if not _leaves(network, outside):
        return
    for station in _stations(upstream, outside):
        yield Route(namespace, host_network(station), None, out)
    if upstream.gateway6 is not None:
        yield Route(namespace, default_route(6), upstream.gateway6, out)


def _send_limit(network: Network, namespace: str, mtu: int | None) -> SendLimit:
    subnets = tuple(subnet.interface for subnet in network.subnets)
    routes = tuple(route for route in network.routes if network.next_hop(route))
    return SendLimit(namespace, network.bridge or "", subnets, routes, mtu)


def _learnt(upstream: Upstream) -> tuple[tuple[IPNetwork, Address], ...]:
    """What a lease says of ways out."""
    if upstream.leased is None:
        return ()
    default = [(default_route(4), upstream.gateway)] if upstream.gateway else []
    return (*default, *((route.destination, route.gateway) for route in upstream.routes))


def transit(upstream: Upstream, forwarding: Iterable[str]) -> Plan:
    """What the host itself needs for a completed upstream of kind "host".

    ``forwarding`` names the interfaces that must forward IPv4 besides the bridge:
    those that the host's own routes to the outside use.  In IPv6 forwarding is
    a matter of the whole host, and not decided here.
    """
    assert upstream.bridge and upstream.subnet and upstream.gateway
    gateways: list[Interface] = [on_link(upstream.gateway, upstream.subnet.prefixlen)]
    if upstream.subnet6 and upstream.gateway6:
        gateways.append(on_link(upstream.gateway6, upstream.subnet6.prefixlen))
    keys = [f"net/ipv4/conf/{link}/forwarding" for link in (upstream.bridge, *forwarding)]
    return (
        TransitBridge(
            upstream.bridge,
            f"natns-transit-{upstream.name}",
            names.mac(upstream.name, "transit"),
        ),
        *([] if len(gateways) < 2 else _transit6(upstream.bridge)),
        Addresses(None, upstream.bridge, tuple(gateways)),
        *(Sysctl(None, key, "1") for key in keys),
        # So that forwards answer on 127.0.0.1, too; the rules keep the bridge's
        # other side from using it.
        Sysctl(None, f"net/ipv4/conf/{upstream.bridge}/route_localnet", "1"),
    )


def _transit6(bridge: str) -> Iterable[Sysctl]:
    """A transit bridge that speaks IPv6 and believes nobody on it.

    Nobody else has its addresses.  Looked for all the same, they would not be there yet
    when the first network's first packets come: the look begins with the first port.
    """
    for key, value in (
        ("accept_dad", "0"),
        ("accept_ra", "0"),
        ("accept_redirects", "0"),
        ("disable_ipv6", "0"),
    ):
        yield Sysctl(None, f"net/ipv6/conf/{bridge}/{key}", value)


def describe(plan: Iterable[Operation]) -> str:
    """The plan in words, an operation a line."""
    told = (operation.describe() for operation in plan)
    return "".join(f"{text}\n" for text in told if text)
