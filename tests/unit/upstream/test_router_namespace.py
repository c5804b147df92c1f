# SPDX-License-Identifier: LGPL-2.1-or-later
"""The namespace of a router is made anew only in place of one of ours."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from libvirt_natns import names
from libvirt_natns.daemons import ndppd
from libvirt_natns.errors import ConflictError
from libvirt_natns.operations import namespaces
from libvirt_natns.operations.operation import ApplyContext
from libvirt_natns.upstream.router import journal, nic_lease
from libvirt_natns.upstream.router.journal import RouterState
from libvirt_natns.upstream.router.router_namespace import RouterNamespace

RECORD = Path(__file__).parent / "router" / "wan.json"
FOREIGN = ""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the namespaces that are made; the router has come up in this boot."""
    monkeypatch.setattr(names, "STATE_DIRECTORY", tmp_path)
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path / "run")
    (tmp_path / "routers").mkdir()
    shutil.copy(RECORD, tmp_path / "routers" / "wan.json")
    monkeypatch.setattr(journal.RouterRecord, "this_boot", True)
    listed: list[str] = []
    monkeypatch.setattr(nic_lease, "end", lambda _: None)
    monkeypatch.setattr(ndppd, "stop_in", lambda _: None)
    monkeypatch.setattr(namespaces, "make_anew", lambda _, name, __: listed.append(name))
    return listed


def ensure(owner: str | None, state: RouterState) -> None:
    record = journal.load("wan")
    assert record is not None
    journal.advance(record, state=state)
    kernel = SimpleNamespace(namespace_owner=lambda _: owner)
    context = cast("ApplyContext", SimpleNamespace(kernel=kernel))
    RouterNamespace(record.target).ensure(context)


def test_a_foreign_namespace_in_place_of_a_router_is_refused(made: list[str]) -> None:
    with pytest.raises(ConflictError, match="belongs to another program"):
        ensure(FOREIGN, "up")
    assert made == []


def test_the_namespace_of_another_router_is_not_to_be_deleted(made: list[str]) -> None:
    with pytest.raises(ConflictError) as raised:
        ensure("router two", "up")
    assert str(raised.value) == (
        "namespace natns-router-wan belongs to router two: rename the upstream"
    )


@pytest.mark.parametrize(("owner", "state"), [(None, "up"), (FOREIGN, "going up")])
def test_a_namespace_that_is_missing_or_half_made_is_made(
    owner: str | None, state: RouterState, made: list[str]
) -> None:
    ensure(owner, state)
    assert made == ["natns-router-wan"]
    assert sorted(file.name for file in (names.STATE_DIRECTORY / "routers").iterdir()) == [
        "wan.json"
    ]


def test_a_repair_that_was_killed_goes_on(made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A namespace is made before it is tagged."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(namespaces, "make_anew", die)
        with pytest.raises(KeyboardInterrupt):
            ensure(None, "up")
    ensure(FOREIGN, "up")
    assert made == ["natns-router-wan"]
