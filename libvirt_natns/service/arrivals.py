# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts networks with autostart when their upstream comes, later than libvirt.

A thread looks at the notes of refused starts (``engine/late_starts``).  It has libvirt start
a network once its upstream is there, if libvirt would have started the network by
itself.  A network that was stopped by hand has no note.
"""

from threading import Event, Thread

from libvirt_natns.daemons import libvirt
from libvirt_natns.engine import late_starts
from libvirt_natns.engine.factory import Sessions
from libvirt_natns.errors import LibvirtError
from libvirt_natns.service.complaints import Complaints
from libvirt_natns.service.log import Log

LOOK = 1.0
"""Seconds between two looks at the notes."""

STOP_LIMIT = 2.0
"""Seconds that the thread gets to end; it may be waiting for libvirt."""


class Arrivals:
    """The thread that waits for upstreams to come."""

    def __init__(self, sessions: Sessions, log: Log) -> None:
        self._sessions = sessions
        self._log = log
        self._complaints = Complaints()
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="arrivals", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End; a start that goes on is left to libvirt."""
        self._stopping.set()
        self._thread.join(STOP_LIMIT)

    def _run(self) -> None:
        while not self._stopping.wait(LOOK):
            try:
                if uuids := late_starts.noted():
                    self.look(uuids)
            except Exception as error:  # the next look must come
                if self._complaints.is_news("late starts", error):
                    self._log.say_error("error", "failed", error, when="starting late networks")

    def look(self, uuids: list[str]) -> None:
        """Start the noted networks that can be started.

        A note that comes during this look waits for the next one.
        """
        with self._sessions.engine() as engine:
            late = list(late_starts.waiting(engine, uuids))
        for uuid in {*uuids} - {each.uuid for each in late}:
            late_starts.forget(uuid)
        for each in late:
            if not each.fault:
                self._start(each)

    def _start(self, late: late_starts.LateStart) -> None:
        """Have libvirt start a network; its hook asks this service again, in another thread."""
        try:
            started = libvirt.autostart(late.uuid)
        except LibvirtError as error:
            if self._complaints.is_news(late.uuid, error):
                self._log.say_error("error", "late-start", error, network=late.name)
            return
        self._complaints.end(late.uuid)
        late_starts.forget(late.uuid)
        if started:
            self._log.say("notice", "late-start", network=late.name)
