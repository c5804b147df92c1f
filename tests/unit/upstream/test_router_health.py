# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a router is, while others may be at work on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import cast

import pytest

from libvirt_natns.errors import LockError
from libvirt_natns.upstream.router import health, journal, router_files
from libvirt_natns.upstream.router.lifecycle import RouterLifecycle

VERBS = cast("RouterLifecycle", SimpleNamespace(kernel=SimpleNamespace(distrust=lambda: None)))
WHOLE = SimpleNamespace(this_boot=True, is_whole=True, is_overdue=False, deadline=None)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What one look after the other finds."""
    found: list[list[str]] = []
    monkeypatch.setattr(journal, "load", lambda _: WHOLE)
    monkeypatch.setattr(health, "differences", lambda *_: found.pop(0))
    return found


def lock_with(monkeypatch: pytest.MonkeyPatch, error: LockError | None = None) -> list[str]:
    taken = []

    @contextmanager
    def lock() -> Iterator[None]:
        taken.append("lock")
        if error:
            raise error
        yield

    monkeypatch.setattr(router_files, "lock", lock)
    return taken


def test_a_lease_that_comes_into_force_is_no_damage(
    looks: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = lock_with(monkeypatch)
    looks += [["setting ipv6/conf/accept_dad of ens3 is 0 instead of 1"], []]
    assert health.of(VERBS, "wan")[0] == "up"
    assert taken == ["lock"]
    looks += [["x"], ["y"]]
    assert health.of(VERBS, "wan")[::2] == ("damaged", ["y"])


def test_a_router_that_is_well_waits_for_nobody(
    looks: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = lock_with(monkeypatch)
    looks.append([])
    assert health.of(VERBS, "wan")[0] == "up"
    assert taken == []


def test_without_the_lock_the_first_look_counts(
    looks: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_with(monkeypatch, LockError("cannot lock", "try again"))
    looks.append(["x"])
    assert health.of(VERBS, "wan")[::2] == ("damaged", ["x"])
