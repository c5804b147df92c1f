# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table and the JSON."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from libvirt_natns.cli import status, status_report
from libvirt_natns.cli.status_report import Status, StatusReport
from libvirt_natns.daemons import lease_file
from libvirt_natns.engine.late_starts import LateStart
from libvirt_natns.engine.reconcile.obstacles import Obstacle
from libvirt_natns.model.configuration import Config

UUID = "c0ffee00-0000-4000-8000-000000000001"


def network(name: str, state: str = "up", *differences: str) -> Status:
    return Status(
        network=name,
        uuid=UUID,
        state=state,
        namespace=f"nat-{name}",
        bridge="virbr10",
        subnets=("10.0.0.0/24", "10.1.0.0/24"),
        upstream="provider",
        address="192.168.0.100" if state == "up" else None,
        leases=3,
        health=f"damaged ({len(differences)})" if differences else "ok",
        differences=differences,
    )


# Status


def test_table() -> None:
    shown = status_report.text(
        StatusReport(
            [network("a"), network("long-name", "down"), network("c", "up", "x")], [], [], []
        )
    )
    assert (
        shown
        == """\
NETWORK    NAMESPACE  SUBNET                    UPSTREAM  ADDRESS        LEASES  HEALTH
a          nat-a      10.0.0.0/24, 10.1.0.0/24  provider  192.168.0.100  3       ok
long-name  -          10.0.0.0/24, 10.1.0.0/24  provider  -              -       ok
c          nat-c      10.0.0.0/24, 10.1.0.0/24  provider  192.168.0.100  3       damaged (1)
  ! x
"virt-natns sync" repairs the differences marked with "!"."""
    )


def test_what_is_wrong_elsewhere_stands_below() -> None:
    lines = status_report.text(
        StatusReport(
            [network("a")],
            ["bridge x is left over"],
            [("b", "has no router")],
            [("web", "is not published")],
        )
    )
    assert lines.splitlines()[2:] == [
        "  ! host: bridge x is left over",
        "  ! b: has no router",
        "  ! web: is not published",
        '"virt-natns sync" repairs the differences marked with "!".',
    ]


def test_what_no_repair_changes_stands_at_the_end() -> None:
    report = StatusReport([], [], [], [], stops=("a chain",), notes=("a relay",))
    assert status_report.text(report).splitlines()[1:] == ["  # a chain", "  # a relay"]


def test_an_obstacle_is_nothing_that_sync_repairs() -> None:
    found = (Obstacle("no way out", "no way out: no route"),)
    blocked = replace(network("a"), health="no way out", obstacles=found)
    lines = status_report.text(StatusReport([blocked], [], [], [])).splitlines()
    assert lines[1].endswith("no way out")
    assert lines[2:] == ["  - no way out: no route"]


def active(name: str, number: int, inside: str) -> tuple[str, bytes]:
    uuid = f"c0ffee00-0000-4000-8000-00000000000{number}"
    return uuid, (
        f"<network><name>{name}</name><uuid>{uuid}</uuid><bridge name='virbr{number}'/>"
        f"{inside}</network>"
    ).encode()


IP = "<ip address='10.0.0.1' prefix='24'/>"
DISABLED = "<metadata><natns:nat xmlns:natns='urn:libvirt-natns:1' enabled='no'/></metadata>"
ACTIVE = dict([
    active("a", 1, DISABLED + IP),
    active("b", 2, IP),
    active("c", 3, ""),
    active("d", 4, f"<forward mode='nat'/>{IP}"),
    active("e", 5, DISABLED + IP),
    active("f", 6, DISABLED.replace("no", "maybe") + IP),
])  # fmt: skip


def test_active_networks_without_a_router_are_not_down() -> None:
    recorded = [replace(network(name, "down"), health="down") for name in "abcdfg"]
    found = status.with_unhandled(recorded, ACTIVE, Config(scope="isolated"), None)
    assert [(each.network, each.state, each.health) for each in found] == [
        ("a", "isolated", "isolated (enabled=no)"),
        ("b", "down", "no router"),
        ("c", "isolated", "isolated (no address)"),
        ("d", "isolated", "not handled (forward mode=nat)"),
        ("e", "isolated", "isolated (enabled=no)"),
        ("f", "down", "no router"),
        ("g", "down", "down"),
    ]
    opted = status.with_unhandled(recorded, ACTIVE, Config(scope="annotated"), None)
    assert opted[1].health == "isolated (scope=annotated)"


def test_networks_that_were_never_handled_are_listed_on_demand() -> None:
    names = {
        named: [each.network for each in status.with_unhandled([], ACTIVE, Config(), named)]
        for named in (None, "c", "d", "e", "x")
    }
    assert names == {None: ["a", "e"], "c": ["c"], "d": [], "e": ["e"], "x": []}


def test_a_network_that_waits_for_its_upstream_is_shown_by_name() -> None:
    late = [LateStart(UUID, "a", "br0 does not exist"), LateStart("other", "b", "")]
    assert status.waiting(late, "a") == status.waiting(late, UUID)
    assert status.waiting(late, "x") == ()
    report = StatusReport([], [], [], [], late=status.waiting(late, None))
    assert status_report.text(report).splitlines() == [
        "  > a: waits to be started: br0 does not exist",
        "  > b: waits to be started: its upstream is there by now",
    ]


def test_nothing_yet() -> None:
    assert status_report.text(StatusReport([], [], [], [])) == status_report.NONE


def test_json_keeps_its_keys() -> None:
    told = status_report.as_json(
        StatusReport([network("a", "up", "x")], ["y"], [("b", "z")], [("web", "w")])
    )
    shown = json.loads(told)
    assert shown["host"] == ["y"]
    assert shown["guests"] == [{"guest": "web", "difference": "w"}]
    assert shown["missed"] == [{"network": "b", "difference": "z"}]
    assert list(shown["networks"][0]) == [
        "network", "uuid", "state", "namespace", "bridge", "subnets", "upstream", "address",
        "leases", "health", "differences", "forwards", "address6", "prefix",
        "lease_seconds", "obstacles", "dhcp_leases",
    ]  # fmt: skip


def test_leases_that_have_not_expired_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_file, "LIBVIRT_DIRECTORY", tmp_path)
    entries = [{"expiry-time": 4_000_000_000}, {"expiry-time": 1}, {"expiry-time": 0}]
    (tmp_path / "virbr10.status").write_text(json.dumps(entries))
    (tmp_path / "virbr11.status").write_text("")
    (tmp_path / "virbr12.status").write_text("{half")
    found = [len(lease_file.current(f"virbr1{number}")) for number in range(4)]
    assert found == [2, 0, 0, 0]
