# SPDX-License-Identifier: LGPL-2.1-or-later
"""Repairs networks that something happened to, and knows when to stop.

A network under suspicion is compared with what it should be, and where it differs
brought up again: that changes only what differs, so what is well is not touched.
After a repair it is looked at once more, as the damage may have gone on meanwhile,
while the watch took all that happened for our own doing.

Whoever keeps undoing what we do has their reasons: after a few repairs of the
same thing within a minute, a network is left as it is, with an error in the log
and in ``health``; so is one that cannot be repaired.  It gets another chance
after ten minutes, when somebody has it brought up (``relent``), and, where it
could not be repaired, when something about it changes.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from threading import Condition, Thread

from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine import reconcile
from libvirt_natns.engine.apply import Undo
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.factory import Sessions
from libvirt_natns.engine.observer import HOST
from libvirt_natns.errors import NatnsError
from libvirt_natns.model.network import Network
from libvirt_natns.model.upstream import Upstream
from libvirt_natns.records import dataclass, field
from libvirt_natns.service.log import Journal
from libvirt_natns.state.networks import NetworkRecord

WORKERS = 4
"""How many networks are looked at at once."""

DELAY = 0.15
"""Seconds from the first sign of damage to the look: it seldom comes alone."""

HOST_DELAY = 0.05
"""The same for what is shared: networks that rely on it are looked at later."""

HOST_PAUSE = 1.0
"""Seconds between two looks at the host, of which others change a lot."""

AGAIN = 0.5
"""Seconds until a repair is looked at once more, and until the first one that failed
is tried again; from there on, the double each time."""

WINDOW = 60.0
"""Seconds within which repairs count as a fight."""

REPAIRS = 5
"""How often the same thing is repaired within that time, and how often a repair may fail."""

ALL_REPAIRS = 20
"""How often anything is repaired within that time."""

RETRY = 600.0
"""Seconds after which what was given up is tried again."""

RECHECK = 10.0
"""Seconds between two tries of what could not be repaired, when something changes."""

BRIDGE_PAUSE = 5.0
"""Seconds until another try where the network's own bridge is missing: libvirt deletes
it a moment before it tells of a network's end."""

SAID = 3
"""The failure in a row of which the log tells."""

STARTING = 1.0
"""Seconds until a network that is being started is looked at again."""

STOP_LIMIT = 10.0
"""Seconds that a repair which is going on gets to end."""


class _NotUpError(NatnsError):
    """A network went down before it could be repaired."""


class _ChangedError(NatnsError):
    """A network's record was replaced before it could be repaired: it must be read anew."""


class _NoBridgeError(NatnsError):
    """libvirt's bridge is missing."""


class _Repairer(Engine):
    """The verb up, for networks that are up: one that went down meanwhile stays down.

    ``Engine.up`` itself makes a network's router in any state.
    """

    def _admit(self, network: Network, xml: bytes, upstream: Upstream, undo: Undo) -> None:
        # Under the network's lock, and before anything is changed.
        if self._state(network.uuid) != "up":
            raise _NotUpError(f"network {network.name} is not up")
        known = self.store.networks.get(network.uuid)
        if known is None or known.document != xml:
            raise _ChangedError(f"network {network.name} was changed")
        super()._admit(network, xml, upstream, undo)

    def _end_rivals(self, network: Network, *, active: bool) -> None:
        raise _NotUpError(f"network {network.name} is not up")


@dataclass(slots=True)
class _Trouble:
    """What happened lately to a network: repairs by time, and tries that failed in a row.

    ``given_up`` says why it is left alone.
    """

    name: str
    repairs: deque[tuple[float, tuple[str, ...]]] = field(default_factory=deque)
    failures: int = 0
    given_up: str = ""
    last: float = 0.0

    def repaired(self, now: float, found: Iterable[str]) -> None:
        """Note a repair, and forget old ones."""
        self.failures = 0
        self.given_up = ""
        self.repairs.append((now, tuple(found)))
        self.expire(now)

    def expire(self, now: float) -> None:
        """Forget repairs that are too long ago to count."""
        while self.repairs and now - self.repairs[0][0] > WINDOW:
            self.repairs.popleft()

    def fight(self) -> str:
        """What is undone again and again, in words; "" if nothing is."""
        counted = Counter(what for _, found in self.repairs for what in dict.fromkeys(found))
        what, times = counted.most_common(1)[0] if counted else ("", 0)
        if times <= REPAIRS and len(self.repairs) <= ALL_REPAIRS:
            return ""
        return f"{what} (repaired {times} times within {WINDOW:.0f} s)"


class Healer:
    """Looks at networks under suspicion, in threads of its own.

    ``on_heal`` is told how many seconds a repair took, ``on_failure`` that one
    failed or was given up ("heal").
    """

    def __init__(
        self,
        sessions: Sessions,
        journal: Journal,
        *,
        on_heal: Callable[[float], None] = lambda seconds: None,
        on_failure: Callable[[str], None] = lambda what: None,
    ) -> None:
        self._sessions = sessions
        self._journal = journal
        self._on_heal = on_heal
        self._on_failure = on_failure
        self._work = Condition()
        self._due: dict[str, float] = {}
        self._busy: set[str] = set()
        self._troubles: dict[str, _Trouble] = {}
        self._host_looked = 0.0
        self._host_waits = 0.0
        self._stopping = False
        self._workers: list[Thread] = []
        self._thread = threading.local()

    # -- for all threads ---------------------------------------------------

    def start(self) -> None:
        """Begin to look at networks under suspicion."""
        self._workers = [
            Thread(target=self._run, name=f"healer-{number}", daemon=True)
            for number in range(WORKERS)
        ]
        for worker in self._workers:
            worker.start()

    def stop(self) -> None:
        """End, with what is being repaired, but not with what is due."""
        with self._work:
            self._stopping = True
            self._work.notify_all()
        deadline = time.monotonic() + STOP_LIMIT
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))

    def suspect(self, uuid: str) -> None:
        """Have a network, or HOST, looked at soon."""
        now = time.monotonic()
        with self._work:
            if uuid == HOST:
                due = max(now + HOST_DELAY, self._host_looked + HOST_PAUSE)
            else:
                due = now + DELAY
            trouble = self._troubles.get(uuid)
            if trouble and trouble.given_up and trouble.failures:
                # Perhaps what stood in the way has gone.
                recheck = max(due, trouble.last + RECHECK)
                self._due[uuid] = min(self._due.get(uuid, recheck), recheck)
            elif uuid not in self._due:
                self._due[uuid] = due
            self._work.notify()

    def appeared(self, namespace: str) -> None:
        """A namespace that some other process has made: look at the network it belongs to."""
        try:
            with self._sessions.engine() as engine:
                found = engine.store.networks.all("starting", "up")
        except NatnsError as error:
            self._journal.say("error", "heal", namespace=namespace, error=error)
            return
        for record in found:
            if record.namespace == namespace and record.runs:
                self.suspect(record.uuid)

    def relent(self, name: str) -> None:
        """Somebody's verb has changed a network of that name: begin anew with it.

        What this object does itself by way of a repair does not count.
        """
        if self.at_work:
            return
        with self._work:
            for uuid in [key for key, known in self._troubles.items() if known.name == name]:
                self._forget(uuid)

    def forget(self, uuid: str) -> None:
        """Begin anew with a network, whatever happened to it."""
        with self._work:
            self._forget(uuid)

    def _forget(self, uuid: str) -> None:
        trouble = self._troubles.pop(uuid, None)
        if trouble and trouble.given_up:
            self._due.pop(uuid, None)

    @property
    def at_work(self) -> bool:
        """Whether the calling thread is repairing something for this object."""
        return getattr(self._thread, "at_work", False)

    def health(self) -> Mapping[str, str]:
        """Networks (HOST: what they share) that are left alone, by uuid, and why."""
        with self._work:
            return {
                uuid: trouble.given_up
                for uuid, trouble in self._troubles.items()
                if trouble.given_up
            }

    # -- the workers -------------------------------------------------------

    def _run(self) -> None:
        while True:
            uuid = self._next()
            if uuid is None:
                return
            self._thread.at_work = True
            try:
                # A log that cannot be written must not end a worker.
                with suppress(OSError):
                    self._look(uuid)
            finally:
                self._thread.at_work = False
                with self._work:
                    self._busy.discard(uuid)
                    self._work.notify_all()

    def _next(self) -> str | None:
        """Wait for a network that is due and that nobody looks at; None to end."""
        with self._work:
            while not self._stopping:
                now = time.monotonic()
                uuid, due = self._first()
                if due is not None and due <= now:
                    del self._due[uuid]
                    self._busy.add(uuid)
                    # There may be more for another worker.
                    self._work.notify()
                    return uuid
                self._work.wait(None if due is None else due - now)
        return None

    def _first(self) -> tuple[str, float | None]:
        """Who is due first, and when (None: nobody is)."""
        if HOST in self._busy:
            # Each network's repair begins with the host's, and would keep it to itself.
            return "", None
        idle = [(due, uuid) for uuid, due in self._due.items() if uuid not in self._busy]
        due, uuid = min(idle, default=(None, ""))
        first = HOST in self._due and time.monotonic() >= self._host_waits
        return (HOST if first else uuid), due

    def _look(self, uuid: str) -> None:
        start = time.monotonic()
        name = "host" if uuid == HOST else uuid
        try:
            with self._sessions.engine() as engine:
                record = engine.store.networks.get(uuid) if uuid != HOST else None
                name = record.name if record else name
                found = self._repair(engine, uuid, record)
        except _NotUpError:
            self.forget(uuid)
        except _ChangedError:
            self._put_off(uuid, DELAY)
        except Exception as error:
            self._failed(uuid, name, error)
        else:
            self._looked(uuid, name, found, time.monotonic() - start)

    def _repair(self, engine: Engine, uuid: str, record: NetworkRecord | None) -> list[str]:
        """Repair what is wrong; returns it.

        Raises _NotUpError for a network that is not to be repaired.
        """
        # Some other process may have changed what there is to watch.
        with engine.observer.changing(uuid):
            pass
        if uuid == HOST:
            return self._repair_host(engine)
        if record is None or not record.runs:
            raise _NotUpError(f"network {uuid} is not up")
        if record.state != "up":
            self._put_off(uuid, STARTING)
            return []
        if engine.kernel.link(None, record.bridge) is None:
            raise _NoBridgeError(f"bridge {record.bridge} is missing", "start the network anew")
        # Without the lock, so that nobody waits, and without looking away meanwhile.
        if not reconcile.differences(engine, record):
            return []
        repairer = _Repairer(
            engine.config, engine.store, engine.kernel, engine.before, engine.observer
        )
        return repairer.up(libvirt_xml.parse_network(record.document), record.document)

    def _repair_host(self, engine: Engine) -> list[str]:
        self._host_looked = time.monotonic()
        if any(each.unfinished for each in engine.store.networks.all("preparing", "starting")):
            # Its start sees to most of it, unless it is given up or concerns the host little.
            self._put_off(HOST, STARTING)
            return []
        return engine.ensure_host() if reconcile.host_differences(engine) else []

    def _put_off(self, uuid: str, seconds: float) -> None:
        with self._work:
            self._due[uuid] = time.monotonic() + seconds
            if uuid == HOST:
                # Networks that are due sooner must not have it looked at ahead of its time.
                self._host_waits = self._due[uuid]
            self._work.notify()

    # -- what came of it ---------------------------------------------------

    def _looked(self, uuid: str, name: str, found: list[str], seconds: float) -> None:
        if found:
            self._repaired(uuid, name, found, seconds)
        else:
            self._well(uuid, name)

    def _well(self, uuid: str, name: str) -> None:
        with self._work:
            trouble = self._troubles.get(uuid)
            if trouble is None:
                return
            recovered = bool(trouble.given_up)
            trouble.expire(time.monotonic())
            trouble.given_up = ""
            trouble.failures = 0
            if not trouble.repairs:
                del self._troubles[uuid]
        if recovered:
            self._journal.say("notice", "recovered", network=name)

    def _repaired(self, uuid: str, name: str, found: list[str], seconds: float) -> None:
        now = time.monotonic()
        with self._work:
            trouble = self._troubles.setdefault(uuid, _Trouble(name))
            trouble.repaired(now, found)
            fight = trouble.fight()
            if not fight:
                self._due[uuid] = min(self._due.get(uuid, now + AGAIN), now + AGAIN)
                self._work.notify()
        self._on_heal(seconds)
        wrong = "; ".join(found)
        self._journal.say("warning", "healed", network=name, wrong=wrong, seconds=seconds)
        if fight:
            self._give_up(uuid, f"is undone again and again: {fight}")

    def _failed(self, uuid: str, name: str, error: Exception) -> None:
        now = time.monotonic()
        told = str(error) if isinstance(error, NatnsError) else f"{type(error).__name__}: {error}"
        with self._work:
            trouble = self._troubles.setdefault(uuid, _Trouble(name))
            trouble.name = name
            trouble.failures += 1
            trouble.last = now
            over = trouble.failures > REPAIRS
            if not over:
                least = BRIDGE_PAUSE if isinstance(error, _NoBridgeError) else 0.0
                self._due[uuid] = now + max(least, AGAIN * 2 ** (trouble.failures - 1))
                self._work.notify()
        if over:
            self._give_up(uuid, f"cannot be repaired: {told}")
        elif trouble.failures == SAID:
            self._on_failure("heal")
            self._journal.say("warning", "not healed", network=name, error=told)

    def _give_up(self, uuid: str, why: str) -> None:
        with self._work:
            trouble = self._troubles.get(uuid)
            if trouble is None:
                # Somebody's verb has begun anew with it in between.
                return
            known = trouble.given_up
            trouble.given_up = why
            trouble.repairs.clear()
            self._due[uuid] = time.monotonic() + RETRY
            self._work.notify()
        if known != why:
            self._on_failure("heal")
            self._journal.say("error", "given up", network=trouble.name, why=why, retry=RETRY)
