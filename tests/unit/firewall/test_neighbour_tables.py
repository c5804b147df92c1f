# SPDX-License-Identifier: LGPL-2.1-or-later
"""What doctor says of the kernel's neighbour tables."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from libvirt_natns.cli import access, doctor
from libvirt_natns.firewall import neighbour_tables
from libvirt_natns.model.configuration import Config


@pytest.fixture
def sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, Path]:
    found = {4: tmp_path / "four", 6: tmp_path / "six"}
    for file in found.values():
        file.write_text("1024\n")
    monkeypatch.setattr(neighbour_tables, "SIZES", found)
    monkeypatch.setattr(neighbour_tables, "key", lambda path: path.name)
    return found


def test_room_for_few_networks(sizes: dict[int, Path]) -> None:
    assert neighbour_tables.examine(0) == (False, "room for 0 networks")
    for file in sizes.values():
        file.write_text("8192")
    assert neighbour_tables.examine(5) == (False, "room for 5 networks")


def test_tight_for_many(sizes: dict[int, Path]) -> None:
    sizes[6].write_text("32768")
    assert neighbour_tables.examine(20) == (
        True,
        "1024 entries on this host, and 20 networks may need 29240: sysctl -w four=32768",
    )
    sizes[4].unlink()
    assert neighbour_tables.examine(20) == (False, "room for 20 networks")


@pytest.mark.parametrize(("networks", "state"), [(0, "ok"), (1, "warn")])
def test_doctor_warns(sizes: dict[int, Path], networks: int, state: str) -> None:
    store = SimpleNamespace(host=SimpleNamespace(users=lambda: range(networks)))
    engine = cast("access.Engines", lambda _: nullcontext(SimpleNamespace(store=store)))
    (finding,) = doctor.neighbour_warnings(engine, Config())
    assert (finding.what, finding.state) == ("neighbour tables", state)


def test_names_of_the_settings() -> None:
    keys = [neighbour_tables.key(path) for path in neighbour_tables.SIZES.values()]
    assert keys == [f"net.ipv{family}.neigh.default.gc_thresh3" for family in (4, 6)]
