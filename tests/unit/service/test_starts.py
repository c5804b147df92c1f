# SPDX-License-Identifier: LGPL-2.1-or-later
"""The threads that follow starts live as long as the service."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from libvirt_natns.engine.engine import Engine
from libvirt_natns.model.configuration import Config
from libvirt_natns.service.log import Log
from libvirt_natns.service.starts import ASKERS, Starts


class Sessions:
    """Has no descriptor left."""

    def __init__(self) -> None:
        self.opened = 0

    @contextmanager
    def engine(self, settings: Config | None = None) -> Iterator[Engine]:
        """Fail as open(2) does."""
        self.opened += 1
        raise OSError(24, "Too many open files")
        yield cast("Engine", None)


def test_an_unexpected_error_ends_no_thread() -> None:
    sessions = Sessions()
    starts = Starts(sessions, Log(), lambda _uuid: None)
    starts.start()
    try:
        # More starts than threads.
        for number in range(ASKERS + 1):
            starts.expect(f"uuid-{number}")
        deadline = time.monotonic() + 10
        while sessions.opened <= ASKERS and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        starts.stop()
    assert sessions.opened == ASKERS + 1
