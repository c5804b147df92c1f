# SPDX-License-Identifier: LGPL-2.1-or-later
"""The recent repairs of one network, and whether they are a fight against another program."""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

WINDOW = 60.0
"""Seconds within which repairs count as a fight."""

REPAIRS = 5
"""Repairs of the same thing within that time; and failures of a repair in a row."""

ALL_REPAIRS = 20
"""Repairs of anything within that time."""


@dataclass(slots=True)
class Trouble:
    """The history of one network, or of the host.

    ``repairs`` are the times and differences of the latest repairs.  ``failures`` counts
    repairs that failed in a row.  ``last`` is the time of the latest failure.  Times are on
    the monotonic clock.  ``given_up`` is the reason why the network is left alone, or "".
    """

    name: str
    repairs: deque[tuple[float, tuple[str, ...]]] = field(default_factory=deque)
    failures: int = 0
    given_up: str = ""
    last: float = 0.0

    def repaired(self, now: float, differences: Iterable[str]) -> None:
        """Note a repair, and forget old ones."""
        self.failures = 0
        self.given_up = ""
        self.repairs.append((now, tuple(differences)))
        self.expire(now)

    def failed(self, now: float, name: str) -> None:
        """Note that a repair has failed."""
        self.name = name
        self.failures += 1
        self.last = now

    def well(self, now: float) -> bool:
        """Note that nothing differs; true if the network was given up until now."""
        recovered = bool(self.given_up)
        self.expire(now)
        self.given_up = ""
        self.failures = 0
        return recovered

    def expire(self, now: float) -> None:
        """Forget repairs that are too long ago to count."""
        while self.repairs and now - self.repairs[0][0] > WINDOW:
            self.repairs.popleft()

    def fight(self) -> str:
        """Return the difference that comes again and again, in words; "" if none does."""
        counted = Counter(
            difference
            for _, differences in self.repairs
            for difference in dict.fromkeys(differences)
        )
        difference, times = counted.most_common(1)[0] if counted else ("", 0)
        if times <= REPAIRS and len(self.repairs) <= ALL_REPAIRS:
            return ""
        return f"{difference} (repaired {times} times within {WINDOW:.0f} s)"
