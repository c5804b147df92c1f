# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why no namespace of ours is joined to the host by pasta: what it did when it was tried.

docs/explanation/pasta.md has the verdict.  Each test asserts a property of the real program
that rules it out, beside a guest that leaves by the kernel's way.  A test that fails here for
a later pasta is good news: read that page again.
"""

import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import (
    ECHO_PORT,
    INTERNET,
    FastGuest,
    LabError,
    Node,
    Provider,
    Server,
    isolated,
    natns,
    run,
    wait_for,
)
from lab_boundary import guest_on, nat_network, on_a_link, reaches
from lab_domains import asked, carries, create, destroy, domain, networks, nic, ports
from lab_hosts_pasta import (
    GUEST,
    INSIDE,
    NAMESPACE,
    TAP,
    Joined,
    Pasta,
    options,
    ping_allowed,
    program,
)
from packets import inject, ip_packet, sctp_init

CLIENT, HOST, SECOND, TUNNEL = "192.168.0.77", "192.168.0.2", "192.168.0.3", "10.8.0.2"
ROUTER, VICTIM = "192.168.0.1", "192.168.150.5"
WEB = "52:54:00:00:00:05"
DATABASE = 5432
SCTP = 132
BRIDGE = "natns-host"
CAP_SYS_ADMIN = 21

INPUT = "type filter hook input priority 0; policy drop"
FORWARD = "type filter hook forward priority 0; policy drop"
OUTPUT = "type filter hook output priority 0"


@dataclass
class World:
    """``sock`` leaves by pasta, ``kern`` by the kernel; ``control`` is on libvirt's NAT network."""

    client: Node
    provider: Provider
    sock: FastGuest
    kern: FastGuest


@pytest.fixture(scope="module")
def world(installed: None) -> Iterator[World]:
    with Provider() as provider, ExitStack() as stack:
        run("ip", "address", "add", f"{SECOND}/24", "dev", "br0")
        stack.enter_context(
            networks(
                isolated("kernel", "virbr10"),
                nat_network("control", "virbr52", "192.168.152"),
                nat_network("victim", "virbr50", "192.168.150"),
            )
        )
        stack.callback(destroy, "web")
        create(domain("web", nic("kernel", WEB), publishes=ports("start='3222' to='22'")))
        joined = stack.enter_context(Joined())
        kern = stack.enter_context(FastGuest("virbr10", WEB, "kern"))
        kern.dhcp()
        guest_on(stack, "control", "virbr52", "192.168.152.5")
        victim = guest_on(stack, "victim", "virbr50", VICTIM)
        for guest in (joined.guest, kern, victim):
            guest.serve("tcp", 22)
            guest.serve("udp", 22)
        client = provider.neighbour("client", f"{CLIENT}/24")
        yield World(client, provider, joined.guest, kern)


@contextmanager
def table(chain: str, *rules: str) -> Iterator[None]:
    """A table of the administrator's, with one chain."""
    run("nft", f"table inet admin {{ chain one {{ {'; '.join((chain, *rules))}; }}; }}")
    try:
        yield
    finally:
        run("nft", "delete table inet admin")


@contextmanager
def rules(*texts: str) -> Iterator[None]:
    """Rules of the host's routing policy."""
    with ExitStack() as stack:
        for text in texts:
            run("ip", "rule", "add", *text.split())
            stack.callback(run, "ip", "rule", "del", *text.split())
        yield


@contextmanager
def tunnel(packets: str) -> Iterator[None]:
    """A tunnel of the host's with a table of its own, for packets that a rule selects."""
    with ExitStack() as stack:
        far = on_a_link(stack, "far", "p-far", TUNNEL, "10.8.0.1")
        far.run("ip", "address", "add", f"{INTERNET}/32", "dev", "lo")
        far.serve("tcp", ECHO_PORT)
        run("ip", "route", "add", "default", "via", "10.8.0.1", "table", "51820")
        near = "pref 32764 table main suppress_prefixlength 0"
        stack.enter_context(rules(near, f"pref 32765 {packets} table 51820"))
        yield


def test_guests_leave_as_programs_of_the_host_do(world: World) -> None:
    """The reason to try it: a tunnel's table and a kill switch hold, and clients are seen."""
    with ExitStack() as stack:
        stack.enter_context(Pasta(NAMESPACE, tcp=f"{HOST}/2222:22", udp=f"{HOST}/2222:22"))
        assert asked("sock", "tcp", INTERNET, ECHO_PORT) == HOST
        assert asked("sock", "udp", ROUTER, ECHO_PORT) == HOST
        assert asked("client", "udp", HOST, 2222) == CLIENT
        stream, seen = opened(world.client, HOST, 2222)
        stream.close()
        assert seen == CLIENT
        assert not reaches(world.client, SECOND, 2222)
        stack.enter_context(tunnel("not fwmark 0xca6c"))
        assert asked("sock", "tcp", INTERNET, ECHO_PORT) == TUNNEL
        with table(OUTPUT, 'oifname "p-far" drop'):
            assert asked("sock", "tcp", INTERNET, ECHO_PORT, timeout=1.0) is None


def opened(client: Node, address: str, port: int) -> tuple[socket.socket, str]:
    """A connection to an echo server, and the client's address that the server sees.

    The client speaks first: Debian 12's pasta ends its handshake with a guest no sooner.
    """
    stream = client.connect(address, port)
    stream.sendall(b"hello")
    received = b""
    while not received.endswith(b"hello"):
        received += stream.recv(100)
    return stream, received.decode().partition(":")[0]


def both_ways(client: Node, port: int, guest: Node) -> list[socket.socket]:
    """A connection to a published port, and a connection outwards, which both carry."""
    streams = [opened(client, HOST, port)[0], opened(guest, INTERNET, ECHO_PORT)[0]]
    assert all(map(carries, streams))
    return streams


@contextmanager
def added(port: int, to: int) -> Iterator[None]:
    """A port of the guest ``kern`` that is published live, by the kernel."""
    natns("forward", "add", "web", f"{port}:{to}")
    try:
        yield
    finally:
        natns("forward", "remove", "web", f"{port}")


def test_ports_are_those_of_its_start(world: World) -> None:
    """No socket takes orders, and a restart ends connections that have nothing to do with it."""
    said = subprocess.run([*program(), "--help"], capture_output=True, text=True, check=False)
    assert "--tcp-ports" in said.stdout + said.stderr
    assert "--conf-path" not in said.stdout + said.stderr
    by_kernel = both_ways(world.client, 3222, world.kern)
    with Pasta(NAMESPACE, tcp=f"{HOST}/2222:22"):
        by_pasta = both_ways(world.client, 2222, world.sock)
    with Pasta(NAMESPACE, tcp=f"{HOST}/2222-2223:22-23"), added(3223, 22):
        both = [opened(world.client, HOST, port)[0] for port in (2222, 3223)]
        assert all(map(carries, both)), "the ports are there"
        assert not any(map(carries, by_pasta))
        assert all(map(carries, by_kernel))
    for stream in (*by_pasta, *by_kernel, *both):
        stream.close()


def test_its_death_ends_all_connections(world: World) -> None:
    """As by an upgrade, for want of memory, or by a fault of its own."""
    first = Pasta(NAMESPACE, tcp=f"{HOST}/2222:22")
    streams = both_ways(world.client, 2222, world.sock)
    first.kill()
    links = run("ip", "-n", NAMESPACE, "-br", "link").stdout
    assert TAP not in links, "the guests' way out goes with it"
    with Pasta(NAMESPACE, tcp=f"{HOST}/2222:22"):
        again = both_ways(world.client, 2222, world.sock)
        assert not any(map(carries, streams))
    for stream in (*streams, *again):
        stream.close()


def test_it_keeps_the_rights_of_root(world: World) -> None:
    """To join a namespace of the host's own it stays root, and may enter any namespace."""
    with Pasta(NAMESPACE) as pasta:
        assert asked("sock", "tcp", INTERNET, ECHO_PORT) == HOST, "it has given up what it gives up"
        status = Path(f"/proc/{pasta.process.pid}/status").read_text()
    (held,) = re.findall(r"^CapEff:\s+(\w+)$", status, re.MULTILINE)
    assert int(held, 16) >> CAP_SYS_ADMIN & 1
    without = [word for word in options(NAMESPACE) if word not in ("--runas", "0")]
    refused = subprocess.run([*program(), *without], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "Couldn't switch to pasta namespaces" in refused.stderr


def test_guests_reach_the_host_as_its_own_programs_do(world: World) -> None:
    """Services behind the host's firewall, and guests of libvirt's other networks."""
    database = Server(None, "tcp", DATABASE)
    closed = 'iifname "lo" accept', "ct state established,related accept", "ip protocol icmp accept"
    try:
        with Pasta(NAMESPACE), table(INPUT, *closed, 'iifname "virbr*" udp dport 67 accept'):
            for guest in ("sock", "kern", "control", "client"):
                seen = asked(guest, "tcp", HOST, DATABASE, timeout=0.7)
                assert seen == (HOST if guest == "sock" else None), guest
        with Pasta(NAMESPACE):
            assert reaches(None, VICTIM, 22), "it answers"
            for guest in ("sock", "kern", "control"):
                seen = asked(guest, "tcp", VICTIM, 22, timeout=0.7)
                assert (seen is not None) == (guest == "sock"), guest
    finally:
        database.close()


def test_sctp_is_lost(world: World) -> None:
    """As is every protocol but TCP, UDP and echo requests."""
    with Pasta(NAMESPACE), world.provider.router.sniff("sctp") as outside:
        for guest, address in (("sock", GUEST), ("kern", "10.0.0.100")):
            inject(guest, ip_packet(address, INTERNET, SCTP, sctp_init(5000, 22)))
        wait_for(outside.lines, what="the packet by the kernel's way")
        assert asked("sock", "tcp", INTERNET, ECHO_PORT) == HOST, "TCP passes"
        assert len(outside.lines()) == 1


def test_ping_needs_a_setting_of_the_hosts(world: World) -> None:
    """Debian 12 has it off; it is for the groups of all programs of the host."""
    with Pasta(NAMESPACE):
        assert world.kern.ping(INTERNET)
        assert not world.sock.ping(INTERNET)
    with ping_allowed(), Pasta(NAMESPACE):
        assert world.sock.ping(INTERNET)


def test_a_port_that_nothing_listens_on_looks_open(world: World) -> None:
    """pasta accepts before it asks the guest, so that a check of the port is misled."""
    with added(3224, 24), Pasta(NAMESPACE, tcp=f"{HOST}/2224:24"):
        assert not reaches(world.client, HOST, 3224)
        assert reaches(world.client, HOST, 2224)


def test_ports_by_themselves_have_no_address(world: World) -> None:
    """Its only live forwards follow listeners in the namespace; Debian 12's do not even that."""
    with Pasta(NAMESPACE, tcp="auto"):
        listener = Server(NAMESPACE, "tcp", 2225, address=INSIDE)
        try:
            with suppress(LabError):
                wait_for(lambda: reaches(world.client, HOST, 2225), what="the port, live")
            answered = {each for each in (HOST, SECOND) if reaches(world.client, each, 2225)}
            assert answered in (set(), {HOST, SECOND}), "never HOST alone"
        finally:
            listener.close()


def test_the_kernels_way_instead(world: World) -> None:
    """A rule that names the transit bridge leads guests by a policy's table; a guard holds."""
    with tunnel("fwmark 0x77"):
        natns("sync")
        assert asked("kern", "tcp", INTERNET, ECHO_PORT) == HOST
        with rules(f"pref 32765 iif {BRIDGE} table 51820"):
            assert asked("kern", "tcp", INTERNET, ECHO_PORT) == TUNNEL
            with table(FORWARD):
                assert asked("kern", "tcp", INTERNET, ECHO_PORT, timeout=1.0) is None
    natns("sync")
