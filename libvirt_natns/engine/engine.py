# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs: prepare, build, up, refresh, down.

Each converges on what the recorded network needs and can be called again at
any time; each takes back what it created when it fails.  Who asked (a hook, a
service, a person) makes no difference here, and libvirt is never called: a
hook that did would deadlock.

A network's own lock is taken before the host's, and never two networks' at
once.
"""

import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import get_args

from libvirt_natns import names
from libvirt_natns.addresses import FAMILIES, Address, Family
from libvirt_natns.daemons import dnsmasq, dnsmasq_trial, ndppd, udhcpc
from libvirt_natns.documents import libvirt_xml, xml_sniff
from libvirt_natns.engine import allocation, apply, given_up, host, plan, proxied_addresses
from libvirt_natns.engine.apply import Step, Undo
from libvirt_natns.engine.observer import HOST, NOBODY, Observer, tell
from libvirt_natns.engine.planner import ETHERNET_MTU, Planner, resolvers_of
from libvirt_natns.engine.prebuilt import Built
from libvirt_natns.errors import ConflictError, NatnsError, StoreError, UpstreamError
from libvirt_natns.firewall import libvirts
from libvirt_natns.kernel import address_probe, netns
from libvirt_natns.kernel.boot import boot_id, now
from libvirt_natns.kernel.defer import Later, at_once
from libvirt_natns.kernel.locks import LIMIT, locked
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.metadata import PortForward
from libvirt_natns.model.network import Network
from libvirt_natns.model.publication import Forward
from libvirt_natns.model.upstream import Outside, Upstream
from libvirt_natns.records import dataclass
from libvirt_natns.state import applicants, pool
from libvirt_natns.state.claims import Claims
from libvirt_natns.state.leases import LeaseKind
from libvirt_natns.state.networks import NetworkRecord, State
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import attachment, dhcp, routers, selection

FIRST_LOOK = 0.006
"""Seconds in which nearly every station of a local network has answered."""

ROOM = 64 << 10
"""Octets that a network's run-time files may take: most are those of its dnsmasq."""

POLL = 0.02
"""Seconds between two looks at whether another network's start is over."""


@dataclass(frozen=True, slots=True)
class Engine:
    """All verbs over one configuration, one state database, one kernel session.

    ``before`` is called ahead of every change, for tests; ``observer`` is told
    what is being changed and what has been.  A resident process has a ``later``
    for what nobody waits for, and keeps in ``built`` what ``build`` has made.
    """

    config: Config
    store: Store
    kernel: Kernel
    before: Step | None = None
    observer: Observer = NOBODY
    later: Later = at_once
    built: Built | None = None

    @property
    def planner(self) -> Planner:
        return Planner(self.config, self.store, self.kernel)

    def _step(self, what: str) -> None:
        if self.before is not None:
            self.before(what)

    @contextmanager
    def _changing(
        self, verb: str, uuid: str, name: str, limit: float = LIMIT
    ) -> Iterator[list[str]]:
        """Hold a network's lock; what the body puts into the list, it has changed."""
        changed: list[str] = []
        directory = names.network_directory(uuid)
        with locked(directory, limit), self.observer.changing(uuid), self.kernel.work():
            # Others may have changed the network until its lock was free.
            self.kernel.forget()
            start = time.monotonic()
            try:
                yield changed
            finally:
                self._discard_lock(uuid)
            taken = time.monotonic() - start
        tell(self.observer, verb, name, changed, taken)

    # -- up ----------------------------------------------------------------

    def prepare(self, network: Network, xml: bytes) -> None:
        """Check all that can be refused and reserve what the network needs.

        Runs in libvirt's `start` hook, before the bridge exists.  Raises a
        NatnsError, and leaves nothing, where the network cannot come up.
        Waits while another network with an overlapping subnet is between its
        own `start` and `started`.
        """
        upstream = self.planner.upstream(network)
        self._check(network, upstream)
        self._end_rivals(network, active=False)
        with self._changing("prepare", network.uuid, network.name) as done, Undo() as undo:
            undo.add(_discard_directory, network.uuid)
            _check_room(network)
            self._clear(network, xml)
            self._reserve(network, xml, upstream, undo)
            self._await_turn(network, xml, upstream)
            done.append(f"reserved {self._said(network, upstream)}")
            undo.pop_all()

    def build(self, network: Network, xml: bytes) -> bool:
        """Make ahead all that needs nothing of libvirt's, which ``up`` then joins.

        For a thread of a resident process, right after ``prepare``, while
        libvirt makes its bridge.  Raises a NatnsError and takes back what it
        created; ``up`` does all of it then.  Returns False where that start is
        over already.
        """
        upstream = self.planner.upstream(network)
        with self._changing("build", network.uuid, network.name) as done, Undo() as undo:
            record = self.store.networks.get(network.uuid)
            if self.built is None or not record or not _starts(record, xml):
                return False
            undo.add(_empty_directory, network.uuid)
            self._renew_leases(network, upstream)
            self._adjust_host(network.uuid)
            operations = self.planner.plan_ahead(network, upstream)
            done += apply.carry_out(self.kernel, operations, undo, self.before, later=self.later)
            self.built.keep(network.uuid, record.since, operations)
            undo.pop_all()
        return True

    def _joined(self, uuid: str) -> plan.Plan:
        """What ``build`` has made for the start that goes on."""
        record = self.store.networks.get(uuid)
        if self.built is None or record is None:
            return ()
        made = self.built.take(uuid, record.since)
        goes_on = self._state(uuid) == "starting" and netns.exists(record.namespace)
        return made if goes_on else ()

    def give_up(
        self, start: NetworkRecord, *, orphaned: bool = False, limit: float = LIMIT
    ) -> bool:
        """Take back a start that libvirt has given up, as if there had been none.

        ``orphaned``: the network is surely inactive in libvirt, so a bridge of
        libvirt's that is still there goes as well.  Returns False, and does
        nothing, if anything has happened to the network since the record was made.
        """
        with self._changing("give up", start.uuid, start.name, limit) as done:
            record = self.store.networks.get(start.uuid)
            if not record or (record.state, record.since) != (start.state, start.since):
                return False
            if orphaned:
                self._remove_orphan(record.document)
            self._end(start.uuid, start.namespace)
            done.append("removed a start that libvirt gave up")
        return True

    def end_given_up(self, but: str = "", *, wait: bool = False) -> None:
        """Take back the starts of other networks than ``but`` that libvirt has given up.

        libvirt tells nobody of them: without the service, the next event does.  What
        cannot be removed is left to ``sync``.  ``wait``: await the bridge of a start
        that has none yet, for as long as ``given_up.BRIDGE_LIMIT``.
        """
        for record in self.store.networks.all("preparing", "starting"):
            if record.uuid == but:
                continue
            while wait and self.later is at_once and given_up.may_be_given_up(record):
                time.sleep(POLL)
            if given_up.is_given_up(record):
                # The holder of its lock may have to wait for a DHCP server.
                with suppress(NatnsError):
                    self.give_up(record, limit=POLL)

    def _discard_lock(self, uuid: str) -> None:
        """Leave no directory behind that was only made to be locked."""
        if self._state(uuid) == "down":
            _discard_directory(uuid)

    def up(self, network: Network, xml: bytes) -> list[str]:
        """Make the network's namespace and all that is in it; returns what differed.

        Runs in `started`, when the bridge is there, and whenever a network must
        be repaired.  Raises a NatnsError and takes back what it created.
        """
        upstream = self.planner.upstream(network)
        if self._state(network.uuid) not in ("starting", "up"):
            # Nobody answered its `start`.
            self._check(network, upstream)
            self._end_rivals(network, active=True)
        with self._changing("up", network.uuid, network.name) as repaired, Undo() as undo:
            made = self._joined(network.uuid)
            self._admit(network, xml, upstream, undo)
            upstream = self._as_leased(network, upstream)
            if not upstream.by_dhcp and names.dhcp_directory(network.uuid).is_dir():
                self._end_leasing(network, upstream, undo)
            if made:
                undo.add(remove, self.kernel, network.uuid, names.namespace(network.name))
            undo.add(self._return_routes, network)
            repaired += self._take_over(network, undo)
            self._renew_leases(network, upstream)
            if upstream.by_dhcp:
                configured = selection.upstream_of(network, self.config)
                repaired += dhcp.news(network, configured)
            for address in self.planner.outside(network, upstream).addresses:
                self.store.claims.move(network.uuid, address)
            self._adjust_host(network.uuid)
            operations = self.planner.plan(network, upstream)
            repaired += apply.carry_out(
                self.kernel, operations, undo, self.before, later=self.later, done=made
            )
            repaired += ["joined what was built ahead"] if made else []
            if network.needs_dnsmasq:
                dnsmasq.check_started(network.uuid, names.namespace(network.name))
            if repaired or self._state(network.uuid) != "up":
                self._step("note that it is up")
                self.store.networks.set_state(network.uuid, "up")
            undo.pop_all()
        return repaired

    def _end_leasing(self, network: Network, upstream: Upstream, undo: Undo) -> None:
        """Give back what a DHCP server has leased: the configuration was another one."""
        held = dhcp.held(network.uuid)
        _end_client(self.kernel, network.uuid, names.namespace(network.name))
        leased = self.store.leases.of(upstream.name, network.uuid).address
        if held is not None and held.address.ip == leased:
            # The server may give it to anybody from now on.
            undo.add(self.store.leases.restore, self.store.leases.all_of(network.uuid))
            self.store.leases.release(upstream.name, network.uuid, "ipv4")

    def _as_leased(self, network: Network, upstream: Upstream) -> Upstream:
        """The upstream again, by what a DHCP server has leased since."""
        return self.planner.upstream(network) if upstream.by_dhcp else upstream

    def follow_lease(self, uuid: str) -> list[str]:
        """Bring a network to what its DHCP client has leased, or lost; returns what differed."""
        if self._state(uuid) == "down":
            return []
        # A start looks for itself, but may have done so a moment ago.
        with locked(names.network_directory(uuid)):
            self._discard_lock(uuid)
            record = self.store.networks.get(uuid)
        if record is None or record.state != "up" or not record.this_boot:
            return []
        if self.kernel.link(None, record.bridge) is None:
            # It is being stopped.
            return []
        return self.up(libvirt_xml.parse_network(record.document), record.document)

    def _take_over(self, network: Network, undo: Undo) -> list[str]:
        """Take libvirt's addresses off the bridge, ahead of all else.

        Starts of networks with an overlapping subnet wait for nothing more.
        """
        repaired = apply.carry_out(self.kernel, plan.withdrawals(network), undo, self.before)
        if self._state(network.uuid) == "starting":
            self._step("let others start")
            self.store.networks.set_state(network.uuid, "up")
        return repaired

    def _state(self, uuid: str) -> State:
        """A network's recorded state; what was before a reboot is down."""
        record = self.store.networks.get(uuid)
        return record.state if record and record.this_boot else "down"

    def _admit(self, network: Network, xml: bytes, upstream: Upstream, undo: Undo) -> None:
        """Record a network, and how to forget it again if it was not up."""
        state = self._state(network.uuid)
        if state != "up":
            # Last of all, when the network's state is set back and does not count.
            undo.add(self._adjust_host, network.uuid)
            undo.add(_discard_directory, network.uuid)
        if state not in ("starting", "up"):
            self._reserve(network, xml, upstream, undo)
            return
        if state == "starting":
            undo.add(self.store.networks.set_state, network.uuid, "down")
            if upstream.by_dhcp:
                # Its `start` has made part of it, to be leased an address.
                undo.add(remove, self.kernel, network.uuid, names.namespace(network.name))
        known = self.store.networks.get(network.uuid)
        if known is not None and known.upstream != upstream.name:
            # What another upstream's server has leased is nothing here.
            _end_client(self.kernel, network.uuid, known.namespace)
        if state == "starting" or known is None or _changed(known, network, xml, upstream):
            self._step("record the network")
            self.store.networks.put(_record(network, xml, upstream, state))
            if state == "up" and known is not None:
                self._publish_anew(known, network, upstream, undo)

    def _publish_anew(
        self, known: NetworkRecord, network: Network, upstream: Upstream, undo: Undo
    ) -> None:
        """Take what a running network's edited metadata publishes, in place of what it did."""
        with suppress(NatnsError):
            if _forwards(libvirt_xml.parse_network(known.document)) == _forwards(network):
                return
        undo.add(self.store.networks.put, known)
        before = Claims(network.uuid, self.store.claims.forwards(owner=network.uuid))
        undo.add(self.store.claims.put, before, allocation.scopes(self.store, [network.uuid]), True)
        choices = allocation.Choices(self.config, self.store, self.kernel, self.observer)
        self._renew_leases(network, upstream)
        self._claim(choices, network, upstream, before.forwards)

    def _claim(
        self,
        choices: allocation.Choices,
        network: Network,
        upstream: Upstream,
        held: Collection[Forward] = (),
    ) -> None:
        """Take what a network's own metadata publishes."""
        outside, whole = (
            self.planner.outside(network, upstream),
            self.planner.completed(network, upstream),
        )
        allocation.claim_for_network(choices, whole, upstream, outside, held)

    def _check(self, network: Network, upstream: Upstream) -> None:
        """Refuse what could not come up, as far as that can be seen now."""
        backend = self.planner.backend(ipv6=plan.has_ipv6(network))
        if network.needs_dnsmasq:
            dnsmasq_trial.check(network)
        selection.check_addresses(network, upstream)
        # What no rule can express is refused here, not when the rules are loaded.
        around = plan.Surroundings(ETHERNET_MTU, ETHERNET_MTU, backend, None)
        plan.make(network, upstream, Outside(), around)
        self.planner.check_proxied(network, upstream)
        if selection.proxied(network, upstream):
            ndppd.program()
        if upstream.known:
            families = selection.families(network, upstream)
            selection.check_resolvers(network, upstream, resolvers_of(upstream, families).servers)
        if upstream.by_dhcp:
            udhcpc.program()
        self._check_bridge(network, upstream)

    def _check_bridge(self, network: Network, upstream: Upstream) -> None:
        """Refuse an upstream's bridge or NIC that could not take another network."""
        if upstream.kind == "host" and self.kernel.link(None, upstream.bridge or "") is None:
            return
        problem = attachment.problem(self.kernel, upstream)
        if problem and upstream.kind == "router":
            problem = problem[0], f"virt-natns router up {upstream.name}"
        if problem:
            raise UpstreamError(
                f"network {network.name}: {upstream.segment} of upstream"
                f" {upstream.name} {problem[0]}",
                problem[1],
            )

    def _end_rivals(self, network: Network, *, active: bool) -> None:
        """Take down networks whose end nobody noticed, as this one's start shows.

        ``active``: the network's bridge is there and is its own.
        """
        for rival in self.store.networks.holders(
            names.namespace(network.name), network.bridge or ""
        ):
            if rival.uuid != network.uuid and self._superseded(rival, network, active):
                self.down(rival.uuid)
        # One of that name of which the record was lost.
        namespace = names.namespace(network.name)
        owner = self.kernel.namespace_owner(namespace)
        if owner and owner != network.uuid:
            self.tidy(owner, namespace)

    def _superseded(self, rival: NetworkRecord, network: Network, active: bool) -> bool:
        """Whether a start of ``network`` shows that ``rival`` has gone unnoticed."""
        if rival.name == network.name:
            # libvirt has no two of a name, and starts none that is active.
            return True
        if rival.bridge != network.bridge:
            return False
        if active:
            return True
        if self.kernel.link(None, rival.bridge) is not None:
            return False
        # libvirt has no two networks with a bridge of one name.
        return rival.state in ("starting", "up") or given_up.is_given_up(rival)

    def _clear(self, network: Network, xml: bytes) -> None:
        """Remove what an earlier run of this network left, and refuse what is foreign."""
        namespace = plan.Namespace(names.namespace(network.name), network.uuid)
        if apply.namespace_owner(self.kernel, namespace) not in (network.uuid, None):
            raise ConflictError(
                f"network {network.name}: namespace {namespace.name} exists and is not ours",
                f"rename the network, or delete it (ip netns delete {namespace.name})",
            )
        remove(self.kernel, network.uuid, namespace.name, self.before)
        # One that came up just as libvirt was killed would keep the address.
        dnsmasq.stop_libvirts(network.name)
        self._remove_former_name(network)
        if self._state(network.uuid) != "down":
            self._remove_orphan(xml)
            self._step("note that it is down")
            self.store.networks.set_state(network.uuid, "down")
            self._adjust_host(network.uuid)

    def _remove_former_name(self, network: Network) -> None:
        """Remove the namespace that a network had under another name."""
        record = self.store.networks.get(network.uuid)
        former = record.namespace if record else ""
        if former and former != names.namespace(network.name) and netns.exists(former):
            _delete_own_namespace(self.kernel, network.uuid, former)

    def _remove_orphan(self, xml: bytes) -> None:
        """Remove what libvirt left of a network whose `started` was killed.

        For a network that is not active in libvirt.  The bridge is known by its
        MAC address as one that libvirt made.
        """
        seen = xml_sniff.at_network(xml)
        if seen.mac and self.kernel.mac(seen.bridge) == seen.mac:
            self._step("remove libvirt's bridge")
            abandon(self.kernel, seen.name, seen.bridge)

    def _reserve(self, network: Network, xml: bytes, upstream: Upstream, undo: Undo) -> None:
        """Record the network and lease what it needs; ``undo`` takes back both."""
        earlier = self.store.leases.all_of(network.uuid)
        had = {lease.kind for lease in earlier if lease.upstream == upstream.name}
        self._step("record the network")
        if upstream.by_dhcp:
            undo.add(self._adjust_host, network.uuid)
        undo.add(self.store.networks.set_state, network.uuid, "down")
        self.store.networks.put(_record(network, xml, upstream, "preparing"))
        for kind in set(get_args(LeaseKind)) - had:
            undo.add(self.store.leases.release, upstream.name, network.uuid, kind)
        undo.add(self.store.leases.restore, earlier)

        self._step("lease an address")
        if upstream.by_dhcp:
            upstream = self._await_lease(network, upstream, undo)
        for family in FAMILIES:
            if selection.leases_address(network, upstream, family):
                self._lease(network, upstream, family)
        if selection.leases_prefix(network, upstream):
            self._lease_prefix(network, upstream)
        if network.nat and network.nat.forwards:
            undo.add(self.store.claims.drop, network.uuid)
            choices = allocation.Choices(self.config, self.store, self.kernel, self.observer)
            self._claim(choices, network, upstream)

    def _await_lease(self, network: Network, upstream: Upstream, undo: Undo) -> Upstream:
        """Have a DHCP server asked; returns the upstream as it is known with its lease."""
        # Nobody would hear the client where the host filters what bridges carry.
        self._adjust_host(network.uuid)
        operations = self.planner.plan_ahead_of_lease(network, upstream)
        with udhcpc.awaiting(names.dhcp_directory(network.uuid)):
            apply.carry_out(self.kernel, operations, undo, self.before)
            self._step("await a DHCP lease")
            dhcp.await_lease(network, upstream)
        upstream = self.planner.upstream(network)
        dhcp.settle_first(self.store, network, upstream)
        return upstream

    def _probe(self, upstream: Upstream, addresses: Collection[Address]) -> set[Address]:
        """Those of the addresses that other stations have.

        A process that stays asks at length when it announces the address.
        """
        if upstream.probe == 0:
            return set()
        resident = self.later is not at_once
        seconds = min(upstream.probe, FIRST_LOOK) if resident else upstream.probe
        return address_probe.probe(upstream.bridge or "", addresses, seconds, self.later)

    def relocate(self, uuid: str, taken: Address, avoided: Collection[Address] = ()) -> list[str]:
        """Give a network another address than one that another station has.

        ``avoided`` are addresses that other stations answered for lately.  The caller
        limits how often a network moves.  No hook waits: the new address is probed for
        in full, and then announced without another probe, so one move leads to no other.
        Returns what was changed: nothing, where it has another one by now.
        Raises LeaseError where there is no other, or it is the one that was asked for.
        """
        record = self.store.networks.get(uuid)
        if record is None or not record.runs:
            return []
        network = libvirt_xml.parse_network(record.document)
        upstream = self.planner.upstream(network)
        if upstream.by_dhcp and taken.version == 4:
            # The client asks the neighbours, and declines what they have.
            return []
        waiting = Engine(self.config, self.store, self.kernel, self.before, self.observer)
        with self._changing("relocate", uuid, record.name) as done:
            if taken not in self.store.leases.of(upstream.name, uuid).addresses:
                return []

            def probe(addresses: Collection[Address]) -> set[Address]:
                known = {taken, *avoided}.intersection(addresses)
                return known | waiting._probe(
                    upstream, [each for each in addresses if each not in known]
                )

            own = self.kernel.host_addresses()
            applicant = applicants.applicant(network, 4 if taken.version == 4 else 6)
            address = pool.reserve(self.store, applicant, upstream, probe, own)
            done.append(f"moved from {taken} to {address}")
        # A start that goes on takes the new address by itself.
        return [*done, *waiting.up(network, record.document)] if record.state == "up" else done

    def defend(self, record: NetworkRecord, address: Address) -> None:
        """Announce an address that a network has and another station answers for.

        Raises UpstreamError or KernelError.
        """
        mac = names.mac(record.uuid, names.UPSTREAM_LINK)
        with netns.entered(record.namespace):
            address_probe.announce(names.UPSTREAM_LINK, address, mac)

    def _await_turn(self, network: Network, xml: bytes, upstream: Upstream) -> None:
        self._step("await its turn")
        while self.store.networks.enter_start(_record(network, xml, upstream, "starting")):
            time.sleep(POLL)

    def _renew_leases(self, network: Network, upstream: Upstream) -> None:
        """Keep what is leased; lease anew where the configuration has moved on."""
        leased = self.store.leases.of(upstream.name, network.uuid)
        if upstream.by_dhcp:
            dhcp.settle(self.store, network, upstream)
        for family in FAMILIES:
            address = leased.of(family)
            keeps = address is not None and applicants.can_keep(address, upstream)
            if not keeps and selection.leases_address(network, upstream, family):
                self._lease(network, upstream, family)
        if selection.leases_prefix(network, upstream):
            prefix = leased.prefix
            if prefix is None or not selection.can_keep_prefix(prefix, network, upstream):
                self._lease_prefix(network, upstream)

    def _lease(self, network: Network, upstream: Upstream, family: Family) -> None:
        """Lease the network's address of a family.  Raises LeaseError."""
        if upstream.by_dhcp and family == 4:
            return
        pool.reserve(
            self.store,
            applicants.applicant(network, family),
            upstream,
            partial(self._probe, upstream),
            self.kernel.host_addresses(),
        )

    def _lease_prefix(self, network: Network, upstream: Upstream) -> None:
        """Lease the network's prefix.  Raises LeaseError."""
        pool.reserve_prefix(
            self.store,
            applicants.applicant(network),
            upstream,
            selection.wanted_prefix(network, upstream),
            self.kernel.host_addresses(),
        )

    def _said(self, network: Network, upstream: Upstream) -> str:
        """What a network has outside, in words."""
        leased = self.store.leases.of(upstream.name, network.uuid)
        found = [*leased.addresses, *([leased.prefix] if leased.prefix else [])]
        return " and ".join(map(str, found)) or "nothing outside"

    # -- refresh -----------------------------------------------------------

    def refresh(self, network: Network, xml: bytes) -> list[str]:
        """Apply a changed network XML (`net-update`) to a network that is up.

        libvirt has written its dnsmasq's files by now.  Connections live on.
        """
        record = self.store.networks.get(network.uuid)
        if record is None or record.state != "up":
            return []
        return self.up(network, xml)

    def look_elsewhere(self, uuid: str, asked: proxied_addresses.Asked) -> list[str]:
        """Cut what stations outside have out of what a network's ndppd answers for.

        Returns what differed.  Asks as long as the upstream's ``probe`` says where a guest
        has an address in the provider's own prefix.  Raises a NatnsError.
        """
        record = self.store.networks.get(uuid)
        if record is None or record.state != "up" or not record.this_boot:
            return []
        if self.kernel.link(record.namespace, record.bridge) is None:
            # The network is stopping, or is to be repaired.
            return []
        due = asked.due(self.kernel.neighbours6(record.namespace, record.bridge))
        due = due[: proxied_addresses.MOST]
        if not due:
            return []
        asked.note(due)
        network = libvirt_xml.parse_network(record.document)
        upstream = self.planner.upstream(network)
        proxy = proxied_addresses.outermost(self.planner.plan(network, upstream))
        if proxy is None:
            return []
        found = proxied_addresses.look(proxy, due, upstream.probe)
        if found is None:
            return []
        with locked(names.network_directory(uuid)):
            self._discard_lock(uuid)
            if self._state(uuid) != "up":
                return []
            proxied_addresses.note(uuid, found)
        told = ", ".join(map(str, found)) or "none"
        return [
            f"addresses outside, of what guests have: {told}",
            *self.up(network, record.document),
        ]

    # -- down --------------------------------------------------------------

    def down(self, uuid: str, name: str = "", *, shared: bool = True) -> None:
        """Remove all of a network but its lease, by recorded state alone.

        Missing things are success; everything is tried before the first error
        is raised.  ``name`` serves where there is no record; ``shared`` False
        leaves what networks have in common in the host to a later ``sync``.
        """
        with self._changing("down", uuid, name or self._name(uuid)) as done:
            record = self.store.networks.get(uuid)
            namespace = record.namespace if record else names.namespace(name) if name else None
            self._end(uuid, namespace, shared=shared)
            done.append("removed")

    def down_unless_changed(self, record: NetworkRecord) -> bool:
        """The same for a network that is not active any more, by its record.

        Unless something happened to it since the record was read: returns
        whether it was taken down.
        """
        with self._changing("down", record.uuid, record.name) as done:
            current = self.store.networks.get(record.uuid)
            if current and (current.state, current.since) != (record.state, record.since):
                return False
            self._remove_orphan(record.document)
            self._end(record.uuid, record.namespace)
            done.append("removed")
        return True

    def tidy(self, uuid: str, namespace: str | None = None) -> bool:
        """Remove what is left of a network, unless it is recorded as running.

        Returns whether there was something.
        """
        if namespace is None and not names.network_directory(uuid).is_dir():
            return False
        with self._changing("tidy", uuid, self._name(uuid)) as done:
            left = self._state(uuid) == "down"
            if left:
                self._end(uuid, namespace)
                done.append("removed what was left over")
        return left

    def _end(self, uuid: str, namespace: str | None, *, shared: bool = True) -> None:
        if self.built is not None:
            self.built.drop(uuid)
        remove(self.kernel, uuid, namespace, self.before)
        record = self.store.networks.get(uuid)
        if record and record.state != "down":
            self._step("note that it is down")
            self.store.claims.drop(uuid)
            self.store.networks.set_state(uuid, "down")
        _discard_directory(uuid)
        if shared:
            self._adjust_host(uuid)

    def _name(self, uuid: str) -> str:
        record = self.store.networks.get(uuid)
        return record.name if record else uuid

    def ensure_host(self, *, configured: bool = False) -> list[str]:
        """Make the host as the networks need it; returns what differed.

        Routers that are up are made as ``configured`` by now, or stay as they came up.
        """
        with self.observer.changing(HOST):
            found = self._host.ensure() + self._ensure_routers()
            repaired = routers.repair(self.config, self.kernel, self.store, configured=configured)
            return found + repaired

    def follow_forwarding(self) -> None:
        """Have the host's rules drop no more than what it forwards because of us alone."""
        with self.observer.changing(HOST):
            self._host.ensure()

    def host_differences(self) -> list[str]:
        """How the host differs from what the networks need, in words."""
        found = self._host.differences()
        return found + routers.differences(self.config, self.kernel, self.store)

    def host_obstacles(self) -> tuple[str, ...]:
        """Name the chains of others that drop the networks' packets, with the accepts to add."""
        return self._host.obstacles()

    @property
    def _host(self) -> host.Host:
        planner = self.planner
        return host.Host(self.kernel, self.store, planner.host_needs, planner.backend, self.before)

    def _adjust_host(self, uuid: str) -> None:
        """The same where one network alone has come, gone or changed."""
        if self._host.is_adjusted(uuid):
            self._host.leave()
        else:
            with self.observer.changing(HOST):
                self._host.adjust(uuid)
        self._ensure_routers()

    def _ensure_routers(self) -> list[str]:
        """Bring the rules of routers to what their networks publish; returns what differed."""
        return routers.ensure(self.store, self._step)

    def hand_back(self, network: Network, *, renew: bool = False) -> None:
        """Take a running network down and give libvirt's bridge its addresses back.

        ``renew`` ends libvirt's dnsmasq, which has lost its lease helper to us:
        libvirt starts another one when it is reloaded, which is the caller's task.
        """
        self.down(network.uuid, network.name)
        if not network.taken_over or self.kernel.link(None, network.bridge or "") is None:
            return
        for subnet in network.subnets:
            self.kernel.add_address(None, network.bridge or "", subnet.interface)
        self._return_routes(network)
        if renew:
            dnsmasq.stop_libvirts(network.name)

    def _return_routes(self, network: Network) -> None:
        """libvirt's <route>s, which go with the last address of its bridge."""
        for route in network.routes if network.taken_over else ():
            self.kernel.add_route(None, route.destination, route.gateway, network.bridge or "")


def _check_room(network: Network) -> None:
    """Refuse a start whose run-time files have no room: `started` is too late for that.

    Raises StoreError.
    """
    probe = names.network_directory(network.uuid) / "room"
    try:
        with probe.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, ROOM)
    except OSError as error:
        raise StoreError(
            f"network {network.name}: {probe.parent} has no room for {ROOM >> 10} KiB"
            f" ({error.strerror})",
            f"free some space (df {names.RUN_DIRECTORY}; df -i {names.RUN_DIRECTORY})",
        ) from error
    finally:
        probe.unlink(missing_ok=True)


def _record(network: Network, xml: bytes, upstream: Upstream, state: State) -> NetworkRecord:
    return NetworkRecord(
        uuid=network.uuid,
        name=network.name,
        namespace=names.namespace(network.name),
        bridge=network.bridge or "",
        upstream=upstream.name,
        kind=upstream.kind,
        subnets=tuple(subnet.network for subnet in network.subnets),
        taken_over=network.taken_over,
        state=state,
        boot=boot_id(),
        since=now(),
        document=xml,
    )


def _starts(record: NetworkRecord, xml: bytes) -> bool:
    """Whether a network is on its way from `start` to `started`, by that very XML."""
    return record.state == "starting" and record.this_boot and record.document == xml


def _forwards(network: Network) -> tuple[PortForward, ...]:
    return network.nat.forwards if network.nat else ()


def _changed(known: NetworkRecord, network: Network, xml: bytes, upstream: Upstream) -> bool:
    """Whether a record says something else than today's XML and configuration."""
    if known.upstream != upstream.name:
        return True
    if known.document == xml:
        return False
    with suppress(NatnsError):
        return libvirt_xml.parse_network(known.document) != network
    return True


# -- removing, without a state database -----------------------------------------


def remove(kernel: Kernel, uuid: str, namespace: str | None, before: Step | None = None) -> None:
    """Delete a network's namespace, if it is named, and all that belongs to it.

    Its links go first: a namespace that ends loses its rules before its links,
    and would let packets out untranslated in between.  Everything is tried
    before the first error is raised.
    """
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        # While the server can still hear that the address is free.
        ("end the DHCP client", partial(_end_client, kernel, uuid, namespace)),
        ("delete the patches", partial(_delete_patches, kernel, uuid)),
        ("delete the macvlan", partial(_delete_macvlan, kernel, uuid, namespace)),
        ("end ndppd", partial(ndppd.stop, uuid)),
        ("end dnsmasq", partial(dnsmasq.stop, uuid, search=_exists(namespace))),
        ("delete the namespace", partial(_delete_own_namespace, kernel, uuid, namespace)),
        ("empty the directory", partial(_empty_directory, uuid)),
    )
    errors = []
    for what, step in steps:
        if before is not None:
            before(what)
        try:
            step()
        except NatnsError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def remove_unrecorded(kernel: Kernel, uuid: str, namespace: str) -> None:
    """The same where the state database cannot be read: what the names tell.

    The host's own part stays until ``sync``.
    """
    try:
        remove(kernel, uuid, namespace)
    finally:
        _discard_directory(uuid)


def _end_client(kernel: Kernel, uuid: str, namespace: str | None) -> None:
    apply.end_client(kernel, names.dhcp_directory(uuid), namespace, names.UPSTREAM_LINK)


def _delete_patches(kernel: Kernel, uuid: str) -> None:
    ports = (names.upstream_patch(uuid), names.private_patch(uuid))
    kernel.delete_links(names.link_group(uuid), *ports)
    for file in names.NETNS_DIRECTORY.glob(f"{names.ROUTER_PREFIX}*"):
        if netns.exists(file.name):
            kernel.delete_link(names.upstream_patch(uuid), file.name)


def _delete_macvlan(kernel: Kernel, uuid: str, namespace: str | None) -> None:
    """Delete the upstream's link where it has no end in the host, and so is still there."""
    if namespace is None or not _exists(namespace):
        return
    if kernel.namespace_owner(namespace) == uuid:
        kernel.delete_link(names.UPSTREAM_LINK, namespace)


def _exists(namespace: str | None) -> bool:
    return namespace is not None and netns.exists(namespace)


def _delete_own_namespace(kernel: Kernel, uuid: str, namespace: str | None) -> None:
    if namespace is None:
        return
    # No owner: nothing, or the empty file that a killed start left.
    owner = apply.namespace_owner(kernel, plan.Namespace(namespace, uuid))
    if owner in (uuid, None):
        kernel.delete_namespace(namespace)


def _empty_directory(uuid: str) -> None:
    """Remove a network's run-time files, but not what its lock is held on."""
    directory = names.network_directory(uuid)
    for file in directory.iterdir() if directory.is_dir() else ():
        file.unlink(missing_ok=True)


def _discard_directory(uuid: str) -> None:
    directory = names.network_directory(uuid)
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(OSError):
        # Only the last network finds it empty.
        directory.parent.rmdir()


def _stop_libvirts(name: str) -> None:
    with suppress(NatnsError, OSError):
        dnsmasq.stop_libvirts(name, search=True)


def abandon(kernel: Kernel, name: str, bridge: str) -> None:
    """Remove what libvirt itself leaves of a network whose `started` has failed.

    It thinks the network inactive, yet its bridge, dnsmasq and firewall rules
    live on, and every later start would find the address in use.
    """
    with Undo() as everything:
        if bridge:
            everything.add(libvirts.forget, bridge)
            everything.add(kernel.delete_link, bridge)
        if name:
            everything.callback(_stop_libvirts, name)
