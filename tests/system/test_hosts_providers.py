# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses as providers of servers hand them out: their router is outside of the subnet.

The provider's router has 51.0.113.254 and leads the addresses to its Ethernet, where it asks
for each by ARP or Neighbour Discovery.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest
from lab import (
    ECHO_PORT,
    INTERNET,
    FastGuest,
    Node,
    Provider,
    define_network,
    isolated,
    natns,
    remove_config,
    run,
    virsh,
    write_config,
)
from lab_domains import STATE, asked, networks
from lab_ipv6 import GATEWAY6, INTERNET6, DualProvider, dual, settle, static6

ROUTER, SERVER = "51.0.113.254", "51.0.113.7"


class Layout(NamedTuple):
    """The keys of an upstream, what the router leads to its Ethernet, and networks' addresses."""

    keys: tuple[str, ...]
    led: tuple[str, ...]
    addresses: tuple[str, ...]


FOUR = {
    # The first and the last address are no station's, as in any subnet.
    "subnet": Layout(
        (f'gateway = "{ROUTER}"', 'subnet = "198.51.100.8/29"', 'pool = ["198.51.100.8/29"]'),
        ("198.51.100.8/29",),
        ("198.51.100.9", "198.51.100.10"),
    ),
    "alone": Layout(
        (f'gateway = "{ROUTER}"', 'pool = ["198.51.100.8", "203.0.113.200"]'),
        ("198.51.100.8", "203.0.113.200"),
        ("198.51.100.8", "203.0.113.200"),
    ),
    "single": Layout(
        (f'gateway = "{ROUTER}"', 'subnet = "198.51.100.9/32"', 'pool = ["198.51.100.9"]'),
        ("198.51.100.9",),
        ("198.51.100.9",),
    ),
    # The router is the other of the two stations (RFC 3021).
    "pair": Layout(
        ('gateway = "198.51.100.8"', 'subnet = "198.51.100.8/31"', 'pool = ["198.51.100.9"]'),
        (),
        ("198.51.100.9",),
    ),
}
SIX = {
    "subnet": Layout(
        (f'gateway6 = "{GATEWAY6}"', 'subnet6 = "2001:db8:99::8/125"',
         'pool6 = ["2001:db8:99::8/125"]'),
        ("2001:db8:99::8/125",),
        ("2001:db8:99::9", "2001:db8:99::a"),
    ),
    "alone": Layout(
        (f'gateway6 = "{GATEWAY6}"', 'pool6 = ["2001:db8:99::8", "2001:db8:98::9"]'),
        ("2001:db8:99::8", "2001:db8:98::9"),
        ("2001:db8:99::8", "2001:db8:98::9"),
    ),
    "single": Layout(
        ('gateway6 = "fe80::1"', 'subnet6 = "2001:db8:99::9/128"', 'pool6 = ["2001:db8:99::9"]'),
        ("2001:db8:99::9",),
        ("2001:db8:99::9",),
    ),
    "pair": Layout(
        ('gateway6 = "2001:db8:99::8"', 'subnet6 = "2001:db8:99::8/127"',
         'pool6 = ["2001:db8:99::9"]'),
        (),
        ("2001:db8:99::9",),
    ),
}  # fmt: skip
PUBLISHED = (
    "<natns:nat xmlns:natns='urn:libvirt-natns:1'><natns:portForward guestAddress='{guest}'>"
    "<natns:range start='8080' to='{port}'/></natns:portForward></natns:nat>"
)


def configured(layout: Layout, firewall: str, *more: str, dns: str = ROUTER) -> None:
    lines = (f'firewall = "{firewall}"', 'upstream = "public"', "[upstreams.public]",
             'kind = "bridge"', 'bridge = "br0"', f'dns = ["{dns}"]', "probe = 0.05",
             *layout.keys, *more)  # fmt: skip
    write_config("\n".join(lines) + "\n")


def known_macs(router: Node, family: int) -> dict[str, str]:
    """The MAC addresses of the addresses that have answered the router."""
    shown = router.run("ip", f"-{family}", "neighbour", "show", "dev", "eth0").stdout
    return dict(re.findall(r"^(\S+) lladdr (\S+)", shown, re.M))


@pytest.fixture(autouse=True)
def fresh(installed: None) -> Iterator[None]:
    """No address is leased yet."""
    for file in STATE.glob("state.db*"):
        file.unlink()
    yield
    remove_config()


@pytest.mark.parametrize(
    ("name", "attach", "firewall"),
    [
        *((name, "bridge", "nftables") for name in FOUR),
        ("alone", "macvlan", "nftables"),
        ("alone", "bridge", "iptables"),
    ],
)
def test_a_router_outside_of_the_subnet(name: str, attach: str, firewall: str) -> None:
    layout = FOUR[name]
    with ExitStack() as stack:
        provider = stack.enter_context(
            Provider(subnet="51.0.113.0/24", gateway=ROUTER, host_address=f"{SERVER}/24")
        )
        router = provider.router
        gateway = "198.51.100.8" if name == "pair" else ROUTER
        if name == "pair":
            router.add_address("198.51.100.8/31")
        for each in layout.led:
            router.run("ip", "route", "add", each, "dev", "eth0")
        desk = provider.neighbour("desk", "51.0.113.20/24")
        configured(layout, firewall, f'attach = "{attach}"')
        for number, address in enumerate(layout.addresses):
            published = PUBLISHED.format(guest="10.0.0.5", port=ECHO_PORT)
            network = isolated(f"n{number}", f"virbr1{number}", metadata=published)
            stack.enter_context(networks(network))
            guest = stack.enter_context(FastGuest(f"virbr1{number}", name=f"guest{number}"))
            guest.static("10.0.0.5/24", "10.0.0.1")
            guest.serve("tcp", ECHO_PORT)
            assert asked(guest.name, "tcp", INTERNET, ECHO_PORT) == address
            assert asked(guest.name, "udp", gateway, ECHO_PORT) == address
            for client in (router, desk):
                assert asked(client.name, "tcp", address, 8080), client.name
        macs = known_macs(router, 4)
        assert len({macs[address] for address in layout.addresses}) == len(layout.addresses)
        # The networks reach each other, directly or by the router.
        for address in layout.addresses[1:]:
            assert asked("guest0", "tcp", address, 8080)
        assert natns("check").stdout == ""


@pytest.mark.parametrize(
    ("name", "firewall"), [*((name, "nftables") for name in SIX), ("alone", "iptables")]
)
def test_a_router_outside_of_the_subnet_in_ipv6(name: str, firewall: str) -> None:
    layout = SIX[name]
    with ExitStack() as stack:
        router = stack.enter_context(DualProvider()).router
        for address in ("fe80::1/64", *(["2001:db8:99::8/127"] if name == "pair" else [])):
            run("ip", "-n", router.name, "address", "add", address, "dev", "eth0", "nodad")
        for each in layout.led:
            router.run("ip", "-6", "route", "add", each, "dev", "eth0")
        configured(layout, firewall, dns=GATEWAY6)
        for number, address in enumerate(layout.addresses):
            published = PUBLISHED.format(guest="fd00:10::5", port=ECHO_PORT)
            network = dual(f"n{number}", f"virbr1{number}", ipv4=False, metadata=published)
            stack.enter_context(networks(network))
            guest = stack.enter_context(FastGuest(f"virbr1{number}", name=f"guest{number}"))
            settle(guest)
            static6(guest, "fd00:10::5/64", "fd00:10::1")
            guest.serve("tcp", ECHO_PORT, address="::")
            assert asked(guest.name, "tcp", INTERNET6, ECHO_PORT) == address
            assert asked(router.name, "tcp", address, 8080)
        macs = known_macs(router, 6)
        assert len({macs[address] for address in layout.addresses}) == len(layout.addresses)
        assert natns("check").stdout == ""


def test_a_network_that_hides_the_router_is_refused() -> None:
    """Its private subnet has the router's address, or one of the pool's."""
    with Provider(subnet="51.0.113.0/24", gateway=ROUTER, host_address=f"{SERVER}/24"):
        configured(FOUR["alone"], "auto")
        for gateway, hidden in (
            ("51.0.113.1", f"{ROUTER}/32"),
            ("198.51.100.1", "198.51.100.8/32"),
        ):
            define_network(isolated("n", "virbr10", address=gateway))
            done = virsh("net-start", "n", check=False)
            assert f"overlaps {hidden} of upstream public" in done.stderr
            virsh("net-undefine", "n")
