# SPDX-License-Identifier: LGPL-2.1-or-later
"""Firewalls of an administrator's own, each from a few lines, and what status says of them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import natns, run
from lab_boundary import BRIDGE_NF

KILL_SWITCH = """table inet vpnguard {
  chain forward {
    type filter hook forward priority 0; policy drop;
    oifname "p-tun" accept
    iifname "p-tun" ct state established,related accept
    reject
  }
}
"""
"""Nothing leaves but by the tunnel."""

CONF = """table inet filter {
  chain forward {
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    iifname "natns-host" ip daddr 192.168.0.0/16 reject
    iifname "natns-host" accept
  }
}
"""
"""An nftables.conf that lets guests out, but not to the LAN."""


@contextmanager
def without_bridge_nf() -> Iterator[None]:
    """Bridged frames do not meet the host's rules, as on a host that has never had Docker."""
    before = BRIDGE_NF.read_text() if BRIDGE_NF.exists() else ""
    if before:
        BRIDGE_NF.write_text("0")
    try:
        yield
    finally:
        if before:
            BRIDGE_NF.write_text(before)


@contextmanager
def libvirts_rules_kept() -> Iterator[None]:
    """Put libvirt's own rules back, without which libvirt starts no network."""
    saved = {each: run(f"{each}-save").stdout for each in ("iptables", "ip6tables")}
    try:
        yield
    finally:
        run("nft", "flush ruleset")
        for program, rules in saved.items():
            run(f"{program}-restore", input=rules)


@contextmanager
def loaded(rules: str, *tables: str) -> Iterator[None]:
    """An administrator's rules, as an nftables.conf has them; his ``tables`` stay as they are."""
    file = Path("/run/tmp/nftables.conf")
    file.write_text(rules)
    run("nft", "-f", str(file))
    before = [listed(table) for table in tables]
    try:
        yield
        assert [listed(table) for table in tables] == before
    finally:
        for table in tables:
            run("nft", "delete", "table", *table.split(), check=False)


def listed(table: str) -> str:
    """A table as nft prints it, with the numbers of its rules."""
    return run("nft", "-a", "-s", "list", "table", *table.split()).stdout


def health(network: str) -> str:
    """What status says of a network."""
    (found,) = json.loads(natns("status", "--json", network).stdout)["networks"]
    return str(found["health"])


def stops() -> list[str]:
    """The chains that stop networks, as status, check and doctor say alike."""
    found = json.loads(natns("status", "--json").stdout)["stops"]
    checked = natns("check", check=False).stdout.splitlines()
    assert [line.removeprefix("note: ") for line in checked if line.startswith("note: ")] == found
    told = natns("doctor", check=False).stdout.splitlines()
    warned = [line.partition("foreign chains: ")[2] for line in told if "foreign chains: " in line]
    assert warned == found
    return [str(line) for line in found]


def suggested(line: str) -> list[str]:
    """The rules that a line suggests for a chain of nft."""
    for words in ("add to it ", "insert at its beginning "):
        if words in line:
            return line.rpartition(words)[2].split("; ")
    return []
