# SPDX-License-Identifier: LGPL-2.1-or-later
"""Follows what libvirt tells of and no hook: metadata edited, devices plugged, ends missed.

libvirt's event loop only notes down whom an event concerns.  Workers ask libvirt
about those and apply the answer, and so a libvirt that is held up by a hook holds
up a worker, never the answering of hooks.

Connections are kept to daemons that run, and opened again when those do; none is
ever started by us.  As events were missed meanwhile, all is reconciled then.

Limit: a modular daemon that systemd would end for want of work stays as long as
we listen to it.
"""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Literal

from libvirt_natns.daemons import libvirtd
from libvirt_natns.daemons.libvirt_events import Happened, Kind, Link, Loop
from libvirt_natns.daemons.libvirtd import Daemon, Driver
from libvirt_natns.engine import reconcile
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.factory import Sessions
from libvirt_natns.engine.guests import Guests
from libvirt_natns.errors import LibvirtError, NatnsError
from libvirt_natns.service.agenda import Agenda
from libvirt_natns.service.log import Journal, Level

DRIVERS = (libvirtd.QEMU, libvirtd.LXC, libvirtd.NETWORK)
WORKERS = 3
"""Two may be held up, by a hook or by a reconciliation, without anybody waiting."""

LOOK = 0.5
"""Seconds between two looks whether a daemon runs that is not connected."""

PATIENCE = 30.0
"""The most seconds between two attempts to connect to a daemon that refuses."""

GATHER = 0.2
"""Seconds in which drivers that are connected are reconciled at once."""

HOOKS_FIRST = 0.25
"""Seconds by which a start or stop is looked at later: hooks have told of nearly all."""

STOP_LIMIT = 3.0
"""Seconds that threads get to end; they may be waiting for a libvirt that is stuck."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A guest or a network to look after, and whom to ask about it."""

    driver: Driver
    kind: Kind
    uuid: str
    name: str = field(compare=False)


Ask = Callable[[], bytes | None]
"""Asks libvirt for the XML of a guest or a network; None where it is not active."""

Task = Subject | Literal["everything"]


class Follower:
    """Listens to libvirt and applies what it tells, until it is stopped."""

    def __init__(self, sessions: Sessions, journal: Journal, reconcile: Callable[[], None]) -> None:
        """``reconcile`` looks after all networks and guests; it may take its time."""
        self._sessions = sessions
        self._journal = journal
        self._reconcile = reconcile
        self._agenda: Agenda[Task] = Agenda()
        self._loop = Loop()
        self._keepers = {driver: Keeper(driver, journal, self._agenda) for driver in DRIVERS}
        self._workers = [
            Thread(target=self._work, name=f"follower-{number}", daemon=True)
            for number in range(WORKERS)
        ]

    def start(self) -> None:
        """Begin to listen, in threads that do not keep the process."""
        self._loop.start()
        for thread in (*self._workers, *self._keepers.values()):
            thread.start()

    def stop(self) -> None:
        """End the connections and the threads, as far as libvirt lets them end in time."""
        self._agenda.close()
        keepers = self._keepers.values()
        for keeper in keepers:
            keeper.stop()
        deadline = time.monotonic() + STOP_LIMIT
        for thread in (*keepers, *self._workers):
            thread.join(max(0.0, deadline - time.monotonic()))
        # Last: a connection that is stuck ends by the loop alone.
        if not any(keeper.is_alive() for keeper in keepers):
            self._loop.stop()

    def reconcile_soon(self) -> None:
        """Have all reconciled, once for all who ask at about the same time."""
        self._agenda.put("everything", GATHER)

    def is_active(self, uuid: str) -> bool | None:
        """Ask libvirt for a network; None without a connection.

        Waits while libvirt starts or stops that network.  Raises LibvirtError.
        """
        link = self._keepers[libvirtd.NETWORK].link
        return None if link is None else link.xml("network", uuid) is not None

    # -- working -----------------------------------------------------------

    def _work(self) -> None:
        while (task := self._agenda.take()) is not None:
            try:
                self._do(task)
            except Exception:
                # A fault of ours in one event must not keep the others back.
                self._journal.say(
                    "error", "fault", **_about(task), traceback=traceback.format_exc()
                )
            finally:
                self._agenda.done(task)

    def _do(self, task: Task) -> None:
        """Look after somebody, or say why not; what was in force before still is."""
        try:
            if isinstance(task, Subject):
                self._follow(task)
            else:
                self._reconcile()
        except NatnsError as error:
            self._journal.say(self._level(task, error), "not-applied", **_about(task), error=error)

    def _level(self, task: Task, error: NatnsError) -> Level:
        """A broken connection is no loss: all is reconciled after the next."""
        link = self._keepers[task.driver].link if isinstance(task, Subject) else None
        broken = isinstance(error, LibvirtError) and (link is None or not link.alive)
        return "debug" if broken else "warning"

    def _follow(self, subject: Subject) -> None:
        link = self._keepers[subject.driver].link
        if link is None:
            # All is reconciled once there is one.
            return

        def ask() -> bytes | None:
            return link.xml(subject.kind, subject.uuid)

        start = time.monotonic()
        with self._sessions.engine() as engine:
            if subject.kind == "guest":
                changed = Guests(engine).follow(subject.uuid, ask)
            else:
                changed = self._follow_network(engine, subject.uuid, ask)
        if changed:
            taken = time.monotonic() - start
            told = "; ".join(changed)
            self._journal.say("info", "followed", **_about(subject), changed=told, seconds=taken)

    def _follow_network(self, engine: Engine, uuid: str, ask: Ask) -> list[str]:
        ran = _runs(engine, uuid)
        changed = reconcile.network_changed(engine, uuid, ask)
        runs = _runs(engine, uuid)
        if not ran and runs:
            # No hook told of it: nor, then, of guests that run in it.
            self.reconcile_soon()
        if not runs:
            # Guests that still run publish nothing there.
            Guests(engine).refresh(uuid)
        return changed


def _runs(engine: Engine, uuid: str) -> bool:
    record = engine.store.networks.get(uuid)
    return record is not None and record.runs


def _about(task: Task) -> dict[str, str]:
    """Whom a task is about, as fields of a line in the log."""
    return {task.kind: task.name} if isinstance(task, Subject) else {}


class Keeper(Thread):
    """Keeps the connection to one driver, for as long as its daemon runs."""

    def __init__(self, driver: Driver, journal: Journal, agenda: Agenda[Task]) -> None:
        super().__init__(name=f"libvirt-{driver.scheme}", daemon=True)
        self.driver = driver
        self.link: Link | None = None
        self._journal = journal
        self._agenda = agenda
        self._patience = Patience()
        self._stopping = Event()
        self._ended = Event()

    def run(self) -> None:
        """Connect, be connected, and begin again."""
        while not self._stopping.is_set():
            daemon = self.driver.daemon()
            if daemon is not None and self._patience.allows(daemon.pid):
                self._connect(daemon)
            self._stopping.wait(LOOK)

    def stop(self) -> None:
        """Have the connection closed and the thread end, soon."""
        self._stopping.set()
        self._ended.set()

    def _connect(self, daemon: Daemon) -> None:
        """Be connected until the connection ends, or is to."""
        self._ended = ended = Event()
        try:
            link = Link(daemon.uri, self._tell, ended.set)
        except LibvirtError as error:
            if self._patience.refused(daemon.pid):
                self._journal.say("info", "not-connected", uri=daemon.uri, error=error)
            return
        self._patience = Patience()
        self._journal.say("notice", "connected", uri=daemon.uri)
        self.link = link
        self._agenda.put("everything", GATHER)
        # Whoever stops us has set the one before it looked at the other.
        if not self._stopping.is_set():
            ended.wait()
        self.link = None
        link.close()
        self._journal.say("notice", "disconnected", uri=daemon.uri)

    def _tell(self, happened: Happened) -> None:
        subject = Subject(self.driver, happened.kind, happened.uuid, happened.name)
        self._agenda.put(subject, HOOKS_FIRST if happened.what == "life" else 0.0)


class Patience:
    """Ever fewer attempts at a daemon that refuses, from the start again with the next one."""

    def __init__(self) -> None:
        self._pid: int | None = None
        self._wait = LOOK
        self._due = 0.0

    def allows(self, pid: int) -> bool:
        """Whether that daemon may be tried now."""
        return pid != self._pid or time.monotonic() >= self._due

    def refused(self, pid: int) -> bool:
        """Note that it has refused; returns whether it was the first time."""
        first = pid != self._pid
        self._pid = pid
        self._wait = LOOK if first else min(2 * self._wait, PATIENCE)
        self._due = time.monotonic() + self._wait
        return first
