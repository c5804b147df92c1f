# SPDX-License-Identifier: LGPL-2.1-or-later
"""The healer: looks at networks under suspicion, repairs them, and knows when to stop.

After a repair the healer looks at the network once more.  The damage may have gone
on during the repair, while the watch took all events for our own doing.

Another program may undo a repair on purpose.  After a few repairs of the same thing
within a minute, the healer gives the network up.  It also gives up a network that cannot
be repaired.  The log and ``health`` have the error.

A network that was given up gets another chance after ten minutes, when a verb changes it
(``relent``), and when something about it changes.  Reloads of the host's whole ruleset are no
fight (``reloads``).
"""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Lock

from libvirt_natns.engine.factory import Sessions
from libvirt_natns.engine.observer import HOST
from libvirt_natns.engine.up import NotUpError, RecordChangedError
from libvirt_natns.errors import NatnsError
from libvirt_natns.service.log import Log
from libvirt_natns.service.reloads import Reloads
from libvirt_natns.service.repair import NoBridgeError, RepairVerb, repair
from libvirt_natns.service.trouble import REPAIRS, Trouble
from libvirt_natns.service.workqueue import Workers, WorkQueue

WORKERS = 4
"""Networks that are looked at at once."""

DELAY = 0.15
"""Seconds from the first sign of damage to the look: damage seldom comes alone."""

HOST_DELAY = 0.05
"""The same for the host: networks that rely on it are looked at later."""

HOST_PAUSE = 1.0
"""Seconds between two looks at the host, of which others change a lot."""

AGAIN = 0.5
"""Seconds until the look after a repair, and until the first repair that failed
is tried again; from there on, the double each time."""

RETRY = 600.0
"""Seconds after which a network that was given up is tried again."""

RECHECK = 10.0
"""Seconds between two tries of a network that was given up, when something changes.

Where repairs are undone again and again, each time the double."""

BRIDGE_PAUSE = 5.0
"""Seconds until another try where the network's own bridge is missing: libvirt deletes
it a moment before it tells of a network's end."""

SAID = 3
"""The failure in a row of which the log tells."""

STARTING = 1.0
"""Seconds until a network that is being started is looked at again."""

STOP_LIMIT = 10.0
"""Seconds that a repair which is going on gets to end."""


class Healer:
    """Looks at networks under suspicion, in threads of its own.

    Each repair calls ``on_heal`` with its seconds, and each failure of which the log
    tells calls ``on_failure`` with "heal".
    """

    def __init__(
        self,
        sessions: Sessions,
        log: Log,
        *,
        on_heal: Callable[[float], None] = lambda seconds: None,
        on_failure: Callable[[str], None] = lambda what: None,
        repair: RepairVerb = repair,
    ) -> None:
        self._sessions = sessions
        self._log = log
        self._on_heal = on_heal
        self._on_failure = on_failure
        self._repair = repair
        # Each network's repair begins with the host's, and would keep it to itself.
        self._queue: WorkQueue[str] = WorkQueue(leader=HOST)
        self._workers = Workers(self._queue, self._work, WORKERS, "healer")
        self._troubles: dict[str, Trouble] = {}
        # Held as well where a trouble and the time of the next look change together.
        self._lock = Lock()
        self._host_looked = 0.0
        # Of the worker that looks at HOST alone.
        self._reloads = Reloads()
        self._thread = threading.local()

    # -- for all threads ---------------------------------------------------

    def start(self) -> None:
        """Begin to look at networks under suspicion."""
        self._workers.start()

    def stop(self) -> None:
        """Finish repairs that are going on; looks that are due are left to others."""
        self._workers.stop(STOP_LIMIT)

    def suspect(self, uuid: str) -> None:
        """Have a network, or HOST, looked at soon."""
        now = time.monotonic()
        delay = max(HOST_DELAY, self._host_looked + HOST_PAUSE - now) if uuid == HOST else DELAY
        with self._lock:
            trouble = self._troubles.get(uuid)
            if trouble and trouble.given_up:
                # Perhaps the obstacle has gone, or the other program.
                self._queue.put(uuid, max(delay, trouble.last + trouble.pause - now))
            else:
                self._queue.put_new(uuid, delay)

    def appeared(self, namespace: str) -> None:
        """Suspect the network of a namespace that another process has made."""
        try:
            with self._sessions.engine() as engine:
                records = engine.store.networks.all("starting", "up")
        except Exception as error:  # the thread that hears the kernel must go on
            self._log.say_error("error", "heal", error, namespace=namespace)
            return
        for record in records:
            if record.namespace == namespace and record.runs:
                self.suspect(record.uuid)

    def relent(self, name: str) -> None:
        """Begin anew with networks of a name, as a verb has changed one.

        The verb of a repair does not count.
        """
        if self.at_work:
            return
        with self._lock:
            for uuid in [key for key, trouble in self._troubles.items() if trouble.name == name]:
                self._forget(uuid)

    def forget(self, uuid: str) -> None:
        """Forget all troubles of a network."""
        with self._lock:
            self._forget(uuid)

    def _forget(self, uuid: str) -> None:
        trouble = self._troubles.pop(uuid, None)
        if trouble and trouble.given_up:
            self._queue.drop(uuid)

    @property
    def at_work(self) -> bool:
        """True if the calling thread is repairing something for this object."""
        return getattr(self._thread, "at_work", False)

    def is_idle(self, seconds: float = 0.0) -> bool:
        """True if no look goes on, and none is due within that time."""
        return self._queue.is_idle(seconds)

    def health(self) -> Mapping[str, str]:
        """Return the networks, and HOST, that are left alone, by uuid, and why."""
        with self._lock:
            return {
                uuid: trouble.given_up
                for uuid, trouble in self._troubles.items()
                if trouble.given_up
            }

    # -- the workers -------------------------------------------------------

    def _work(self, uuid: str) -> None:
        self._thread.at_work = True
        try:
            # A log that cannot be written must not end a worker.
            with suppress(OSError):
                self._look(uuid)
        finally:
            self._thread.at_work = False

    def _look(self, uuid: str) -> None:
        start = time.monotonic()
        name = "host" if uuid == HOST else uuid
        try:
            with self._sessions.engine() as engine:
                record = engine.store.networks.get(uuid) if uuid != HOST else None
                name = record.name if record else name
                if uuid == HOST:
                    self._host_looked = time.monotonic()
                differences = self._repair(engine, uuid, record)
        except NotUpError:
            self.forget(uuid)
        except RecordChangedError:
            self._queue.postpone(uuid, DELAY)
        except Exception as error:
            self._failed(uuid, name, error)
        else:
            if differences is None:
                # The look has compared no part, so the network is neither well nor damaged.
                self._queue.postpone(uuid, STARTING)
            elif differences:
                self._repaired(uuid, name, differences, time.monotonic() - start)
            else:
                self._well(uuid, name)

    def _well(self, uuid: str, name: str) -> None:
        if uuid == HOST:
            self._reloads.look()
        with self._lock:
            trouble = self._troubles.get(uuid)
            if trouble is None:
                return
            recovered = trouble.well(time.monotonic())
            if not trouble.repairs:
                del self._troubles[uuid]
        if recovered:
            self._log.say("notice", "recovered", network=name)

    def _repaired(self, uuid: str, name: str, differences: list[str], seconds: float) -> None:
        undone = self._reloads.undone(differences) if uuid == HOST else differences
        with self._lock:
            trouble = self._troubles.setdefault(uuid, Trouble(name))
            trouble.repaired(time.monotonic(), undone)
            fight = trouble.fight()
            if not fight:
                self._queue.put(uuid, AGAIN)
        self._on_heal(seconds)
        wrong = "; ".join(differences)
        self._log.say("warning", "healed", network=name, wrong=wrong, seconds=seconds)
        if fight:
            self._give_up(uuid, f"repairs are undone repeatedly: {fight}")

    def _failed(self, uuid: str, name: str, error: Exception) -> None:
        reason = str(error) if isinstance(error, NatnsError) else f"{type(error).__name__}: {error}"
        with self._lock:
            trouble = self._troubles.setdefault(uuid, Trouble(name))
            trouble.failed(time.monotonic(), name)
            failures = trouble.failures
            if failures <= REPAIRS:
                least = BRIDGE_PAUSE if isinstance(error, NoBridgeError) else 0.0
                self._queue.postpone(uuid, max(least, AGAIN * 2 ** (failures - 1)))
        if failures > REPAIRS:
            self._give_up(uuid, f"cannot be repaired: {reason}")
        elif failures == SAID:
            self._on_failure("heal")
            self._log.say("warning", "not healed", network=name, error=reason)

    def _give_up(self, uuid: str, why: str) -> None:
        with self._lock:
            trouble = self._troubles.get(uuid)
            if trouble is None:
                # A verb has changed the network in between, so it begins anew.
                return
            earlier = trouble.given_up
            pause = RECHECK if trouble.failures else min(RETRY, max(RECHECK, 2 * trouble.pause))
            trouble.give_up(time.monotonic(), why, pause)
            self._queue.postpone(uuid, RETRY)
        if earlier != why:
            self._on_failure("heal")
            self._log.say("error", "given up", network=trouble.name, why=why, retry=RETRY)
