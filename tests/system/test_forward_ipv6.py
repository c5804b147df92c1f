# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command virt-natns forward in IPv6, and DHCPv6 leases in what it publishes.

client ::77             upstream provider, 2001:db8:77::/64
  |
--+---------- br0       nat-a ::150
                          |
web (DHCPv6) ---------- virbr10, fd00:10::/64
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from lab import FastGuest, Node, natns, remove_config, virsh, write_config
from lab_domains import STATE, asked, create, destroy, domain, nat, networks, nic
from lab_ipv6 import GATEWAY6, DualProvider, dual, leased6, settle, static6

MAC = "52:54:00:00:00:05"
OUTSIDE, OUTSIDE4 = "2001:db8:77::150", "192.168.0.150"
CLIENT = "2001:db8:77::77"

pytestmark = pytest.mark.usefixtures("installed")


@dataclass
class World:
    client: Node
    web: FastGuest
    address: str
    """What DHCPv6 has given to web."""


@pytest.fixture(scope="module")
def world(installed: None) -> Iterator[World]:
    with DualProvider() as provider, ExitStack() as cleanup:
        write_config(provider.config6())
        cleanup.callback(remove_config)
        for file in STATE.glob("state.db*"):
            file.unlink()
        wanted = f'<natns:upstream name="provider" address="{OUTSIDE4}" address6="{OUTSIDE}"/>'
        xml = dual("a", "virbr10", dhcp6=("fd00:10::100", "fd00:10::1ff"), metadata=nat(wanted))
        cleanup.enter_context(networks(xml))
        cleanup.callback(destroy, "web")
        create(domain("web", nic("a", MAC)))
        client = provider.neighbour("client", "192.168.0.77/24")
        static6(client, f"{CLIENT}/64", GATEWAY6)
        natns("forward", "add", "web", "2222:22")
        web = cleanup.enter_context(FastGuest("virbr10", MAC, "web"))
        settle(web)
        web.dhcp()
        address = leased6(web)["new_ip6_address"]
        for protocol in ("tcp", "udp"):
            web.serve(protocol, 22)
            web.serve(protocol, 22, address="::")
        yield World(client, web, address)


def listed() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(natns("forward", "list", "--json").stdout)["forwards"]
    return found


def test_dhcpv6_gives_the_address_that_is_published(world: World) -> None:
    (six,) = (each for each in listed() if each["address"] == OUTSIDE)
    assert (six["target"], six["target_first"]) == (world.address, 22)
    assert asked("client", "tcp", OUTSIDE, 2222) == CLIENT
    assert asked("client", "tcp", OUTSIDE4, 2222) == "192.168.0.77"
    assert f" {world.address}/64 " in virsh("net-dhcp-leases", "a").stdout
    shown = natns("forward", "list", "web").stdout
    assert f"tcp    [{OUTSIDE}]:2222  " in shown
    assert f"  [{world.address}]:22  " in shown


def test_one_that_names_an_address_comes_and_goes(world: World) -> None:
    options = ("--guest-address", world.address.upper(), "--source", f"{CLIENT}, fd00::/8")
    told = natns("forward", "add", *options, "web", f"[{OUTSIDE}]:53:22/udp").stdout
    assert told.startswith(f"web: udp [{OUTSIDE}]:53 -> [{world.address}]:22 from {CLIENT}/128, ")
    assert asked("client", "udp", OUTSIDE, 53) == CLIENT
    assert asked(None, "udp", OUTSIDE, 53, timeout=0.3) is None
    natns("forward", "remove", "web", f"[{OUTSIDE}]:53/udp")
    assert asked("client", "udp", OUTSIDE, 53, timeout=0.3) is None


def test_one_of_several_is_named_by_where_it_listens(world: World) -> None:
    """Neither says where: one is for clients of IPv4, the other for those of IPv6."""
    natns("forward", "add", "--source", "192.168.0.0/24", "web", "8080:22")
    natns("forward", "add", "--source", "2001:db8::/32", "web", "8080:22")
    assert "2 times" in natns("forward", "remove", "web", "8080", check=False).stderr
    natns("forward", "remove", "web", f"[{OUTSIDE}]:8080")
    assert asked("client", "tcp", OUTSIDE, 8080, timeout=0.3) is None
    assert asked("client", "tcp", OUTSIDE4, 8080) == "192.168.0.77"
    natns("forward", "remove", "web", f"{OUTSIDE4}:8080")
    assert [each["first"] for each in listed()] == [2222, 2222]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("web", f"{OUTSIDE}:80"), "an IPv6 address needs brackets"),
        (("--guest-address", "10.0.0.5", "web", f"[{OUTSIDE}]:80"), "addresses of one family"),
        (("web", "[2001:db8:77::999]:80"), "is not an address of its network"),
        (("web", "[::1]:80"), "the address of a single host"),
    ],
)
def test_what_is_refused(world: World, words: tuple[str, ...], complaint: str) -> None:
    done = natns("forward", "add", *words, check=False)
    assert done.returncode != 0
    assert complaint in done.stderr
    assert len(listed()) == 2
