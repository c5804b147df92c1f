# SPDX-License-Identifier: LGPL-2.1-or-later
"""What doctor says of the kernel's neighbour tables."""

from pathlib import Path

import pytest

from libvirt_natns import neighbour_tables


@pytest.fixture
def sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, Path]:
    found = {4: tmp_path / "four", 6: tmp_path / "six"}
    for file in found.values():
        file.write_text("1024\n")
    monkeypatch.setattr(neighbour_tables, "SIZES", found)
    monkeypatch.setattr(neighbour_tables, "key", lambda path: path.name)
    return found


def test_room_for_few_networks(sizes: dict[int, Path]) -> None:
    for networks in (0, 1, 5):
        assert neighbour_tables.examine(networks) == f"room for {networks} networks"


def test_tight_for_many(sizes: dict[int, Path]) -> None:
    sizes[6].write_text("16384")
    assert neighbour_tables.examine(20) == (
        "tight: 1024 entries on this host, 20 networks may take 4000: sysctl -w four=4096"
    )
    sizes[4].unlink()
    assert neighbour_tables.examine(20) == "room for 20 networks"


def test_names_of_the_settings() -> None:
    keys = [neighbour_tables.key(path) for path in neighbour_tables.SIZES.values()]
    assert keys == [f"net.ipv{family}.neigh.default.gc_thresh3" for family in (4, 6)]
