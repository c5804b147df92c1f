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
    ``pause`` is the time in seconds after ``last`` from which a change is a reason to try again.
    """

    name: str
    repairs: deque[tuple[float, tuple[str, ...]]] = field(default_factory=deque)
    failures: int = 0
    given_up: str = ""
    last: float = 0.0
    pause: float = 0.0

    def repaired(self, now: float, differences: Iterable[str] | None) -> None:
        """Note a repair, and forget old ones; None is a repair that no fight can be about."""
        self.failures = 0
        self.given_up = ""
        if differences is not None:
            self.repairs.append((now, tuple(differences)))
        self.expire(now)

    def give_up(self, now: float, why: str, pause: float) -> None:
        """Note that the network is left alone, and for how long at least."""
        self.given_up = why
        self.repairs.clear()
        self.last, self.pause = now, pause

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
        difference = difference or "the rules of the host are removed"
        times = times or len(self.repairs)
        return f"{difference} (repaired {times} times within {WINDOW:.0f} s)"
