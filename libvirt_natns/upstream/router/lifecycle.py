# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs of a router: up, confirm, down, and how it is.

All of it is done under one lock.  A router that a kill left between two states is
taken back first, by the journal, whatever was asked for; one of an earlier boot has left
nothing but, perhaps, its resolv.conf.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from libvirt_natns import names
from libvirt_natns.errors import NatnsError, RouterError, StoreError
from libvirt_natns.kernel.boot import boot_id
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.upstream import Upstream
from libvirt_natns.records import dataclass, replace
from libvirt_natns.upstream.router import (
    confirm_timer,
    dhcp,
    downstream,
    journal,
    nic,
    preflight,
    recover,
    resolv_conf,
)
from libvirt_natns.upstream.router.downstream import Needs
from libvirt_natns.upstream.router.journal import Record, Target
from libvirt_natns.upstream.router.nic import Capture
from libvirt_natns.upstream.router.steps import STEPS, Work

Before = Callable[[str], None]
NeedsOf = Callable[[Target], Needs]

Health = Literal["down", "half-done", "overdue", "unconfirmed", "up", "damaged"]

PORTS_DIFFER = "host_ports differ from the configuration"


def _no_needs(_: Target) -> Needs:
    return Needs()


@dataclass(frozen=True, slots=True)
class Machine:
    """The verbs over one configuration and one kernel session.

    ``needs`` is what the networks on a router need of it, ``users`` who they are, by
    the router's name; ``reattach`` hangs them on it again, where it is a new one.
    ``before`` is called ahead of each step, for tests.  ``faults`` are why the configuration
    or the database cannot be read: a new router needs both, and nothing else does.
    """

    config: Config
    kernel: Kernel
    needs: NeedsOf = _no_needs
    users: Callable[[str], list[str]] = lambda _: []
    reattach: Callable[[str], list[str]] = lambda _: []
    faults: tuple[NatnsError, ...] = ()
    before: Before | None = None

    def upstream(self, name: str | None) -> Upstream:
        """The upstream of a router, the only one without a name.  Raises RouterError."""
        return preflight.upstream(self.config, name)

    # -- up ----------------------------------------------------------------

    def up(
        self,
        name: str,
        within: float | None = None,
        *,
        configured: bool = True,
    ) -> list[str]:
        """Make a router, or repair the one there is; returns what was done, in words.

        One that is up gets changed ``host_ports`` where it is to be as ``configured``.
        Unless it is confirmed ``within`` so many seconds, it is taken back; so a new one
        is at once where any step fails.  Raises a NatnsError.
        """
        for fault in self.faults:
            raise fault
        upstream = self.upstream(name)
        with journal.lock(), self.kernel.work():
            done: list[str] = []
            record = self._settled(name, done)
            if record is None:
                kept = journal.kept(name)
                return [*done, *self._make(upstream, kept.before if kept else None, within)]
            done += self._repair(record)
            return done if not configured else done + self._apply(record, within)

    def boot(self, upstream: Upstream, had: Capture) -> list[str]:
        """Make a router as it was confirmed, or repair the one there is.

        The NIC's configuration may not be complete yet: it ``had`` these settings when
        the router was confirmed.  Raises a NatnsError.
        """
        with journal.lock(), self.kernel.work():
            done: list[str] = []
            record = self._settled(upstream.name, done)
            if record is not None:
                return done + self._repair(record)
            return [*done, *self._make(upstream, had, boot=True)]

    def _settled(self, name: str, done: list[str]) -> Record | None:
        """The record of a router that is up; any other is taken back first."""
        record = recover.load(name, done.append)
        if record is None:
            return None
        if not record.this_boot:
            self._forget(record)
            return None
        if record.is_whole and not record.is_overdue:
            return record
        done.append(f"took back router {name}, which was {self._unsettled(record)}")
        self._take_back(record)
        return None

    @staticmethod
    def _unsettled(record: Record) -> str:
        return "never confirmed" if record.is_whole else f"interrupted {record.state}"

    def _make(
        self,
        upstream: Upstream,
        had: Capture | None,
        within: float | None = None,
        *,
        boot: bool = False,
    ) -> list[str]:
        target, before, resolv = preflight.target(
            self.config, self.kernel, upstream, had, boot=boot
        )
        deadline = None if within is None else nic.clock() + within
        record = Record(target, before, resolv, "going up", boot_id(), deadline=deadline)
        journal.save(record)
        try:
            if deadline is not None:
                confirm_timer.arm(upstream.name, deadline)
            for step in STEPS:
                self._announce(step.what)
                record = journal.advance(record, step=step.what)
                step.do(self._work(record))
            self._announce("note that it is up")
            record = journal.advance(record, state="up", step="")
            if deadline is None and not boot:
                journal.keep(record)
        except BaseException as error:
            self._take_back(record)
            if isinstance(error, NatnsError | OSError):
                fact = error.fact if isinstance(error, NatnsError) else str(error)
                remedy = error.remedy if isinstance(error, NatnsError) else ""
                told = f"{record.step}: {fact}" + (f": {remedy}" if remedy else "")
                raise RouterError(
                    f"router {upstream.name}: cannot {told}", "everything is as it was"
                ) from error
            raise
        return [f"router {upstream.name} is up: {target.nic} is in {target.namespace}"]

    def _repair(self, record: Record) -> list[str]:
        work = self._work(record)
        done = []
        for step in STEPS:
            found = step.differs(work)
            if found:
                self._announce(step.what)
                step.do(work)
                done += found
        return done

    def _apply(self, record: Record, within: float | None) -> list[str]:
        """Put changed ``host_ports`` in force; all is as it was where that fails."""
        name = record.target.name
        target = replace(record.target, ports=preflight.ports(self.upstream(name)))
        if target == record.target:
            return []
        preflight.check_published(target, self.needs(target))
        deadline = record.deadline
        if deadline is None and within is not None:
            deadline = nic.clock() + within
        changed = journal.advance(record, target=target, deadline=deadline)
        try:
            if deadline is not None and record.deadline is None:
                confirm_timer.arm(name, deadline)
            self._repair(changed)
        except BaseException:
            self._repair(journal.advance(record))
            raise
        if deadline is None:
            journal.keep(changed)
        return [PORTS_DIFFER]

    def _work(self, record: Record) -> Work:
        return Work(self.kernel, record, lambda: self.needs(record.target))

    def _announce(self, what: str) -> None:
        if self.before is not None:
            self.before(what)

    # -- confirm -----------------------------------------------------------

    def confirm(self, name: str) -> bool:
        """Let a router stay; returns whether it was waiting for that.  Raises RouterError."""
        with journal.lock():
            record = recover.load(name)
            if record is None or not record.is_whole:
                raise RouterError(f"router {name} is not up", f"virt-natns router up {name}")
            if record.deadline is None:
                return False
            journal.keep(journal.advance(record, deadline=None))
            return True

    def expire(self, name: str, deadline: float, remembered: Record | None = None) -> None:
        """Take a router back whose deadline, this one, has passed.

        ``remembered`` is its record as its timer knows it, for a journal that has been
        lost or damaged meanwhile.  Raises a NatnsError or OSError.
        """
        with journal.lock(), self.kernel.work():
            record = recover.overdue(name, deadline, remembered)
            if record is not None:
                self._take_back(record)

    def forget_earlier(self, name: str) -> None:
        """Forget a router of an earlier boot, but for its resolv.conf, which goes back."""
        with journal.lock():
            record = journal.load(name)
            if record is not None and not record.this_boot:
                self._forget(record)

    def expire_overdue(self) -> list[str]:
        """Take all routers back that were not confirmed in time; returns what was done."""
        done = []
        for record in journal.load_all():
            if record.is_overdue and record.this_boot and record.deadline is not None:
                self.expire(record.target.name, record.deadline)
                done.append(f"took back router {record.target.name}, which was never confirmed")
        return done

    def follow_lease(self, name: str) -> None:
        """Put a changed DHCP lease of a router in force."""
        with journal.lock(), self.kernel.work():
            record = journal.load(name)
            if record is not None and record.is_whole:
                dhcp.apply(record.target, record.before)

    # -- down --------------------------------------------------------------

    def down(self, name: str, *, force: bool = False) -> list[str]:
        """Put everything back as it was; returns how the NIC differs from that all the same.

        That the router is down is success.  Raises RouterError while networks
        use it, unless ``force``.
        """
        with journal.lock(), self.kernel.work():
            record = recover.load(name)
            if record is None:
                return []
            users = [] if force else self.users_of(record)
            if users and record.is_whole:
                raise RouterError(
                    f"router {name} serves {', '.join(users)}",
                    "stop these networks (virsh net-destroy), or say --force",
                )
            if not record.this_boot:
                self._forget(record)
                return []
            return self._take_back(record)

    def users_of(self, record: Record) -> list[str]:
        """The networks that use a router; without the database, by their links."""
        try:
            return self.users(record.target.name)
        except StoreError as error:
            links = downstream.attached(record.target)
            return [f"{len(links)} networks ({error.fact})"] if links else []

    def _take_back(self, record: Record) -> list[str]:
        """Undo all steps; everything is tried before the first error is raised."""
        with suppress(OSError):
            # A full disk must not keep the NIC away.
            record = journal.advance(record, state="going down")
        work = self._work(record)
        errors: list[Exception] = []
        for step in reversed(STEPS):
            self._announce(f"take back: {step.what}")
            try:
                step.undo(work)
            except (NatnsError, OSError) as error:
                errors.append(error)
        if errors:
            raise errors[0]
        self._announce("forget the router")
        journal.discard(record.target.name)
        return nic.differences(None, record.before)

    @staticmethod
    def _forget(record: Record) -> None:
        """Settle a router of an earlier boot: only files have outlived that."""
        named = record.target.servers
        if named and resolv_conf.look() == resolv_conf.wanted(named, record.resolver):
            resolv_conf.restore(record.resolver)
        journal.discard(record.target.name)

    def repair_all(self, *, configured: bool = False) -> list[str]:
        """Repair all routers that are up; returns what differed.  Raises a NatnsError.

        What is ``configured`` otherwise by now comes only with the administrator's word.
        """
        found = []
        for record in journal.load_all():
            name = record.target.name
            if record.is_whole and not record.is_overdue and self.differences(name):
                done = self.up(name, configured=configured)
                found += [f"router {name}: {each}" for each in done]
        return found

    # -- looking -----------------------------------------------------------

    def all_differences(self) -> list[str]:
        """What differs of all routers that are up."""
        found = [
            f"router {record.target.name}: {what}"
            for record in journal.load_all()
            for what in (*self.differences(record.target.name), *dhcp.left_out(record.target))
        ]
        return found + [f"router {name}: {error}" for name, error in journal.damaged().items()]

    def differences(self, name: str) -> list[str]:
        """What of a router that is up is not as it should be, in words."""
        record = journal.load(name)
        if record is None or not record.is_whole:
            return []
        with self.kernel.work():
            work = self._work(record)
            found: list[str] = []
            for step in STEPS:
                found += step.differs(work)
        wanted = self._configured(name)
        if wanted is not None and preflight.ports(wanted) != record.target.ports:
            found.append(PORTS_DIFFER)
        return found + self.unapplied(name)

    def unapplied(self, name: str) -> list[str]:
        """What is configured otherwise, and only a router that is made anew can have."""
        record, wanted = journal.load(name), self._configured(name)
        if record is None or not record.is_whole or wanted is None:
            return []
        return preflight.unapplied(wanted, record.target, record.before)

    def _configured(self, name: str) -> Upstream | None:
        found = self.config.upstreams.get(name)
        return found if found is not None and found.kind == "router" else None

    def health(self, name: str) -> tuple[Health, Record | None, list[str]]:
        """How a router is, what is recorded of it, and what differs."""
        try:
            record = journal.load(name)
        except StoreError as error:
            return "damaged", None, [str(error)]
        if record is None and recover.is_lost(name):
            return "damaged", None, [f"the journal of router {name} is missing"]
        if record is None or not record.this_boot:
            return "down", None, []
        if not record.is_whole:
            return "half-done", record, []
        if record.is_overdue:
            return "overdue", record, []
        try:
            found = self.differences(name)
        except StoreError as error:
            # What its networks need stands in the database.
            found = [str(error)]
        if found:
            return "damaged", record, found
        return ("up" if record.deadline is None else "unconfirmed"), record, []


def is_confirmed(name: str) -> bool:
    """Whether a router was confirmed once, so that a boot may bring it up."""
    files = (names.router_file(name, kind) for kind in ("kept", "restore"))
    return any(file.exists() for file in files) or recover.kept(name) is not None
