# SPDX-License-Identifier: LGPL-2.1-or-later
"""Upstream addresses that another station answers for: one move for each start, no more.

An answer proves nothing about its sender.  A station that answers for each address would
otherwise move a network for ever, and each move ends the connections of its guests.
"""

import time
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

from libvirt_natns.addresses import Address

K = TypeVar("K")

MEMORY = 600.0
"""Seconds for which an address counts as taken, and a move as made."""

LIMIT = 1024
"""Conflicts that are remembered at most; the oldest go first."""


class Conflicts:
    """Addresses found taken lately, and starts that moved for one.  Safe for threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._taken: dict[tuple[str, Address], float] = {}
        self._moved: dict[tuple[str, int], float] = {}

    def note(self, upstream: str, address: Address) -> None:
        """Remember that another station answered for an address of an upstream."""
        with self._lock:
            _put(self._taken, (upstream, address), self._clock())

    def taken(self, upstream: str) -> set[Address]:
        """Return the addresses of an upstream that were found taken lately."""
        since = self._clock() - MEMORY
        with self._lock:
            return {
                address
                for (name, address), when in self._taken.items()
                if name == upstream and when > since
            }

    def may_move(self, uuid: str, namespace: int | None) -> bool:
        """True for the first conflict of a start, which is named by its namespace's inode."""
        key, now = (uuid, namespace or 0), self._clock()
        with self._lock:
            if now - self._moved.get(key, -MEMORY) < MEMORY:
                return False
            _put(self._moved, key, now)
            return True


def _put(table: dict[K, float], key: K, when: float) -> None:
    table.pop(key, None)
    table[key] = when
    while len(table) > LIMIT:
        del table[next(iter(table))]
