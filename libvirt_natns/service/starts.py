# SPDX-License-Identifier: LGPL-2.1-or-later
"""Follows starts until libvirt has the network active, and takes back those it gives up.

libvirt tells nobody that a start has failed after our `start` hook.  A thread of
the service looks at each start that goes on, and asks libvirt where the bridge is
missing, or where `started` was answered: a hook that is killed makes libvirt give
up as well.  libvirt answers once the start is over, however long it takes, so a
slow start is never taken for one that failed.  libvirt is never asked while it
makes the bridge and all that is on it, and never from a thread that answers hooks.
"""

import time
from collections.abc import Callable
from threading import Condition, Thread

from libvirt_natns.daemons import libvirtd
from libvirt_natns.engine import given_up
from libvirt_natns.engine.factory import Sessions
from libvirt_natns.errors import LibvirtError
from libvirt_natns.kernel.boot import now
from libvirt_natns.service.log import Journal
from libvirt_natns.state.networks import START_LIMIT, NetworkRecord

LOOK = 0.25
"""Seconds between two looks at a start that goes on."""

BROKEN = 2.0
"""Seconds until libvirt is asked again after a connection has broken."""

ASKERS = 2
"""Threads: one may wait for libvirt, which is busy with a slow start."""

STOP_LIMIT = 2.0
"""Seconds that threads get to end; they may be waiting for a libvirt that is stuck."""

Ask = Callable[[str], bool | None]
"""Asks libvirt whether a network is active; None where there is no libvirt to ask."""


class Starts:
    """Starts that go on, and the threads that look at them."""

    def __init__(self, sessions: Sessions, journal: Journal, ask: Ask) -> None:
        """``ask`` is called from threads of this object alone.  Raises LibvirtError."""
        self._sessions = sessions
        self._journal = journal
        self._ask = ask
        self._changed = Condition()
        self._due: dict[str, float] = {}
        self._stopping = False
        self._knows_daemon = False
        self._threads = [
            Thread(target=self._run, name=f"starts-{number}", daemon=True)
            for number in range(ASKERS)
        ]

    def start(self) -> None:
        """Begin to look."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End; starts that go on are left to the next service."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        deadline = time.monotonic() + STOP_LIMIT
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def expect(self, uuid: str) -> None:
        """Look at a network's start until it is over; from any thread."""
        self._note_daemon()
        with self._changed:
            self._due[uuid] = time.monotonic() + LOOK
            self._changed.notify()

    # -- the threads -------------------------------------------------------

    def _run(self) -> None:
        while (uuid := self._next()) is not None:
            try:
                again = self._goes_on(uuid)
            except LibvirtError:
                # The connection has broken: the next one tells, or the daemon's end.
                self._look_again(uuid, BROKEN)
            except Exception as error:  # the other starts are still to be followed
                self._journal.say("error", "start", network=uuid, error=error)
                self._look_again(uuid, START_LIMIT)
            else:
                if again:
                    self._look_again(uuid, LOOK)

    def _look_again(self, uuid: str, seconds: float) -> None:
        with self._changed:
            self._due.setdefault(uuid, time.monotonic() + seconds)
            self._changed.notify()

    def _next(self) -> str | None:
        """Wait for a start that is to be looked at; None to end."""
        with self._changed:
            while not self._stopping:
                uuid = min(self._due, key=self._due.__getitem__, default=None)
                wait = None if uuid is None else self._due[uuid] - time.monotonic()
                if uuid is not None and wait is not None and wait <= 0:
                    del self._due[uuid]
                    self._changed.notify()
                    return uuid
                self._changed.wait(wait)
        return None

    def _goes_on(self, uuid: str) -> bool:
        """Look at a start; returns whether to look again."""
        with self._sessions.engine() as engine:
            record = engine.store.networks.get(uuid)
        if record is None or record.state == "down" or not record.this_boot:
            return False
        if record.state != "up" and self._lost_daemon(record):
            active: bool | None = False
        elif _goes_on(record):
            return True
        else:
            active = self._ask(record.uuid)
        if active is None and record.state == "up":
            # All networks are compared with libvirt once it answers again.
            return False
        if active is None and record.unfinished:
            return True
        if not active:
            with self._sessions.engine() as engine:
                # Without libvirt's word its bridge may still be in use.
                engine.give_up(record, orphaned=active is not None)
        return False

    def _lost_daemon(self, record: NetworkRecord) -> bool:
        """True if the daemon that made the start has ended: no start outlives it."""
        if given_up.outlived_daemon(record):
            return True
        return self._knows_daemon and not self._note_daemon()

    def _note_daemon(self) -> bool:
        """True if a daemon runs."""
        found = libvirtd.NETWORK.daemon() is not None
        # Where no pid file ever told of one, its absence means nothing.
        self._knows_daemon |= found
        return found


def _goes_on(record: NetworkRecord) -> bool:
    """True if libvirt need not be asked yet: it still works on the bridge."""
    if record.state == "up" or now() - record.since > START_LIMIT:
        return False
    return record.state == "preparing" or not given_up.lacks_bridge(record, LOOK)
