# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules that assign conntrack's helpers, and kernels that lack the helpers."""

import os
import stat
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import (
    backends,
    helper_trial,
    host_iptables,
    host_parts,
    host_rules,
    iptables,
    nft_listing,
    nftables,
)
from libvirt_natns.firewall.helpers import following
from libvirt_natns.firewall.host_nftables import HOST
from libvirt_natns.firewall.host_policy import Followed, HostPolicy, Transit
from libvirt_natns.kernel import processes
from libvirt_natns.model.upstream import Helper

BOTH: tuple[Helper, ...] = ("tftp", "ftp")
TRANSIT = Transit("natns-host", IPv4Network("198.19.252.0/22"))
POLICY = HostPolicy(
    transits=(TRANSIT,), followed=(Followed("natns-host", IPv4Address("198.19.252.7"), BOTH),)
)


def test_a_namespace_assigns_helpers_to_flows_from_its_guests() -> None:
    rules = tuple(following("virbr1", BOTH))
    assert "\n".join(nftables.render(rules).splitlines()[4:20]) == (
        "table inet natns {\n"
        "\tct helper ftp {\n"
        '\t\ttype "ftp" protocol tcp\n'
        "\t\tl3proto inet\n"
        "\t}\n"
        "\tct helper tftp {\n"
        '\t\ttype "tftp" protocol udp\n'
        "\t\tl3proto inet\n"
        "\t}\n"
        "\tchain helper {\n"
        "\t\ttype filter hook prerouting priority mangle; policy accept;\n"
        '\t\tiifname "virbr1" tcp dport 21 ct helper set "ftp"\n'
        '\t\tiifname "virbr1" udp dport 69 ct helper set "tftp"\n'
        "\t}\n"
        "\tchain input {\n"
        "\t\ttype filter hook input priority filter; policy drop;"
    )
    made = iptables.tables(rules, ipv6=True)
    for family in (4, 6):
        (raw,) = (each for each in made if (each.name, each.family) == ("raw", family))
        assert [str(entry) for entry in raw.chains["PREROUTING"]] == [
            "-i virbr1 -p tcp -m tcp --dport 21 -j CT --helper ftp",
            "-i virbr1 -p udp -m udp --dport 69 -j CT --helper tftp",
        ]


def test_no_helper_is_declared_that_no_rule_assigns() -> None:
    assert "helper" not in nftables.render(following("virbr1", ()))


def test_the_host_assigns_helpers_to_flows_of_single_networks() -> None:
    rules = host_rules.rules(POLICY)
    text = nftables.script(rules, HOST)
    assert (
        '\t\tiifname "natns-host" ip saddr 198.19.252.7 udp dport 69 ct helper set "tftp"' in text
    )
    (raw,) = (
        table for table in host_iptables.tables({4: rules}) if table["name"] == "raw"
    )  # fmt: skip
    targets = [entry["target"] for entry in raw["chains"]["NATNS-PREROUTING"]]
    assert ("CT", {"helper": "ftp"}) in targets
    assert [jump["builtin"] for jump in raw["jumps"]] == ["PREROUTING"]


def test_a_network_with_helpers_has_all_rules_compared() -> None:
    without, part = host_parts.make(HostPolicy(transits=(TRANSIT,))), host_parts.make(POLICY)
    assert part.counts() == without.counts()
    assert host_parts.script(without, part, []) is None
    assert host_parts.script(part, part, []) == ""


@pytest.mark.parametrize("number", ["protocol tcp\n", "protocol 6\n\n"])
def test_protocols_as_each_nft_lists_them(number: str) -> None:
    """nft names a protocol where the machine has an /etc/protocols."""
    listed = nft_listing.canonical(f'\t\ttype "ftp" {number}\t\tl3proto inet\n')
    assert listed.split() == ["type", '"ftp"', "protocol", "6", "l3proto", "inet"]


# -- kernels without the helper ----------------------------------------------


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A backend that loads rules nowhere; returns the helpers that the kernel lacks."""
    lacks: list[str] = []

    def apply(_namespace: object, rules: tuple[object, ...]) -> None:
        if any(f"helper='{name}'" in repr(rules) for name in lacks):
            raise FirewallError("nft refused the rules", "No such file or directory")

    monkeypatch.setattr(helper_trial, "worked", set())
    monkeypatch.setattr(nftables, "apply", apply)
    monkeypatch.setattr(helper_trial, "in_scratch_namespace", lambda call: call())
    monkeypatch.setattr(processes, "program", lambda _: None)
    assert backends.named("nftables").apply is apply
    return lacks


def test_a_missing_helper_is_named_with_its_module(backend: list[str]) -> None:
    backend.append("ftp")
    with pytest.raises(FirewallError) as refused:
        helper_trial.check(BOTH, "nftables", "network a", "remove it")
    assert str(refused.value) == (
        "network a: the kernel has no helper ftp, as module nf_conntrack_ftp is missing (nft"
        " refused the rules: No such file or directory): install a kernel with nf_conntrack_ftp"
        " and nf_nat_ftp, or remove it"
    )
    helper_trial.check(["tftp"], "nftables", "network a", "")
    helper_trial.check((), "nftables", "network a", "")
    assert helper_trial.present(BOTH, "nftables") == ("tftp",)


def test_a_helper_that_comes_later_is_found_once(backend: list[str]) -> None:
    backend.append("tftp")
    with pytest.raises(FirewallError, match="nf_conntrack_tftp"):
        helper_trial.check(BOTH, "nftables", "network a", "")
    backend.clear()
    helper_trial.check(BOTH, "nftables", "network a", "")
    # A helper that was there is not tried again.
    backend.append("tftp")
    helper_trial.check(BOTH, "nftables", "network a", "")


@pytest.fixture
def modprobe(
    backend: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Path]:
    """A modprobe that ends with a status, on a kernel with modules; returns its log."""
    assert not backend
    program, log = tmp_path / "modprobe", tmp_path / "log"
    modules = tmp_path / os.uname().release
    modules.mkdir()
    (modules / "modules.dep").touch()
    monkeypatch.setattr(helper_trial, "MODULES", tmp_path)
    monkeypatch.setattr(helper_trial, "LOADED", tmp_path / "loaded")
    monkeypatch.setattr(processes, "program", lambda _: str(program))

    def ends(status: int) -> Path:
        program.write_text(f'#!/bin/sh\necho "$*" >>{log}\nexit {status}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return log

    return ends


def test_the_module_that_translates_announcements_is_loaded(
    modprobe: Callable[[int], Path], tmp_path: Path
) -> None:
    """No rule asks the kernel for it."""
    log = modprobe(0)
    (tmp_path / "loaded" / "nf_nat_tftp").mkdir(parents=True)
    helper_trial.check(BOTH, "nftables", "network a", "")
    assert log.read_text() == "-q nf_nat_ftp\n"


def test_a_kernel_without_the_module_that_translates_is_refused(
    modprobe: Callable[[int], Path],
) -> None:
    modprobe(1)
    with pytest.raises(FirewallError, match="as module nf_nat_ftp is missing: install a kernel"):
        helper_trial.check(BOTH, "nftables", "network a", "")
