# SPDX-License-Identifier: LGPL-2.1-or-later
"""The part of the host that networks share: transit bridges, forwarding, a few rules.

The host has only the parts that running networks need, and the last network removes them.
Each part is noted in a file of the run-time directory before it is made.  So the next
process after a kill knows what to remove.

Forwarding is switched on for the links concerned, not for the whole host.  Rules let those
links forward for a transit bridge alone.  An administrator, or another program, may have
switched forwarding on for all links.  The global value shows that, and forwarding is left
as it is then.  In IPv6 there is only the global value (``ipv6_forwarding``).

Networks come and go one by one, and there may be a thousand.  ``ensure`` compares
everything.  ``adjust`` adds and removes the part of one network, as long as nothing else
differs from the last ``ensure``.  The state database has the part of each network, and the
rules' fingerprint shows whether the rules are still those.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from libvirt_natns import names
from libvirt_natns.engine.host import ipv6_forwarding as host_ipv6
from libvirt_natns.engine.host import stops, unneeded
from libvirt_natns.engine.host.forwarding import plan_of
from libvirt_natns.engine.host.needs import Needs, together
from libvirt_natns.engine.host.notes import note_ipv6, note_transit
from libvirt_natns.engine.host.policy import (
    complete_policy,
    facts,
    part_of,
)
from libvirt_natns.engine.host.record import (
    HostRecord,
    assign_zones,
    load,
    note_way_out,
    save,
)
from libvirt_natns.engine.host.stops import HostStops
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import (
    foreign_chains,
    host_parts,
    missed_flows,
    nfnetlink,
    nft,
    nftables,
    zones,
)
from libvirt_natns.firewall import host_firewall as rules
from libvirt_natns.firewall.host_parts import HostPart
from libvirt_natns.firewall.host_rules import dnats
from libvirt_natns.kernel.defer import Later, at_once
from libvirt_natns.kernel.locks import locked
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations.carry_out import carry_out, plan_differences
from libvirt_natns.operations.operation import Plan, Step
from libvirt_natns.operations.undo import Undo
from libvirt_natns.state.store import Store

LOADED = "loaded"
LEFT_RULES = "firewall rules are left over"


@dataclass(frozen=True, slots=True)
class Host:
    """The shared part of the host.

    ``needs_of`` returns the needs of all networks, or of the named one, by network.
    ``backend`` names the firewall's backend.  ``before`` is called ahead of each change.
    ``later`` waits for a DNS relay that is started.
    """

    kernel: Kernel
    store: Store
    needs_of: Callable[[str | None], Mapping[str, Needs]]
    backend: Callable[[], str]
    before: Step | None = None
    later: Later = at_once

    def is_adjusted(self, network: str) -> bool:
        """True if the host needs nothing for a network, and has nothing for it.

        Most networks are like that.  Where bridged frames do not meet the host's rules, a
        network on an existing bridge needs nothing of the host.
        """
        record = load()
        if record != HostRecord() and not record.seen:
            return False
        needs = self.needs_of(network).get(network, Needs())
        return part_of(self.kernel, needs, record) == HostPart() and not self.store.host.part(
            network
        )

    def leave(self) -> None:
        """Remove the run-time directory, if nothing is in it any more."""
        with suppress(OSError):
            if any(names.RUN_DIRECTORY.iterdir()):
                return
            with locked(names.RUN_DIRECTORY):
                names.RUN_DIRECTORY.rmdir()

    def adjust(self, network: str) -> list[str]:
        """Make the host as one network needs it, and return what differed.

        Compares everything where more than that network has changed.
        Raises KernelError or FirewallError.
        """
        with self._alone():
            try:
                changes = self._adjust(network, load())
            except FirewallError:
                changes = None
            return self._ensure() if changes is None else changes

    def _adjust(self, network: str, record: HostRecord) -> list[str] | None:
        """Bring one network's part to the host; return None if that does not suffice."""
        needs = self.needs_of(network).get(network, Needs())
        assign_zones(needs, record)
        old = host_parts.load(self.store.host.part(network))
        new = part_of(self.kernel, needs, record)
        counts = Counter(record.counts)
        counts.update(new.counts())
        counts.subtract(old.counts())
        script = host_parts.script(old, new, record.parents)
        same = {key for key, count in counts.items() if count > 0} == set(record.counts)
        if script is None or not same or not record.seen or record.seen != host_parts.seen():
            return None
        seen = record.seen
        plans = self._noted(needs, record)
        if facts(self.kernel, needs, record) != record.ways:
            # The rules come first, or for a moment more would be forwarded.
            return None
        lines = self._carry_out(plans)
        stray = [each for each in old.routes if each not in new.routes]
        unneeded.remove_routes(self.kernel, stray, record, self._announce)
        if old != new:
            record.seen = ""
            save(record)
            if script:
                self._announce("load the host's rules")
                nft.load(None, script)
                missed_flows.end(None, dnats(needs.forwards))
            self.store.host.put_part(network, host_parts.dump(new))
            record.counts = dict(counts)
        if not record.seen:
            record.seen = seen
            save(record)
        return lines

    def ensure(self) -> list[str]:
        """Make the host as the networks need it, and no more; return what differed.

        The needs are read under the host's lock.  Of two networks that end at once, the
        second one sees so that it is the last.  Raises KernelError or FirewallError.
        """
        with self._alone():
            return self._ensure()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the host's lock, trust nothing that was read before, and note a way out."""
        with locked(names.RUN_DIRECTORY):
            self.kernel.distrust()
            yield
            note_way_out()

    def _ensure(self) -> list[str]:
        parts = self.needs_of(None)
        needs = together(parts.values())
        record = load()
        before = asdict(record)
        record.seen = record.zones_of = ""
        record.zones = zones.assigned({each.bridge for each in needs.private}, record.zones)
        plans = self._noted(needs, record)
        lines = unneeded.remove(self.kernel, needs, record, self._announce)
        record.ways = facts(self.kernel, needs, record)
        # The rules limit the forwarding, so they come ahead of it.
        lines += self._ensure_rules(needs, record)
        lines += self._carry_out(plans)
        self._note_parts(parts, record)
        if asdict(record) != before:
            save(record)
        with suppress(OSError):
            # Only the last network finds the directory empty.
            names.RUN_DIRECTORY.rmdir()
        return lines

    def _note_parts(self, all_needs: Mapping[str, Needs], record: HostRecord) -> None:
        """Write down the part that the host has for each network now."""
        parts = {uuid: part_of(self.kernel, needs, record) for uuid, needs in all_needs.items()}
        self.store.host.put_parts({uuid: host_parts.dump(part) for uuid, part in parts.items()})
        counts: Counter[str] = Counter()
        for part in parts.values():
            counts.update(part.counts())
        there = bool(record.bridges or record.policy or record.routes or record.settings)
        if not there:
            record.zones = {}
        record.counts = dict(counts) if there else {}
        record.parents = nfnetlink.parents(foreign_chains.CHAIN) if there else []
        record.seen = host_parts.seen() if there and self.backend() == nftables.name else ""

    def differences(self) -> list[str]:
        """Return how the host differs from the networks' needs, in words."""
        needs = together(self.needs_of(None).values())
        lines = []
        for segment in needs.transits:
            lines += plan_differences(self.kernel, plan_of(self.kernel, segment, needs.private))
        lines += plan_differences(self.kernel, host_ipv6.plan_of(self.kernel, needs))
        record = load()
        lines += unneeded.differences(needs, record)
        policy = complete_policy(self.kernel, self.backend, needs, record)
        if not policy.is_empty:
            lines += rules.differences(policy, self.backend())
        elif record.policy:
            lines.append(LEFT_RULES)
        return lines

    def stops(self) -> HostStops:
        """Return the chains of others that stop networks.  Raises FirewallError."""
        return stops.look(self.kernel, self.needs_of(None))

    def _noted(self, needs: Needs, record: HostRecord) -> list[Plan]:
        """Return the plans beside the rules, after a note of all that will change."""
        plans = [plan_of(self.kernel, each, needs.private) for each in needs.transits]
        for operations in plans:
            note_transit(self.kernel, operations, record)
        operations = host_ipv6.plan_of(self.kernel, needs)
        note_ipv6(self.kernel, operations, record)
        return [*plans, operations]

    def _carry_out(self, plans: Iterable[Plan]) -> list[str]:
        # No operation is undone.  The next call finds the parts of a failed start noted, and not
        # needed.
        return [
            line
            for operations in plans
            for line in carry_out(self.kernel, operations, Undo(), self.before, later=self.later)
        ]

    def _announce(self, what: str) -> None:
        if self.before is not None:
            self.before(what)

    def _ensure_rules(self, needs: Needs, record: HostRecord) -> list[str]:
        policy = complete_policy(self.kernel, self.backend, needs, record)
        if policy.is_empty:
            return self._remove_rules(record)

        def announce() -> None:
            self._announce("load the host's rules")
            record.policy = LOADED
            save(record)

        return list(rules.ensure(policy, self.backend(), announce))

    def _remove_rules(self, record: HostRecord) -> list[str]:
        if not record.policy:
            return []
        self._announce("remove the host's rules")
        rules.remove()
        record.policy = ""
        return [LEFT_RULES]
