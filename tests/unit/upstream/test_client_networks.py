# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks on a router: their forwards are rules of the router as it is now."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from libvirt_natns import names
from libvirt_natns.firewall.loaded import RuleSet
from libvirt_natns.kernel.boot_clock import boot_id
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.publication import PortProtocol
from libvirt_natns.state.store import Store
from libvirt_natns.upstream.router import (
    client_networks,
    downstream,
    journal,
    link_config,
    nat_rules,
    router_files,
)
from libvirt_natns.upstream.router.downstream import RouterNeeds

RECORD = Path(__file__).parent / "router" / "wan.json"
SSH: tuple[PortProtocol, int, int] = ("tcp", 2222, 2222)


def test_rules_are_those_of_the_ports_that_the_router_has_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`router up` applies changed ``host_ports`` while a guest's hook waits for the lock."""
    monkeypatch.setattr(names, "STATE_DIRECTORY", tmp_path)
    (tmp_path / "routers").mkdir()
    shutil.copy(RECORD, tmp_path / "routers" / "wan.json")
    kept = journal.load("wan")
    assert kept is not None
    record = journal.advance(kept, boot=boot_id())
    assert SSH not in record.target.ports
    changed = replace(record.target, ports=(*record.target.ports, SSH))

    @contextmanager
    def lock() -> Iterator[None]:
        journal.advance(record, target=changed)
        yield

    loaded: list[RuleSet] = []
    monkeypatch.setattr(router_files, "lock", lock)
    monkeypatch.setattr(link_config, "configure", lambda _: None)
    monkeypatch.setattr(downstream, "transit", lambda *_: None)
    monkeypatch.setattr(RuleSet, "load", lambda rules: loaded.append(rules))  # bound as a method
    empty = SimpleNamespace(users=list, forwards=list)
    store = cast("Store", SimpleNamespace(host=empty, claims=empty))
    assert client_networks.ensure(store, Config(), lambda _: None)
    wanted = nat_rules.rules(changed, RouterNeeds())
    assert [each.rules for each in loaded] == [nat_rules.firewall(changed, wanted).rule_set.rules]
