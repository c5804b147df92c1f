# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which events are damage, and whose turn an audit is."""

import select
from pathlib import Path

import pytest

from libvirt_natns.engine.observer import HOST
from libvirt_natns.service import audit
from libvirt_natns.service.audit import Audit
from libvirt_natns.service.kernel_watch import Bell, KernelWatch
from libvirt_natns.service.own_changes import OwnChanges


@pytest.fixture
def suspected() -> list[str]:
    return []


@pytest.fixture
def own(suspected: list[str]) -> OwnChanges:
    return OwnChanges(suspected.append, lambda: None)


def test_events_during_our_own_changes_are_kept_until_their_end(
    own: OwnChanges, suspected: list[str]
) -> None:
    with own.changing("a"), own.changing("a"):
        own.heard("a")
        own.heard("b")
        own.heard(None)
    assert suspected == ["b"]
    # Until the thread has read all events, they are taken for ours.
    own.heard("a")
    assert own.is_going_on("a")
    assert own.take_ended() == ["a", "a"]
    assert own.take_ended() == []
    assert [own.finish("a"), own.finish("a")] == [False, True]
    assert own.was_overheard("a")
    assert not own.was_overheard("a")
    own.heard("a")
    assert suspected == ["b", "a"]


def test_our_own_changes_of_the_hosts_rules_are_no_news(
    own: OwnChanges, suspected: list[str]
) -> None:
    with own.changing(HOST):
        own.heard(HOST)
        assert not own.was_overheard(HOST)
        own.heard_of_host()
        assert own.was_overheard(HOST)
    assert suspected == []
    own.finish(HOST)
    own.heard_of_host()
    assert suspected == [HOST]


def test_changes_are_settled_when_their_ends_are_attended_to(own: OwnChanges) -> None:
    assert own.settled(0)
    with own.changing("a"):
        assert own.settled(0)
    assert not own.settled(0)
    own.note_attended()
    assert own.settled(0)


def test_a_bell_rings_until_it_is_closed() -> None:
    open_before = descriptors()
    bell = Bell()
    assert not is_readable(bell)
    bell.ring()
    assert is_readable(bell)
    bell.clear()
    bell.clear()
    assert not is_readable(bell)
    bell.close()
    # A change of ours may end after the watch.
    bell.ring()
    assert descriptors() == open_before


def is_readable(bell: Bell) -> bool:
    return bool(select.select([bell], [], [], 0)[0])


def test_a_stopped_watch_leaves_no_descriptor_open() -> None:
    open_before = descriptors()
    watch = KernelWatch(lambda uuid: None, lambda uuid: None)
    assert descriptors() != open_before
    watch.stop()
    assert descriptors() == open_before


def descriptors() -> set[str]:
    """Return the descriptors that this process has open, apart from that of the look itself."""
    return {entry.name for entry in Path("/proc/self/fd").iterdir() if entry.exists()}


def test_an_audit_takes_turns() -> None:
    turns = Audit()
    assert turns.take(100.0, []) is None
    assert turns.due == 0.0
    # The networks have just come up.
    assert turns.take(100.0, ["a", "b"]) is None
    pause = audit.ROUND / 3
    assert turns.due == 100.0 + pause
    assert turns.take(100.0 + pause / 2, ["a", "b"]) is None
    taken = [turns.take(100.0 + pause * number, ["a", "b"]) for number in range(1, 6)]
    assert taken == [HOST, "a", "b", HOST, "a"]
    # "b" went down before its turn.
    assert turns.take(100.0 + pause * 6, ["a", "c"]) is None
    assert turns.take(100.0 + pause * 7, ["a", "c"]) == HOST


def test_an_audit_of_many_networks_costs_little() -> None:
    turns = Audit()
    many = [str(number) for number in range(10_000)]
    turns.take(100.0, many)
    assert turns.due == 100.0 + audit.PAUSE
