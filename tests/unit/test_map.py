# SPDX-License-Identifier: LGPL-2.1-or-later
"""The map of the code and the guide for contributors name files that exist, and each room."""

import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGE = CHECKOUT / "libvirt_natns"
MAP = CHECKOUT / "docs" / "explanation" / "architecture.md"
GUIDE = CHECKOUT / "CONTRIBUTING.md"
FILE = re.compile(
    r"`([\w./-]+\.(?:py|md|rng|toml|[578])|(?:contrib|hooks|tests|bench|xml)/[\w./-]*)"
)


def named(page: Path) -> set[str]:
    return set(FILE.findall(page.read_text()))


@pytest.mark.parametrize("page", [MAP, GUIDE], ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    places = (CHECKOUT, PACKAGE, CHECKOUT / "tests" / "system")
    missing = [name for name in named(page) if not any((place / name).exists() for place in places)]
    assert not missing
    assert len(named(page)) > 20


def test_the_map_has_each_room() -> None:
    headings = set(re.findall(r"(?m)^### (\S+)$", MAP.read_text()))
    rooms = {f"{file.parent.name}/" for file in PACKAGE.glob("*/__init__.py")}
    assert headings == rooms | {"Ground", "hook.py"}


def test_the_map_has_each_module_of_the_engine() -> None:
    modules = {f"engine/{file.name}" for file in (PACKAGE / "engine").glob("[!_]*.py")}
    assert modules - named(MAP) == set()
