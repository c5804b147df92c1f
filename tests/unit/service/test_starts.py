# SPDX-License-Identifier: LGPL-2.1-or-later
"""The threads that follow starts live as long as the service."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from libvirt_natns.engine.engine import Engine
from libvirt_natns.model.configuration import Config
from libvirt_natns.service import starts as module
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


@pytest.mark.parametrize("taken_back", [True, False])
def test_guests_follow_a_start_that_is_given_up(
    taken_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt's event of the end may come, and be followed, before the start is taken back."""
    done: list[str] = []
    record = SimpleNamespace(uuid="a", state="up", this_boot=True)

    def give_up(given: Any, *, orphaned: bool) -> bool:  # noqa: ANN401
        done.append(f"give up {given.uuid} {orphaned}")
        return taken_back

    store = SimpleNamespace(networks=SimpleNamespace(get=lambda _: record))
    engine = SimpleNamespace(store=store, give_up=give_up)
    sessions = SimpleNamespace(engine=lambda: nullcontext(engine))
    monkeypatch.setattr(module, "leave", lambda _, ended: done.append(f"leave {ended.uuid}"))
    starts = Starts(cast("Any", sessions), Log(), lambda _uuid: False)
    starts.start()
    try:
        starts.expect("a")
        deadline = time.monotonic() + 10
        while len(done) <= taken_back and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        starts.stop()
    assert done == ["give up a True", "leave a"][: 1 + taken_back]
