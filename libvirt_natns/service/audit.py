# SPDX-License-Identifier: LGPL-2.1-or-later
"""The audit: a look at one network now and then, which finds damage without an event."""

from collections.abc import Collection, Iterator

from libvirt_natns.engine.observer import HOST

ROUND = 1800.0
"""Seconds in which each network is looked at once ..."""

PAUSE = 5.0
"""... but not more than one network in that many seconds: a look costs CPU time."""


class Audit:
    """Takes turns among networks and the host; ``due`` is on the monotonic clock."""

    def __init__(self) -> None:
        self.due = 0.0
        self._turns: Iterator[str] = iter(())

    def take(self, now: float, networks: Collection[str]) -> str | None:
        """Return the network, or HOST, to be looked at now; None before its time."""
        if not networks:
            self.due = 0.0
            return None
        if now < self.due:
            return None
        # The first network has just been looked at.
        first = not self.due
        self.due = now + max(PAUSE, ROUND / (len(networks) + 1))
        return None if first else self._next(networks)

    def _next(self, networks: Collection[str]) -> str | None:
        uuid = next(self._turns, None)
        if uuid is None:
            self._turns = iter([HOST, *networks])
            uuid = next(self._turns)
        return uuid if uuid == HOST or uuid in networks else None
