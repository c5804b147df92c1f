# SPDX-License-Identifier: LGPL-2.1-or-later
"""A running network moves to another upstream by `virt-natns sync` alone, with all its ports."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from lab import (
    FastGuest,
    Node,
    Provider,
    isolated,
    natns,
    remove_config,
    wait_for,
    write_config,
)
from lab_domains import (
    asked,
    carries,
    create,
    destroy,
    domain,
    greeted,
    nat,
    networks,
    nic,
    ports,
)
from test_dhcp_dns import upstream_address

WEB, THIRD = "52:54:00:00:00:05", "52:54:00:00:00:06"
GUEST = "10.0.0.100"
CLIENT, HOST = "192.168.0.77", "192.168.0.2"
OWN, OF_WEB, OF_THIRD = 9022, 2222, 4444
"""Ports that the network itself publishes, and its guests."""


@dataclass
class World:
    client: Node
    firewall: str
    provider: Provider

    def configure(self, default: str, kind: str = "bridge") -> None:
        """Two upstreams on one bridge; the first may be of another kind under its name."""
        first = self.provider.config(firewall=self.firewall, more="probe = 0")
        if kind == "host":
            first = first.partition("[upstreams.")[0] + '[upstreams.provider]\nkind = "host"\n'
        second = self.provider.config(pool="192.168.0.210-192.168.0.219", more="probe = 0")
        second = second.partition("[upstreams.provider]")[2]
        first = first.replace('upstream = "provider"', f'upstream = "{default}"', 1)
        write_config(f"{first}\n[upstreams.second]{second}")

    def check_open(self, address: str) -> None:
        for port in (OWN, OF_WEB):
            found = wait_for(lambda port=port: asked("client", "tcp", address, port, timeout=1))  # type: ignore[misc]
            assert found == CLIENT, (address, port)

    def check_closed(self, address: str) -> None:
        for port in (OWN, OF_WEB):
            assert asked("client", "tcp", address, port, timeout=0.5) is None, (address, port)


@pytest.fixture(params=["nftables", "iptables"])
def world(request: pytest.FixtureRequest, installed: None) -> Iterator[World]:
    with Provider() as provider, ExitStack() as cleanup:
        made = World(provider.neighbour("client", f"{CLIENT}/24"), request.param, provider)
        cleanup.callback(remove_config)
        made.configure("provider")
        own = ports(f"start='{OWN}' to='22'", more=f"guestAddress='{GUEST}'")
        cleanup.enter_context(networks(isolated("a", "virbr10", metadata=nat(own))))
        cleanup.callback(destroy, "web", "third")
        create(domain("web", nic("a", WEB), publishes=ports(f"start='{OF_WEB}' to='22'")))
        guest = cleanup.enter_context(FastGuest("virbr10", WEB, "web"))
        assert guest.dhcp()["ip"] == GUEST
        guest.serve("tcp", 22)
        yield made


def third() -> str:
    return domain("third", nic("a", THIRD), publishes=ports(f"start='{OF_THIRD}' to='22'"))


def test_a_network_goes_from_upstream_to_upstream(world: World) -> None:
    first = upstream_address("a")
    world.check_open(first)
    with greeted(world.client, first, OF_WEB) as flow:
        world.configure("host")
        # A hook looks at the network, and so does check.
        create(third())
        assert natns("check", check=False).stdout == ""
        assert upstream_address("a") == first
        assert carries(flow)
        destroy("third")
    former = "provider"
    for default, address in (("host", HOST), ("second", ""), ("provider", ""), ("host", HOST)):
        left = upstream_address("a")
        world.configure(default)
        told = f"a: moves from upstream {former} to {default}\n"
        assert natns("sync", "--dry-run").stdout == told
        # A look moves nothing.
        assert upstream_address("a") == left
        assert natns("sync").stdout.splitlines(keepends=True)[0] == told
        assert natns("sync", "--dry-run").stdout == ""
        former = default
        world.check_open(address or upstream_address("a"))
        world.check_closed(left)
        if not address:
            world.check_closed(HOST)
        assert natns("check", check=False).stdout == ""


def test_an_upstream_becomes_one_of_another_kind(world: World) -> None:
    """On the host, a program of the host keeps its port, and all other ports move."""
    create(third())
    first = upstream_address("a")
    with socket.create_server((HOST, OF_THIRD)) as program:
        world.configure("provider", "host")
        told = "a: moves with upstream provider from kind bridge to host\n"
        assert natns("sync", "--dry-run").stdout == told
        said = natns("sync", check=False).stderr
        assert f"a program of the host listens on tcp port {OF_THIRD}" in said
        world.check_open(HOST)
        with greeted_by(program, world.client):
            pass
    world.check_closed(first)
    world.configure("provider")
    assert natns("sync").stderr == ""
    world.check_open(upstream_address("a"))
    world.check_closed(HOST)


def greeted_by(program: socket.socket, client: Node) -> socket.socket:
    """A connection of the client to the host's program, which accepts it."""
    stream = client.connect(HOST, OF_THIRD)
    program.settimeout(2)
    program.accept()[0].close()
    return stream
