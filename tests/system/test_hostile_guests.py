# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that leases all addresses of its network: others that publish something start.

Control: the addresses that it asked for are leased, so that none is left.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import (
    FastGuest,
    Provider,
    define_network,
    isolated,
    natns,
    remove_config,
    run,
    virsh,
    wait_for,
    write_config,
)
from lab_domains import asked, create, destroy, domain, nic, ports
from lab_ipv6 import DualProvider, dual, leased6, settle
from views import upstream_address

MAC = "52:54:00:00:00:05"
PLAIN = "52:54:00:00:00:22"
RANGE = ("10.0.0.100", "10.0.0.102")
NATNS_IP = (
    '<natns:nat xmlns:natns="urn:libvirt-natns:1"><natns:ip address="10.0.0.1" prefix="24">'
    f'<natns:dhcp><natns:range start="{RANGE[0]}" end="{RANGE[1]}"/></natns:dhcp>'
    "</natns:ip></natns:nat>"
)


@pytest.fixture
def configured(installed: None, provider: Provider) -> Iterator[Provider]:
    yield provider
    remove_config()


def leases(bridge: str = "virbr10") -> dict[str, str]:
    """Leased addresses with their MACs, as libvirt's helper has them on file."""
    file = Path(f"/var/lib/libvirt/dnsmasq/{bridge}.status")
    entries = json.loads(file.read_text() or "[]") if file.exists() else []
    return {entry["ip-address"]: entry.get("mac-address", "") for entry in entries}


def leases6() -> list[str]:
    return [each for each in leases() if ":" in each]


def starve(guest: FastGuest, count: int) -> None:
    """Have a guest lease addresses under made-up MACs."""
    for number in range(count):
        run("ip", "-n", guest.name, "link", "set", "eth0", "down")
        guest.run("ip", "link", "set", "eth0", "address", f"02:00:00:00:00:{number:02x}")
        run("ip", "-n", guest.name, "link", "set", "eth0", "up")
        guest.dhcp(apply=False, timeout=15)


@pytest.mark.parametrize(
    ("stock", "firewall"),
    [(True, "nftables"), (False, "iptables")],
    ids=["ip-nftables", "natns-ip-iptables"],
)
def test_reservations_find_room(configured: Provider, stock: bool, firewall: str) -> None:
    """A guest with a forward starts, gets an address, and is reached; plain ones keep theirs."""
    write_config(configured.config(firewall=firewall, more="probe = 0.05"))
    if stock:
        define_network(isolated("a", "virbr10", dhcp=RANGE))
    else:
        define_network(isolated("a", "virbr10", address=None, metadata=NATNS_IP))
    virsh("net-start", "a")
    with FastGuest("virbr10", PLAIN, "plain") as plain:
        own = plain.dhcp()["ip"]
        with FastGuest("virbr10", name="hostile") as hostile:
            starve(hostile, 2)
        # dnsmasq has its helper write a lease down a moment after the guest has it.
        wait_for(lambda: len(leases()) == 3, what="the leases to be on file")
        before = leases()
        create(domain("web", nic("a", MAC), publishes=ports("start='8080' to='7'")))
        after = leases()
        assert after[own] == PLAIN
        assert len(after) == 2
        with FastGuest("virbr10", MAC, "web") as web:
            got = web.dhcp()["ip"]
            assert got in set(before) - set(after)
            web.serve("tcp", 7)
            assert asked("upstream", "tcp", upstream_address("a"), 8080) is not None
            # The plain guest's lease is renewed, not refused.
            assert plain.dhcp()["ip"] == own
        assert natns("check", check=False).stdout == ""
        destroy("web")
    virsh("net-destroy", "a")


def test_reservations_find_room_in_ipv6(installed: None) -> None:
    with DualProvider() as provider:
        write_config(provider.config6())
        define_network(dual("a", "virbr10", dhcp6=("fd00:10::100", "fd00:10::101")))
        virsh("net-start", "a")
        with FastGuest("virbr10", "02:00:00:00:00:01", name="hostile") as hostile:
            for number in range(2):
                run("ip", "-n", "hostile", "link", "set", "eth0", "down")
                mac = f"02:00:00:00:00:{number:02x}"
                hostile.run("ip", "link", "set", "eth0", "address", mac)
                run("ip", "-n", "hostile", "link", "set", "eth0", "up")
                settle(hostile)
                leased6(hostile)
        wait_for(lambda: len(leases6()) == 2, what="the leases to be on file")
        create(domain("web", nic("a", MAC), publishes=ports("start='8080' to='7'")))
        assert len(leases6()) == 1
        destroy("web")
        virsh("net-destroy", "a")
    remove_config()
