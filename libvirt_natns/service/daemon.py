# SPDX-License-Identifier: LGPL-2.1-or-later
"""The resident service: answers hooks, applies changes, heals damage.

Each event is answered in a thread of its own, by the code that a hook runs without the
service.  So networks wait for each other only at their locks.  An answer never asks
libvirt, which waits for it.

Other news come from three sides.  ``libvirt_watch`` listens to libvirt, ``kernel_watch``
to the kernel.  A reconciliation after each connection to libvirt finds what both missed.

A daemon of libvirt that sleeps is not woken: all of its networks and guests are known.
"""

import gc
import json
import os
import signal
import socket
import time
from contextlib import ExitStack, closing, suppress
from threading import Lock

from libvirt_natns import __version__
from libvirt_natns.addresses import Address, parsed
from libvirt_natns.daemons import libvirt, systemd
from libvirt_natns.documents import config
from libvirt_natns.engine import rebuild
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.observer import HOST
from libvirt_natns.engine.reconcile import sync
from libvirt_natns.engine.reconcile.active import Active
from libvirt_natns.errors import AddressTakenError, LibvirtError
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.channel import load_writer
from libvirt_natns.service import resources
from libvirt_natns.service.arrivals import Arrivals
from libvirt_natns.service.change_observer import ChangeObserver
from libvirt_natns.service.engine_pool import EnginePool
from libvirt_natns.service.healer import Healer
from libvirt_natns.service.kernel_watch import KernelWatch
from libvirt_natns.service.libvirt_watch import LibvirtWatch
from libvirt_natns.service.listener import own_socket
from libvirt_natns.service.log import Log
from libvirt_natns.service.look import Look
from libvirt_natns.service.looks import Looks
from libvirt_natns.service.metrics import Metrics
from libvirt_natns.service.server import Server
from libvirt_natns.service.starts import Starts
from libvirt_natns.service.watched import Watched, parent_of
from libvirt_natns.service.workqueue import Background
from libvirt_natns.state.address_conflicts import Conflicts
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store

REST = 5.0
"""Seconds after some work until its memory is given back."""


class Service:
    """All parts of the service, and their connections."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.look = Look(log)
        log.hear(self.look.changed)
        self.metrics = Metrics()
        self.background = Background(self._failed)
        observer = ChangeObserver(log, self.metrics, self._after_work)
        self.sessions = EnginePool(observer, self.background)
        self.healer = Healer(
            self.sessions, log, on_heal=self.metrics.healed, on_failure=self.metrics.failed
        )
        self.kernel_watch = KernelWatch(
            self._describe, self._suspect, self.healer.appeared, self._fault_of_watch
        )
        observer.connect(self.healer, self.kernel_watch)
        self.libvirt_watch = LibvirtWatch(
            self.sessions, log, self.reconcile, heard=self.look.changed
        )
        self.starts = Starts(self.sessions, log, self.libvirt_watch.is_active)
        self.sessions.expect = self.starts.expect
        self.arrivals = Arrivals(self.sessions, log)
        self.looks = Looks(self.sessions, self.background, log, self._report, self.healer.suspect)
        self.server = Server(
            self.sessions,
            log,
            self.metrics,
            {"metrics": self._say_metrics, "health": self._say_health},
        )
        self.conflicts = Conflicts()
        self._since = time.time()
        self._reconciling = Lock()

    # -- running -----------------------------------------------------------

    def run(self, listener: socket.socket) -> None:
        """Serve until a signal ends it (SIGTERM, SIGINT)."""
        parts = (
            self.background, self.kernel_watch, self.healer, self.libvirt_watch, self.starts,
            self.arrivals, self.look,
        )  # fmt: skip
        with ExitStack() as started:
            for part in parts:
                part.start()
                started.callback(part.stop)
            self._look_after_all()
            self.looks.start()
            self.server.handle({
                signal.SIGHUP: self.libvirt_watch.reconcile_soon,
                signal.SIGTERM: self.server.stop,
                signal.SIGINT: self.server.stop,
            })  # fmt: skip
            # All objects made so far stay: the collector need not look at them.
            gc.freeze()
            systemd.notify("READY=1")
            self.log.say("notice", "started", version=__version__, pid=os.getpid())
            self.server.run(listener, systemd.watchdog_interval())
            systemd.notify("STOPPING=1")
        self.sessions.close()
        self.log.say("notice", "ended", pid=os.getpid())

    def _look_after_all(self) -> None:
        """Watch networks that are up, and follow starts that go on."""
        try:
            with self.sessions.engine() as engine:
                records = engine.store.networks.all("preparing", "starting", "up")
                if expects_a_start(engine.store):
                    self.background.soon(load_writer)
        except Exception as error:  # hooks are answered in any case
            self.log.say_error("error", "startup", error)
            return
        # The watch has networks that are new to it looked at.
        self.kernel_watch.follow(
            record.uuid for record in records if record.state == "up" and record.this_boot
        )
        for record in records:
            if record.state != "up":
                self.starts.expect(record.uuid)

    # -- for the parts -----------------------------------------------------

    def _describe(self, uuid: str) -> Watched | None:
        """Return the parts of a network to watch; None where it is not up."""
        with closing(Store()) as store:
            record = store.networks.get(uuid)
        if record is None or record.state != "up":
            return None
        return Watched.of(record, parent_of(record.upstream))

    def reconcile(self) -> None:
        """Repair all that differs, as ``virt-natns sync`` does, but move no network.

        A network and its connections do not notice that the service starts.
        """
        start = time.monotonic()
        with self._reconciling:
            rebuilt = rebuild.rebuild(config.load(), _ask_networks, _ask_guests)
            for _, what in rebuilt.found[:1]:
                self.log.say("warning", "rebuilt", database=what)
            with self.sessions.engine() as engine:
                outcome = sync.sync_all(engine, _ask_networks, _ask_guests, configured=False)
        for name, what in [*rebuilt.found[1:], *outcome.repaired]:
            self.log.say("warning", "reconciled", network=name, repaired=what)
        for error in [*rebuilt.errors, *outcome.errors]:
            self.metrics.failed("reconcile")
            self.log.say("error", "reconcile", error=error)
        taken = time.monotonic() - start
        self.log.say("info", "reconciled", repaired=len(outcome.repaired), seconds=taken)

    def _after_work(self) -> None:
        # Each is done once for all verbs within its time.
        self.background.after(REST, resources.give_memory_back)
        self.looks.after_work()

    def _suspect(self, uuid: str) -> None:
        self.healer.suspect(uuid)
        self.look.changed()
        if uuid == HOST:
            self.looks.after_change_of_host()

    # -- errors ------------------------------------------------------------

    def _failed(self, error: Exception) -> None:
        """Report work in the background that has failed, and have the networks compared."""
        self._report(error, "in the background")
        if isinstance(error, AddressTakenError):
            self._relocate(error)
        else:
            # The error does not name its network.
            self.suspect_all()

    def _report(self, error: Exception, when: str, network: str | None = None) -> None:
        self.metrics.failed("background")
        self.log.say_error("error", "failed", error, when=when, network=network)

    def _fault_of_watch(self, error: Exception) -> None:
        self.metrics.failed("background")
        self.log.say_error("error", "fault", error, when="watching the kernel")

    def suspect_all(self) -> None:
        """Have each network that is up compared with its plan."""
        # The error is reported already, and this one may well be the same.
        with suppress(Exception), self.sessions.engine() as engine:
            for record in engine.store.networks.all("up"):
                if record.this_boot:
                    self.healer.suspect(record.uuid)

    def _relocate(self, error: AddressTakenError) -> None:
        """Move a start away from an address that is taken: once, then keep and defend it."""
        try:
            with self.sessions.engine() as engine:
                for record in engine.store.networks.all("starting", "up"):
                    if record.namespace == error.namespace and record.this_boot:
                        self._settle(engine, record, parsed(error.address))
        except Exception as fault:  # no caller reports it
            self.log.say_error("error", "relocate", fault, network=error.namespace)

    def _settle(self, engine: Engine, record: NetworkRecord, address: Address) -> None:
        self.conflicts.note(record.upstream, address)
        own = engine.store.leases.of(record.upstream, record.uuid).addresses
        inode = netns.inode(record.namespace)
        # A guest's own address was probed for in full before the guest started.
        if address in own and self.conflicts.may_move(record.uuid, inode):
            engine.relocate(record.uuid, address, self.conflicts.taken(record.upstream))
            return
        engine.defend(record, address)
        self.log.say("warning", "conflict", network=record.name, kept=address)

    # -- questions of people -----------------------------------------------

    def _say_metrics(self) -> str:
        with self.sessions.engine() as engine:
            return self.metrics.text(engine, self.healer.health(), self.looks.obstacles.kinds())

    def _say_health(self) -> str:
        return json.dumps(
            {
                "pid": os.getpid(),
                "version": __version__,
                "since": self._since,
                "given_up": dict(self.healer.health()),
            }
        )


def expects_a_start(store: Store) -> bool:
    """True if a known network does not run, so that it may start soon.

    The first start in a process would wait 0.15 s for the library that makes changes.
    Networks that run seldom need a change.
    """
    return any(not record.runs for record in store.networks.all())


def _ask_networks() -> Active | None:
    with suppress(LibvirtError):
        return libvirt.active_networks(wake=False)
    return None


def _ask_guests() -> libvirt.ActiveDomains | None:
    with suppress(LibvirtError):
        return libvirt.active_domains(wake=False)
    return None


def main() -> int:
    """Run the service in the foreground, and return the exit status."""
    resources.fill_standard_streams()
    resources.raise_limits()
    resources.save_memory()
    with ExitStack() as cleanup:
        listener = systemd.passed_socket() or own_socket(cleanup)
        Service(Log()).run(listener)
    return 0
