# SPDX-License-Identifier: LGPL-2.1-or-later
"""Code that runs as root, and who else may write it."""

import os
from pathlib import Path

import pytest

from libvirt_natns.cli import doctor, trust

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    directory = tmp_path / "lib" / "package"
    directory.mkdir(parents=True)
    file = directory / "module.py"
    file.write_text("")
    return file


def said(place: Path) -> list[str]:
    return [each for each in trust.findings([place]) if str(place.parent.parent) in each]


def test_what_is_roots_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(place) == []
    # A group without members writes nothing.
    monkeypatch.setattr(trust, "group_members", lambda _: [])
    place.parent.parent.chmod(0o2775)
    os.chown(place.parent.parent, 0, 50)
    assert said(place) == []


def test_what_others_may_write(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "group_members", lambda _: ["alice"])
    place.parent.parent.chmod(0o2775)
    os.chown(place.parent.parent, 0, 50)
    place.parent.chmod(0o777)
    os.chown(place, 65534, 0)
    lib, package, module = said(place)[::-1]
    assert lib.startswith(f"{place.parent.parent} is writable by group ")
    assert lib.endswith("(alice)")
    assert package == f"{place.parent} is writable by every user"
    assert module == f"{place} is writable by user nobody"
    # A link is as good as what it leads to.
    link = place.parent.parent.parent / "link.py"
    link.symlink_to(place)
    assert module in trust.findings([link])
    place.parent.chmod(0o1777)
    assert not any("every user" in each for each in said(place))


def test_doctor_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "findings", lambda: ["/opt/x is writable by every user"])
    found = doctor.trusted()
    assert found.state == "warn"
    assert "/opt/x is writable by every user" in found.said
    monkeypatch.setattr(trust, "findings", list)
    assert doctor.trusted().state == "ok"
