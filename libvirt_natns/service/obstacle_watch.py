# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service's look at what keeps guests from the outside: the log tells what comes and goes."""

from collections.abc import Mapping

from libvirt_natns import names
from libvirt_natns.engine.factory import Sessions
from libvirt_natns.engine.host.record import had_way_out, note_way_out
from libvirt_natns.engine.reconcile import obstacles
from libvirt_natns.engine.reconcile.obstacles import Obstacle, ObstacleKind, Obstacles
from libvirt_natns.kernel.locks import locked
from libvirt_natns.service.complaints import Complaints
from libvirt_natns.service.log import Log
from libvirt_natns.service.outside_look import TellError

PAUSE = 60.0
"""Seconds between two looks: a gateway that falls silent causes no event."""

SOON = 1.0
"""Seconds from a change of the host, or of a network, to the look."""


class ObstacleWatch:
    """Looks at all networks that are up, at the caller's times; one look at a time.

    An error is told to ``report`` once.
    """

    def __init__(self, sessions: Sessions, log: Log, report: TellError) -> None:
        self._sessions = sessions
        self._log = log
        self._report = report
        self._complaints = Complaints()
        self._found = Obstacles()
        self._names: dict[str, str] = {}

    def look(self) -> None:
        """Look, and log what is new."""
        try:
            self._look()
            self._complaints.end("obstacles")
        except Exception as error:  # it belongs to no network, so none is suspected
            if self._complaints.is_news("obstacles", error):
                self._report(error, "looking for obstacles")

    def _look(self) -> None:
        with self._sessions.engine() as engine:
            records = [record for record in engine.store.networks.all("up") if record.this_boot]
            found = obstacles.find(engine, records)
        if not had_way_out():
            with locked(names.RUN_DIRECTORY):
                note_way_out()
        before = self._found
        for record in records:
            self._tell(record.name, before.of(record.uuid), found.of(record.uuid))
        for note in (*found.stops, *found.notes):
            if note not in (*before.stops, *before.notes):
                self._log.say("warning", "note", about="host", note=note)
        self._names = {record.uuid: record.name for record in records}
        self._found = found

    def _tell(self, name: str, before: tuple[Obstacle, ...], now: tuple[Obstacle, ...]) -> None:
        for each in now:
            if each not in before:
                self._log.say(
                    "warning", "obstacle", network=name, obstacle=each.kind, reason=each.reason
                )
        for kind in sorted({each.kind for each in before} - {each.kind for each in now}):
            self._log.say("notice", "passable", network=name, obstacle=kind)

    def kinds(self) -> Mapping[str, frozenset[ObstacleKind]]:
        """Return the kinds of sure obstacles of each network of the last look, by name."""
        return {
            name: frozenset(each.kind for each in self._found.of(uuid) if each.sure)
            for uuid, name in self._names.items()
        }
