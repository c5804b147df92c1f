# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process is killed ahead of each step: the next start, stop or sync mends that."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

import pytest
from lab import (
    run,
    snapshot,
)
from lab_bench import (
    AHEAD,
    Bench,
    FailAt,
    grow_old,
    interesting,
    of_kind,
    settles_as,
)

from libvirt_natns.engine.reconcile import comparison, repairs
from libvirt_natns.engine.reconcile.sync import sync_all
from libvirt_natns.operations.addressing import Withdrawal
from libvirt_natns.operations.link_operations import Patch

pytest_plugins = ("lab_bench",)


def dies(verb: Callable[[Callable[[object], None]], None], index: int) -> bool:
    """Run a verb in a child that is killed ahead of one step; whether it got there."""
    child = os.fork()
    if child == 0:
        steps = iter(range(1000))

        def before(step: object) -> None:
            if next(steps) == index:
                os.kill(os.getpid(), signal.SIGKILL)

        with suppress(BaseException):
            verb(before)
            os._exit(0)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def start_again(bench: Bench) -> None:
    bench.start()
    assert bench.differences() == []
    bench.stop()


def stop_again(bench: Bench) -> None:
    with bench.engine() as verbs:
        verbs.down(bench.uuid)
    # libvirt's, if it was a start that was killed: the next start removes it.
    bench.delete_bridge()


def sync(bench: Bench) -> None:
    """libvirt thinks the network inactive."""
    grow_old()
    synchronize(bench, {})


def sync_active(bench: Bench) -> None:
    """libvirt has the network active: the hook was killed, and libvirt as well."""
    grow_old()
    synchronize(bench, {bench.uuid: bench.xml})
    assert bench.differences() == []
    bench.stop()


def synchronize(bench: Bench, active: Mapping[str, bytes]) -> None:
    with bench.engine() as verbs:
        assert sync_all(verbs, lambda: active).errors == []
        assert comparison.missed(verbs, lambda: active) == []
        # Twice is once.
        assert sync_all(verbs, lambda: active) == repairs.Outcome([], [])


Remedy = Callable[[Bench], None]
REMEDIES: list[Remedy] = [start_again, stop_again, sync]


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [*(("host upstream", remedy) for remedy in REMEDIES), ("iptables", start_again)],
    indirect=["setting"],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_killed_while_starting(remedy: Remedy, bench: Bench, setting: str) -> None:
    rehearsal = FailAt()
    before = snapshot()
    bench.start(rehearsal)
    bench.stop()
    settles_as(before)
    indexes = interesting(rehearsal.steps, setting)
    assert len(indexes) >= (2 if setting == "iptables" else 15)
    for index in indexes:
        assert dies(bench.start, index), rehearsal.steps[index]
        remedy(bench)
        settles_as(before)


Step = tuple[str, int]
"""A step's kind, or its text, and how many of them came before."""


def rehearsed(bench: Bench) -> dict[Step, int]:
    """Return the interesting steps of a start, with their places."""
    rehearsal = FailAt()
    bench.start(rehearsal)
    bench.stop()
    earlier: Counter[str] = Counter()
    places = {}
    for index in interesting(rehearsal.steps, "nftables"):
        step = rehearsal.steps[index]
        name = step if isinstance(step, str) else type(step).__name__
        places[name, earlier[name]] = index
        earlier[name] += 1
    return places


def pairs(places: Mapping[str, Mapping[Step, int]]) -> Iterator[tuple[str, Step, Remedy]]:
    """Yield kinds, steps and remedies, so that each two of them meet.

    A step of both kinds has one remedy in each; a step of one kind has both there.
    """
    remedies = (start_again, sync)
    steps = dict.fromkeys(step for of_kind in places.values() for step in of_kind)
    for number, step in enumerate(steps):
        kinds = [kind for kind in places if step in places[kind]]
        for place, kind in enumerate(kinds):
            chosen = remedies if len(kinds) == 1 else [remedies[(number + place) % 2]]
            yield from ((kind, step, remedy) for remedy in chosen)


@pytest.mark.parametrize("setting", ["nftables"], indirect=True)
def test_killed_while_building(bench: Bench) -> None:
    """Pairwise: the remedies do not know the kind of network, nor a step its remedy."""
    before = snapshot()
    benches = {kind: of_kind(kind, bench.xml) for kind in AHEAD}
    places = {kind: rehearsed(benches[kind]) for kind in AHEAD}
    settles_as(before)
    cases = list(pairs(places))
    assert {(kind, step) for kind, step, _ in cases} == {
        (kind, step) for kind in AHEAD for step in places[kind]
    }
    for kind, step, remedy in cases:
        assert dies(benches[kind].start, places[kind][step]), step
        remedy(benches[kind])
        settles_as(before)


@pytest.mark.parametrize("setting", ["nftables"], indirect=True)
def test_killed_before_libvirt_knew(bench: Bench) -> None:
    """The network is active in libvirt, and its router is somewhere in between."""
    rehearsal = FailAt()
    before = snapshot()
    bench.start(rehearsal)
    bench.stop()
    kinds = (Patch, Withdrawal)
    indexes = [i for i, step in enumerate(rehearsal.steps) if isinstance(step, kinds)]
    for index in [*indexes, len(rehearsal.steps) - 1]:
        assert dies(bench.start, index), rehearsal.steps[index]
        sync_active(bench)
        settles_as(before)


@pytest.mark.parametrize("setting", ["host upstream"], indirect=True)
@pytest.mark.parametrize("remedy", REMEDIES, ids=lambda remedy: remedy.__name__)
def test_killed_while_stopping(remedy: Remedy, bench: Bench) -> None:
    before = snapshot()
    index = 0
    while True:
        bench.start()
        killed = dies(bench.stop, index)
        remedy(bench)
        settles_as(before)
        if not killed:
            break
        index += 1
    assert index > 5


@pytest.mark.parametrize("setting", ["nftables"], indirect=True)
def test_killed_while_repairing(bench: Bench) -> None:
    before = snapshot()
    bench.start()
    active = {bench.uuid: bench.xml}

    def repair(step: Callable[[object], None]) -> None:
        with bench.engine(step) as verbs:
            sync_all(verbs, lambda: active)

    index, killed = 0, True
    while killed:
        run("ip", "netns", "delete", "nat-bench")
        killed = dies(repair, index)
        synchronize(bench, active)
        assert bench.differences() == []
        index += 8
    assert index > 16
    bench.stop()
    settles_as(before)
