# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reasons why a network is of no use to its guests, although all of our own parts are in order.

An obstacle belongs to the host, its administrator or the provider, so no repair removes it.
status, check, doctor, the metrics and the service's log tell the same ones.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from libvirt_natns.engine import names_health
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.host import zone
from libvirt_natns.engine.reconcile import comparison, ways_out
from libvirt_natns.errors import NatnsError
from libvirt_natns.state.networks import NetworkRecord

ObstacleKind = Literal["no way out", "stopped", "no names"]

KINDS: tuple[ObstacleKind, ...] = ("no way out", "stopped", "no names")
"""In the order of weight: names are of no use to a guest without a way out."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """A reason in words.  It is not ``sure`` if a rule of others cannot be judged."""

    kind: ObstacleKind
    reason: str
    sure: bool = True

    @property
    def brief(self) -> str:
        """The network's health in a column."""
        return self.reason if self.kind == "stopped" else self.kind


@dataclass(frozen=True, slots=True)
class Obstacles:
    """All obstacles.

    ``by_network`` has those of each network by uuid, the weightiest first.  ``stops`` name chains
    of others that stop networks, with the lines to add.  ``notes`` are about the host.
    """

    by_network: Mapping[str, tuple[Obstacle, ...]] = field(default_factory=dict)
    stops: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def of(self, uuid: str, *, damaged: bool = False) -> tuple[Obstacle, ...]:
        """Return the obstacles of a network; a ``damaged`` one hears no DNS server anyway."""
        return tuple(
            each
            for each in self.by_network.get(uuid, ())
            if not (damaged and each.kind == "no names")
        )


def find(engine: Engine, records: Iterable[NetworkRecord]) -> Obstacles:
    """Return the obstacles of networks that are up.

    A source that cannot be looked at has a note, which says why.
    """
    records = list(records)
    closed = ways_out.closed(engine, records)
    stops = comparison.host_stops(engine)
    notes = zone.notes()
    stopped_by_zone = bool(notes)
    without_names: Mapping[str, str] = {}
    try:
        without_names = names_health.findings(engine)
    except NatnsError as error:
        notes = [*notes, str(error)]
    by_network = {}
    for record in records:
        found = [Obstacle("no way out", why) for why in closed[record.uuid]]
        if stop := stops.by_network.get(record.uuid):
            found.append(Obstacle("stopped", stop.said, stop.sure))
        if stopped_by_zone and record.kind == "host":
            found.append(Obstacle("stopped", "stopped by firewalld"))
        if why := without_names.get(record.uuid):
            found.append(Obstacle("no names", why))
        by_network[record.uuid] = tuple(found)
    return Obstacles(by_network, stops.lines, tuple(notes))
