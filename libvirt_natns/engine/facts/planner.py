# SPDX-License-Identifier: LGPL-2.1-or-later
"""The planner: facts are read from configuration, state database and kernel, and make a plan.

The planner changes nothing, except that it chooses a transit subnet at its first use.
"""

from dataclasses import dataclass

from libvirt_natns.addresses import is_placeholder
from libvirt_natns.engine.facts.mtu import private_mtu, upstream_mtu, usual_mtu
from libvirt_natns.engine.facts.proxies import proxy_beyond, without_others
from libvirt_natns.engine.facts.services import client_of, dnsmasq_of, leasing
from libvirt_natns.engine.network_record import present_upstream
from libvirt_natns.engine.network_run import NetworkRun
from libvirt_natns.engine.plan.network_plan import (
    ahead_of_lease,
    claims_part,
    make,
    private_port,
    withdrawals,
)
from libvirt_natns.engine.plan.surroundings import Published, Surroundings, path_mtu
from libvirt_natns.errors import KernelError
from libvirt_natns.firewall import backends
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import DhcpSegment, Segment
from libvirt_natns.model.upstream import Outside, Upstream
from libvirt_natns.operations.operation import Plan
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import segments, selection
from libvirt_natns.values import quoted


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans over one configuration, one state database, one kernel session."""

    config: Config
    store: Store
    kernel: Kernel

    def segment(self, network: Network) -> Segment:
        """Return the segment of the network's upstream.  Raises UpstreamError or ConfigError."""
        return self.complete(network, selection.upstream_of(network, self.config))

    def complete(self, network: Network, upstream: Upstream) -> Segment:
        """Return the segment of a selected upstream, as machine, router or lease have it.

        Raises UpstreamError.
        """
        return segments.of_network(self.kernel, self.store, network, upstream)

    def run(
        self,
        network: Network,
        xml: bytes,
        record: NetworkRecord | None,
        *,
        configured: bool = False,
    ) -> NetworkRun:
        """Return the facts for a verb on a network; its row was just read.

        A network that runs stays on its upstream.  With ``configured``, it follows today's
        configuration.  The caller holds the network's lock, or only looks.  Raises
        UpstreamError or ConfigError.
        """
        present = None if configured else present_upstream(record, network, xml)
        upstream = selection.upstream_of(network, self.config, present)
        segment = self.complete(network, upstream)
        leased = self.store.leases.of(segment.name, network.uuid)
        return NetworkRun(network, xml, record, segment, leased)

    def plan(self, run: NetworkRun) -> Plan:
        """Return the plan of a network.

        Raises KernelError where the private bridge, or the upstream's, is missing.
        """
        whole, segment, outside = run.whole, run.segment, run.in_force
        around = self._surroundings(whole, segment, outside)
        published = self._published(whole, segment, outside)
        made = make(whole, segment, outside, around, published)
        plan = (*made, *proxy_beyond(self.kernel, whole, segment, outside))
        return tuple(without_others(self.kernel, each, segment) for each in plan)

    def plan_ahead(self, run: NetworkRun) -> Plan:
        """Return the part of the plan that does not need the network's bridge."""
        whole, segment, outside = run.whole, run.segment, run.in_force
        around = self._surroundings(whole, segment, outside, ahead=True)
        published = self._published(whole, segment, outside)
        needs_libvirt = (*withdrawals(whole), private_port(whole))
        plan = make(whole, segment, outside, around, published)
        return tuple(operation for operation in plan if operation not in needs_libvirt)

    def plan_claims(self, run: NetworkRun) -> Plan:
        """Return the part of the plan that claims and reservations decide.

        Raises KernelError where the private bridge, or the upstream's, is missing.
        """
        whole, segment, outside = run.whole, run.segment, run.in_force
        around = self._surroundings(whole, segment, outside)
        published = self._published(whole, segment, outside)
        return claims_part(make(whole, segment, outside, around, published), published)

    def plan_ahead_of_lease(self, network: Network, segment: DhcpSegment) -> Plan:
        """Return the plan by which a DHCP server can be asked for an address.

        Raises KernelError where the upstream's bridge is missing.
        """
        mtu = self.kernel.host.links.mtu(segment.bridge)
        if mtu is None:
            raise KernelError(f"network {quoted(network.name)}: bridge {segment.bridge} is missing")
        return ahead_of_lease(network, segment, mtu, client_of(self.store, network, segment))

    def _published(self, network: Network, segment: Segment, outside: Outside) -> Published:
        """Return the forwards and static NAT of the namespace's own rules.

        The host's part of forwards is in ``host_needs``, a router's in the router's rules.
        """
        forwards = tuple(
            segment.inside(each, outside)
            for each in self.store.claims.forwards(network.uuid)
            if not is_placeholder(each.address)
        )
        return Published(forwards, self.store.claims.static_nats(network.uuid))

    def _surroundings(
        self, network: Network, segment: Segment, outside: Outside, *, ahead: bool = False
    ) -> Surroundings:
        """Return the facts about the machine.

        ``ahead``: libvirt has not made its bridge yet, nor written its dnsmasq's files.
        Raises KernelError where a bridge is missing.
        """
        unknown = ahead and network.taken_over
        private = usual_mtu(network) if ahead else private_mtu(self.kernel, network)
        out = upstream_mtu(self.kernel, segment)
        if private is None or out is None:
            missing = f"bridge {network.bridge}" if private is None else segment.in_words
            raise KernelError(f"network {quoted(network.name)}: {missing} is missing")
        guests_mtu = path_mtu(private.carried, segment.carried(out), private.patch)
        return Surroundings(
            private_mtu=private.patch,
            upstream_mtu=out,
            backend=self.backend(),
            dnsmasq=None
            if unknown
            else dnsmasq_of(self.store, self.config, network, segment, outside, guests_mtu),
            idle=not unknown and network.taken_over and network.has_dnsmasq,
            carried=private.limit,
            leasing=leasing(self.store, network, segment),
        )

    def backend(self, *, ipv6: bool = False) -> str:
        """Return the name of the firewall backend.

        Raises FirewallError where the backend cannot work, with ``ipv6`` in both families.
        """
        return backends.choose(self.config.firewall, ipv6=ipv6).name
