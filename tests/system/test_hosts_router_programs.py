# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs that listen on single addresses of a rented server, behind a router."""

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import lab_vps
import pytest
from lab import (
    ECHO_PORT,
    INTERNET,
    FastGuest,
    Server,
    isolated,
    remove_config,
    run,
    start_network,
    virsh,
    wait_for,
    write_config,
)
from lab_hosts_router import ADDRESS, SSH, dhcp_server, server
from lab_sides import Command, in_process
from lab_vps import CONFIG, GATEWAY, NAMESPACE, NIC, ROUTER, Vps, greeting, provider, state_of_host

from libvirt_natns.kernel.netns import entered

SECOND = "198.51.100.51"
HTTPS, NAMES, PRIVATE = 443, 53, 8080
PORTS = f'host_ports = ["tcp/{SSH}", "tcp/{HTTPS}", "udp/{NAMES}"]\n'
PLAIN = (
    f"address add {ADDRESS}/24 dev {NIC}",
    f"address add {SECOND}/24 dev {NIC}",
    f"route add default via {GATEWAY}",
)
APPLIED = Path("/run/libvirt-natns/routers/wan/applied")


@pytest.fixture(autouse=True)
def nothing_kept(nothing_left: None) -> Iterator[None]:
    yield
    remove_config()
    shutil.rmtree(lab_vps.STATE, ignore_errors=True)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return in_process(capsys)


def configure(firewall: str = "auto", more: str = PORTS) -> None:
    write_config(f'firewall = "{firewall}"\nupstream = "wan"\n{CONFIG}{more}')


class Programs:
    """A web server on each address, a resolver on one, and sshd on all addresses."""

    def __init__(self, stack: ExitStack) -> None:
        self.servers = {
            ADDRESS: Server(None, "tcp", HTTPS, address=ADDRESS),
            SECOND: Server(None, "tcp", HTTPS, address=SECOND),
            "names": Server(None, "udp", NAMES, address=SECOND),
            "ssh": Server(None, "tcp", SSH),
            "private": Server(None, "tcp", PRIVATE, address=ADDRESS),
        }
        for served in self.servers.values():
            stack.callback(served.close)

    def asked(self, address: str, port: int, namespace: str | None, source: str = "") -> set[str]:
        """The programs that a connection reaches, with the client as each sees it."""
        for served in self.servers.values():
            served.contacts.clear()
        if port == NAMES:
            ask(address, namespace, source)
        else:
            greeting(address, port, namespace, source=source, timeout=1.0)
        return {f"{n} {a}" for n, served in self.servers.items() for a in served.addresses()}


def ask(address: str, namespace: str | None, source: str) -> None:
    """Send one datagram to a resolver, and wait for its answer."""
    with entered(namespace):
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.settimeout(1.0)
        client.bind((source, 0))
        client.connect((address, NAMES))
        client.send(b"who?")
        try:
            assert client.recv(100)
        except OSError:
            return


def outside(programs: Programs) -> dict[str, set[str]]:
    """Each address and port, asked from outside."""
    return {
        f"{address} {port}": programs.asked(address, port, NAMESPACE, INTERNET)
        for address in (ADDRESS, SECOND)
        for port in (HTTPS, SSH, NAMES)
    }


@contextmanager
def programs_on(*lines: str) -> Iterator[tuple[Vps, Programs]]:
    with ExitStack() as stack:
        world = stack.enter_context(server(*lines))
        yield world, Programs(stack)


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
def test_each_address_leads_to_its_program(backend: str, command: Command) -> None:
    configure(backend)
    with programs_on(*PLAIN) as (world, programs):
        host, before = state_of_host(), outside(programs)
        assert before[f"{ADDRESS} {HTTPS}"] == {f"{ADDRESS} {INTERNET}"}
        stream = lab_vps.connection(SECOND, HTTPS, NAMESPACE)
        with world.sniff() as sent:
            assert command("router", "up").err == ""
            assert outside(programs) == before
            stream.sendall(b"still there?")
            assert stream.recv(100) == b"still there?", "the address is the same"
            assert not programs.asked(ADDRESS, PRIVATE, NAMESPACE), "no port of host_ports"
            # The host asks itself, and goes out by each address.
            for address in (ADDRESS, SECOND):
                assert programs.asked(address, HTTPS, None) == {f"{address} {address}"}
                assert greeting(INTERNET, ECHO_PORT, source=address) == address
                assert provider("busybox", "ping", "-c1", "-W2", address)
            assert greeting(INTERNET, ECHO_PORT) == ADDRESS
            assert world.sources(sent) == {lab_vps.MAC}
        # A program that starts anew finds its address.
        programs.servers[SECOND].close()
        programs.servers[SECOND] = Server(None, "tcp", HTTPS, address=SECOND)
        assert outside(programs) == before
        damages(command)
        assert outside(programs) == before
        assert command("router", "down").err == ""
        with stream:
            stream.sendall(b"and now?")
            assert stream.recv(100) == b"and now?"
        assert outside(programs) == before
        programs.servers[SECOND].close()
        after = state_of_host()
        assert after == host, host.diff(after)


def damages(command: Command) -> None:
    """Each damage is seen, and repaired."""
    for damage in (
        ("rule", "del", "to", SECOND, "ipproto", "tcp"),
        ("rule", "add", "priority", "0", "to", ADDRESS, "lookup", "local"),
        ("route", "flush", "table", "158"),
    ):
        run("ip", "-n", ROUTER, *damage)
        if damage[1] != "add":
            assert "do not go to the host" in command("router", "status").out, damage
        assert command("router", "up").status == 0
        assert "wan: up\n" in command("router", "status").out, damage
    run("ip", "address", "del", f"{SECOND}/32", "dev", lab_vps.HOST_LINK)
    assert command("router", "up").status == 0


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
def test_guests_beside_them(
    backend: str, installed: None, nothing_kept: None, command: Command
) -> None:
    configure(backend)
    with programs_on(*PLAIN) as (_, programs), ExitStack() as stack:
        assert command("router", "up").err == ""
        published = (
            '<natns:nat xmlns:natns="urn:libvirt-natns:1"><natns:portForward '
            'guestAddress="10.0.0.5"><natns:range start="8001" to="80"/></natns:portForward>'
            "</natns:nat>"
        )
        start_network(isolated("a", "virbr10", metadata=published))
        stack.callback(virsh, "net-undefine", "a", check=False)
        stack.callback(virsh, "net-destroy", "a", check=False)
        guest = stack.enter_context(FastGuest("virbr10", "52:54:00:00:00:05", "guest-a"))
        guest.static("10.0.0.5/24", "10.0.0.1")
        guest.serve("tcp", 80)
        assert greeting(INTERNET, ECHO_PORT, guest.name) == ADDRESS
        for address in (ADDRESS, SECOND):
            assert greeting(address, 8001, NAMESPACE, source=INTERNET) == INTERNET
            assert greeting(address, 8001, guest.name), "its own port"
            (reached,) = programs.asked(address, HTTPS, guest.name)
            assert reached.startswith(address)
            assert programs.asked(address, SSH, guest.name)
            assert not programs.asked(ADDRESS, PRIVATE, guest.name)
        assert greeting("192.168.158.1", 8001), "asked by the host"


def test_at_a_boot_programs_start_later(command: Command) -> None:
    configure()
    with server(*PLAIN):
        with ExitStack() as stack:
            before = outside(Programs(stack))
            assert command("router", "up").status == 0
            assert command("router", "down").status == 0
        run("ip", "address", "flush", "dev", NIC)
        assert command("router", "up", "--boot").err == ""
        with ExitStack() as stack:
            assert outside(Programs(stack)) == before


def test_addresses_that_are_named(command: Command) -> None:
    """Programs need not listen yet, or only one address stays the host's."""
    with server(*PLAIN), ExitStack() as stack:
        configure(more=f'{PORTS}host_addresses = ["198.51.100.99"]\n')
        refused = command("router", "up")
        assert (refused.status, refused.err.count("\n")) == (1, 1)
        assert "host_addresses has 198.51.100.99, which is no address of ens3" in refused.err
        configure(more=f'{PORTS}host_addresses = ["{ADDRESS}", "{SECOND}"]\n')
        assert command("router", "up").err == ""
        found = outside(Programs(stack))
        assert found[f"{SECOND} {HTTPS}"] == {f"{SECOND} {INTERNET}"}
        configure(more=f"{PORTS}host_addresses = []\n")
        assert "host_addresses differs" in command("router", "status").out


def test_sshd_on_a_leased_address(command: Command) -> None:
    """The lease is renewed, although its answers come to the address that is the host's, too."""
    configure()
    leased = f"address add {ADDRESS}/24 dev {NIC} valid_lft 600 preferred_lft 600"
    run_files = APPLIED.parent
    with (
        server(leased, f"route add default via {GATEWAY}"),
        closing(Server(None, "tcp", SSH, address=ADDRESS)) as ssh,
        dhcp_server(f"--dhcp-range={ADDRESS},{ADDRESS},2m", f"--dhcp-option=3,{GATEWAY}"),
    ):
        assert command("router", "up").err == ""
        assert greeting(ADDRESS, SSH, NAMESPACE, source=INTERNET) == INTERNET
        assert ssh.addresses() == {INTERNET}
        wait_for(APPLIED.exists, timeout=20, what="a lease that is kept up")
        assert "wan: up\n" in command("router", "status").out
        first = (run_files / "times").read_text()
        wait_for(lambda: int(first.split()[1]) != seconds(), what="another second")
        os.kill(int((run_files / "pid").read_text()), signal.SIGUSR1)
        wait_for(lambda: (run_files / "times").read_text() != first, timeout=5, what="a renewal")
        assert greeting(ADDRESS, SSH, NAMESPACE, source=INTERNET) == INTERNET
        assert greeting(INTERNET, ECHO_PORT) == ADDRESS


def seconds() -> int:
    """Seconds since boot, as the client's script notes them."""
    return int(float(Path("/proc/uptime").read_text().split()[0]))
