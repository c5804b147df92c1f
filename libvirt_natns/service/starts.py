# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts of networks: each is followed until libvirt has the network active, or gives it up.

libvirt calls no hook for a start that fails after our `start` hook.  So threads of the
service look at each start that goes on, and take back a start that libvirt gave up.

A thread asks libvirt where the bridge is missing, or where `started` was answered: a
hook that is killed makes libvirt give up as well.  libvirt answers once the start is
over, so a slow start never counts as failed.  libvirt is never asked while it makes the
bridge, and never from a thread that answers hooks.
"""

from collections.abc import Callable

from libvirt_natns.daemons import libvirtd
from libvirt_natns.engine import given_up
from libvirt_natns.engine.factory import Sessions
from libvirt_natns.engine.network_end import leave
from libvirt_natns.errors import LibvirtError
from libvirt_natns.kernel.boot_clock import now
from libvirt_natns.service.log import Log
from libvirt_natns.service.workqueue import Workers, WorkQueue
from libvirt_natns.state.networks import START_LIMIT, NetworkRecord

LOOK = 0.25
"""Seconds between two looks at a start that goes on."""

BROKEN = 2.0
"""Seconds until libvirt is asked again after a connection has broken."""

ASKERS = 2
"""Threads: one may wait for libvirt, which is busy with a slow start."""

STOP_LIMIT = 2.0
"""Seconds that threads get to end; they may be waiting for a libvirt that is stuck."""

IsActive = Callable[[str], bool | None]
"""Asks libvirt whether a network is active; None where there is no libvirt to ask."""


class Starts:
    """Starts that go on, and the threads that look at them.

    ``ask`` is called from threads of this object alone, and may raise LibvirtError.
    """

    def __init__(self, sessions: Sessions, log: Log, ask: IsActive) -> None:
        self._sessions = sessions
        self._log = log
        self._ask = ask
        self._queue: WorkQueue[str] = WorkQueue()
        self._askers = Workers(self._queue, self._follow, ASKERS, "starts")
        self._knows_daemon = False

    def start(self) -> None:
        """Begin to look."""
        self._askers.start()

    def stop(self) -> None:
        """End; starts that go on are left to the next service."""
        self._askers.stop(STOP_LIMIT)

    def expect(self, uuid: str) -> None:
        """Look at a network's start until it is over; from any thread."""
        self._note_daemon()
        self._queue.postpone(uuid, LOOK)

    # -- the threads -------------------------------------------------------

    def _follow(self, uuid: str) -> None:
        try:
            again = self._goes_on(uuid)
        except LibvirtError:
            # The connection has broken: the next connection tells, or the daemon's end.
            self._queue.put_new(uuid, BROKEN)
        except Exception as error:  # the thread must go on with other starts
            self._log.say("error", "start", network=uuid, error=error)
            self._queue.put_new(uuid, START_LIMIT)
        else:
            if again:
                self._queue.put_new(uuid, LOOK)

    def _goes_on(self, uuid: str) -> bool:
        """Look at a start; true if it is to be looked at again."""
        with self._sessions.engine() as engine:
            record = engine.store.networks.get(uuid)
        if record is None or record.state == "down" or not record.this_boot:
            return False
        if record.state != "up" and self._lost_daemon(record):
            active: bool | None = False
        elif _libvirt_goes_on(record):
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
                if engine.give_up(record, orphaned=active is not None):
                    # libvirt may send no event of the end.
                    leave(engine, record)
        return False

    def _lost_daemon(self, record: NetworkRecord) -> bool:
        """True if the daemon that made the start has ended: no start outlives it."""
        if given_up.outlived_daemon(record):
            return True
        return self._knows_daemon and not self._note_daemon()

    def _note_daemon(self) -> bool:
        """True if a daemon runs."""
        runs = libvirtd.NETWORK.daemon() is not None
        # Without a pid file ever, a missing pid file means nothing.
        self._knows_daemon |= runs
        return runs


def _libvirt_goes_on(record: NetworkRecord) -> bool:
    """True if libvirt need not be asked yet: it still works on the bridge."""
    if record.state == "up" or now() - record.since > START_LIMIT:
        return False
    return record.state == "preparing" or not given_up.lacks_bridge(record, LOOK)
