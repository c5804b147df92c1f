# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a network to its plan: what the plan must know, looked up on this machine.

Reads the configuration, the state database and the kernel; changes nothing,
but for a transit subnet, which is chosen when it is first needed.
"""

from collections import defaultdict
from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address, IPv6Network

from libvirt_natns import firewall, names
from libvirt_natns.addresses import (
    FAMILIES,
    Address,
    AddressRange,
    Family,
    IPNetwork,
    by_family,
    host_network,
    is_placeholder,
    on_link,
    unless_placeholder,
)
from libvirt_natns.daemons import dnsmasq, dnsmasq_config, resolv_conf
from libvirt_natns.daemons.ndppd import Proxy
from libvirt_natns.daemons.resolv_conf import Resolvers
from libvirt_natns.engine import host, host_ipv6, proxied_addresses
from libvirt_natns.engine.allocation import ranges_of
from libvirt_natns.engine.plan import (
    Leasing,
    NeighbourProxy,
    Operation,
    Plan,
    Published,
    Route,
    Surroundings,
    ahead_of_lease,
    has_ipv6,
    make,
    path_mtu,
    private_port,
    withdrawals,
)
from libvirt_natns.errors import DocumentError, KernelError
from libvirt_natns.firewall.host import HostForward, Private, Provider
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.network import Network
from libvirt_natns.model.publication import Forward
from libvirt_natns.model.subnet import Subnet
from libvirt_natns.model.upstream import Outside, Upstream
from libvirt_natns.records import dataclass, replace
from libvirt_natns.state import applicants, pool
from libvirt_natns.state.host_records import User
from libvirt_natns.state.leases import Leased
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import dhcp, routers, selection, transit

ETHERNET_MTU = 1500


@dataclass(frozen=True, slots=True)
class PrivateMtu:
    """The MTU of a namespace's patch into its private bridge, and what that one carries."""

    patch: int
    carried: int

    @property
    def limit(self) -> int | None:
        """What is carried, where it is less than what the patch takes."""
        return self.carried if self.carried < self.patch else None


def _usual(network: Network) -> PrivateMtu:
    """What libvirt gives a network's bridge, and guests assume."""
    mtu = network.mtu or ETHERNET_MTU
    return PrivateMtu(mtu, mtu)


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans over one configuration, one state database, one kernel session."""

    config: Config
    store: Store
    kernel: Kernel

    def upstream(self, network: Network) -> Upstream:
        """The network's upstream, complete.  Raises UpstreamError or ConfigError."""
        upstream = selection.upstream_of(network, self.config)
        if upstream.kind == "host":
            return transit.choose(self.kernel, self.store, network, upstream)
        if upstream.kind == "router":
            return routers.complete(upstream)
        return dhcp.complete(network, upstream) if upstream.by_dhcp else upstream

    # -- what a network has outside ------------------------------------------

    def outside(self, network: Network, upstream: Upstream) -> Outside:
        """What a network has on its completed upstream, by its leases."""
        leased = self.store.leases.of(upstream.name, network.uuid)
        return _outside(network, upstream, leased)

    def in_force(self, network: Network, upstream: Upstream) -> Outside:
        """The same, as far as it is known by now: no stand-ins for what is yet to be leased."""
        return _in_force(self.outside(network, upstream))

    def completed(self, network: Network, upstream: Upstream) -> Network:
        """The network with the prefix that it leases as one more subnet."""
        leased = self.store.leases.of(upstream.name, network.uuid)
        return _completed(network, upstream, leased)

    def lacks(self, network: Network, upstream: Upstream) -> list[str]:
        """What a network should lease from its upstream and does not, in words."""
        leased = self.store.leases.of(upstream.name, network.uuid)
        missing = [
            "address" if family == 4 else "IPv6 address"
            for family in FAMILIES
            if selection.leases_address(network, upstream, family) and leased.of(family) is None
        ]
        if selection.leases_prefix(network, upstream) and leased.prefix is None:
            missing.append("prefix")
        return missing

    # -- plans ---------------------------------------------------------------

    def plan(self, network: Network, upstream: Upstream) -> Plan:
        """What must exist for a network whose bridge is there.

        Raises KernelError where one of its two bridges is not.
        """
        outside, whole = self.in_force(network, upstream), self.completed(network, upstream)
        around = self._surroundings(whole, upstream, outside)
        published = self._published(whole, upstream, outside)
        made = make(whole, upstream, outside, around, published)
        plan = (*made, *self._proxy_beyond(whole, upstream, outside))
        return tuple(self._without_others(each, upstream) for each in plan)

    def _without_others(self, operation: Operation, upstream: Upstream) -> Operation:
        """An operation, with the ndppd that the provider hears cut by what others have."""
        if not isinstance(operation, NeighbourProxy) or not operation.daemon.prefixes:
            return operation
        daemon = operation.daemon
        if upstream.is_transit and not daemon.in_host:
            # It is asked by the host, or the router, alone.
            return operation
        others = {*proxied_addresses.known(daemon.uuid), *self.kernel.host_addresses()}
        spans = tuple(AddressRange(each, each) for each in sorted(others, key=by_family))
        return NeighbourProxy(replace(daemon, without=(*daemon.without, *spans)))

    def _proxy_beyond(self, network: Network, upstream: Upstream, outside: Outside) -> Plan:
        """What answers on the host's, or router's, own link for guests behind a transit bridge."""
        if not has_ipv6(network):
            return ()
        known: set[Address] = set()
        link, prefixes = "", outside.proxied if upstream.is_transit else ()
        if prefixes and upstream.kind == "router":
            link, known = upstream.nic or "", routers.neighbours(upstream)
        elif prefixes and upstream.host6 is not None:
            link = self.kernel.host_link_in(upstream.host6) or ""
            known = self.kernel.host_addresses() | self.kernel.host_gateways(6)
        if not link:
            prefixes = ()
        without = tuple(AddressRange(each, each) for each in sorted(known, key=by_family))
        bridge = upstream.bridge or ""
        daemon = Proxy(network.uuid, upstream.bridge_namespace, link, bridge, prefixes, without)
        # The host and its routers are no guests, although they have addresses like them.
        namespace, here = names.namespace(network.name), names.UPSTREAM_LINK
        beyond = (
            Route(namespace, host_network(each), upstream.gateway6, here)
            for each in sorted(known, key=by_family)
            if any(each in prefix for prefix in prefixes)
        )
        return (*beyond, NeighbourProxy(daemon))

    def plan_ahead(self, network: Network, upstream: Upstream) -> Plan:
        """What of it can be made before libvirt has made the network's bridge."""
        outside, whole = self.in_force(network, upstream), self.completed(network, upstream)
        around = self._surroundings(whole, upstream, outside, ahead=True)
        published = self._published(whole, upstream, outside)
        needs_libvirt = (*withdrawals(whole), private_port(whole))
        plan = make(whole, upstream, outside, around, published)
        return tuple(operation for operation in plan if operation not in needs_libvirt)

    def plan_ahead_of_lease(self, network: Network, upstream: Upstream) -> Plan:
        """What must be there for a DHCP server to be asked.

        Raises KernelError where the upstream's bridge is missing.
        """
        client = leasing(self.store, network, upstream)
        assert client is not None
        mtu = self.kernel.mtu(upstream.bridge or "")
        if mtu is None:
            raise KernelError(f"network {network.name}: bridge {upstream.bridge} is missing")
        return ahead_of_lease(network, upstream, mtu, client)

    def _published(self, network: Network, upstream: Upstream, outside: Outside) -> Published:
        """What the namespace translates; the host's part is in ``host_needs``.

        That of a router is in its own rules.
        """
        found = tuple(
            each
            for each in self.store.claims.forwards(network.uuid)
            if not is_placeholder(each.address)
        )
        if upstream.is_transit:
            # Who routes it has looked at the address, and at the clients that it masquerades.
            found = tuple(_behind_host(each, upstream, outside) for each in found)
        return Published(found, self.store.claims.static_nats(network.uuid))

    def _surroundings(
        self, network: Network, upstream: Upstream, outside: Outside, *, ahead: bool = False
    ) -> Surroundings:
        """``ahead``: libvirt has not made its bridge yet, nor written its files."""
        unknown = ahead and network.taken_over
        private = _usual(network) if ahead else self._private(network)
        out = self._outside_mtu(upstream)
        if private is None or out is None:
            missing = f"bridge {network.bridge}" if private is None else upstream.segment
            raise KernelError(f"network {network.name}: {missing} is missing")
        told = path_mtu(private.carried, min(out, upstream.mtu or out), private.patch)
        return Surroundings(
            private_mtu=private.patch,
            upstream_mtu=out,
            backend=self.backend(),
            dnsmasq=None if unknown else self._daemon(network, upstream, outside, told),
            idle=not unknown and self._has_idle_dnsmasq(network),
            carried=private.limit,
            leasing=leasing(self.store, network, upstream),
        )

    def _private(self, network: Network) -> PrivateMtu | None:
        """What a network's bridge takes now; None where there is no bridge."""
        bridge = network.bridge or ""
        mtu = self.kernel.mtu(bridge)
        if mtu is None:
            return None
        foreign = self.kernel.foreign_mtu(bridge, names.private_patch(network.uuid))
        # The patch must not be what keeps the bridge's MTU small.
        return PrivateMtu(max(mtu, _usual(network).patch), min(mtu, foreign or mtu))

    def _outside_mtu(self, upstream: Upstream) -> int | None:
        """The MTU of the upstream's bridge, in octets; None where it is missing."""
        link = self.kernel.link(upstream.bridge_namespace, upstream.bridge or "")
        return link.mtu if link else None

    @staticmethod
    def _has_idle_dnsmasq(network: Network) -> bool:
        """Whether libvirt's own dnsmasq has lost all that it served."""
        return network.taken_over and network.has_dnsmasq

    def backend(self, *, ipv6: bool = False) -> str:
        """The name of the firewall backend.

        Raises FirewallError where it cannot work, with ``ipv6`` in both families.
        """
        return firewall.choose(self.config.firewall, ipv6=ipv6).name

    def _daemon(
        self, network: Network, upstream: Upstream, outside: Outside, mtu: int | None
    ) -> dnsmasq.Daemon:
        files = self._files(network, upstream, outside, mtu) if network.needs_dnsmasq else None
        namespace = names.namespace(network.name)
        return dnsmasq.Daemon(network.uuid, namespace, network.bridge or "", files)

    def _files(
        self, network: Network, upstream: Upstream, outside: Outside, mtu: int | None
    ) -> dnsmasq_config.Files:
        taken_over = network.taken_over and network.has_dnsmasq
        libvirts = dnsmasq.read_libvirts(network.name) if taken_over else None
        kept = [pair for family in FAMILIES for pair in self._reserved(network, family)]
        servers = resolvers_of(upstream, families_of(outside))
        return dnsmasq_config.make(
            network,
            libvirts,
            servers,
            mtu,
            kept,
            proxied=outside.proxied,
            router6=6 in families_of(outside),
        )

    def _reserved(self, network: Network, family: Family) -> Collection[tuple[str, Address]]:
        """The addresses of guests that DHCP must know, with their MACs."""
        # At least half is left to guests that publish nothing, as long as those that
        # do and run now need no more.
        half = sum(span.size for span in ranges_of(network, family)) // 2
        return self.store.reservations.for_dhcp(network.uuid, half, family).items()

    def preview(self, network: Network) -> Plan:
        """What would be done for a network that need not exist; changes and leases nothing."""
        upstream = self._preview_upstream(network)
        selection.check_addresses(network, upstream)
        leased = self._preview_leases(network, upstream)
        outside, network = (
            _in_force(_outside(network, upstream, leased)),
            _completed(network, upstream, leased),
        )
        # What libvirt will write is not known yet.
        files = dnsmasq_config.Files("") if network.needs_dnsmasq else None
        namespace = names.namespace(network.name)
        daemon = dnsmasq.Daemon(network.uuid, namespace, network.bridge or "", files)
        private = self._private(network) or _usual(network)
        around = Surroundings(
            private.patch,
            self._outside_mtu(upstream) or ETHERNET_MTU,
            self.backend(),
            daemon,
            carried=private.limit,
            leasing=leasing(self.store, network, upstream),
        )
        subnets = tuple(subnet.network for subnet in network.subnets)
        user = User(network.uuid, network.bridge or "", upstream.name, subnets, leased)
        needs = self._needs(user, upstream, [], [])
        shared = (
            *host.plan_of(self.kernel, upstream),
            *host_ipv6.plan_of(self.kernel, needs),
        )
        return (*shared, *make(network, upstream, outside, around))

    def _preview_leases(self, network: Network, upstream: Upstream) -> Leased:
        """What a network leases, or would lease next."""
        leased = self.store.leases.of(upstream.name, network.uuid)
        own = self.kernel.host_addresses()
        for family in FAMILIES:
            if not selection.leases_address(network, upstream, family):
                continue
            if upstream.by_dhcp and family == 4:
                # What a server would lease, only the server knows.
                leased = replace(leased, address=upstream.leased)
                continue
            who = applicants.applicant(network, family)
            if pool.leased(self.store, who, upstream) is None:
                address = pool.next_address(self.store, who, upstream, own)
                if isinstance(address, IPv4Address):
                    leased = replace(leased, address=address)
                else:
                    leased = replace(leased, address6=address)
        if selection.leases_prefix(network, upstream) and leased.prefix is None:
            who = applicants.applicant(network)
            prefix = selection.wanted_prefix(network, upstream)
            found = prefix or pool.next_prefix(self.store, who, upstream, own)
            leased = replace(leased, prefix=found)
        return leased

    def _preview_upstream(self, network: Network) -> Upstream:
        upstream = selection.upstream_of(network, self.config)
        if upstream.by_dhcp:
            return dhcp.complete(network, upstream)
        if upstream.kind == "router":
            return routers.complete(upstream)
        if upstream.kind != "host":
            return upstream
        known = upstream.subnet or self.store.transit.subnet(upstream.name)
        if known is None:
            known = transit.free(self.kernel, network, upstream)[0]
        subnet6 = None
        if transit.needs_ipv6(self.kernel, network):
            subnet6 = self.store.transit.prefix(upstream.name) or transit.free6(network)
        return transit.complete(upstream, known, subnet6)

    def host_needs(self, network: str | None = None) -> dict[str, host.Needs]:
        """What each network that runs or starts, or this one, needs of the host."""
        upstreams = {name: self._transit(each) for name, each in self.config.upstreams.items()}
        forwards: defaultdict[str, list[Forward]] = defaultdict(list)
        statics: defaultdict[str, list[Address]] = defaultdict(list)
        for forward in self.store.claims.forwards(network):
            forwards[forward.network].append(forward)
        for static in self.store.claims.static_nats(network):
            statics[static.network].append(static.address)
        return {
            user.uuid: self._needs(user, upstream, forwards[user.uuid], statics[user.uuid])
            for user in self.store.host.users(network)
            if (upstream := upstreams.get(user.upstream)) is not None
        }

    def _needs(
        self, user: User, upstream: Upstream, forwards: list[Forward], statics: list[Address]
    ) -> host.Needs:
        """What one network needs of the host."""
        needs = host.Needs(private=(Private(user.bridge, user.subnets),))
        leased, bridge = _in_use(user, upstream), upstream.bridge or ""
        if upstream.kind == "host" and upstream.subnet is not None:
            found = [_host_forward(each, upstream, leased) for each in forwards if not each.own]
            routes = _routes(bridge, leased.prefix, leased.address6)
            routes += self._proxied_routes(user, upstream)
            return replace(
                needs,
                transits=(upstream,),
                forwards=tuple(each for each in found if each),
                public=tuple(
                    Provider(bridge, route.destination) for route in routes if route.gateway
                ),
                routes=routes,
                routes6=leased.address6 is not None,
            )
        if upstream.is_transit or not bridge or upstream.attach == "macvlan":
            # No bridge of the host forwards a macvlan's frames: its rules see none.
            return needs
        if upstream.by_dhcp:
            needs = replace(needs, dhcp=(bridge,))
        routes = _routes(bridge, leased.prefix, _own_address(user.uuid))
        if routes and self.kernel.sysctl(None, f"net/ipv6/conf/{bridge}/disable_ipv6") != "0":
            routes = ()
        there = (each for each in (*leased.addresses, *statics) if not is_placeholder(each))
        provider = [Provider(bridge, each) for each in there]
        provider += [Provider(bridge, route.destination, routed=True) for route in routes]
        return replace(needs, provider=tuple(provider), routes=routes, routes6=bool(routes))

    def _proxied_routes(self, user: User, upstream: Upstream) -> tuple[Route, ...]:
        """The host's routes to what a network has of its own subnet."""
        whole, gateway, bridge = upstream.host6, user.leased.address6, upstream.bridge or ""
        if whole is None or gateway is None:
            return ()
        parts: list[IPNetwork] = []
        for subnet in user.subnets:
            if isinstance(subnet, IPv6Network) and subnet.subnet_of(whole):
                # Of the host's own link's route only something longer gets ahead.
                parts += subnet.subnets() if subnet == whole else [subnet]
        found = [Route(None, part, gateway, bridge) for part in parts]
        link = self.kernel.host_link_in(whole) if parts else None
        for router in self.kernel.host_gateways(6) if link else ():
            if link and any(router in part for part in parts):
                found.append(Route(None, host_network(router), None, link))
        return tuple(found)

    def check_proxied(self, network: Network, upstream: Upstream) -> None:
        """Refuse a part of the host's, or router's, own subnet that another network has.

        Raises DocumentError.
        """
        mine = selection.proxied(network, upstream) if upstream.is_transit else ()
        for user in self.store.host.users() if mine else ():
            theirs = self.config.upstreams.get(user.upstream)
            if user.uuid == network.uuid or theirs is None or not theirs.is_transit:
                continue
            for subnet in mine:
                if any(subnet.overlaps(other) for other in user.subnets):
                    raise DocumentError(
                        f"network {network.name}: another network has a part of {subnet}",
                        "give each of them a part of its own",
                    )

    def _transit(self, upstream: Upstream) -> Upstream:
        """The upstream as it is known by now: completed, once its subnet is chosen."""
        if upstream.kind != "host":
            return upstream
        subnet = upstream.subnet or self.store.transit.subnet(upstream.name)
        if subnet is None:
            return upstream
        six = transit.has_ipv6(self.kernel)
        return transit.complete(
            upstream, subnet, self.store.transit.prefix(upstream.name) if six else None
        )


def _in_force(outside: Outside) -> Outside:
    return replace(outside, address=unless_placeholder(outside.address))


def _outside(network: Network, upstream: Upstream, leased: Leased) -> Outside:
    routed = selection.routed(network, upstream)
    if leased.prefix is not None and not routed and selection.leases_prefix(network, upstream):
        routed = (leased.prefix,)
    has = {family: selection.leases_address(network, upstream, family) for family in FAMILIES}
    return Outside(
        leased.address if has[4] else None,
        leased.address6 if has[6] else None,
        routed,
        selection.proxied(network, upstream),
    )


def _completed(network: Network, upstream: Upstream, leased: Leased) -> Network:
    if leased.prefix is None or not selection.leases_prefix(network, upstream):
        return network
    if selection.wanted_prefix(network, upstream) is not None:
        return network
    prefix = leased.prefix
    subnet = Subnet(on_link(prefix[1], prefix.prefixlen))
    return replace(network, subnets=(*network.subnets, subnet))


def families_of(outside: Outside) -> tuple[Family, ...]:
    """The families in which a network gets to the outside."""
    six = outside.address6 is not None or bool(outside.public)
    ways: tuple[tuple[Family, bool], ...] = ((4, outside.address is not None), (6, six))
    return tuple(family for family, way in ways if way)


def _behind_host(forward: Forward, upstream: Upstream, outside: Outside) -> Forward:
    """A forward as the namespace sees it on a transit bridge."""
    family: Family = 4 if forward.target.version == 4 else 6
    address, gateway = outside.of(family), upstream.side(family).gateway
    if forward.own or address is None:
        return forward
    sources = forward.sources
    if sources and gateway is not None:
        sources = (*sources, host_network(gateway))
    return replace(forward, address=address, sources=sources)


def _in_use(user: User, upstream: Upstream) -> Leased:
    """What a network leases and still has a use for."""
    leased = user.leased
    if not any(subnet.version == 6 for subnet in user.subnets):
        return Leased(leased.address)
    prefix = leased.prefix
    if prefix is not None and not any(prefix.subnet_of(each) for each in upstream.prefixes6):
        return replace(leased, prefix=None)
    return leased


def _routes(
    bridge: str, prefix: IPv6Network | None, gateway: IPv6Address | None
) -> tuple[Route, ...]:
    """The host's route to a network's prefix, by its namespace's address on a bridge."""
    if prefix is None or gateway is None:
        return ()
    return (Route(None, prefix, gateway, bridge),)


def _own_address(uuid: str) -> IPv6Address:
    """The link-local address of a network's namespace on its upstream.

    The kernel makes it of the MAC address (RFC 4291, appendix A).
    """
    octets = bytearray.fromhex(names.mac(uuid, "upstream").replace(":", ""))
    octets[0] ^= 2
    return IPv6Address(b"\xfe\x80" + bytes(6) + octets[:3] + b"\xff\xfe" + octets[3:])


def _host_forward(forward: Forward, upstream: Upstream, leased: Leased) -> HostForward | None:
    """The host's part of what a network on a transit bridge publishes."""
    address = leased.address if forward.target.version == 4 else leased.address6
    if address is None:
        return None
    return HostForward(
        forward.proto,
        forward.address if int(forward.address) else None,
        forward.first,
        forward.last,
        address,
        upstream.bridge or "",
        forward.sources,
    )


def resolvers_of(upstream: Upstream, families: Collection[Family]) -> Resolvers:
    """Whom the namespaces on an upstream ask: its own resolvers, else the host's.

    ``families`` are those in which they get there.
    """
    servers = tuple(server for server in upstream.dns if server.version in families)
    return Resolvers(servers) if servers else resolv_conf.host_resolvers(families=families)


def leasing(store: Store, network: Network, upstream: Upstream) -> Leasing | None:
    """Return a network's DHCP client as a part of its plan, if its upstream has one."""
    if not upstream.by_dhcp:
        return None
    client = dhcp.client(network, upstream)
    return Leasing(client, dhcp.requested(store, network, upstream))
