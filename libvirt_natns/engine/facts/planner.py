# SPDX-License-Identifier: LGPL-2.1-or-later
"""The planner: facts are read from configuration, state database and kernel, and make a plan.

The planner changes nothing, except that it chooses a transit subnet at its first use.
"""

from libvirt_natns.addresses import FAMILIES, is_placeholder
from libvirt_natns.engine.facts.mtu import private_mtu, upstream_mtu, usual_mtu
from libvirt_natns.engine.facts.outside import behind_host, completed_by, in_force, outside_of
from libvirt_natns.engine.facts.proxies import proxy_beyond, without_others
from libvirt_natns.engine.facts.services import dnsmasq_of, leasing
from libvirt_natns.engine.operations.operation import Plan
from libvirt_natns.engine.plan.network import ahead_of_lease, make, private_port, withdrawals
from libvirt_natns.engine.plan.surroundings import Published, Surroundings, path_mtu
from libvirt_natns.errors import KernelError
from libvirt_natns.firewall import backends
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.network import Network
from libvirt_natns.model.upstream import Outside, Upstream
from libvirt_natns.records import dataclass
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import dhcp, routers, selection, transit


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans over one configuration, one state database, one kernel session."""

    config: Config
    store: Store
    kernel: Kernel

    def upstream(self, network: Network) -> Upstream:
        """Return the network's upstream, complete.  Raises UpstreamError or ConfigError."""
        upstream = selection.upstream_of(network, self.config)
        if upstream.kind == "host":
            return transit.choose(self.kernel, self.store, network, upstream)
        if upstream.kind == "router":
            return routers.complete(upstream)
        return dhcp.complete(network, upstream) if upstream.by_dhcp else upstream

    def outside(self, network: Network, upstream: Upstream) -> Outside:
        """Return a network's addresses on its completed upstream, by its leases."""
        leased = self.store.leases.of(upstream.name, network.uuid)
        return outside_of(network, upstream, leased)

    def in_force(self, network: Network, upstream: Upstream) -> Outside:
        """Return a network's addresses on its upstream, without placeholder addresses."""
        return in_force(self.outside(network, upstream))

    def completed(self, network: Network, upstream: Upstream) -> Network:
        """Return the network with its leased prefix as one more subnet."""
        leased = self.store.leases.of(upstream.name, network.uuid)
        return completed_by(network, upstream, leased)

    def lacks(self, network: Network, upstream: Upstream) -> list[str]:
        """Return the leases that a network lacks, in words."""
        leased = self.store.leases.of(upstream.name, network.uuid)
        missing = [
            "address" if family == 4 else "IPv6 address"
            for family in FAMILIES
            if selection.leases_address(network, upstream, family) and leased.of(family) is None
        ]
        if selection.leases_prefix(network, upstream) and leased.prefix is None:
            missing.append("prefix")
        return missing

    def plan(self, network: Network, upstream: Upstream) -> Plan:
        """Return the plan of a network.

        Raises KernelError where the private bridge, or the upstream's, is missing.
        """
        outside, whole = self.in_force(network, upstream), self.completed(network, upstream)
        around = self._surroundings(whole, upstream, outside)
        published = self._published(whole, upstream, outside)
        made = make(whole, upstream, outside, around, published)
        plan = (*made, *proxy_beyond(self.kernel, whole, upstream, outside))
        return tuple(without_others(self.kernel, each, upstream) for each in plan)

    def plan_ahead(self, network: Network, upstream: Upstream) -> Plan:
        """Return the part of the plan that does not need the network's bridge."""
        outside, whole = self.in_force(network, upstream), self.completed(network, upstream)
        around = self._surroundings(whole, upstream, outside, ahead=True)
        published = self._published(whole, upstream, outside)
        needs_libvirt = (*withdrawals(whole), private_port(whole))
        plan = make(whole, upstream, outside, around, published)
        return tuple(operation for operation in plan if operation not in needs_libvirt)

    def plan_ahead_of_lease(self, network: Network, upstream: Upstream) -> Plan:
        """Return the plan by which a DHCP server can be asked for an address.

        Raises KernelError where the upstream's bridge is missing.
        """
        client = leasing(self.store, network, upstream)
        assert client is not None
        mtu = self.kernel.host.links.mtu(upstream.bridge or "")
        if mtu is None:
            raise KernelError(f"network {network.name}: bridge {upstream.bridge} is missing")
        return ahead_of_lease(network, upstream, mtu, client)

    def _published(self, network: Network, upstream: Upstream, outside: Outside) -> Published:
        """Return the forwards and static NAT of the namespace's own rules.

        The host's part of forwards is in ``host_needs``, a router's in the router's rules.
        """
        forwards = tuple(
            each
            for each in self.store.claims.forwards(network.uuid)
            if not is_placeholder(each.address)
        )
        if upstream.is_transit:
            # The host, or router, has matched the address, and masquerades some clients.
            forwards = tuple(behind_host(each, upstream, outside) for each in forwards)
        return Published(forwards, self.store.claims.static_nats(network.uuid))

    def _surroundings(
        self, network: Network, upstream: Upstream, outside: Outside, *, ahead: bool = False
    ) -> Surroundings:
        """Return the facts about the machine.

        ``ahead``: libvirt has not made its bridge yet, nor written its dnsmasq's files.
        Raises KernelError where a bridge is missing.
        """
        unknown = ahead and network.taken_over
        private = usual_mtu(network) if ahead else private_mtu(self.kernel, network)
        out = upstream_mtu(self.kernel, upstream)
        if private is None or out is None:
            missing = f"bridge {network.bridge}" if private is None else upstream.segment
            raise KernelError(f"network {network.name}: {missing} is missing")
        guests_mtu = path_mtu(private.carried, min(out, upstream.mtu or out), private.patch)
        return Surroundings(
            private_mtu=private.patch,
            upstream_mtu=out,
            backend=self.backend(),
            dnsmasq=None
            if unknown
            else dnsmasq_of(self.store, network, upstream, outside, guests_mtu),
            idle=not unknown and network.taken_over and network.has_dnsmasq,
            carried=private.limit,
            leasing=leasing(self.store, network, upstream),
        )

    def backend(self, *, ipv6: bool = False) -> str:
        """Return the name of the firewall backend.

        Raises FirewallError where the backend cannot work, with ``ipv6`` in both families.
        """
        return backends.choose(self.config.firewall, ipv6=ipv6).name
