# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host whose way out takes smaller packets than Ethernet, and a router that does not say so.

    guest -- namespace -- host ==1400== far --1500-- server

Routers that drop ICMP are common, so TCP must not depend on ICMP errors.
"""

import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from threading import Thread

import pytest
from lab import FastGuest, Node, Service, remove_config, run, wait_for, write_config
from lab_domains import asked, networks
from lab_hosts_ways import TUNNEL, default_by, dual_guest, way_out
from lab_ipv6 import dual
from lab_servers import Server

from libvirt_natns.kernel.netns import entered

MTU = 1400
HEADERS = {4: 20 + 8, 6: 40 + 8}
SERVER = {4: "198.51.100.80", 6: "2001:db8:51::80"}
BEYOND = {4: "198.51.100.1", 6: "2001:db8:51::1"}
LENGTH = {4: 24, 6: 64}
PORT = 8080
PUBLISHED = "".join(
    f"<natns:portForward guestAddress='{guest}'><natns:range start='9090' to='{PORT}'/>"
    "</natns:portForward>"
    for guest in ("10.0.0.5", "fd00:10::5")
)
NETWORK = dual(
    "a", "virbr10",
    metadata=f"<natns:nat xmlns:natns='urn:libvirt-natns:1'>{PUBLISHED}</natns:nat>",
)  # fmt: skip
SIZE = 300_000
IP_MTU_DISCOVER, IP_MTU = 10, 14
IPV6_MTU_DISCOVER, IPV6_MTU = 23, 24
KEEP = 2
"""IP_PMTUDISC_DO: the kernel refuses packets beyond the path's MTU, as far as it knows."""


@pytest.fixture(autouse=True, params=["nftables", "iptables"])
def world(request: pytest.FixtureRequest, installed: None) -> Iterator[FastGuest]:
    write_config(f'firewall = "{request.param}"\n')
    with ExitStack() as stack:
        stack.callback(remove_config)
        far = stack.enter_context(way_out(TUNNEL, *default_by(TUNNEL, 5)))
        narrow(far)
        stack.callback(run, "ip", "netns", "del", "server")
        server_beyond(far)
        for address in ("", "::"):
            stack.callback(Server("server", "tcp", PORT, address=address).close)
            stack.callback(Server("server", "udp", PORT, address=address).close)
        stack.enter_context(Service())
        stack.enter_context(networks(NETWORK))
        guest = dual_guest(stack, "virbr10")
        guest.serve("tcp", PORT)
        guest.serve("tcp", PORT, address="::")
        yield guest


def narrow(far: Node) -> None:
    """The way out has a smaller MTU, and its router's errors are dropped."""
    run("ip", "link", "set", TUNNEL.link, "mtu", str(MTU))
    far.run("ip", "link", "set", "eth0", "mtu", str(MTU))
    far.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    for line in (
        "add table inet quiet",
        "add chain inet quiet out { type filter hook output priority 0 ; }",
        "add rule inet quiet out icmp type destination-unreachable drop",
        "add rule inet quiet out icmpv6 type packet-too-big drop",
    ):
        far.run("nft", *line.split())


def server_beyond(far: Node) -> None:
    run("ip", "netns", "add", "server")
    run("ip", "-n", "server", "link", "set", "lo", "up")
    run("ip", "-n", far.name, "link", "add", "beyond", "type", "veth", "peer", "name", "eth0",
        "netns", "server")  # fmt: skip
    for name, link, addresses in ((far.name, "beyond", BEYOND), ("server", "eth0", SERVER)):
        run("ip", "-n", name, "link", "set", link, "up")
        for family, address in addresses.items():
            run("ip", "-n", name, "address", "add", f"{address}/{LENGTH[family]}", "dev", link,
                *(["nodad"] if family == 6 else []))  # fmt: skip
    for family, router in BEYOND.items():
        run("ip", "-n", "server", f"-{family}", "route", "add", "default", "via", router)


def echoed(namespace: str | None, address: str, port: int) -> int:
    """The octets that came back of as many that were sent: both directions are full."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with entered(namespace):
        stream = socket.socket(family, socket.SOCK_STREAM)
    with stream:
        stream.settimeout(5)
        stream.connect((address, port))
        stream.recv(100)
        sender = Thread(target=_send, args=(stream,), daemon=True)
        sender.start()
        count = 0
        try:
            while count < SIZE and (chunk := stream.recv(65536)):
                count += len(chunk)
        except TimeoutError:
            pass
    sender.join(10)
    return count


def _send(stream: socket.socket) -> None:
    with suppress(OSError):
        stream.sendall(b"x" * SIZE)


@pytest.mark.parametrize("family", [4, 6])
def test_streams_fit_in_both_directions(family: int, world: FastGuest) -> None:
    wait_for(lambda: asked("guest", "tcp", SERVER[family], PORT), what="the way out")
    assert echoed(None, SERVER[family], PORT) == SIZE, "the control"
    assert echoed("guest", SERVER[family], PORT) == SIZE
    # A client outside, of a published port.
    assert echoed("server", TUNNEL.seen(family), 9090) == SIZE


@pytest.mark.parametrize("family", [4, 6])
def test_a_guest_hears_that_its_datagram_is_too_big(family: int, world: FastGuest) -> None:
    wait_for(lambda: asked("guest", "tcp", SERVER[family], PORT), what="the way out")
    level = socket.IPPROTO_IP if family == 4 else socket.IPPROTO_IPV6
    discover, mtu = (IP_MTU_DISCOVER, IP_MTU) if family == 4 else (IPV6_MTU_DISCOVER, IPV6_MTU)
    here = "::" if family == 6 else ""
    with world.open_socket("udp", address=here, timeout=3) as datagrams:
        datagrams.setsockopt(level, discover, KEEP)
        datagrams.connect((SERVER[family], PORT))

        def told() -> int:
            with suppress(OSError):
                datagrams.send(b"x" * (1500 - HEADERS[family]))
            return int.from_bytes(datagrams.getsockopt(level, mtu, 4), sys.byteorder)

        wait_for(lambda: told() == MTU, timeout=10, what="the MTU of the path", interval=0.1)
        with suppress(OSError):
            # The error of the last datagram is told once more.
            datagrams.send(b"y")
        datagrams.send(b"y" * (MTU - 200))
        assert datagrams.recv(2000)
