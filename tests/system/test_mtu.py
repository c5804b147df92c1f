# SPDX-License-Identifier: LGPL-2.1-or-later
"""A private network and an upstream of different MTU: the smaller one counts."""

import json
import re
import socket
import threading
from collections.abc import Iterator

import pytest
from lab import (
    FastGuest,
    Host,
    Provider,
    isolated,
    natns,
    run,
    start_network,
    wait_for,
    write_config,
)

GATEWAY = "10.0.0.1"
WEB = Host("52:54:00:00:00:05", "10.0.0.5", "web")
IP_HEADERS = 28
"""Octets of an IPv4 and an ICMP header."""
TCP_HEADERS = 40
"""Octets of an IPv4 and a TCP header."""
SMALL = 1400
LARGE = 1500
AMOUNT = 300_000
"""Octets transferred: far more than one window."""

# Of linux/in.h; the module socket does not know them.
IP_MTU_DISCOVER, IP_MTU = 10, 14
IP_PMTUDISC_DO = 2

BACKENDS = pytest.mark.parametrize("firewall", ["nftables", "iptables"])

pytestmark = pytest.mark.usefixtures("installed")


@pytest.fixture
def narrow(nothing_left: None) -> Iterator[Provider]:
    """A provider whose network takes packets of 1400 octets at most."""
    with Provider(mtu=SMALL) as world:
        yield world


def mtu_of(link: str, namespace: str | None = None) -> int:
    shown = run("ip", "-j", "link", "show", link, namespace=namespace).stdout
    return int(json.loads(shown)[0]["mtu"])


def mss(packets: list[str]) -> list[int]:
    """What the SYN packets of a capture announce."""
    return [int(size) for line in packets for size in re.findall(r"mss (\d+)", line)]


def transfers(guest: FastGuest, world: Provider) -> bool:
    """Whether a lot of data comes through, in either direction at a time."""
    assert len(guest.curl(f"http://{world.gateway}/bytes/{AMOUNT}")) == AMOUNT
    with guest.connect(world.gateway, 7) as stream:
        greeting = stream.recv(100)
        sender = threading.Thread(target=stream.sendall, args=(b"x" * AMOUNT,))
        sender.start()
        received = 0
        while received < AMOUNT:
            received += len(stream.recv(65536))
        sender.join()
    return greeting.startswith(b"192.168.0.")


def largest_allowed(guest: FastGuest, address: str) -> int:
    """The path MTU that a guest learns when it sends what must not be fragmented."""
    with guest.open_socket("udp") as sender:
        sender.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
        sender.connect((address, 7))
        sender.send(b"x" * (LARGE - IP_HEADERS))

        def learned() -> int:
            return int(sender.getsockopt(socket.IPPROTO_IP, IP_MTU))

        wait_for(lambda: learned() < LARGE, what="an ICMP message")
        return learned()


@BACKENDS
def test_narrow_upstream(narrow: Provider, firewall: str) -> None:
    write_config(narrow.config(firewall=firewall))
    start_network(isolated("a", "virbr10", hosts=[WEB]))
    assert mtu_of("br0") == mtu_of("upstream", "nat-a") == SMALL
    assert mtu_of("virbr10") == mtu_of("virbr10", "nat-a") == LARGE
    with FastGuest("virbr10", WEB.mac) as guest:
        assert guest.dhcp()["mtu"] == str(SMALL)
        assert mtu_of("eth0", guest.name) == SMALL
        assert transfers(guest, narrow)

        # One that ignores the option.
        run("ip", "-n", guest.name, "link", "set", "eth0", "mtu", str(LARGE))
        filter_ = "tcp[tcpflags] & tcp-syn != 0"
        with guest.sniff(filter_) as inside, narrow.router.sniff(filter_) as outside:
            assert transfers(guest, narrow)
            wait_for(lambda: len(mss(outside.lines())) >= 4, what="two handshakes")
            wait_for(lambda: len(mss(inside.lines())) >= 4, what="two handshakes")
            assert set(mss(outside.lines())) == {SMALL - TCP_HEADERS}
            assert set(mss(inside.lines())) == {LARGE - TCP_HEADERS, SMALL - TCP_HEADERS}
        with guest.sniff("icmp") as capture:
            assert largest_allowed(guest, narrow.gateway) == SMALL
            wait_for(capture.lines)
            assert f"{GATEWAY} > {WEB.ip}: ICMP {narrow.gateway} unreachable" in capture.lines()[0]
            assert f"need to frag (mtu {SMALL})" in capture.lines()[0]
        assert guest.ping(narrow.gateway, "-s", "4000")
    assert natns("check").returncode == 0
    assert mtu_of("br0") == SMALL
    assert mtu_of("virbr10") == LARGE


@BACKENDS
def test_narrow_private_network(provider: Provider, firewall: str) -> None:
    write_config(provider.config(firewall=firewall))
    start_network(isolated("a", "virbr10", hosts=[WEB], mtu=SMALL))
    assert mtu_of("virbr10") == mtu_of("virbr10", "nat-a") == SMALL
    assert mtu_of("br0") == mtu_of("upstream", "nat-a") == LARGE
    with FastGuest("virbr10", WEB.mac, mtu=SMALL) as guest:
        assert guest.dhcp()["mtu"] == str(SMALL)
        syn = "tcp[tcpflags] & tcp-syn != 0"
        with guest.sniff(syn) as inside:
            assert transfers(guest, provider)
            # The provider's own announcement is made smaller on the way in.
            wait_for(lambda: len(mss(inside.lines())) >= 4, what="two handshakes")
            assert set(mss(inside.lines())) == {SMALL - TCP_HEADERS}
        # Too large for the way in, and not to be fragmented: the sender is told.
        with (
            provider.router.sniff("icmp") as capture,
            provider.router.open_socket("udp", 5000) as server,
            guest.open_socket("udp") as client,
        ):
            client.sendto(b"hello", (provider.gateway, 5000))
            address, port = server.recvfrom(100)[1]
            answer_large(server, address, port)
            wait_for(capture.lines)
            assert f"{address} > {provider.gateway}: ICMP" in capture.lines()[0]
            assert f"need to frag (mtu {SMALL})" in capture.lines()[0]
    assert mtu_of("br0") == LARGE


def answer_large(server: socket.socket, address: str, port: int) -> None:
    """Answer with a datagram of full size that must not be fragmented."""
    server.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
    server.sendto(b"x" * (LARGE - IP_HEADERS), (address, port))


def test_users_own_option_and_natns_ip(narrow: Provider) -> None:
    write_config(narrow.config(firewall="nftables"))
    users = """<dnsmasq:options xmlns:dnsmasq='http://libvirt.org/schemas/network/dnsmasq/1.0'>
      <dnsmasq:option value='dhcp-option=26,1280'/></dnsmasq:options>"""
    start_network(isolated("a", "virbr10", hosts=[WEB], more=users))
    dhcp = f"<natns:dhcp><natns:host mac='{WEB.mac}' ip='{WEB.ip}'/></natns:dhcp>"
    nat = f"""<natns:nat xmlns:natns='urn:libvirt-natns:1'>
      <natns:ip address='{GATEWAY}' prefix='24'>{dhcp}</natns:ip></natns:nat>"""
    start_network(isolated("b", "virbr11", address=None, metadata=nat))
    start_network(isolated("c", "virbr12", address=None, metadata=nat, mtu=1300))
    for letter, bridge, expected in (("a", 10, 1280), ("b", 11, SMALL), ("c", 12, 1300)):
        with FastGuest(f"virbr{bridge}", WEB.mac, f"g-{letter}") as guest:
            assert guest.dhcp(apply=False)["mtu"] == str(expected)
