# SPDX-License-Identifier: LGPL-2.1-or-later
"""The stream of states and changes for all watchers.

A single job collects the state, and all watchers get the changes since the state before.  Without
watchers no job runs.  A large host is looked at less often: the pause after
a look is a multiple of its duration.
"""

import json
import time
from typing import Any

from libvirt_natns.cli import json_text, state_changes, status
from libvirt_natns.cli.look_jobs import Job, JobOutcome, start
from libvirt_natns.cli.look_link import LookLink

SETTLE = 0.1
"""Seconds from the first news to the look: news seldom comes alone."""

LEAST_PAUSE = 0.5
SHARE = 3
"""Seconds of rest after a look: at least the former, and the latter's multiple of its duration."""

REFRESH = 60.0
"""Seconds until the next look without news: an expired lease, for instance, causes none."""

ERROR_PAUSE = 5.0
"""Seconds until the next look after one that has failed."""


def collect() -> int:
    """Print the state: the body of the job."""
    # A daemon of libvirt that sleeps is not woken for a watcher.
    print(status.as_json(wake=False))
    return 0


def line(event: str, serial: int, **fields: object) -> bytes:
    """Return a line of the stream."""
    document = {"event": event, "serial": serial, "time": round(time.time(), 3), **fields}
    return json_text.dumped(document, line=True).encode() + b"\n"


class Stream:
    """The state as it was last seen, its watchers, and the time of the next look."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self._watchers: set[LookLink] = set()
        self._state: dict[str, Any] | None = None
        self._error = ""
        self._serial = 0
        self._due = 0.0
        self._not_before = 0.0
        self._begun = 0.0
        # The job was killed, as the last watcher had gone.
        self._void = False

    @property
    def due(self) -> float | None:
        """The time of the next look; None without watchers, or while a look goes on."""
        return self._due if self._watchers and self.job is None else None

    def add(self, link: LookLink) -> None:
        """Let a client watch: the state comes at once, or with the first look."""
        link.streams = True
        self._watchers.add(link)
        if self._state is not None:
            link.stream(self._whole())
        elif self.job is None:
            self._due = max(time.monotonic(), self._not_before)

    def remove(self, link: LookLink) -> None:
        """Forget a watcher; after the last one, the state as well."""
        self._watchers.discard(link)
        if not self._watchers:
            self._state = None
            self._error = ""
            if self.job is not None:
                self._void = True
                self.job.kill()

    def note(self) -> None:
        """Have the next look soon, as something may have changed."""
        self._due = min(self._due, max(time.monotonic() + SETTLE, self._not_before))

    def look(self) -> Job:
        """Begin to collect the state.  Raises OSError."""
        self._begun = time.monotonic()
        # News from here on ask for another look.
        self._due = self._begun + REFRESH
        self.job = start(collect)
        return self.job

    def looked(self, outcome: JobOutcome) -> None:
        """Tell the watchers the outcome of a look."""
        now = time.monotonic()
        self.job = None
        if self._void:
            self._void = False
            self._due = now
            return
        self._not_before = now + max(LEAST_PAUSE, SHARE * (now - self._begun))
        self._due = max(self._due, self._not_before)
        try:
            state = json.loads(outcome.out) if outcome.status == 0 else None
        except ValueError:
            state = None
        if isinstance(state, dict):
            self._tell(state)
        else:
            self._not_before = now + ERROR_PAUSE
            self._due = min(self._due, self._not_before)
            self._fail(outcome.err.strip() or f"the look ended with status {outcome.status}")

    def _tell(self, state: dict[str, Any]) -> None:
        before, self._state, self._error = self._state, state, ""
        if before is None:
            self._serial += 1
            self._send(self._whole())
            return
        change = state_changes.between(before, state)
        if change is not None:
            self._serial += 1
            self._send(line("change", self._serial, set=change.set, removed=change.removed))

    def _fail(self, error: str) -> None:
        # The state is unknown from here on, so that the next one comes whole.
        self._state = None
        if error != self._error:
            self._error = error
            self._serial += 1
            self._send(line("error", self._serial, error=error))

    def catch_up(self, link: LookLink) -> None:
        """Give a reader that lagged the whole state, once it has read all of the rest."""
        if link.lags and not link.waits and self._state is not None:
            link.catch_up(self._whole())

    def _whole(self) -> bytes:
        return line("state", self._serial, state=self._state)

    def _send(self, text: bytes) -> None:
        for link in self._watchers:
            link.stream(text)
