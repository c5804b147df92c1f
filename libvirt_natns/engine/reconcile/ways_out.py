# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether routes lead guests' packets out, and whether the provider's gateways answer.

A route is looked up as a guest's packet would find it, and not presumed.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from errno import ENETUNREACH

from libvirt_natns import names
from libvirt_natns.addresses import Address, Family
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine.context import Context
from libvirt_natns.engine.facts.outside import families_of
from libvirt_natns.engine.host import record as host_record
from libvirt_natns.engine.network_run import NetworkRun
from libvirt_natns.errors import NatnsError
from libvirt_natns.firewall.sample_packets import OUTSIDE
from libvirt_natns.kernel.route_lookup import NextHop, NoRouteError
from libvirt_natns.model.segment import Segment
from libvirt_natns.model.transit_segment import TransitSegment
from libvirt_natns.state.leases import Leased
from libvirt_natns.state.networks import NetworkRecord

NO_WAY_OUT = "no way out"


def closed(context: Context, records: Iterable[NetworkRecord]) -> dict[str, tuple[str, ...]]:
    """Return the reasons why guests of each network get no packet out, by uuid.

    The parts that each network has for itself are compared with its plan.  A network that
    cannot be examined has a difference, which says why.
    """
    look = _Look(context)
    return {record.uuid: look.at(record) for record in records}


@dataclass(frozen=True, slots=True)
class _Look:
    """A look at the ways out, as the kernel has them now.

    ``runs`` has one network of each upstream: its XML is parsed for all of them.
    ``answers`` tells which gateways answer, by namespace.
    """

    context: Context
    runs: dict[tuple[str, frozenset[int]], NetworkRun] = field(default_factory=dict)
    answers: dict[tuple[str, Address], bool] = field(default_factory=dict)

    def at(self, record: NetworkRecord) -> tuple[str, ...]:
        """Return the reasons why guests of a network do not get outside."""
        try:
            # A socket that stays open would keep a namespace alive.
            with self.context.kernel.work():
                run = self._like(record)
                if run.lacks:
                    return ()
                return tuple(
                    self._routed(run.segment, families_of(run.in_force), record)
                    if isinstance(run.segment, TransitSegment)
                    else self._attached(run)
                )
        except NatnsError:
            return ()

    def _like(self, record: NetworkRecord) -> NetworkRun:
        """Return the facts of a network with the upstream and the families of this one."""
        alike = (record.upstream, frozenset(subnet.version for subnet in record.subnets))
        if alike not in self.runs:
            network = libvirt_xml.parse_network(record.document)
            self.runs[alike] = self.context.planner.run(network, record.document, record)
        return self.runs[alike]

    def _routed(
        self, segment: TransitSegment, families: tuple[Family, ...], record: NetworkRecord
    ) -> list[str]:
        """Look at the way through the host, or through a router."""
        leased = self.context.store.leases.of(segment.name, record.uuid)
        blocked = {family: self._forwarded(segment, family, leased) for family in families}
        reasons = [reason for reason in blocked.values() if reason]
        if len(reasons) == len(blocked):
            return [] if self._is_lab(segment, families) else reasons
        # A host without IPv6 outside is in order: its guests have what it has itself.
        return [
            reason
            for family, reason in blocked.items()
            if reason and not self._own_error(segment, family)
        ]

    def _forwarded(self, segment: TransitSegment, family: Family, leased: Leased) -> str:
        """Return why packets from a transit bridge do not get out, or ""."""
        lookup = self.context.kernel.at(segment.namespace).route_lookup
        # The source decides in rules of the host's, such as "from 198.19.252.2 lookup 100".
        source = leased.of(family)
        try:
            hop = lookup.next_hop(OUTSIDE[family], source=source, inward=segment.bridge)
        except NoRouteError as error:
            where = f"router {segment.namespace}" if segment.namespace else "the host"
            origin = f" from {source}" if source else ""
            return (
                f"{NO_WAY_OUT}: {where} forwards no IPv{family} from {segment.bridge} to the"
                f" outside ({error.fact}): see ip route get {OUTSIDE[family]}{origin}"
                f" iif {segment.bridge}"
            )
        return self._silent(segment, segment.namespace, hop) if segment.namespace else ""

    def _own_error(self, segment: TransitSegment, family: Family) -> int:
        """Return why packets of the host's own, or of the router's, get nowhere; 0 if they do."""
        try:
            self.context.kernel.at(segment.namespace).route_lookup.next_hop(OUTSIDE[family])
        except NoRouteError as error:
            return error.number
        return 0

    def _is_lab(self, segment: TransitSegment, families: tuple[Family, ...]) -> bool:
        """True if the host has had no way out since networks run, and refuses none.

        Then its guests reach all that it reaches itself.  A host that has lost its way out
        is no lab, nor is a host with a route that refuses to lead outside.
        """
        if segment.namespace or host_record.had_way_out():
            return False
        return all(self._own_error(segment, family) == ENETUNREACH for family in families)

    def _attached(self, run: NetworkRun) -> list[str]:
        """Look at the way from a namespace to the provider's gateways."""
        lookup = self.context.kernel.at(run.namespace).route_lookup
        reasons = []
        for family in families_of(run.in_force):
            # The plan has the route where the upstream has a gateway.
            with suppress(NoRouteError):
                hop = lookup.next_hop(OUTSIDE[family])
                reasons.append(self._silent(run.segment, run.namespace, hop))
        return [reason for reason in reasons if reason]

    def _silent(self, segment: Segment, namespace: str, hop: NextHop) -> str:
        """Return that a gateway does not answer, or ""."""
        if hop.gateway is None:
            return ""
        asked = (namespace, hop.gateway)
        if asked not in self.answers:
            lookup = self.context.kernel.at(namespace).route_lookup
            self.answers[asked] = lookup.answers(hop.gateway, hop.link)
        if self.answers[asked]:
            return ""
        return (
            f"{NO_WAY_OUT}: gateway {hop.gateway} of upstream {segment.name} does not answer on"
            f" {segment.in_words}: check the provider, or the gateway in {names.CONFIG_FILE}"
        )
