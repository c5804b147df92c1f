# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests with IPv6: two networks of the same prefixes at once, in and out, on both backends.

client ::77   host ::2   router ::1        2001:db8:77::/64, br0
    |           |           |
----+-----------+-----------+-----
    | ::150                 | ::160
  nat-a                   nat-b            both fd00:10::1 and 10.0.0.1
 virbr10                 virbr11           2001:db8:100::/64 and 2001:db8:100:1::/64
 |     |                  |
web  other               twin
::100  ::6               ::100             web and twin have one MAC
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from lab import (
    ECHO_PORT,
    FastGuest,
    Node,
    remove_config,
    run,
    write_config,
)
from lab_domains import STATE, asked, create, destroy, domain, nat, networks, nic, ports
from lab_ipv6 import (
    GATEWAY6,
    HOST6,
    INTERNET6,
    DualProvider,
    dual,
    route_to_host,
    slaac,
    static6,
)
from lab_sides import Answer, in_process

MAC, OTHER = "52:54:00:00:00:05", "52:54:00:00:00:06"
A, B, OWN = "2001:db8:77::150", "2001:db8:77::160", "2001:db8:77::180"
A4, OWN4 = "192.168.0.150", "192.168.0.100"
CLIENT, CLIENT4 = "2001:db8:77::77", "192.168.0.77"
STATIC = "fd00:10::6"
PUBLIC_A, PUBLIC_B = "2001:db8:100::", "2001:db8:100:1::"
RANGE = ("fd00:10::100", "fd00:10::1ff")

pytestmark = pytest.mark.usefixtures("installed")


@dataclass
class World:
    provider: DualProvider
    client: Node
    web: FastGuest
    other: FastGuest
    twin: FastGuest


PUBLISHES = (
    ports("start='2222' to='22'")
    + ports("start='2222' to='22'", more="proto='udp'")
    + ports("start='4444' to='22'", more=f"guestAddress='{STATIC}'")
    + ports("start='5555' to='22'", more=f"guestAddress='{STATIC}' source='{CLIENT}/128'")
    + ports("start='22'", more=f"guestAddress='{PUBLIC_A}5'")
    + ports("start='auto' to='80'")
    + f'<natns:address address="{OWN}"/><natns:address address="auto"/>'
)


def upstream(address: str, address6: str) -> str:
    return nat(f'<natns:upstream name="provider" address="{address}" address6="{address6}"/>')


@pytest.fixture(scope="module", params=["nftables", "iptables"])
def world(request: pytest.FixtureRequest, installed: None) -> Iterator[World]:
    with DualProvider() as provider, ExitStack() as cleanup:
        write_config(provider.config6(firewall=request.param, prefixes6=["2001:db8:100::/56"]))
        cleanup.callback(remove_config)
        for file in STATE.glob("state.db*"):
            file.unlink()
        route_to_host(provider)
        cleanup.enter_context(
            networks(
                dual("a", "virbr10", dhcp6=RANGE, metadata=upstream(A4, A)),
                dual("b", "virbr11", dhcp6=RANGE, metadata=upstream("192.168.0.160", B)),
            )
        )
        cleanup.callback(destroy, "web")
        create(domain("web", nic("a", MAC), publishes=PUBLISHES))
        client = provider.neighbour("client", f"{CLIENT4}/24")
        static6(client, f"{CLIENT}/64", GATEWAY6)
        guests = []
        for name, bridge, mac, number in (
            ("web", "virbr10", MAC, "100"),
            ("other", "virbr10", OTHER, "6"),
            ("twin", "virbr11", MAC, "100"),
        ):
            guest = cleanup.enter_context(FastGuest(bridge, mac, name))
            guest.static(f"10.0.0.{number}/24", "10.0.0.1")
            static6(guest, f"fd00:10::{number}/64", "fd00:10::1")
            guest.resolve_with("fd00:10::1")
            for protocol in ("tcp", "udp"):
                guest.serve(protocol, 22)
                guest.serve(protocol, 22, address="::")
            guests.append(guest)
        # Not what it leaves by, unless it asks for it.
        run("ip", "-n", "web", "address", "add", f"{PUBLIC_A}5/64", "dev", "eth0",
            "nodad", "preferred_lft", "0")  # fmt: skip
        yield World(provider, client, *guests)


def test_two_networks_of_one_prefix_leave_by_addresses_of_their_own(world: World) -> None:
    for guest, own, own4 in (
        (world.web, OWN, OWN4),
        (world.other, A, A4),
        (world.twin, B, "192.168.0.160"),
    ):
        for protocol in ("tcp", "udp"):
            assert asked(guest.name, protocol, GATEWAY6, ECHO_PORT) == own
            assert asked(guest.name, protocol, "192.168.0.1", ECHO_PORT) == own4
        assert asked(guest.name, "tcp", INTERNET6, ECHO_PORT) == own
        assert guest.ping(INTERNET6)
        assert guest.dig("www6.example.test", "AAAA") == [INTERNET6]
        assert guest.dig("www6.example.test", "AAAA", server="10.0.0.1") == [INTERNET6]


def test_ports_are_published_in_both_families(world: World) -> None:
    for protocol in ("tcp", "udp"):
        assert asked("client", protocol, A, 2222) == CLIENT
        assert asked("client", protocol, A4, 2222) == CLIENT4
        # The host, and the guests themselves.
        assert asked(None, protocol, A, 2222) == HOST6
        assert asked("twin", protocol, A, 2222) == B
        assert asked("other", protocol, A, 2222) == "fd00:10::1"
        assert asked("web", protocol, A, 2222) == "fd00:10::1"
    assert asked("client", "tcp", A, 4444) == CLIENT
    assert asked("client", "tcp", A4, 4444, timeout=0.3) is None
    assert asked("client", "tcp", A, 5555) == CLIENT
    assert asked(None, "tcp", A, 5555, timeout=0.3) is None
    assert asked("client", "tcp", A, 22, timeout=0.3) is None
    assert asked("client", "tcp", B, 2222, timeout=0.3) is None


def test_an_address_of_a_guests_own(world: World) -> None:
    for protocol in ("tcp", "udp"):
        assert asked("client", protocol, OWN, 22) == CLIENT
        assert asked("twin", protocol, OWN, 22) == B
        assert asked("client", protocol, OWN4, 22) == CLIENT4
    assert world.client.ping(OWN)


def test_a_routed_prefix(world: World) -> None:
    """The guest's address is seen as it is; only what is published comes in to it."""
    web = f"{PUBLIC_A}5"
    assert world.web.ping(INTERNET6, "-I", web)
    assert asked("client", "tcp", web, 22) == CLIENT
    assert asked("twin", "tcp", web, 22) == B
    assert asked("client", "udp", web, 22, timeout=0.3) is None
    assert world.client.ping(web)


def test_guests_make_addresses_of_a_routed_prefix(world: World) -> None:
    for bridge, prefix in (("virbr10", PUBLIC_A), ("virbr11", PUBLIC_B)):
        with FastGuest(bridge, "52:54:00:00:00:0a", "late") as guest:
            address = slaac(guest, prefix.removesuffix(":"))
            assert asked("late", "tcp", INTERNET6, ECHO_PORT) == address
            assert world.provider.router.ping(address)
            guest.serve("tcp", 22, address="::")
            assert asked("client", "tcp", address, 22, timeout=0.3) is None


def test_what_is_shown(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    command = in_process(capsys)
    told = command("status").out
    assert f"192.168.0.150, {A}" in told
    assert f"{PUBLIC_A}/64" in told
    assert "! " not in told
    listed = command("forward", "list").out
    for each in (A, f"{PUBLIC_A}5", OWN):
        assert each in listed
    drawn = command("diagram").out
    for each in (A, f"{PUBLIC_A}1/64", GATEWAY6):
        assert each in drawn


DAMAGES = {
    "ip -n nat-a -6 address del 2001:db8:77::150/64 dev upstream": "lacks the address",
    "ip -n nat-a -6 address del fd00:10::1/64 dev virbr10": "lacks the address",
    "ip -n nat-b -6 route del default": "route default",
    "ip netns exec nat-a sysctl -qw net.ipv6.conf.all.forwarding=0": "forwarding",
    "ip -6 route del 2001:db8:100::/64": "route 2001:db8:100::/64",
    "sysctl -qw net.ipv6.conf.all.forwarding=0": "in the host",
}


def test_damage_is_seen_and_mended(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    command = in_process(capsys)
    assert command("check") == Answer(0, "", "")
    for damage in DAMAGES:
        run(*damage.split())
    found = command("check").out
    for what in DAMAGES.values():
        assert what in found
    assert command("sync").status == 0
    assert command("check") == Answer(0, "", "")
    assert asked("other", "tcp", INTERNET6, ECHO_PORT) == A
    assert asked("twin", "tcp", INTERNET6, ECHO_PORT) == B
    assert asked("client", "tcp", f"{PUBLIC_A}5", 22, timeout=3) == CLIENT
