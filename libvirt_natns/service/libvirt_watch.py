# SPDX-License-Identifier: LGPL-2.1-or-later
"""The watch of libvirt: edited metadata, plugged devices and other changes without a hook.

libvirt's event loop only puts the guest or network of an event into a queue.  Workers
ask libvirt about it and apply the answer.  So a libvirt that waits for a hook holds up a
worker, never the answers to hooks.

The watch is connected to each daemon of libvirt that runs, and starts none.  Events may
be missed without a connection, so all networks and guests are reconciled after the next.

Known limit: a modular daemon that systemd would end for want of work stays as long as
the watch listens to it.
"""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Literal

from libvirt_natns.daemons import libvirtd
from libvirt_natns.daemons.libvirt_events import EventConnection, Kind, LibvirtEvent, Loop
from libvirt_natns.daemons.libvirtd import Driver, LibvirtDaemon
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.factory import Sessions
from libvirt_natns.engine.guests.guest_engine import Guests
from libvirt_natns.engine.reconcile import sync
from libvirt_natns.errors import LibvirtError, NatnsError
from libvirt_natns.service.complaints import Complaints
from libvirt_natns.service.log import Level, Log
from libvirt_natns.service.workqueue import Workers, WorkQueue

DRIVERS = (libvirtd.QEMU, libvirtd.LXC, libvirtd.NETWORK)
WORKERS = 3
"""Two may be held up, by a hook and by a reconciliation, and the third still works."""

LOOK = 0.5
"""Seconds between two looks for a daemon without a connection."""

PATIENCE = 30.0
"""At most so many seconds between two attempts to connect to a daemon that refuses."""

GATHER = 0.2
"""Seconds in which newly connected drivers are reconciled together."""

HOOKS_FIRST = 0.25
"""Seconds until the look at a start or stop, of which a hook has told nearly always."""

STOP_LIMIT = 3.0
"""Seconds that threads get to end; they may be waiting for a libvirt that is stuck."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A guest or a network, and the driver that knows it."""

    driver: Driver
    kind: Kind
    uuid: str
    name: str = field(compare=False)


AskXml = Callable[[], bytes | None]
"""Asks libvirt for the XML of a guest or a network; None where it is not active."""

Task = Subject | Literal["everything"]


class LibvirtWatch:
    """Listens to libvirt and applies changes, until it is stopped.

    ``reconcile`` repairs all networks and guests, and may take its time.  ``heard`` is called at
    each event, and must not wait.
    """

    def __init__(
        self,
        sessions: Sessions,
        log: Log,
        reconcile: Callable[[], None],
        heard: Callable[[], None] = lambda: None,
    ) -> None:
        self._sessions = sessions
        self._log = log
        self._reconcile = reconcile
        self._queue: WorkQueue[Task] = WorkQueue()
        self._loop = Loop()
        self._keepers = {
            driver: ConnectionKeeper(driver, log, self._queue, heard) for driver in DRIVERS
        }
        self._workers = Workers(self._queue, self._work, WORKERS, "libvirt-watch")

    def start(self) -> None:
        """Begin to listen, in threads that do not keep the process."""
        self._loop.start()
        self._workers.start()
        for keeper in self._keepers.values():
            keeper.start()

    def stop(self) -> None:
        """End the connections and the threads, as far as libvirt lets them end in time."""
        self._queue.close()
        keepers = self._keepers.values()
        for keeper in keepers:
            keeper.stop()
        deadline = time.monotonic() + STOP_LIMIT
        for keeper in keepers:
            keeper.join(max(0.0, deadline - time.monotonic()))
        self._workers.stop(max(0.0, deadline - time.monotonic()))
        # The loop comes last: only the loop ends a connection that is stuck.
        if not any(keeper.is_alive() for keeper in keepers):
            self._loop.stop()

    def reconcile_soon(self) -> None:
        """Have all reconciled, once for all calls within ``GATHER``."""
        self._queue.put("everything", GATHER)

    def is_active(self, uuid: str) -> bool | None:
        """Ask libvirt whether a network is active; None without a connection.

        Waits while libvirt starts or stops that network.  Raises LibvirtError.
        """
        link = self._keepers[libvirtd.NETWORK].link
        return None if link is None else link.xml("network", uuid) is not None

    # -- working -----------------------------------------------------------

    def _work(self, task: Task) -> None:
        try:
            self._do(task)
        except Exception:
            # A fault of ours in one event must not stop the worker.
            self._log.say("error", "fault", **_about(task), traceback=traceback.format_exc())

    def _do(self, task: Task) -> None:
        """Apply a change, or log why not; the state before it stays in force then."""
        try:
            if isinstance(task, Subject):
                self._follow(task)
            else:
                self._reconcile()
        except NatnsError as error:
            self._log.say(self._level(task, error), "not-applied", **_about(task), error=error)

    def _level(self, task: Task, error: NatnsError) -> Level:
        """Return the level of an error; after a broken connection all is reconciled."""
        link = self._keepers[task.driver].link if isinstance(task, Subject) else None
        broken = isinstance(error, LibvirtError) and (link is None or not link.alive)
        return "debug" if broken else "warning"

    def _follow(self, subject: Subject) -> None:
        link = self._keepers[subject.driver].link
        if link is None:
            # The next connection reconciles all.
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
            text = "; ".join(changed)
            self._log.say("info", "followed", **_about(subject), changed=text, seconds=taken)

    def _follow_network(self, engine: Engine, uuid: str, ask: AskXml) -> list[str]:
        ran = _runs(engine, uuid)
        changed = sync.network_changed(engine, uuid, ask)
        record = engine.store.networks.get(uuid)
        if record is not None:
            changed += Guests(engine).reroute(record)
        runs = _runs(engine, uuid)
        if not ran and runs:
            # No hook told of the network, nor then of the guests in it.
            self.reconcile_soon()
        if not runs:
            # Guests that still run publish nothing there.
            Guests(engine).refresh(uuid)
        return changed


def _runs(engine: Engine, uuid: str) -> bool:
    record = engine.store.networks.get(uuid)
    return record is not None and record.runs


def _about(task: Task) -> dict[str, str]:
    """Return the subject of a task, as fields of a line in the log."""
    return {task.kind: task.name} if isinstance(task, Subject) else {}


class ConnectionKeeper(Thread):
    """Keeps the connection to one driver, for as long as its daemon runs."""

    def __init__(
        self,
        driver: Driver,
        log: Log,
        queue: WorkQueue[Task],
        heard: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name=f"libvirt-{driver.scheme}", daemon=True)
        self.driver = driver
        self.link: EventConnection | None = None
        self._log = log
        self._queue = queue
        self._heard = heard
        self._backoff = Backoff()
        self._complaints = Complaints()
        self._stopping = Event()
        self._ended = Event()

    def run(self) -> None:
        """Connect, wait for the end of the connection, and begin again."""
        while not self._stopping.is_set():
            try:
                self._look()
            except Exception as error:  # without the thread no event of the driver is heard
                if self._complaints.is_news(self.driver.scheme, error):
                    when = f"listening to {self.driver.scheme}"
                    self._log.say_error("error", "fault", error, when=when)
            self._stopping.wait(LOOK)

    def stop(self) -> None:
        """Have the connection closed and the thread end, soon."""
        self._stopping.set()
        self._ended.set()

    def _look(self) -> None:
        daemon = self.driver.daemon()
        if daemon is not None and self._backoff.allows(daemon.pid):
            self._connect(daemon)

    def _connect(self, daemon: LibvirtDaemon) -> None:
        """Keep a connection until it ends, or until ``stop``."""
        self._ended = ended = Event()
        try:
            link = EventConnection(daemon.uri, self._tell, ended.set)
        except LibvirtError as error:
            if self._backoff.refused(daemon.pid):
                self._log.say("info", "not-connected", uri=daemon.uri, error=error)
            return
        self._backoff = Backoff()
        self._log.say("notice", "connected", uri=daemon.uri)
        self.link = link
        self._queue.put("everything", GATHER)
        # ``stop`` sets this event first, as ``_ended`` may be that of an earlier connection.
        if not self._stopping.is_set():
            ended.wait()
        self.link = None
        self._complaints.end(self.driver.scheme)
        link.close()
        self._log.say("notice", "disconnected", uri=daemon.uri)

    def _tell(self, happened: LibvirtEvent) -> None:
        if happened.what != "definition":
            subject = Subject(self.driver, happened.kind, happened.uuid, happened.name)
            self._queue.put(subject, HOOKS_FIRST if happened.what == "life" else 0.0)
        self._heard()


class Backoff:
    """Makes attempts at a daemon that refuses ever fewer, and begins anew with the next daemon."""

    def __init__(self) -> None:
        self._pid: int | None = None
        self._wait = LOOK
        self._due = 0.0

    def allows(self, pid: int) -> bool:
        """True if the daemon of that pid may be tried now."""
        return pid != self._pid or time.monotonic() >= self._due

    def refused(self, pid: int) -> bool:
        """Note that a daemon has refused; true for the first time."""
        first = pid != self._pid
        self._pid = pid
        self._wait = LOOK if first else min(2 * self._wait, PATIENCE)
        self._due = time.monotonic() + self._wait
        return first
