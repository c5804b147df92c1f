# SPDX-License-Identifier: LGPL-2.1-or-later
"""What firewalld is asked, by a busctl that answers as it does, or not at all."""

from pathlib import Path

import pytest

from libvirt_natns.daemons import firewalld
from libvirt_natns.errors import FirewallError
from libvirt_natns.kernel import processes

BUSCTL = """#!/bin/sh
echo "$*" >>{log}
case $* in
*NameHasOwner*) echo '{{"type":"b","data":[{runs}]}}' ;;
*getZoneOfInterface*) {zone} ;;
*getZones*) echo '{{"type":"as","data":[["public","natns"]]}}' ;;
*changeZoneOfInterface*) {change} ;;
*) exit 1 ;;
esac
"""
NO_ZONE = """echo '{"type":"s","data":[""]}'"""
FAILS = "echo 'Call failed: {}' >&2; exit 1"


class Bus:
    """A place for a busctl, and the calls that it got."""

    def __init__(self, directory: Path) -> None:
        self.program = directory / "busctl"
        self.log = directory / "log"

    def answers(self, *, runs: str = "true", zone: str = NO_ZONE, change: str = NO_ZONE) -> None:
        text = BUSCTL.format(log=self.log, runs=runs, zone=zone, change=change)
        self.program.write_text(text)
        self.program.chmod(0o755)

    def calls(self, word: str) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if word in line]


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bus:
    for name in ("RUN", "SYSTEM_BUS"):
        monkeypatch.setattr(firewalld, name, tmp_path)
    found = Bus(tmp_path)
    monkeypatch.setattr(processes, "program", lambda _: str(found.program))
    found.answers()
    return found


def test_a_link_in_no_zone_is_put_into_ours(bus: Bus) -> None:
    assert firewalld.place(["natns-host"]) == ["natns-host"]
    (call,) = bus.calls("changeZone")
    assert call.endswith("FirewallD1.zone changeZoneOfInterface ss natns natns-host")
    assert "--auto-start=no" in call
    assert "--timeout=" in call


def test_a_link_that_an_administrator_has_put_elsewhere_stays(bus: Bus) -> None:
    bus.answers(zone="""echo '{"type":"s","data":["work"]}'""")
    assert firewalld.place(["natns-host"]) == []
    firewalld.withdraw(["natns-host"])
    assert bus.calls("changeZone") == bus.calls("removeInterface") == []


def test_without_firewalld_there_is_nothing_to_do(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus.answers(runs="false", zone=FAILS.format("no such name"))
    assert firewalld.place(["natns-host"]) == []
    assert firewalld.outside_zones(["natns-host"]) == []
    firewalld.withdraw(["natns-host"])
    assert not firewalld.is_running()
    bus.log.unlink()
    monkeypatch.setattr(firewalld, "RUN", tmp_path / "none")
    assert not firewalld.may_run()
    assert not firewalld.is_running()
    assert bus.calls("") == [], "no program is started where firewalld never ran"


def test_an_unknown_zone_is_no_error(bus: Bus) -> None:
    bus.answers(change=FAILS.format("INVALID_ZONE: natns"))
    assert firewalld.place(["natns-host"]) == []


def test_a_firewalld_that_hangs_is_told(bus: Bus) -> None:
    bus.answers(zone=FAILS.format("Connection timed out"))
    with pytest.raises(FirewallError, match="Connection timed out"):
        firewalld.place(["natns-host"])


@pytest.mark.parametrize("death", ["kill -ABRT $$", "exec sleep 60"])
def test_a_program_that_aborts_or_hangs_harms_nobody(
    death: str, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firewalld, "ANSWER_LIMIT", 0)
    bus.answers(zone=death)
    with pytest.raises(FirewallError):
        firewalld.place(["natns-host"])


def test_a_missing_busctl_is_told(monkeypatch: pytest.MonkeyPatch, bus: Bus) -> None:
    monkeypatch.setattr(processes, "program", lambda _: None)
    with pytest.raises(FirewallError, match="install systemd"):
        firewalld.place(["natns-host"])
