# SPDX-License-Identifier: LGPL-2.1-or-later
"""Leases that stand in a reservation's way."""

import json
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from libvirt_natns.daemons import dnsmasq_files, guest_leases, lease_file
from libvirt_natns.daemons.dnsmasq import Daemon
from libvirt_natns.daemons.dnsmasq_files import Files

STRANGER, WEB, MAIL = "02:00:00:00:00:01", "52:54:00:00:00:05", "52:54:00:00:00:06"
HOSTS = (
    f"{WEB},10.0.0.5,web\n{MAIL},[fd00::6]\nid:00:03:00:01:02,[fd00::7]\nprinter,10.0.0.8\n"
    f"{MAIL.upper()},10.0.0.6\n"
)


def squatted(tmp_path: Path, leases: dict[str, str]) -> list[tuple[str, object]]:
    entries = [
        {"ip-address": address, "mac-address": mac, "expiry-time": 0}
        for address, mac in leases.items()
    ]
    (tmp_path / "virbr10.status").write_text(json.dumps(entries))
    return [*guest_leases.squatted(Daemon("u", "nat-a", "virbr10", Files("", HOSTS)))]


def test_only_strangers_give_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_file, "LIBVIRT_DIRECTORY", tmp_path)
    monkeypatch.setattr(guest_leases, "LINKS", tmp_path / "links")
    assert squatted(tmp_path, {}) == []
    assert squatted(tmp_path, {"10.0.0.5": WEB, "fd00::6": MAIL, "10.0.0.9": STRANGER}) == []
    assert squatted(tmp_path, {"10.0.0.5": STRANGER}) == [(STRANGER, IPv4Address("10.0.0.5"))]
    assert squatted(tmp_path, {"fd00::6": STRANGER}) == [(STRANGER, IPv6Address("fd00::6"))]
    # Another guest that has a reservation, and a client of DHCPv6 that is not known.
    assert squatted(tmp_path, {"10.0.0.5": MAIL, "fd00::6": ""}) == []


def test_hosts_files_are_read_by_one_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of libvirt's may have a name, and reservations of ours have none."""
    monkeypatch.setattr(lease_file, "LIBVIRT_DIRECTORY", tmp_path)
    text = (
        f"{WEB},10.0.0.5,web\n{MAIL.upper()},[fd00::6]\n{MAIL},10.0.0.6\u2028{WEB},10.0.0.9\n"
        "id:00:03:00:01:02,[fd00::7]\n52:54:00:00:00:0x,10.0.0.8\nprinter,10.0.0.8\n"
    )
    assert [*dnsmasq_files.by_mac(text)] == [
        (WEB, IPv4Address("10.0.0.5")),
        (MAIL, IPv6Address("fd00::6")),
        (MAIL, IPv4Address("10.0.0.9")),
    ]
    assert [*dnsmasq_files.reserved(text)] == [(MAIL, IPv6Address("fd00::6"))]
    entries = [{"ip-address": "10.0.0.8", "mac-address": STRANGER, "expiry-time": 0}]
    (tmp_path / "virbr10.status").write_text(json.dumps(entries))
    assert guest_leases.squatted(Daemon("u", "nat-a", "virbr10", Files("", text))) == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "\xff",
        "null",
        "7",
        "{}",
        '{"ip-address": "10.0.0.5"}',
        '"text"',
        '["text", 7, null, ["ip-address"]]',
        '[{"ip-address": "10.0.0.5", "expiry-time": "soon"}]',
        '[{"ip-address": "10.0.0.5", "expiry-time": null}]',
        '[{"ip-address": "10.0.0.5", "expiry-time": [1]}]',
        '[{"ip-address": "10.0.0.5", "expiry-time": NaN}]',
        "[" * 100_000,
    ],
)
def test_a_file_of_another_form_has_no_leases(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_file, "LIBVIRT_DIRECTORY", tmp_path)
    (tmp_path / "virbr10.status").write_text(content, encoding="latin-1")
    assert lease_file.current("virbr10") == []
    assert guest_leases.squatted(Daemon("u", "nat-a", "virbr10", Files("", HOSTS))) == []


@pytest.mark.parametrize("address", ["", "10.0.0", None, [], {}, True])
def test_leases_with_odd_values_do_not_hide_others(
    address: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_file, "LIBVIRT_DIRECTORY", tmp_path)
    entries = ["odd", {"ip-address": address}, {"ip-address": "10.0.0.5", "mac-address": WEB}]
    (tmp_path / "virbr10.status").write_text(json.dumps(entries))
    assert guest_leases.present("virbr10")[IPv4Address("10.0.0.5")] == WEB


def test_without_reservations_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_leases, "present", lambda _: 1 / 0)
    assert guest_leases.squatted(Daemon("u", "nat-a", "virbr10", None)) == []
    assert guest_leases.squatted(Daemon("u", "nat-a", "virbr10", Files(""))) == []
