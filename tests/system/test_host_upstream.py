# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports that guests publish on the host's own addresses, without any configuration."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from lab import FastGuest, Node, Provider, isolated, natns, remove_config, virsh, write_config
from lab_domains import (
    asked,
    carries,
    create,
    destroy,
    domain,
    greeted,
    networks,
    nic,
    ports,
    refusal,
)

WEB = TWIN = "52:54:00:00:00:05"
THIRD = "52:54:00:00:00:06"
CLIENT, HOST = "192.168.0.77", "192.168.0.2"
OF_WEB = (
    ports("start='2222' to='22'")
    + ports("start='2222' to='22'", more="proto='udp'")
    + ports("start='3333' to='22'", more=f"address='{HOST}'")
)
OF_TWIN = ports("start='2224' to='22'")


@dataclass
class World:
    client: Node


@pytest.fixture(scope="module", params=["nftables", "iptables"])
def world(request: pytest.FixtureRequest, installed: None) -> Iterator[World]:
    """Guests of two twin networks publish ports; the backend is all of the configuration."""
    with Provider() as provider, ExitStack() as cleanup:
        write_config(f'firewall = "{request.param}"\n')
        cleanup.callback(remove_config)
        cleanup.enter_context(networks(isolated("a", "virbr10"), isolated("b", "virbr11")))
        cleanup.callback(destroy, "web", "twin")
        create(domain("web", nic("a", WEB), publishes=OF_WEB))
        create(domain("twin", nic("b", TWIN), publishes=OF_TWIN))
        for bridge, name in (("virbr10", "web"), ("virbr11", "twin")):
            guest = cleanup.enter_context(FastGuest(bridge, WEB, name))
            assert guest.dhcp()["ip"] == "10.0.0.100"
            guest.serve("tcp", 22)
            guest.serve("udp", 22)
        yield World(provider.neighbour("client", f"{CLIENT}/24"))


def third(port: int, more: str = "") -> str:
    """Return one more guest, which publishes one port."""
    published = ports(f"start='{port}' to='22'", more=more)
    return domain("third", nic("b", THIRD), publishes=published)


def test_a_port_of_another_guest_is_refused(world: World) -> None:
    said = refusal(third(2222))
    assert said.startswith("guest third: tcp port 2222 of the host is forwarded to guest web")


def test_a_port_of_a_program_of_the_host_is_refused(world: World) -> None:
    with socket.create_server(("127.0.0.1", 4444)):
        said = refusal(third(4444))
    assert "a program of the host listens on tcp port 4444" in said


def test_a_program_on_another_address_is_in_no_ones_way(world: World) -> None:
    """As the stub of a resolver, and libvirt's own dnsmasq, beside a DNS server of a guest's."""
    with (
        socket.create_server(("127.0.0.53", 53)),
        socket.create_server(("127.0.0.1", 5353)),
        FastGuest("virbr11", THIRD, "third") as guest,
    ):
        guest.dhcp()
        guest.serve("tcp", 22)
        create(third(53, f"address='{HOST}'"))
        try:
            assert asked("client", "tcp", HOST, 53) == CLIENT
        finally:
            destroy("third")
        with socket.create_server((HOST, 54)):
            said = refusal(third(54, f"address='{HOST}'"))
        assert "a program of the host listens on tcp port 54" in said
        # On all addresses the forward would take the host's own queries.
        assert "listens on tcp port 5353" in refusal(third(5353))


def test_a_forward_on_an_address_that_the_host_does_not_have_waits(world: World) -> None:
    """test_hosts_addresses has the rest."""
    create(third(2226, "address='192.168.0.9'"))
    try:
        (row,) = (line for line in natns("forward", "list").stdout.splitlines() if "2226" in line)
        assert row.split()[-1] == "waiting"
    finally:
        destroy("third")


def test_a_program_that_listens_later_undoes_nothing(world: World) -> None:
    with socket.create_server(("127.0.0.1", 2224)):
        natns("sync")
        assert natns("check", check=False).stdout == ""
    assert asked("client", "tcp", HOST, 2224) == CLIENT


def test_ports_answer_outside_in_the_host_and_in_guests(world: World) -> None:
    assert asked("client", "tcp", HOST, 2222) == CLIENT
    assert asked("client", "udp", HOST, 2222) == CLIENT
    assert asked("client", "tcp", HOST, 2224) == CLIENT
    assert asked("client", "tcp", HOST, 3333) == CLIENT
    assert asked("client", "tcp", HOST, 2223, timeout=0.5) is None
    for port in (2222, 2224):
        assert asked(None, "tcp", HOST, port), port
        assert asked(None, "tcp", "127.0.0.1", port), port
    for guest in ("web", "twin"):
        assert asked(guest, "tcp", HOST, 2222), guest
        assert asked(guest, "tcp", HOST, 2224), guest


def test_guests_reach_the_outside_on_a_published_port(world: World) -> None:
    server = world.client.serve("tcp", 2222)
    assert asked("web", "tcp", CLIENT, 2222) == HOST
    assert server.addresses() == {HOST}


def test_the_end_of_a_guest_closes_its_own_ports_and_connections(world: World) -> None:
    published = ports("start='5555' to='22'") + ports(
        "start='5556' to='22'", more=f"address='{HOST}'"
    )
    create(domain("brief", nic("a", THIRD), publishes=published))
    with FastGuest("virbr10", THIRD, "brief") as guest, greeted(world.client, HOST, 2224) as other:
        guest.dhcp()
        guest.serve("tcp", 22)
        assert asked("client", "tcp", HOST, 5556) == CLIENT
        with greeted(world.client, HOST, 5555) as flow:
            assert carries(flow)
            virsh("destroy", "brief")
            assert carries(other)
            assert not carries(flow)
        for port in (5555, 5556):
            assert asked("client", "tcp", HOST, port, timeout=0.5) is None, port
    assert asked("client", "tcp", HOST, 2222) == CLIENT
