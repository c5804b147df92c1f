# SPDX-License-Identifier: LGPL-2.1-or-later
"""The resident service: answers hooks, applies changes, heals damage.

Each event is answered in a thread of its own by the very code that a hook runs
without the service, so networks wait for each other only where their locks make
them.  Nothing on that way asks libvirt, which waits for the answer.

What it learns otherwise comes from three sides: ``follower`` listens to libvirt,
``watch`` to the kernel, and a reconciliation after each connection to libvirt
finds what both have missed.
"""

import ctypes
import gc
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from threading import Lock
from types import FrameType

from libvirt_natns import __version__, names
from libvirt_natns.addresses import Address, parsed
from libvirt_natns.daemons import libvirt, systemd
from libvirt_natns.documents import config
from libvirt_natns.engine import proxied_addresses, rebuild, reconcile
from libvirt_natns.engine.engine import Engine
from libvirt_natns.errors import (
    AddressTakenError,
    ConfigError,
    LibvirtError,
    NatnsError,
    ServiceError,
    describe,
)
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.locks import OURS, make_directory
from libvirt_natns.service.background import Background
from libvirt_natns.service.client import SOCKET
from libvirt_natns.service.engine_pool import Kept
from libvirt_natns.service.healer import Healer
from libvirt_natns.service.kernel_watch import Watch, Watched
from libvirt_natns.service.libvirt_watch import Follower
from libvirt_natns.service.log import Journal
from libvirt_natns.service.metrics import Metrics
from libvirt_natns.service.server import Answering
from libvirt_natns.service.starts import Starts
from libvirt_natns.state.address_conflicts import Conflicts
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import routers

M_ARENA_MAX = -8
"""Of malloc.h."""

REST = 5.0
"""Seconds after some work until its memory is given back."""

ROUTERS = 10.0
"""Seconds between two looks for routers that were not confirmed in time."""

LOOK = 1.0
"""Seconds between two looks at what guests in a provider's own IPv6 prefix have claimed."""

TELLING = 300
"""Characters of what a verb changed that the log shows."""


class Witness:
    """Observes the verbs: for the watch, the healer, the log and the metrics."""

    def __init__(self, journal: Journal, metrics: Metrics, after_work: Callable[[], None]) -> None:
        self._journal = journal
        self._metrics = metrics
        self._after_work = after_work
        self._healer: Healer | None = None
        self._watch: Watch | None = None

    def tell(self, healer: Healer, watch: Watch) -> None:
        """Whom to tell: they themselves use what this observes."""
        self._healer, self._watch = healer, watch

    def changing(self, uuid: str) -> AbstractContextManager[None]:
        """See ``Observer``."""
        return self._watch.changing(uuid) if self._watch else nullcontext()

    def done(self, verb: str, name: str, changed: Sequence[str], seconds: float) -> None:
        """See ``Observer``."""
        try:
            self._note(verb, name, changed, seconds)
        except Exception as error:  # the work is done, whatever is wrong with its account
            self._journal.say("error", "failed", when=f"telling of {verb}", error=error)

    def failed(self, when: str, error: Exception) -> None:
        """See ``Observer``."""
        self._journal.say("warning", "failed", when=when, error=error)

    def _note(self, verb: str, name: str, changed: Sequence[str], seconds: float) -> None:
        self._metrics.changed(verb, seconds)
        self._after_work()
        # A repair says itself what was wrong.
        if changed and not (self._healer and self._healer.at_work):
            if self._healer:
                self._healer.relent(name)
            told = "; ".join(changed)
            self._journal.say("info", verb, network=name, changed=told[:TELLING], seconds=seconds)


class Service:
    """All parts of the service, and how they hang together."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.metrics = Metrics()
        self._asked = proxied_addresses.Asked()
        self.background = Background(self._failed)
        # Once for all that is done within that time.
        witness = Witness(journal, self.metrics, self._after_work)
        self.sessions = Kept(witness, self.background)
        self.healer = Healer(
            self.sessions, journal, on_heal=self.metrics.healed, on_failure=self.metrics.failed
        )
        self.watch = Watch(self._describe, self.healer.suspect, self.healer.appeared)
        witness.tell(self.healer, self.watch)
        self.follower = Follower(self.sessions, journal, self.reconcile)
        self.starts = Starts(self.sessions, journal, self.follower.is_active)
        self.sessions.expect = self.starts.expect
        self.answering = Answering(
            self.sessions,
            journal,
            self.metrics,
            {"metrics": self._say_metrics, "health": self._say_health},
        )
        self.conflicts = Conflicts()
        self._since = time.time()
        self._reconciling = Lock()
        # The last complaint about routers that were not confirmed in time.
        self._not_expired = ""

    # -- running -----------------------------------------------------------

    def run(self, listener: socket.socket) -> None:
        """Serve until a signal ends it (SIGTERM, SIGINT)."""
        with ExitStack() as parts:
            for part in (self.background, self.watch, self.healer, self.follower, self.starts):
                part.start()
                parts.callback(part.stop)
            self._look_after_all()
            self.background.soon(self._expire_routers)
            signal.signal(signal.SIGHUP, self._on_hangup)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: self.answering.stop())
            # What was imported and made so far stays: the collector need not look at it.
            gc.freeze()
            systemd.notify("READY=1")
            self.journal.say("notice", "started", version=__version__, pid=os.getpid())
            self.answering.run(listener, systemd.watchdog_interval())
            systemd.notify("STOPPING=1")
        self.sessions.close()
        self.journal.say("notice", "ended", pid=os.getpid())

    def _on_hangup(self, number: int, frame: FrameType | None) -> None:
        self.follower.reconcile_soon()

    def _look_after_all(self) -> None:
        """Watch what is up, and repair what was damaged meanwhile."""
        try:
            with self.sessions.engine() as engine:
                found = engine.store.networks.all("preparing", "starting", "up")
        except NatnsError as error:
            self.journal.say("error", "startup", error=error)
            return
        up = [record.uuid for record in found if record.state == "up" and record.this_boot]
        # It has those looked at that are new to it.
        self.watch.follow(up)
        for record in found:
            if record.state != "up":
                self.starts.expect(record.uuid)

    def _expire_routers(self) -> None:
        """Take overdue routers back, whose own timers have been killed; again in a while."""
        try:
            for line in routers.expire_overdue():
                self.journal.say("warning", "expired", repaired=line)
            self._not_expired = ""
        except Exception as error:  # no network's, so none is suspected
            # Each look meets it again.
            if str(error) != self._not_expired:
                self._report(error, "taking a router back")
            self._not_expired = str(error)
        finally:
            self.background.after(ROUTERS, self._expire_routers)

    # -- what the parts ask ------------------------------------------------

    def _describe(self, uuid: str) -> Watched | None:
        with closing(Store()) as store:
            record = store.networks.get(uuid)
        if record is None or record.state != "up":
            return None
        return Watched.of(record, _parent(record.upstream))

    def reconcile(self) -> None:
        """Repair all that differs, as ``virt-natns sync`` does."""
        start = time.monotonic()
        with self._reconciling:
            rebuilt = rebuild.rebuild(config.load(), _ask_networks, _ask_guests)
            for _, what in rebuilt.found[:1]:
                self.journal.say("warning", "rebuilt", database=what)
            with self.sessions.engine() as engine:
                outcome = reconcile.sync(engine, _ask_networks, _ask_guests)
        for name, what in [*rebuilt.found[1:], *outcome.repaired]:
            self.journal.say("warning", "reconciled", network=name, repaired=what)
        for error in [*rebuilt.errors, *outcome.errors]:
            self.metrics.failed("reconcile")
            self.journal.say("error", "reconcile", error=error)
        taken = time.monotonic() - start
        self.journal.say("info", "reconciled", repaired=len(outcome.repaired), seconds=taken)

    def _after_work(self) -> None:
        self.background.after(REST, _give_memory_back)
        if proxied_addresses.networks():
            self.background.after(LOOK, self._look_elsewhere)

    def _look_elsewhere(self) -> None:
        """Have addresses that guests took and stations outside have answered for no more."""
        found = proxied_addresses.networks()
        try:
            for uuid in found:
                with self.sessions.engine() as engine:
                    record = engine.store.networks.get(uuid)
                    changed = engine.look_elsewhere(uuid, self._asked)
                if changed and record:
                    told = "; ".join(changed)
                    self.journal.say("warning", "claimed", network=record.name, changed=told)
        finally:
            if found:
                self.background.after(LOOK, self._look_elsewhere)

    def _failed(self, error: Exception) -> None:
        """Report work in the background that has failed, and have the networks compared."""
        self._report(error, "in the background")
        if isinstance(error, AddressTakenError):
            self._relocate(error)
        else:
            # The error does not name its network.
            self._suspect_all()

    def _report(self, error: Exception, when: str) -> None:
        line, more = describe(error)
        self.metrics.failed("background")
        self.journal.say("error", "failed", when=when, error=line)
        for each in more:
            self.journal.say("error", "traceback", line=each)

    def _suspect_all(self) -> None:
        """Have every network that is up compared with what it needs."""
        with suppress(NatnsError), self.sessions.engine() as engine:
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
        except NatnsError as fault:
            self.journal.say("error", "relocate", network=error.namespace, error=fault)

    def _settle(self, engine: Engine, record: NetworkRecord, address: Address) -> None:
        self.conflicts.note(record.upstream, address)
        own = engine.store.leases.of(record.upstream, record.uuid).addresses
        inode = netns.inode(record.namespace)
        # A guest's own address was probed for in full before the guest started.
        if address in own and self.conflicts.may_move(record.uuid, inode):
            engine.relocate(record.uuid, address, self.conflicts.taken(record.upstream))
            return
        engine.defend(record, address)
        self.journal.say("warning", "conflict", network=record.name, kept=address)

    # -- what people ask ---------------------------------------------------

    def _say_metrics(self) -> str:
        with self.sessions.engine() as engine:
            return self.metrics.text(engine, given_up=self.healer.health())

    def _say_health(self) -> str:
        return json.dumps(
            {
                "pid": os.getpid(),
                "version": __version__,
                "since": self._since,
                "given_up": dict(self.healer.health()),
            }
        )


# A daemon that sleeps is not woken: it has no networks and no guests that are not known.


def _parent(upstream: str) -> str:
    """The link of the host that an upstream is; "" where the configuration does not tell."""
    with suppress(OSError):
        status = names.CONFIG_FILE.stat()
        return _parents(status.st_ino, status.st_mtime_ns, status.st_size).get(upstream, "")
    return ""


@lru_cache(maxsize=1)
def _parents(*version: int) -> dict[str, str]:
    """All of them, of a version of the file: reading it takes longer than all else here."""
    with suppress(ConfigError):
        upstreams = config.load().upstreams.values()
        return {upstream.name: upstream.bridge or "" for upstream in upstreams}
    return {}


def _ask_networks() -> reconcile.Active | None:
    with suppress(LibvirtError):
        return libvirt.active_networks(wake=False)
    return None


def _ask_guests() -> libvirt.Running | None:
    with suppress(LibvirtError):
        return libvirt.active_domains(wake=False)
    return None


# -- the process -------------------------------------------------------------


def main() -> int:
    """Run the service in the foreground; returns the exit status."""
    _fill_standard_streams()
    _raise_limits()
    _save_memory()
    with ExitStack() as cleanup:
        listener = systemd.passed_socket() or _own_socket(cleanup)
        Service(Journal()).run(listener)
    return 0


def _fill_standard_streams() -> None:
    """Have something behind standard error, where the service was started without it.

    Else a socket or the state database gets its number, and libraries and children
    write their complaints there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number, so this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _raise_limits() -> None:
    """A network takes a few file descriptors, and the usual limit is 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _save_memory() -> None:
    """One heap for all threads: glibc's many keep 10 MB for nothing, and few allocate at once."""
    with suppress(AttributeError):
        # Other C libraries have no such function, and no such heaps.
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def _give_memory_back() -> None:
    """What the last work needed is the machine's again; glibc keeps it otherwise."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _own_socket(cleanup: ExitStack) -> socket.socket:
    """Listen where hooks ask; ``cleanup`` takes the socket away again.

    Raises ServiceError where another service listens already.
    """
    path = Path(SOCKET)
    if _answers(path):
        raise ServiceError(f"a service listens on {path} already", "end that one first")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        make_directory(path.parent)
        # One that an earlier version has made may be open to all.
        path.parent.chmod(OURS)
        # What a service that was killed has left.
        path.unlink(missing_ok=True)
        # Nobody but root can connect, from the first moment on.
        mask = os.umask(0o177)
        listener.bind(os.fspath(path))
        os.umask(mask)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        raise ServiceError(f"cannot listen on {path}", error.strerror or str(error)) from error
    cleanup.callback(_remove_socket, path, path.stat().st_ino)
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(1.0)
        try:
            link.connect(os.fspath(path))
        except OSError:
            return False
    return True


def _remove_socket(path: Path, inode: int) -> None:
    with suppress(OSError):
        if path.stat().st_ino == inode:
            path.unlink()
            # Only where no network runs is the directory empty.
            path.parent.rmdir()
