# SPDX-License-Identifier: LGPL-2.1-or-later
"""firewalld's zone and policies of ours: written, renewed, removed, and an administrator's kept."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from libvirt_natns.cli import firewalld_files, firewalld_reload
from libvirt_natns.daemons import firewalld
from libvirt_natns.kernel import processes

RICH = '<rule family="ipv4"><reject/></rule></zone>'


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of firewalld, below which nothing is yet."""
    place = tmp_path / "firewalld"
    monkeypatch.setattr(firewalld_files, "DIRECTORY", place)
    return place


def changed(file: Path) -> str:
    """A file as firewalld writes it for an administrator: anew, without comments."""
    text = ElementTree.tostring(ElementTree.parse(file).getroot(), encoding="unicode")
    file.write_text(text.replace("</zone>", RICH))
    return file.read_text()


def test_files_come_and_go(directory: Path) -> None:
    written = firewalld_files.install()
    files = [directory / name for name in firewalld_files.FILES]
    assert written == [f"installed {file}" for file in files]
    zone, out, inward = (ElementTree.parse(file).getroot() for file in files)
    assert "target" not in zone.attrib, "the host is closed but for the services"
    ports = {(each.get("port"), each.get("protocol")) for each in zone.iter("port")}
    assert ports == {("305", "udp"), ("305", "tcp")}, "the DNS relay"
    assert [each.get("target") for each in (out, inward)] == ["ACCEPT", "ACCEPT"]
    assert firewalld_files.install() == []
    assert firewalld_files.remove() == [f"removed {file}" for file in reversed(files)]
    assert not directory.exists()
    assert firewalld_files.remove() == []


def test_directories_of_firewalld_itself_stay(directory: Path) -> None:
    (directory / "zones").mkdir(parents=True)
    (directory / firewalld_files.SETTINGS).touch()
    firewalld_files.install()
    firewalld_files.remove()
    assert (directory / "zones").is_dir()


def test_a_file_of_an_earlier_version_is_renewed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    firewalld_files.install()
    zone = firewalld_files.ZONE_FILE
    later = {zone: firewalld_files.FILES[zone].replace("ssh", "http")}
    monkeypatch.setattr(firewalld_files, "FILES", later)
    assert firewalld_files.install() == [f"installed {directory / firewalld_files.ZONE_FILE}"]


@pytest.mark.parametrize("name", firewalld_files.FILES)
def test_what_an_administrator_has_changed_is_kept(directory: Path, name: str) -> None:
    firewalld_files.install()
    theirs = changed(directory / name)
    assert firewalld_files.install() == [f"kept {directory / name}, which was changed here"]
    lines = firewalld_files.remove()
    assert (directory / name).read_text() == theirs
    assert f"kept {directory / name}, which was changed here" in lines


def test_a_zone_that_a_policy_is_about_is_kept(directory: Path) -> None:
    """Without the zone, firewalld would refuse all of its configuration."""
    firewalld_files.install()
    policy = directory / "policies" / "mine.xml"
    policy.write_text("<policy><ingress-zone name='natns'/><egress-zone name='HOST'/></policy>")
    kept = directory / firewalld_files.ZONE_FILE
    assert f"kept {kept}, as a policy of firewalld uses the zone" in firewalld_files.remove()
    assert kept.exists()
    policy.unlink()
    assert firewalld_files.remove() == [f"removed {kept}"]


RUNTIME = """public (default, active)
  target: default
  interfaces: eth0
  services: ssh dhcpv6-client
  rich rules:
\trule family="ipv4" source address="192.0.2.1" reject

libvirt (active)
  target: ACCEPT
  interfaces: virbr0
"""
FILES = """public (default)
  target: default
  interfaces: eth0
  services: dhcpv6-client ssh
  rich rules:
\trule family="ipv4" source address="192.0.2.1" reject

libvirt
  target: ACCEPT
  interfaces:{}

natns
  target: default
"""


def test_what_a_reload_would_drop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(firewalld_reload, "NETWORK_MANAGER", tmp_path / "none")
    in_files = firewalld_reload.comparable(FILES.format(" "))
    assert firewalld_reload.comparable(RUNTIME) == in_files
    for ours, theirs in (("ssh", "ssh http"), ("eth0", "eth0 eth1"), ("reject", "drop")):
        assert firewalld_reload.comparable(RUNTIME.replace(ours, theirs)) != in_files
    monkeypatch.setattr(firewalld_reload, "NETWORK_MANAGER", tmp_path)
    moved = RUNTIME.replace("eth0", "eth0 eth1")
    assert firewalld_reload.comparable(moved) == firewalld_reload.comparable(RUNTIME)


@pytest.mark.parametrize(("known", "renewed"), [(False, True), (True, True), (True, False)])
def test_firewalld_reads_a_zone_that_is_new_or_renewed(
    known: bool, renewed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reloads: list[str] = []
    monkeypatch.setattr(firewalld, "is_running", lambda: True)
    monkeypatch.setattr(firewalld, "knows_zone", lambda: known)
    monkeypatch.setattr(firewalld, "reload", lambda: reloads.append("reload"))
    # A firewall-cmd that lists nothing, in force and in files alike.
    monkeypatch.setattr(processes, "required", lambda *_: "/bin/true")
    assert bool(firewalld_reload.make_known(renewed=renewed)) == renewed
    assert bool(reloads) == renewed
