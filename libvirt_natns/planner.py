# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a network to its plan: what the plan must know, looked up on this machine.

Reads the configuration, the state database and the kernel; changes nothing,
but for a transit subnet, which is chosen when it is first needed.
"""

from collections import defaultdict
from ipaddress import IPv4Address, IPv4Network

from libvirt_natns import (
    dnsmasq,
    dnsmasq_config,
    firewall,
    host,
    names,
    pool,
    resolvers,
    routers,
    selection,
    transit,
)
from libvirt_natns.errors import KernelError
from libvirt_natns.firewall.host import HostForward, Private, Provider
from libvirt_natns.kernel import Kernel
from libvirt_natns.model import Config, Forward, Network, Upstream
from libvirt_natns.plan import (
    Plan,
    Published,
    Surroundings,
    make,
    outer,
    path_mtu,
    private_port,
    withdrawals,
)
from libvirt_natns.records import dataclass, replace
from libvirt_natns.registry import Registry
from libvirt_natns.resolvers import Resolvers
from libvirt_natns.store import Store, User

ETHERNET_MTU = 1500


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
        return routers.complete(upstream) if upstream.kind == "router" else upstream

    @property
    def registry(self) -> Registry:
        return Registry(self.store)

    def plan(self, network: Network, upstream: Upstream, address: IPv4Address) -> Plan:
        """What must exist for a network whose bridge is there.

        Raises KernelError where one of its two bridges is not.
        """
        around = self._surroundings(network, upstream)
        return make(network, upstream, address, around, self._published(network, upstream, address))

    def plan_ahead(self, network: Network, upstream: Upstream, address: IPv4Address) -> Plan:
        """What of it can be made before libvirt has made the network's bridge."""
        around = self._surroundings(network, upstream, ahead=True)
        whole = make(
            network, upstream, address, around, self._published(network, upstream, address)
        )
        needs_libvirt = (*withdrawals(network), private_port(network))
        return tuple(operation for operation in whole if operation not in needs_libvirt)

    def _published(self, network: Network, upstream: Upstream, address: IPv4Address) -> Published:
        """What the namespace translates; the host's part is in ``host_needs``.

        That of a router is in its own rules.
        """
        found = self.registry.forwards(network.uuid)
        if upstream.is_transit:
            # Who routes it has looked at the address, and at the clients that it masquerades.
            gateway = IPv4Network(upstream.gateway or address)
            found = tuple(
                replace(
                    each,
                    address=address,
                    sources=(*each.sources, gateway) if each.sources else (),
                )
                for each in found
            )
        return Published(found, self.registry.static_nats(network.uuid))

    def _surroundings(
        self, network: Network, upstream: Upstream, *, ahead: bool = False
    ) -> Surroundings:
        """``ahead``: libvirt has not made its bridge yet, nor written its files."""
        unknown = ahead and network.taken_over
        private = network.mtu or ETHERNET_MTU if ahead else self.kernel.mtu(network.bridge or "")
        outside = self._outside_mtu(upstream)
        if private is None or outside is None:
            missing = network.bridge if private is None else upstream.bridge
            raise KernelError(f"network {network.name}: bridge {missing} is missing")
        return Surroundings(
            private_mtu=private,
            upstream_mtu=outside,
            backend=self.backend(),
            dnsmasq=None
            if unknown
            else self._daemon(network, upstream, path_mtu(private, outside)),
            idle=not unknown and self._has_idle_dnsmasq(network),
        )

    def _outside_mtu(self, upstream: Upstream) -> int | None:
        """The MTU of the upstream's bridge, in octets; None where it is missing."""
        link = self.kernel.link(outer(upstream), upstream.bridge or "")
        return link.mtu if link else None

    @staticmethod
    def _has_idle_dnsmasq(network: Network) -> bool:
        """Whether libvirt's own dnsmasq has lost all that it served."""
        if not (network.taken_over and network.has_dnsmasq):
            return False
        return not dnsmasq_config.has_dhcpv6(dnsmasq.read_libvirts(network.name).configuration)

    def backend(self) -> str:
        """The name of the firewall backend.  Raises FirewallError where it cannot work."""
        return firewall.choose(self.config.firewall).name

    def _daemon(self, network: Network, upstream: Upstream, mtu: int | None) -> dnsmasq.Daemon:
        files = self._files(network, upstream, mtu) if network.has_dnsmasq else None
        namespace = names.namespace(network.name)
        return dnsmasq.Daemon(network.uuid, namespace, network.bridge or "", files)

    def _files(self, network: Network, upstream: Upstream, mtu: int | None) -> dnsmasq_config.Files:
        libvirts = dnsmasq.read_libvirts(network.name) if network.taken_over else None
        # At least half is left to guests that publish nothing, as long as those that
        # do and run now need no more.
        half = sum(span.size for subnet in network.subnets for span in subnet.ranges) // 2
        kept = self.registry.reservations_known(network.uuid, half)
        return dnsmasq_config.make(network, libvirts, resolvers_of(upstream), mtu, kept)

    def preview(self, network: Network) -> Plan:
        """What would be done for a network that need not exist; changes and leases nothing."""
        upstream = self._preview_upstream(network)
        selection.check_addresses(network, upstream)
        address = self.store.lease(upstream.name, network.uuid) or pool.next_address(
            self.store, selection.applicant(network), upstream, self.kernel.host_addresses()
        )
        # What libvirt will write is not known yet.
        files = dnsmasq_config.Files("") if network.has_dnsmasq else None
        namespace = names.namespace(network.name)
        daemon = dnsmasq.Daemon(network.uuid, namespace, network.bridge or "", files)
        around = Surroundings(
            self.kernel.mtu(network.bridge or "") or network.mtu or ETHERNET_MTU,
            self._outside_mtu(upstream) or ETHERNET_MTU,
            self.backend(),
            daemon,
        )
        shared = host.plan_of(self.kernel, upstream)
        return (*shared, *make(network, upstream, address, around))

    def _preview_upstream(self, network: Network) -> Upstream:
        upstream = selection.upstream_of(network, self.config)
        if upstream.kind == "router":
            return routers.complete(upstream)
        if upstream.kind != "host":
            return upstream
        known = upstream.subnet or self.store.transit(upstream.name)
        if known is None:
            known = transit.free(self.kernel, network, upstream)[0]
        return transit.complete(upstream, known)

    def host_needs(self, network: str | None = None) -> dict[str, host.Needs]:
        """What each network that runs or starts, or this one, needs of the host."""
        upstreams = {name: self._transit(each) for name, each in self.config.upstreams.items()}
        forwards: defaultdict[str, list[Forward]] = defaultdict(list)
        statics: defaultdict[str, list[IPv4Address]] = defaultdict(list)
        for forward in self.registry.forwards(network):
            forwards[forward.network].append(forward)
        for static in self.registry.static_nats(network):
            statics[static.network].append(static.address)
        return {
            user.uuid: _needs(user, upstream, forwards[user.uuid], statics[user.uuid])
            for user in self.store.users(network)
            if (upstream := upstreams.get(user.upstream)) is not None
        }

    def _transit(self, upstream: Upstream) -> Upstream:
        """The upstream as it is known by now: completed, once its subnet is chosen."""
        if upstream.kind != "host":
            return upstream
        subnet = upstream.subnet or self.store.transit(upstream.name)
        return upstream if subnet is None else transit.complete(upstream, subnet)


def _needs(
    user: User, upstream: Upstream, forwards: list[Forward], statics: list[IPv4Address]
) -> host.Needs:
    """What one network needs of the host."""
    needs = host.Needs(private=(Private(user.bridge, user.subnets),))
    if upstream.kind == "host" and upstream.subnet is not None:
        found = (_host_forward(each, upstream, user.address) for each in forwards if user.address)
        return replace(needs, transits=(upstream,), forwards=tuple(found))
    if upstream.is_transit or not (upstream.bridge and user.address):
        return needs
    provider = (Provider(upstream.bridge, each) for each in (user.address, *statics))
    return replace(needs, provider=tuple(provider))


def _host_forward(forward: Forward, upstream: Upstream, address: IPv4Address) -> HostForward:
    """The host's part of what a network on a transit bridge publishes."""
    return HostForward(
        forward.proto,
        forward.address if int(forward.address) else None,
        forward.first,
        forward.last,
        address,
        upstream.bridge or "",
        forward.sources,
    )


def resolvers_of(upstream: Upstream) -> Resolvers:
    """Whom the namespaces on an upstream ask: its own resolvers, else the host's."""
    servers = tuple(server for server in upstream.dns if isinstance(server, IPv4Address))
    return Resolvers(servers) if servers else resolvers.host_resolvers()
