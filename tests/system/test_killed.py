# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process is killed ahead of each step: the next start, stop or sync mends that."""

import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress

import pytest
from lab import (
    run,
    snapshot,
)
from lab_bench import (
    Bench,
    FailAt,
    grow_old,
    interesting,
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


REMEDIES = [start_again, stop_again, sync]


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [*(("host upstream", remedy) for remedy in REMEDIES), ("iptables", start_again)],
    indirect=["setting"],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_killed_while_starting(remedy: Callable[[Bench], None], bench: Bench, setting: str) -> None:
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


@pytest.mark.parametrize("setting", ["nftables"], indirect=True)
@pytest.mark.parametrize("remedy", [start_again, sync], ids=lambda remedy: remedy.__name__)
def test_killed_while_building(remedy: Callable[[Bench], None], ahead: Bench) -> None:
    rehearsal = FailAt()
    before = snapshot()
    ahead.start(rehearsal)
    ahead.stop()
    settles_as(before)
    for index in interesting(rehearsal.steps, "nftables"):
        assert dies(ahead.start, index), rehearsal.steps[index]
        remedy(ahead)
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
def test_killed_while_stopping(remedy: Callable[[Bench], None], bench: Bench) -> None:
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
