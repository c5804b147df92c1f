# SPDX-License-Identifier: LGPL-2.1-or-later
"""Repairs of several networks: an error of one, of any kind, keeps no other."""

import errno
import syslog
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Barrier, get_ident

import pytest

from libvirt_natns.engine import adoption
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.reconcile import repairs
from libvirt_natns.errors import KernelError, StoreError
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.state.store import Store

FULL = OSError(errno.ENOSPC, "No space left on device", "/run/hosts")
NAMES = ("lab0", "lab1", "lab2", "lab3")
ERRORS = {
    "lab0: no link": KernelError("no link"),
    "lab0: cannot write /run/hosts (No space left on device): free some space": FULL,
    "lab0: internal error (KeyError: 'x'): see the system log and report it": KeyError("x"),
}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with closing(Store(tmp_path)) as store, Kernel() as kernel:
        yield Engine(Config(upstreams={}), store, kernel)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(syslog, "syslog", lambda _, line: lines.append(line))
    return lines


@pytest.mark.parametrize("names", [NAMES, NAMES[:1]])
@pytest.mark.parametrize("line", ERRORS)
def test_an_error_of_one_repair_keeps_no_other(
    line: str, names: tuple[str, ...], engine: Engine, logged: list[str]
) -> None:
    def fix(name: str, _: Engine) -> list[str]:
        if name == "lab0":
            raise ERRORS[line]
        return ["was missing"]

    outcome = repairs.repair_all(engine, [(name, partial(fix, name)) for name in names])
    assert outcome.errors == [line]
    assert outcome.repaired == [(name, "was missing") for name in names[1:]]
    # A fault of ours leaves its traceback.
    assert any("KeyError" in each for each in logged) == ("KeyError" in line)


@pytest.mark.parametrize("short_of", ["threads", "databases"])
def test_without_workers_the_caller_repairs(
    short_of: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        if short_of == "threads":
            raise RuntimeError("can't start new thread")
        raise StoreError("cannot open the state database")

    if short_of == "threads":
        monkeypatch.setattr(ThreadPoolExecutor, "submit", fail)
    else:
        monkeypatch.setattr(repairs, "Store", fail)
    done: list[str] = []

    def fix(name: str, own: Engine) -> list[str]:
        done.append(name)
        assert own is engine
        return []

    outcome = repairs.repair_all(engine, [(name, partial(fix, name)) for name in NAMES])
    assert tuple(done) == NAMES
    assert not outcome.errors


def test_networks_that_wait_are_repaired_at_once(engine: Engine) -> None:
    """Each repair ends only when all have begun."""
    begun = Barrier(len(NAMES), timeout=30)

    def fix(_: Engine) -> list[str]:
        begun.wait()
        return ["was missing"]

    outcome = repairs.repair_all(engine, [(name, fix) for name in NAMES])
    assert outcome.repaired == [(name, "was missing") for name in NAMES]


def test_networks_that_are_done_at_once_have_one_worker(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More threads would only take the interpreter from each other."""
    monkeypatch.setattr(repairs, "PATIENCE", 30.0)
    workers: set[int] = set()

    def fix(_: Engine) -> list[str]:
        workers.add(get_ident())
        return []

    repairs.repair_all(engine, [(name, fix) for name in NAMES])
    assert len(workers) == 1


def test_an_adoption_that_fails_keeps_no_other(
    engine: Engine, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise FULL

    monkeypatch.setattr(adoption, "locked", fail)
    monkeypatch.setattr(Kernel, "namespace_owner", lambda _, namespace: namespace[4:])
    xml = {name: f"<network><name>{name}</name></network>".encode() for name in NAMES}
    outcome = adoption.adopt(engine, xml, {})
    assert outcome.errors == [
        f"{name}: cannot write /run/hosts (No space left on device): free some space"
        for name in NAMES
    ]
