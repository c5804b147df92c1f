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
    selection,
    transit,
)
from libvirt_natns.addresses import Address
from libvirt_natns.errors import KernelError
from libvirt_natns.firewall.host import HostForward, Private, Provider
from libvirt_natns.kernel import Kernel
from libvirt_natns.model import Config, Forward, Network, Upstream
from libvirt_natns.plan import (
    Plan,
    Published,
    Surroundings,
    make,
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
        return upstream

    @property
    def registry(self) -> Registry:
        return Registry(self.store)

    def plan(self, network: Network, upstream: Upstream, address: Address) -> Plan:
        """What must exist for a network whose bridge is there.

        Raises KernelError where one of its two bridges is not.
        """
        around = self._surroundings(network, upstream)
        return make(network, upstream, address, around, self._published(network, upstream, address))

    def plan_ahead(self, network: Network, upstream: Upstream, address: Address) -> Plan:
        """What of it can be made before libvirt has made the network's bridge."""
        around = self._surroundings(network, upstream, ahead=True)
        whole = make(
            network, upstream, address, around, self._published(network, upstream, address)
        )
        needs_libvirt = (*withdrawals(network), private_port(network))
        return tuple(operation for operation in whole if operation not in needs_libvirt)

    def _published(self, network: Network, upstream: Upstream, address: Address) -> Published:
        """What the namespace translates; the host's part is in ``host_needs``."""
        found = self.registry.forwards(network.uuid)
        if upstream.kind == "host":
            # The host has looked at the address, and at the clients that it masquerades.
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
        private = _usual(network) if ahead else self._private(network)
        outside = self.kernel.mtu(upstream.bridge or "")
        if private is None or outside is None:
            missing = f"bridge {network.bridge}" if private is None else upstream.segment
            raise KernelError(f"network {network.name}: {missing} is missing")
        told = path_mtu(private.carried, outside, private.patch)
        return Surroundings(
            private_mtu=private.patch,
            upstream_mtu=outside,
            backend=self.backend(),
            dnsmasq=None if unknown else self._daemon(network, upstream, told),
            idle=not unknown and self._has_idle_dnsmasq(network),
            carried=private.limit,
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
        private = self._private(network) or _usual(network)
        around = Surroundings(
            private.patch,
            self.kernel.mtu(upstream.bridge or "") or ETHERNET_MTU,
            self.backend(),
            daemon,
            carried=private.limit,
        )
        shared = host.plan_of(self.kernel, upstream)
        return (*shared, *make(network, upstream, address, around))

    def _preview_upstream(self, network: Network) -> Upstream:
        upstream = selection.upstream_of(network, self.config)
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
        statics: defaultdict[str, list[Address]] = defaultdict(list)
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
    user: User, upstream: Upstream, forwards: list[Forward], statics: list[Address]
) -> host.Needs:
    """What one network needs of the host."""
    needs = host.Needs(private=(Private(user.bridge, user.subnets),))
    if upstream.kind == "host" and upstream.subnet is not None:
        found = (_host_forward(each, upstream, user.address) for each in forwards if user.address)
        return replace(needs, transits=(upstream,), forwards=tuple(found))
    if upstream.kind == "host" or not (upstream.bridge and user.address):
        return needs
    if upstream.attach == "macvlan":
        # No bridge of the host forwards its frames, so that the host's rules see none.
        return needs
    provider = (Provider(upstream.bridge, each) for each in (user.address, *statics))
    return replace(needs, provider=tuple(provider))


def _host_forward(forward: Forward, upstream: Upstream, address: Address) -> HostForward:
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
