# SPDX-License-Identifier: LGPL-2.1-or-later
"""A private bridge that gets a port which takes less, as one to another host does."""

import socket

import pytest
from lab import (
    ECHO_PORT,
    FastGuest,
    Host,
    Node,
    Provider,
    Service,
    isolated,
    natns,
    run,
    start_network,
    wait_for,
    write_config,
)
from lab_sides import in_process
from test_mtu import (
    IP_HEADERS,
    IP_MTU_DISCOVER,
    IP_PMTUDISC_DO,
    TCP_HEADERS,
    mss,
    mtu_of,
    transfers,
)

LARGE, SMALL = 1500, 1450
NEAR = Host("52:54:00:00:00:05", "10.0.0.5")
FAR = Host("52:54:00:00:00:06", "10.0.0.6")
FORWARD = f"""<natns:nat xmlns:natns="urn:libvirt-natns:1">
  <natns:portForward guestAddress="{FAR.ip}">
    <natns:range start="8080" to="80"/>
  </natns:portForward>
  <natns:portForward proto="udp" guestAddress="{FAR.ip}">
    <natns:range start="7"/>
  </natns:portForward>
</natns:nat>"""
SYN = "tcp[tcpflags] & tcp-syn != 0"
AMOUNT = 300_000

pytestmark = pytest.mark.usefixtures("installed")


def told(guest: FastGuest) -> str | None:
    """The MTU that DHCP tells a guest."""
    return guest.dhcp(apply=False).get("mtu")


def send_whole(sender: Node, address: str, size: int) -> None:
    """Send a datagram that must not be fragmented, of so many octets with its headers."""
    with sender.open_socket("udp") as datagrams:
        datagrams.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
        datagrams.sendto(b"x" * (size - IP_HEADERS), (address, ECHO_PORT))


def forwarded(client: Node, far: FastGuest, address: str) -> tuple[set[int], set[int]]:
    """What both ends of a connection from outside announce: seen by the guest, and outside."""
    with far.sniff(SYN) as inside, client.sniff(SYN) as outside:
        assert len(client.curl(f"http://{address}:8080/bytes/{AMOUNT}")) == AMOUNT
        wait_for(lambda: len(mss(inside.lines())) >= 2, what="a handshake")
        wait_for(lambda: len(mss(outside.lines())) >= 2, what="a handshake")
        return set(mss(inside.lines())), set(mss(outside.lines()))


def check_narrow(provider: Provider, near: FastGuest, far: FastGuest, address: str) -> None:
    """All that is to hold while one port of the private bridge takes less."""
    assert mtu_of("virbr10", "nat-a") == mtu_of("upstream", "nat-a") == LARGE
    assert told(far) == told(near) == str(SMALL)
    assert transfers(far, provider)
    assert transfers(near, provider)
    # A connection from outside is made to fit the guest's side, by both ends.
    far_side, outside = forwarded(provider.router, far, address)
    assert far_side == {SMALL - TCP_HEADERS}
    assert outside == {LARGE - TCP_HEADERS, SMALL - TCP_HEADERS}
    # Too large for the private side, and not to be fragmented: the sender is told ...
    with provider.router.sniff("icmp") as capture:
        send_whole(provider.router, address, LARGE)
        wait_for(capture.lines, what="an ICMP message")
        assert f"{address} > {provider.gateway}: ICMP" in capture.lines()[0]
        assert f"need to frag (mtu {SMALL})" in capture.lines()[0]
    # ... and what may be fragmented, is.
    run("ip", "-n", "upstream", "route", "flush", "cache")
    assert provider.router.ping(address, "-s", "4000")
    with provider.router.open_socket("udp") as datagrams:
        datagrams.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, 0)
        datagrams.sendto(b"y" * 4000, (address, ECHO_PORT))
        assert datagrams.recv(5000).endswith(b"y" * 4000)
    # A guest that was never told sends packets as large as before.
    before = len(provider.udp.contacts)
    send_whole(near, provider.gateway, LARGE)
    wait_for(lambda: len(provider.udp.contacts) > before, what="a large packet outside")


def test_sync_follows(provider: Provider, capsys: pytest.CaptureFixture[str]) -> None:
    command = in_process(capsys)

    def in_order() -> bool:
        return command("check").status == 0

    # The other backend's clamp is looked at below, and in test_vxlan.
    write_config(provider.config(firewall="iptables"))
    start_network(isolated("a", "virbr10", hosts=[NEAR, FAR], metadata=FORWARD))
    with FastGuest("virbr10", NEAR.mac, "near") as near:
        offer = near.dhcp()
        assert "mtu" not in offer
        stream = near.connect(provider.gateway, ECHO_PORT)
        address = stream.recv(100).decode().partition(":")[0]
        assert in_order()
        with FastGuest("virbr10", FAR.mac, "far", mtu=SMALL) as far:
            far.serve("http", 80)
            far.serve("udp", ECHO_PORT)
            # The kernel gives the bridge its smallest port's MTU.
            assert mtu_of("virbr10") == SMALL
            assert not in_order()
            assert command("sync").status == 0
            assert in_order()
            assert far.dhcp()["mtu"] == str(SMALL)
            check_narrow(provider, near, far, address)
            stream.sendall(b"x" * LARGE)
            assert stream.recv(10 * LARGE)
        assert mtu_of("virbr10") == LARGE
        assert command("sync").status == 0
        assert in_order()
        assert told(near) is None
        stream.close()


def test_service_follows(service: Service, provider: Provider) -> None:
    # libvirt sets the bridge's MTU, which the kernel then leaves as it is.
    start_network(isolated("a", "virbr10", hosts=[NEAR, FAR], metadata=FORWARD, mtu=9000))
    with FastGuest("virbr10", NEAR.mac, "near", mtu=9000) as near:
        assert near.dhcp()["mtu"] == str(LARGE)
        stream = near.connect(provider.gateway, ECHO_PORT)
        stream.recv(100)
        with FastGuest("virbr10", FAR.mac, "far", mtu=SMALL) as far:
            assert mtu_of("virbr10") == 9000
            wait_for(lambda: told(far) == str(SMALL), timeout=20, what="the smaller MTU")
            far.dhcp()
            far.serve("http", 80)
            address = str(provider.tcp.contacts[-1].address)
            far_side, outside = forwarded(provider.router, far, address)
            assert far_side == {SMALL - TCP_HEADERS}
            assert outside == {LARGE - TCP_HEADERS, SMALL - TCP_HEADERS}
            stream.sendall(b"still there?")
            assert stream.recv(100) == b"still there?"
            assert natns("check").returncode == 0
        wait_for(lambda: told(near) == str(LARGE), timeout=20, what="the MTU of before")
        stream.sendall(b"and now?")
        assert stream.recv(100) == b"and now?"
        stream.close()
