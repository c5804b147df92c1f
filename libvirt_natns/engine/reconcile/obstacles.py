# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reasons why guests do not get out, although all of our own parts are in order.

An obstacle belongs to the host or to the provider, so no repair removes it.  It is looked up
as a guest's packet would find it, and not presumed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address

from libvirt_natns import names
from libvirt_natns.addresses import Address, Family
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine.context import Context
from libvirt_natns.engine.facts.outside import families_of
from libvirt_natns.engine.network_run import NetworkRun
from libvirt_natns.errors import NatnsError
from libvirt_natns.kernel.route_lookup import NextHop, NoRouteError
from libvirt_natns.model.transit_segment import TransitSegment
from libvirt_natns.state.networks import NetworkRecord

FAR: dict[Family, Address] = {
    4: ip_address("198.41.0.4"),
    6: ip_address("2001:503:ba3e::2:30"),
}
"""Addresses far outside: a root server of the DNS. A route is looked up, and nothing is sent."""

NO_WAY_OUT = "no way out"


Obstacles = tuple[str, ...]
"""The reasons why guests do not get outside, in words; empty if they do."""


def by_network(context: Context, records: Iterable[NetworkRecord]) -> dict[str, Obstacles]:
    """Return the obstacles of each network, by uuid.

    Networks of one upstream leave in the same way, so one of them is looked at: the parts
    that each has for itself are compared with its plan.  A network that cannot be examined
    has a difference, which says why.
    """
    look = _Look(context)
    found: dict[tuple[str, frozenset[int]], Obstacles] = {}
    obstacles = {}
    for record in records:
        way = (record.upstream, frozenset(subnet.version for subnet in record.subnets))
        if way not in found:
            found[way] = look.at(record)
        obstacles[record.uuid] = found[way]
    return obstacles


@dataclass(frozen=True, slots=True)
class _Look:
    """A look at the ways out, as the kernel has them now."""

    context: Context

    def at(self, record: NetworkRecord) -> Obstacles:
        """Return what keeps the guests of a network that is up from the outside."""
        try:
            network = libvirt_xml.parse_network(record.document)
            # A socket that stays open would keep a namespace alive.
            with self.context.kernel.work():
                run = self.context.planner.run(network, record.document, record)
                return () if run.lacks else tuple(self._ways(run))
        except NatnsError:
            return ()

    def _ways(self, run: NetworkRun) -> list[str]:
        """Return why no family, or not each family of the host, leads out."""
        blocked = {family: self._blocked(run, family) for family in families_of(run.in_force)}
        reasons = [reason for reason in blocked.values() if reason]
        if isinstance(run.segment, TransitSegment) and len(reasons) < len(blocked):
            # A host without IPv6 outside is in order: its guests have what it has itself.
            reasons = [
                reason
                for family, reason in blocked.items()
                if reason and self._has_own_way(run.segment, family)
            ]
        return [f"{NO_WAY_OUT}: {reason}" for reason in reasons]

    def _blocked(self, run: NetworkRun, family: Family) -> str:
        """Return why guests' packets of a family do not get out, or ""."""
        if isinstance(run.segment, TransitSegment):
            return self._routed(run, run.segment, family)
        return self._attached(run, family)

    def _routed(self, run: NetworkRun, segment: TransitSegment, family: Family) -> str:
        """Look at the way through the host, or through a router."""
        view = self.context.kernel.at(segment.namespace)
        source = run.in_force.of(family)
        try:
            hop = view.route_lookup.next_hop(FAR[family], source=source, inward=segment.bridge)
        except NoRouteError as error:
            where = f"router {segment.namespace}" if segment.namespace else "the host"
            origin = f" from {source}" if source else ""
            return (
                f"{where} forwards no IPv{family} from {segment.bridge} to the outside"
                f" ({error.fact}): see ip route get {FAR[family]}{origin} iif {segment.bridge}"
            )
        if segment.namespace is None:
            return ""
        return self._silent(run, segment.namespace, hop)

    def _has_own_way(self, segment: TransitSegment, family: Family) -> bool:
        """True if packets of the host's own, or of the router's, get out."""
        try:
            self.context.kernel.at(segment.namespace).route_lookup.next_hop(FAR[family])
        except NoRouteError:
            return False
        return True

    def _attached(self, run: NetworkRun, family: Family) -> str:
        """Look at the way from the namespace to the provider's gateway."""
        try:
            hop = self.context.kernel.at(run.namespace).route_lookup.next_hop(FAR[family])
        except NoRouteError:
            # The plan has the route where the upstream has a gateway.
            return ""
        return self._silent(run, run.namespace, hop)

    def _silent(self, run: NetworkRun, namespace: str, hop: NextHop) -> str:
        """Return that the gateway does not answer, or ""."""
        if hop.gateway is None:
            return ""
        if self.context.kernel.at(namespace).route_lookup.answers(hop.gateway, hop.link):
            return ""
        return (
            f"gateway {hop.gateway} of upstream {run.segment.name} does not answer on"
            f" {run.segment.in_words}: check the provider, or the gateway in {names.CONFIG_FILE}"
        )
