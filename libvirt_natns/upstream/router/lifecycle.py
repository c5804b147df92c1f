# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs of a router: up, confirm, down.

A verb runs under one lock.  It first takes back a router that a kill left between two
states, by the journal.  A router of an earlier boot has left files only, and is forgotten.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from libvirt_natns.errors import NatnsError, RouterError, StoreError
from libvirt_natns.kernel import boot_clock
from libvirt_natns.kernel.boot_clock import boot_id
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.upstream import RouterUpstream
from libvirt_natns.operations.carry_out import carry_out
from libvirt_natns.operations.undo import Undo
from libvirt_natns.upstream.router import (
    confirm_timer,
    confirmation,
    downstream,
    journal,
    nic_lease,
    preflight,
    recover,
    rollback,
    router_files,
    router_plan,
)
from libvirt_natns.upstream.router.downstream import RouterNeeds
from libvirt_natns.upstream.router.journal import JournalObserver, RouterRecord
from libvirt_natns.upstream.router.moved_nic import InnerNic
from libvirt_natns.upstream.router.nic_snapshot import Capture
from libvirt_natns.upstream.router.router_plan import RouterPlan
from libvirt_natns.upstream.router.target import Target

Before = Callable[[str], None]
NeedsOf = Callable[[Target], RouterNeeds]

PORTS_DIFFER = "host_ports differ from the configuration"


@dataclass(frozen=True, slots=True)
class RouterLifecycle:
    """The verbs over one configuration and one kernel session.

    ``needs`` returns what the networks of a router need of it, ``users`` their names, by the
    router's name; ``reattach`` attaches them to a router that was made anew.
    ``before`` is called ahead of each step, for tests.  ``faults`` are why the configuration
    or the database cannot be read: only a new router needs both.
    """

    config: Config
    kernel: Kernel
    needs: NeedsOf = lambda _: RouterNeeds()
    users: Callable[[str], list[str]] = lambda _: []
    reattach: Callable[[str], list[str]] = lambda _: []
    faults: tuple[NatnsError, ...] = ()
    before: Before | None = None

    def upstream(self, name: str | None) -> RouterUpstream:
        """Return the upstream of a router; without a name the only one.  Raises RouterError."""
        return preflight.upstream(self.config, name)

    # -- up ----------------------------------------------------------------

    def up(
        self,
        name: str,
        within: float | None = None,
        *,
        configured: bool = True,
    ) -> list[str]:
        """Make a router, or repair it; returns in words what was done.

        ``configured``: changed ``host_ports`` of the configuration come into force.
        ``within``: seconds after which the router is taken back unless it is confirmed.
        A new router is taken back at once where a step fails.  Raises a NatnsError.
        """
        for fault in self.faults:
            raise fault
        upstream = self.upstream(name)
        with self._alone():
            done: list[str] = []
            record = self._settled(name, done)
            if record is None:
                kept = confirmation.load(name)
                return [*done, *self._make(upstream, kept.before if kept else None, within)]
            return done + self._mended(record, configured, within)

    def repair(self, name: str, *, configured: bool) -> list[str]:
        """Repair a router that is still up; returns in words what was done.

        ``configured`` as in ``up``.  A router that others have taken down stays down.
        Raises a NatnsError.
        """
        self.upstream(name)
        with self._alone():
            done: list[str] = []
            record = self._settled(name, done)
            return done if record is None else done + self._mended(record, configured)

    def boot(self, upstream: RouterUpstream, had: Capture) -> list[str]:
        """Make a router as it was confirmed, or repair it; returns in words what was done.

        The NIC ``had`` these settings when the router was confirmed; they complete a NIC
        that is not configured yet.  Raises a NatnsError.
        """
        with self._alone():
            done: list[str] = []
            record = self._settled(upstream.name, done)
            if record is not None:
                return done + self._repair(record)
            return [*done, *self._make(upstream, had, boot=True)]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock of routers, and trust nothing that was read before."""
        with router_files.lock(), self.kernel.work():
            self.kernel.distrust()
            yield

    def _settled(self, name: str, done: list[str]) -> RouterRecord | None:
        """Return the record of a router that is up; take a router in any other state back."""
        record = recover.load(name, done.append)
        if record is None:
            return None
        if not record.this_boot:
            recover.forget(record)
            return None
        if record.is_whole and not record.is_overdue:
            return record
        state = "never confirmed" if record.is_whole else f"interrupted {record.state}"
        done.append(f"rolled back router {name}, which was {state}")
        self._take_back(record)
        return None

    def _make(
        self,
        upstream: RouterUpstream,
        had: Capture | None,
        within: float | None = None,
        *,
        boot: bool = False,
    ) -> list[str]:
        target, before, resolv = preflight.target(
            self.config, self.kernel, upstream, had, boot=boot
        )
        if not boot:
            preflight.check_session(target, {address.ip for address in before.addresses})
        deadline = None if within is None else boot_clock.now() + within
        record = RouterRecord(target, before, resolv, "going up", boot_id(), deadline=deadline)
        plan = self.plan(record)
        journal.save(record)
        written = JournalObserver(record, self._announce)
        try:
            if deadline is not None:
                confirm_timer.arm(upstream.name, deadline)
            self._carry_out(plan, written.begin)
            written.begin("note that it is up")
            up = journal.advance(written.record, state="up", step="")
            if deadline is None and not boot:
                confirmation.save(up)
        except BaseException as error:
            self._take_back(written.record)
            if isinstance(error, NatnsError | OSError):
                raise rollback.failure(written.record, error) from error
            raise
        return [f"router {upstream.name} is up: {target.nic} is in {target.namespace}"]

    def _mended(
        self, record: RouterRecord, configured: bool, within: float | None = None
    ) -> list[str]:
        done = self._repair(record)
        return done + self._apply_ports(record, within) if configured else done

    def _repair(self, record: RouterRecord) -> list[str]:
        return self._carry_out(self.plan(record), self._announce)

    def _carry_out(self, plan: RouterPlan, begin: Callable[[str], None]) -> list[str]:
        """Make a router what its plan says; ``begin`` is called ahead of each change."""
        names = {id(step.operation): step.what for step in plan}
        return carry_out(
            self.kernel,
            [step.operation for step in plan],
            # The journal takes a router back, also after a kill.
            Undo(),
            lambda operation: begin(names[id(operation)]),
        )

    def _apply_ports(self, record: RouterRecord, within: float | None) -> list[str]:
        """Put changed ``host_ports`` in force; undo the change where that fails."""
        name = record.target.name
        target = replace(record.target, ports=preflight.ports(self.upstream(name)))
        if target == record.target:
            return []
        preflight.check_published(target, self.needs(target))
        # Sessions from outside come in by these addresses now.
        preflight.check_session(target, {str(target.host.ip), *target.addresses4})
        deadline = record.deadline
        if deadline is None and within is not None:
            deadline = boot_clock.now() + within
        changed = journal.advance(record, target=target, deadline=deadline)
        try:
            if deadline is not None and record.deadline is None:
                confirm_timer.arm(name, deadline)
            self._repair(changed)
        except BaseException:
            self._repair(journal.advance(record))
            raise
        if deadline is None:
            confirmation.save(changed)
        return [PORTS_DIFFER]

    def plan(self, record: RouterRecord) -> RouterPlan:
        """Return the plan of a router, with what its networks need of it by now."""
        return router_plan.make(record, self.needs(record.target))

    def _announce(self, what: str) -> None:
        if self.before is not None:
            self.before(what)

    # -- confirm -----------------------------------------------------------

    def confirm(self, name: str) -> bool:
        """Confirm a router; returns False if it was confirmed already.  Raises RouterError."""
        with router_files.lock():
            record = recover.load(name)
            if record is None or not record.is_whole:
                raise RouterError(f"router {name} is not up", f"virt-natns router up {name}")
            if record.deadline is None:
                return False
            confirmation.save(journal.advance(record, deadline=None))
            return True

    def expire(self, name: str, deadline: float, remembered: RouterRecord | None = None) -> None:
        """Take a router back that still has this deadline, which has passed.

        ``remembered`` is the record that the router's timer has read last, for a journal
        that is lost or damaged by now.  Raises a NatnsError or OSError.
        """
        with self._alone():
            record = recover.overdue(name, deadline, remembered)
            if record is not None:
                self._take_back(record)

    def expire_overdue(self) -> list[str]:
        """Take all routers back that were not confirmed in time; returns what was done."""
        done = []
        for record in journal.load_all():
            if record.is_overdue and record.this_boot and record.deadline is not None:
                self.expire(record.target.name, record.deadline)
                done.append(f"rolled back router {record.target.name}, which was never confirmed")
        return done

    def follow_lease(self, name: str) -> None:
        """Put a changed DHCP lease of a router in force."""
        with self._alone():
            record = journal.load(name)
            if record is not None and record.is_whole:
                nic_lease.apply(record.target, record.before)
                if nic_lease.current(record.target) is not None:
                    # Routes by a static address have gone with it, even for a moment.
                    InnerNic(record.target, record.before, in_force=True).complete()

    # -- down --------------------------------------------------------------

    def down(self, name: str, *, force: bool = False) -> list[str]:
        """Put everything back as it was; returns in words how the NIC still differs.

        A router that is down already is success.  Raises RouterError while networks
        use the router, unless ``force``.
        """
        with self._alone():
            record = recover.load(name)
            if record is None:
                return []
            users = [] if force else self.users_of(record)
            if users and record.is_whole:
                raise RouterError(
                    f"router {name} serves {', '.join(users)}",
                    "stop these networks (virsh net-destroy), or use --force",
                )
            if not record.this_boot:
                recover.forget(record)
                return []
            return self._take_back(record)

    def users_of(self, record: RouterRecord) -> list[str]:
        """Return the networks that use a router; without the database, count their links."""
        try:
            return self.users(record.target.name)
        except StoreError as error:
            links = downstream.attached(record.target)
            return [f"{len(links)} networks ({error.fact})"] if links else []

    def _take_back(self, record: RouterRecord) -> list[str]:
        return rollback.take_back(self.kernel, record, self._announce)
