# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host with two uplinks and an address on each: a published port answers on both.

The host leaves by the LAN.  Packets with its address on the tunnel ask a table of the tunnel's,
as administrators of two uplinks have it.  A client far behind the tunnel has an address that the
host, by its main table, would look for in the LAN.
"""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from lab import Node, Service, natns, remove_config, run, wait_for, write_config
from lab_domains import networks
from lab_hosts_ways import (
    LAN,
    SERVERS,
    SERVERS6,
    TUNNEL,
    default_by,
    dual_guest,
    lines_in_force,
    way_out,
)
from lab_ipv6 import dual
from lab_servers import Server

from libvirt_natns.kernel.netns import entered

PORT, SERVICE = 9090, 7070
BY_SOURCE = tuple(
    line
    for family, here, there in ((4, TUNNEL.here, TUNNEL.there), (6, TUNNEL.here6, TUNNEL.there6))
    for line in (
        f"ip -{family} route add default via {there} table 100",
        f"ip -{family} rule add from {here} table 100",
    )
)
PUBLISHED = "".join(
    f"<natns:portForward proto='{proto}' guestAddress='{guest}'>"
    f"<natns:range start='{PORT}'/></natns:portForward>"
    for guest in ("10.0.0.5", "fd00:10::5")
    for proto in ("tcp", "udp")
)
NETWORK = dual(
    "a", "virbr10",
    metadata=f"<natns:nat xmlns:natns='urn:libvirt-natns:1'>{PUBLISHED}</natns:nat>",
)  # fmt: skip


@pytest.fixture(autouse=True, params=["nftables", "iptables"])
def hosts(request: pytest.FixtureRequest, installed: None) -> Iterator[tuple[Node, Node]]:
    """The routers behind the LAN and behind the tunnel."""
    write_config(f'firewall = "{request.param}"\n')
    with ExitStack() as stack:
        stack.callback(remove_config)
        router = stack.enter_context(way_out(LAN, *default_by(LAN, 9)))
        far = stack.enter_context(way_out(TUNNEL))
        for address in ("", "::"):
            stack.callback(Server(None, "tcp", SERVICE, address=address).close)
        yield router, far


def answered(client: Node, kind: str, family: int, address: str, port: int) -> bool:
    """Whether a client with one of the Internet's addresses gets an answer."""
    own = (SERVERS if family == 4 else SERVERS6)[0]
    inet = socket.AF_INET if family == 4 else socket.AF_INET6
    with entered(client.name):
        opened = socket.socket(inet, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    with opened:
        opened.settimeout(2)
        opened.bind((own, 0))
        try:
            opened.connect((address, port))
            if kind == "udp":
                opened.send(b"who am I?")
            return opened.recv(100).decode().startswith(f"{own}:")
        except OSError:
            return False


def all_answered(router: Node, far: Node) -> bool:
    return all(
        answered(client, kind, family, way.seen(family), PORT)
        for client, way in ((router, LAN), (far, TUNNEL))
        for family in (4, 6)
        for kind in ("tcp", "udp")
    )


def serve(stack: ExitStack) -> None:
    guest = dual_guest(stack, "virbr10")
    for address in ("", "::"):
        guest.serve("tcp", PORT, address=address)
        guest.serve("udp", PORT, address=address)


def our_rules() -> str:
    shown = (run("ip", f"-{family}", "rule", "show").stdout for family in (4, 6))
    return "".join(line for each in shown for line in each.splitlines() if "natns-" in line)


def test_a_port_answers_by_the_way_that_it_was_asked(hosts: tuple[Node, Node]) -> None:
    router, far = hosts
    with ExitStack() as stack:
        stack.enter_context(lines_in_force(*BY_SOURCE))
        assert answered(far, "tcp", 4, TUNNEL.here, SERVICE), "the control"
        assert answered(far, "tcp", 6, TUNNEL.here6, SERVICE), "the control"
        stack.enter_context(networks(NETWORK))
        serve(stack)
        assert all_answered(router, far)
        assert natns("check").stdout == ""


def test_rules_that_come_and_go_are_followed(hosts: tuple[Node, Node], served: bool) -> None:
    router, far = hosts
    with ExitStack() as stack:
        if served:
            stack.enter_context(Service())
        stack.enter_context(networks(NETWORK))
        serve(stack)
        assert answered(router, "tcp", 4, LAN.here, PORT)
        with lines_in_force(*BY_SOURCE):
            if not served:
                natns("sync")
            wait_for(lambda: all_answered(router, far), timeout=20, what="answers by both ways")
            assert natns("check").stdout == ""
        if not served:
            natns("sync")
        wait_for(lambda: not our_rules(), timeout=20, what="our rules to go")
        assert answered(router, "tcp", 4, LAN.here, PORT)
