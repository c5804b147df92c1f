# SPDX-License-Identifier: LGPL-2.1-or-later
"""What guests publish by their metadata: on every path, at the right target, no two at once.

client .77   host .2   provider .1        192.168.0.0/24, br0
    |          |          |
----+----------+----------+-----
    | .150                | .160
  nat-a                 nat-b             both 10.0.0.1
 virbr10               virbr11
 |     |               |     |
web  static           twin  web's second NIC
.100   .50            .100  .101          web and twin have one MAC
"""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import pytest
from lab import (
    FastGuest,
    Node,
    Provider,
    Server,
    isolated,
    natns,
    run,
    virsh,
    wait_for,
)
from lab_domains import (
    asked,
    create,
    destroy,
    domain,
    networks,
    nic,
    nic_on,
    ports,
    provider_world,
    upstream,
)
from packets import sctp_init

from libvirt_natns.kernel.netns import entered

MAC = "52:54:00:00:00:05"
SECOND = "52:54:00:00:00:15"
STATIC = "52:54:00:00:00:50"
BRIEF = "52:54:00:00:00:33"
A, B = "192.168.0.150", "192.168.0.160"
SCTP = 132
CLIENT, HOST = "192.168.0.77", "192.168.0.2"

pytestmark = pytest.mark.usefixtures("installed")


@dataclass
class World:
    provider: Provider
    client: Node
    web: FastGuest
    web_in_b: FastGuest
    static: FastGuest
    twin: FastGuest


WEB = (
    ports("start='2222' to='22'", "start='8000' end='8002'", "start='8100' end='8102' to='7100'")
    + ports("start='8200' end='8203' to='80' toEnd='80'", more="proto='tcp'")
    + ports("start='8300' end='8303' to='7100'", "start='8301' exclude='yes'")
    + ports("start='2222' to='22'", more="proto='udp'")
    + ports("start='2222' to='22'", more="network='b'")
    + ports("start='3333' to='22'", more=f"mac='{SECOND}'")
    + ports("start='3344' to='22'", more=f"address='{A}'")
    + ports("start='4444' to='22'", more="guestAddress='10.0.0.50'")
    + ports("start='5555' to='22'", more=f"source='{CLIENT}/32'")
    + ports("start='auto' to='22'", "start='auto' to='80'")
)


@pytest.fixture(scope="module", params=["nftables", "iptables"])
def world(request: pytest.FixtureRequest, installed: None) -> Iterator[World]:
    chosen = 'auto_ports = "21000-21009"\n'
    with provider_world(request.param, chosen) as provider, ExitStack() as cleanup:
        own = ports("start='6666' to='22'", more="guestAddress='10.0.0.50'")
        cleanup.enter_context(
            networks(
                isolated("a", "virbr10", metadata=upstream(A, own)),
                isolated("b", "virbr11", metadata=upstream(B)),
            )
        )
        cleanup.callback(destroy, "web", "twin")
        create(domain("twin", nic_on("virbr11", MAC), publishes=ports("start='2224' to='22'")))
        create(domain("web", nic("a", MAC), nic("b", SECOND), publishes=WEB))
        client = provider.neighbour("client", f"{CLIENT}/24")
        nodes = [
            cleanup.enter_context(FastGuest(bridge, mac, name))
            for bridge, mac, name in (
                ("virbr10", MAC, "web"),
                ("virbr11", SECOND, "web-in-b"),
                ("virbr10", STATIC, "static"),
                ("virbr11", MAC, "twin"),
            )
        ]
        for each in nodes:
            if each.name == "static":
                each.static("10.0.0.50/24", "10.0.0.1")
            else:
                each.dhcp()
            each.serve("tcp", 22)
            each.serve("udp", 22)
        yield World(provider, client, *nodes)


def listed() -> list[list[str]]:
    """The rows of ``virt-natns forward list``."""
    return [line.split() for line in natns("forward", "list").stdout.splitlines()[1:]]


def test_targets_are_what_the_guests_lease(world: World) -> None:
    """Known before the boot, and one address in both networks."""
    assert world.web.addresses() == ["10.0.0.100/24"]
    assert world.twin.addresses() == ["10.0.0.100/24"]
    assert world.web_in_b.addresses() == ["10.0.0.101/24"]
    # dnsmasq answers first, and then has the lease written down.
    wait_for(lambda: "10.0.0.100/24" in virsh("domifaddr", "web").stdout)
    wait_for(lambda: "10.0.0.101/24" in virsh("domifaddr", "web").stdout)


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_paths(world: World, proto: str) -> None:
    """From everywhere; the service sees who asks, but for hairpins."""
    for who, seen in (
        ("client", CLIENT),
        (None, HOST),
        ("twin", B),
        ("web-in-b", B),
        ("static", "10.0.0.1"),
        ("web", "10.0.0.1"),
    ):
        assert asked(who, proto, A, 2222) == seen, who  # type: ignore[arg-type]


def test_each_network_has_its_own(world: World) -> None:
    assert asked("client", "tcp", B, 2222) == CLIENT
    assert asked("client", "tcp", B, 2224) == CLIENT
    assert asked("web", "tcp", B, 2224) == A
    assert asked("client", "tcp", A, 2224) is None
    assert asked("client", "tcp", B, 3333) == CLIENT
    assert asked("client", "tcp", A, 3333) is None


@contextmanager
def serving(node: Node, *numbers: int) -> Iterator[dict[int, Server]]:
    servers = {number: node.serve("tcp", number) for number in numbers}
    yield servers
    for server in servers.values():
        server.close()


@pytest.mark.parametrize(
    ("asked_ports", "reached"),
    [
        ((8000, 8001, 8002), (8000, 8001, 8002)),
        ((8100, 8101, 8102), (7100, 7101, 7102)),
        ((8200, 8201, 8203), (80, 80, 80)),
        ((8300, 8302, 8303), (7100, 7102, 7103)),
    ],
    ids=["same", "shifted", "one", "excluded"],
)
def test_ranges(world: World, asked_ports: tuple[int, ...], reached: tuple[int, ...]) -> None:
    with serving(world.web, *sorted(set(reached))) as servers:
        for port, target in zip(asked_ports, reached, strict=True):
            before = len(servers[target].contacts)
            assert asked("client", "tcp", A, port) == CLIENT, port
            assert len(servers[target].contacts) == before + 1, port


def test_addresses_targets_and_sources(world: World) -> None:
    """address, guestAddress, source, the network's own forward."""
    assert asked("client", "tcp", A, 3344) == CLIENT
    assert asked("client", "tcp", A, 4444) == CLIENT
    assert asked("client", "tcp", A, 6666) == CLIENT
    assert {each.port for each in world.static._servers} == {22}
    assert world.static._servers[0].addresses() == {CLIENT}
    assert asked("client", "tcp", A, 5555) == CLIENT
    assert asked(None, "tcp", A, 5555) is None


def test_closed(world: World) -> None:
    """What is not published, excluded, or of the other protocol."""
    with serving(world.web, 7101, 8003):
        for port in (22, 8003, 8301, 2223):
            assert asked("client", "tcp", A, port, timeout=0.5) is None, port
    assert asked("client", "udp", A, 3344, timeout=0.5) is None
    assert asked("client", "tcp", "10.0.0.100", 22, timeout=0.5) is None


def test_ports_of_others_are_not_caught(world: World) -> None:
    """A guest that asks somebody else for a port that is published here."""
    server = world.client.serve("tcp", 2222)
    try:
        assert asked("web", "tcp", CLIENT, 2222) == A
        assert asked("static", "tcp", CLIENT, 2222) == A
        # Inside the private subnet, too.
        with serving(world.static, 2222):
            assert asked("web", "tcp", "10.0.0.50", 2222) == "10.0.0.100"
    finally:
        server.close()


def test_automatic_ports(world: World) -> None:
    with serving(world.web, 80) as servers:
        assert asked("client", "tcp", A, 21000) == CLIENT
        assert asked("client", "tcp", A, 21001) == CLIENT
        assert servers[80].addresses() == {CLIENT}
    assert asked("client", "tcp", A, 21002) is None


def test_check_finds_nothing_wrong(world: World) -> None:
    assert natns("check").stdout == ""


def test_stopping_one_cuts_its_flows_only(world: World) -> None:
    """Both ways to a third guest, and nothing of the others, nor what it asks for itself."""
    published = ports("start='7777' to='22'")
    for proto in ("udp", "sctp"):
        published += ports("start='7777' to='22'", more=f"proto='{proto}'")
    create(domain("brief", nic("a", BRIEF), publishes=published))
    with ExitStack() as opened:
        opened.callback(destroy, "brief")
        brief = opened.enter_context(FastGuest("virbr10", BRIEF, "brief"))
        brief.dhcp()
        brief.serve("tcp", 22)
        brief.serve("udp", 22)
        gone = [flow(world.client, "tcp", A, 7777), flow(world.client, "udp", A, 7777)]
        staying = [flow(world.client, "tcp", A, 2222), flow(world.client, "udp", A, 2222)]
        staying += [flow(world.client, "tcp", B, 2224), flow(brief, "tcp", "192.168.0.1", 7)]
        for each in (*gone, *staying):
            opened.enter_context(each)
            assert alive(each)
        with entered("client"), socket.socket(socket.AF_INET, socket.SOCK_RAW, SCTP) as raw:
            raw.sendto(sctp_init(5000, 7777), (A, 0))
            raw.sendto(sctp_init(5000, 7777), (B, 0))
        assert f"{SCTP} " in tracked("nat-a", 7777)
        virsh("destroy", "brief")
        assert not any(map(alive, gone))
        assert all(map(alive, staying))
        assert tracked("nat-a", 2222)
        assert tracked("nat-a", 7777) == ""


def tracked(namespace: str, port: int) -> str:
    """The tracked flows that began towards a port of the network's address."""
    lines = run("conntrack", "-L", "--orig-dst", A, namespace=namespace).stdout.splitlines()
    return "\n".join(line for line in lines if f"dport={port} " in line.partition(" src=")[2])


def flow(client: Node, proto: Literal["tcp", "udp"], address: str, port: int) -> socket.socket:
    """A connected socket to an echo server."""
    if proto == "udp":
        opened = client.open_socket("udp", timeout=0.5)
        opened.connect((address, port))
        return opened
    opened = client.connect(address, port)
    opened.settimeout(0.5)
    assert opened.recv(100)  # the server's greeting
    return opened


def alive(opened: socket.socket) -> bool:
    """Whether an echo still comes back."""
    try:
        opened.send(b"ping")
        return opened.recv(100).endswith(b"ping")
    except OSError:
        return False
