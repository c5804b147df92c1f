# SPDX-License-Identifier: LGPL-2.1-or-later
"""The firewall against real packets, on both backends.

Needs root and a /run/netns of its own, as contrib/sandbox gives; neither libvirt
nor anything else of the lab.  The "host" is a network namespace too: each test
runs in a fresh one, so whatever it does to the host's rules goes with it.

    guest-a, guest-b (both 10.0.0.5)       neighbour 192.168.0.50   server 192.168.0.1
        | virbr10   | virbr11                   |                        |   | 203.0.113.1
      nat-a       nat-b ---- .100, .101 ------ br0 ---------------------+    far 203.0.113.9
"""

import ctypes
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[2]))

from libvirt_natns import firewall, netns
from libvirt_natns.firewall import host
from libvirt_natns.firewall.rules import Policy, ruleset

GATEWAY = "10.0.0.1"
GUEST = "10.0.0.5"
SERVER = "192.168.0.1"
NEIGHBOUR = "192.168.0.50"
FAR = "203.0.113.9"
NAT = {"a": "192.168.0.100", "b": "192.168.0.101"}
PORT = 8000
SOON = 2.0
"""Seconds within which what should arrive arrives."""
QUIET = 0.4
"""Seconds of waiting for what should not."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


# -- the world -----------------------------------------------------------------


def sh(command: str, *, check: bool = True) -> str:
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"{command}: {done.stdout}{done.stderr}")
    return done.stdout


def inside(node: str | None, command: str, *, check: bool = True) -> str:
    with netns.entered(node):
        return sh(command, check=check)


def in_node(node: str, *commands: str) -> None:
    for command in commands:
        inside(node, command)


@contextmanager
def own_network() -> Iterator[None]:
    """Run the body with a fresh network namespace as the host's."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(netns.CLONE_NEWNET) == 0
    try:
        yield
    finally:
        assert libc.setns(own, netns.CLONE_NEWNET) == 0
        os.close(own)


def node(stack: ExitStack, name: str) -> None:
    sh(f"ip netns add {name}")
    stack.callback(sh, f"ip netns del {name}")
    inside(name, "sysctl -qw net.ipv6.conf.all.disable_ipv6=1; ip link set lo up")


def patch(bridge: str, port: str, target: str, link: str, address: str, mac: str = "") -> None:
    """A veth pair from a bridge of the host into a node."""
    hardware = f"address {mac}" if mac else ""
    sh(f"ip link add {port} type veth peer name {link} {hardware} netns {target}")
    sh(f"ip link set {port} master {bridge} up")
    in_node(target, f"ip address add {address} dev {link}", f"ip link set {link} up")


@pytest.fixture
def world() -> Iterator[None]:
    with own_network(), ExitStack() as stack:
        sh("ip link set lo up; sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
        for bridge in ("br0", "virbr10", "virbr11"):
            sh(f"ip link add {bridge} type bridge; ip link set {bridge} up")
        for name in ("server", "neighbour", "far", "nat-a", "nat-b", "guest-a", "guest-b"):
            node(stack, name)
        patch("br0", "p-server", "server", "eth0", f"{SERVER}/24")
        patch("br0", "p-neighbour", "neighbour", "eth0", f"{NEIGHBOUR}/24")
        inside("server", "ip link add eth1 type veth peer name eth0 netns far")
        in_node("server", "ip address add 203.0.113.1/24 dev eth1", "ip link set eth1 up")
        in_node("server", "sysctl -qw net.ipv4.ip_forward=1")
        in_node("far", f"ip address add {FAR}/24 dev eth0", "ip link set eth0 up")
        in_node("far", "ip route add default via 203.0.113.1")
        for letter, bridge in (("a", "virbr10"), ("b", "virbr11")):
            patch(bridge, f"p-in-{letter}", f"nat-{letter}", bridge, f"{GATEWAY}/24")
            patch("br0", f"p-up-{letter}", f"nat-{letter}", "upstream", f"{NAT[letter]}/24")
            in_node(
                f"nat-{letter}",
                f"ip route add default via {SERVER}",
                "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0",
            )
            patch(bridge, f"p-{letter}", f"guest-{letter}", "eth0", f"{GUEST}/24", "52:54:00:0:0:5")
            in_node(f"guest-{letter}", f"ip route add default via {GATEWAY}")
        yield


def policy(letter: str, *subnets: str) -> Policy:
    return Policy(
        inner="virbr10" if letter == "a" else "virbr11",
        upstream="upstream",
        subnets=tuple(map(IPv4Network, ("10.0.0.0/24", *subnets))),
        gateways=(IPv4Address(GATEWAY),),
        address=IPv4Address(NAT[letter]),
    )


@pytest.fixture(params=["nftables", "iptables"])
def backend(request: pytest.FixtureRequest, world: None) -> firewall.Backend:
    """The backend of that name, with its rules in both namespaces."""
    chosen = firewall.named(request.param)
    chosen.require()
    for letter in NAT:
        chosen.apply(f"nat-{letter}", ruleset(policy(letter)))
    return chosen


# -- packets -------------------------------------------------------------------


def opened(
    node: str, kind: int, address: str = "", port: int = 0, patience: float = SOON
) -> socket.socket:
    with netns.entered(node):
        made = socket.socket(socket.AF_INET, kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.settimeout(patience)
    made.bind((address, port))
    return made


@contextmanager
def serving(node: str, port: int = PORT) -> Iterator[None]:
    """TCP and UDP services that answer with the address they saw."""
    with (
        opened(node, socket.SOCK_STREAM, port=port) as tcp,
        opened(node, socket.SOCK_DGRAM, port=port) as udp,
    ):
        tcp.listen(32)
        done = threading.Event()
        connections: list[socket.socket] = []

        def loop() -> None:
            while not done.is_set():
                for ready in select.select([tcp, udp], [], [], 0.05)[0]:
                    if ready is tcp:
                        connection, peer = tcp.accept()
                        connections.append(connection)
                        connection.sendall(peer[0].encode())
                    else:
                        _, peer = udp.recvfrom(2048)
                        udp.sendto(peer[0].encode(), peer)

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            for connection in connections:
                connection.close()


def seen_by(
    target: str,
    guest: str,
    kind: int,
    port: int = PORT,
    source: int = 0,
    patience: float = SOON,
) -> str:
    """The address that a service at ``target`` sees when ``guest`` asks it."""
    with opened(guest, kind, port=source, patience=patience) as client:
        client.connect((target, port))
        if kind == socket.SOCK_DGRAM:
            client.send(b"?")
        return client.recv(64).decode()


def ignored(target: str, client: str, kind: int, port: int = PORT) -> bool:
    """Whether ``client`` gets no answer at all, not even an error."""
    try:
        seen_by(target, client, kind, port, patience=QUIET)
    except TimeoutError:
        return True
    except OSError:
        return False
    return False


def refused(action: Callable[[], object]) -> bool:
    """Whether it fails, and fails at once."""
    start = time.monotonic()
    with pytest.raises(OSError):
        action()
    return time.monotonic() - start < SOON / 2


def pings(node: str, target: str) -> bool:
    echo = struct.pack("!BBHHH", 8, 0, 0, 77, 1)
    echo = echo[:2] + struct.pack("!H", checksum(echo)) + echo[4:]
    with netns.entered(node):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    raw.settimeout(QUIET)
    with raw:
        raw.sendto(echo, (target, 0))
        try:
            while raw.recv(2048)[20] != 0:
                pass
        except TimeoutError:
            return False
        return True


@dataclass(frozen=True)
class Packet:
    source: str
    destination: str
    protocol: int
    payload: bytes


class Capture:
    """All IPv4 packets that pass one interface of a node, in or out."""

    def __init__(self, node: str, link: str) -> None:
        with netns.entered(node):
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))
            self.socket.bind((link, 0x0003))
        self.socket.settimeout(QUIET)

    def __enter__(self) -> "Capture":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def packets(self) -> list[Packet]:
        """What has passed, once nothing has for a while."""
        found = []
        try:
            while True:
                data, address = self.socket.recvfrom(65535)
                # Bridges ask for multicast groups now and then.
                if address[1] == 0x0800 and data[9] != socket.IPPROTO_IGMP:
                    header = (data[0] & 15) * 4
                    source, target = (socket.inet_ntoa(data[o : o + 4]) for o in (12, 16))
                    found.append(Packet(source, target, data[9], data[header:]))
        except TimeoutError:
            return found


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def ip_packet(source: str, target: str, protocol: int, payload: bytes, ttl: int = 64) -> bytes:
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    pseudo = ends + struct.pack("!BBH", 0, protocol, len(payload))
    if protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        at = 16 if protocol == socket.IPPROTO_TCP else 6
        total = struct.pack("!H", checksum(pseudo + payload))
        payload = payload[:at] + total + payload[at + 2 :]
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, ttl, protocol, 0) + ends
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + payload


def tcp(flags: int, source: int = 4444, target: int = PORT) -> bytes:
    return struct.pack("!HHIIBBHHH", source, target, 7, 7, 0x50, flags, 1024, 0, 0)


def udp(source: int, target: int, data: bytes = b"forged") -> bytes:
    return struct.pack("!HHHH", source, target, 8 + len(data), 0) + data


def inject(node: str, packet: bytes, *, frame: tuple[str, bytes] | None = None) -> None:
    """Send an IP packet as it is: by the node's routes, or in a frame to a MAC on a link."""
    if frame:
        with netns.entered(node):
            out = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0x0800)
        with out:
            out.sendto(packet, (frame[0], 0x0800, 0, 0, frame[1]))
        return
    with netns.entered(node):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with raw:
        raw.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0))


def mac(node: str, link: str) -> bytes:
    text = inside(node, f"ip -br link show {link}").split()[2]
    return bytes.fromhex(text.replace(":", ""))


# -- a namespace ---------------------------------------------------------------


def test_twins_go_out_masqueraded(backend: firewall.Backend) -> None:
    with serving("server"):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            for letter, address in NAT.items():
                # The same five-tuple from both.
                assert seen_by(SERVER, f"guest-{letter}", kind, source=40000) == address
    assert all(pings(f"guest-{letter}", SERVER) for letter in NAT)


def test_neighbour_with_a_route_reaches_nothing(backend: firewall.Backend) -> None:
    in_node("neighbour", f"ip route add 10.0.0.0/24 via {NAT['a']}")
    with serving("guest-a"), serving("nat-a"), Capture("guest-a", "eth0") as inner:
        with Capture("neighbour", "eth0") as outer:
            for target in (GUEST, GATEWAY):
                assert not pings("neighbour", target)
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    assert ignored(target, "neighbour", kind)
            # Neither a redirect nor an error gives away that somebody is there.
            for ttl in (1, 2):
                inject("neighbour", ip_packet(NEIGHBOUR, GUEST, 17, udp(9, 9), ttl))
            assert [p for p in outer.packets() if p.destination == NEIGHBOUR] == []
        assert [p for p in inner.packets() if NEIGHBOUR in (p.source, p.destination)] == []


def test_forged_packets_of_a_known_flow_go_nowhere(backend: firewall.Backend) -> None:
    with serving("server"), opened("guest-a", socket.SOCK_DGRAM, port=40001) as client:
        client.connect((SERVER, PORT))
        client.send(b"?")
        assert client.recv(64).decode() == NAT["a"]
        frame = ("eth0", mac("nat-a", "upstream"))
        with Capture("server", "eth0") as wire, Capture("guest-a", "eth0") as inner:
            inject("neighbour", ip_packet(GUEST, SERVER, 17, udp(40001, PORT)), frame=frame)
            inject("neighbour", ip_packet(SERVER, GUEST, 17, udp(PORT, 40001)), frame=frame)
            assert [p for p in wire.packets() if b"forged" in p.payload] == []
            assert inner.packets() == []


def test_no_port_is_offered_upstream(backend: firewall.Backend) -> None:
    assert pings("neighbour", NAT["a"])
    for port in (53, 67, 69, PORT):
        with serving("nat-a", port):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                assert ignored(NAT["a"], "neighbour", kind, port)


def test_guests_reach_the_services_and_are_told_of_the_rest(backend: firewall.Backend) -> None:
    stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
    assert pings("guest-a", GATEWAY)
    with serving("nat-a", 53), serving("nat-a", 69), serving("nat-a", PORT):
        assert seen_by(GATEWAY, "guest-a", stream, 53) == GUEST
        assert seen_by(GATEWAY, "guest-a", datagram, 53) == GUEST
        assert seen_by(GATEWAY, "guest-a", datagram, 69) == GUEST
        for kind in (stream, datagram):
            assert refused(lambda kind=kind: seen_by(GATEWAY, "guest-a", kind, PORT))  # type: ignore[misc]
    # An answer to a forged question would leave by the default route.
    with serving("nat-a", 53), Capture("server", "eth0") as wire:
        inject("guest-a", ip_packet("172.16.0.9", GATEWAY, 17, udp(9, 53)))
        assert [p for p in wire.packets() if p.destination == "172.16.0.9"] == []


def test_the_namespace_itself_asks_and_is_answered(backend: firewall.Backend) -> None:
    """As its dnsmasq does, upstream and in local."""
    with serving("server"), serving("nat-a"):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            assert seen_by(SERVER, "nat-a", kind) == NAT["a"]
            assert seen_by("127.0.0.1", "nat-a", kind) == "127.0.0.1"


def test_a_guest_without_address_asks_for_one(backend: firewall.Backend) -> None:
    with opened("nat-a", socket.SOCK_DGRAM, port=67) as dhcp:
        broadcast = ip_packet("0.0.0.0", "255.255.255.255", 17, udp(68, 67, b"discover"))
        inject("guest-a", broadcast, frame=("eth0", b"\xff" * 6))
        assert dhcp.recv(64) == b"discover"


def test_forged_sources_stay_in(backend: firewall.Backend) -> None:
    with Capture("server", "eth0") as wire, Capture("neighbour", "eth0") as other:
        for source in ("172.16.0.9", NEIGHBOUR, NAT["a"], NAT["b"], GATEWAY, "0.0.0.0"):
            for payload, protocol in (
                (udp(9, PORT), 17),
                (tcp(2), 6),
                (b"\x08\0\xf7\xff" + b"\0" * 4, 1),
            ):
                inject(
                    "guest-a",
                    ip_packet(source, SERVER, protocol, payload),
                    frame=("eth0", mac("nat-a", "virbr10")),
                )
        assert wire.packets() == []
        assert other.packets() == []


def test_nothing_leaves_untranslated(backend: firewall.Backend) -> None:
    """Out of state, after a lost connection table, and resets after the end."""
    with ExitStack() as stack:
        stack.enter_context(serving("server"))
        wire, near = (stack.enter_context(Capture(n, "eth0")) for n in ("server", "guest-a"))
        with opened("guest-a", socket.SOCK_STREAM) as client:
            client.connect((SERVER, PORT))
            assert client.recv(64).decode() == NAT["a"]
            inside("nat-a", "conntrack -F")
            client.send(b"after the flush")
        # RST, FIN, FIN/ACK, ACK, SYN/ACK, RST/ACK, nothing, everything.
        for number, flags in enumerate((4, 1, 17, 16, 18, 20, 0, 63)):
            inject("guest-a", ip_packet(GUEST, SERVER, 6, tcp(flags, source=5000 + number)))
        # ICMP errors about flows that never were.
        inner = ip_packet(SERVER, GUEST, 17, udp(PORT, 9))[:28]
        error = struct.pack("!BBHI", 3, 3, 0, 0) + inner
        error = error[:2] + struct.pack("!H", checksum(error)) + error[4:]
        inject("guest-a", ip_packet(GUEST, SERVER, 1, error))
        time.sleep(QUIET)
        leaked = [p for p in wire.packets() if p.source not in (SERVER, NAT["a"])]
        assert leaked == []
        # Nor is the guest told that anything was wrong.
        assert [
            p
            for p in near.packets()
            if p.protocol == socket.IPPROTO_ICMP and p.destination == GUEST
        ] == []


def test_a_flow_older_than_the_rules_does_not_leak(backend: firewall.Backend) -> None:
    backend.clear("nat-a")
    # Anything that asks for a state makes the kernel remember connections.
    inside("nat-a", "iptables-legacy -A FORWARD -m conntrack --ctstate NEW -j ACCEPT")
    inside(
        "nat-a",
        "nft 'table ip t { chain f { type filter hook forward priority 0;"
        " ct state new accept; }; }'",
    )
    in_node("server", f"ip route add 10.0.0.0/24 via {NAT['a']}")
    with serving("server"), opened("guest-a", socket.SOCK_DGRAM, port=40002) as client:
        client.connect((SERVER, PORT))
        client.send(b"?")
        assert client.recv(64).decode() == GUEST
        backend.apply("nat-a", ruleset(policy("a")))
        with Capture("server", "eth0") as wire:
            client.send(b"?")
            assert [p for p in wire.packets() if p.source == GUEST] == []
        inside("nat-a", "conntrack -F")
        client.send(b"?")
        assert client.recv(64).decode() == NAT["a"]


def test_an_older_upstream_address_does_not_leak(backend: firewall.Backend) -> None:
    with serving("server"), opened("guest-a", socket.SOCK_DGRAM, port=40003) as client:
        client.connect((SERVER, PORT))
        client.send(b"?")
        assert client.recv(64).decode() == NAT["a"]
        moved = Policy(
            "virbr10",
            "upstream",
            policy("a").subnets,
            policy("a").gateways,
            IPv4Address("192.168.0.199"),
        )
        backend.apply("nat-a", ruleset(moved))
        with Capture("server", "eth0") as wire:
            client.send(b"?")
            assert [p for p in wire.packets() if p.source == NAT["a"]] == []


def segment_sizes(packets: list[Packet]) -> set[int]:
    syns = [p.payload for p in packets if p.protocol == 6 and p.payload[13] & 2]
    return {struct.unpack("!H", syn[22:24])[0] for syn in syns if syn[20:22] == b"\x02\x04"}


@pytest.mark.parametrize(("outside", "inner"), [(1400, 1500), (1500, 1300)])
def test_segments_fit_both_sides(backend: firewall.Backend, outside: int, inner: int) -> None:
    in_node("nat-a", f"ip link set upstream mtu {outside}", f"ip link set virbr10 mtu {inner}")
    with serving("server"), Capture("server", "eth0") as wire, Capture("guest-a", "eth0") as near:
        assert seen_by(SERVER, "guest-a", socket.SOCK_STREAM) == NAT["a"]
        sizes = {min(segment_sizes(capture.packets())) for capture in (wire, near)}
        assert sizes == {min(outside, inner) - 40}


def path_mtu(node: str, target: str) -> int:
    with opened(node, socket.SOCK_DGRAM) as client:
        client.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
        client.connect((target, PORT))
        for _ in range(2):
            try:
                client.send(b"x" * 1400)
            except OSError:
                break
            time.sleep(QUIET)
        return client.getsockopt(socket.IPPROTO_IP, 14)  # IP_MTU


def test_too_big_is_told(backend: firewall.Backend) -> None:
    in_node("server", "ip link set eth1 mtu 1300")
    assert path_mtu("guest-a", FAR) == 1300
    in_node("nat-b", "ip link set upstream mtu 1350")
    assert path_mtu("guest-b", SERVER) == 1350


def test_errors_about_a_flow_come_back(backend: firewall.Backend) -> None:
    assert refused(lambda: seen_by(SERVER, "guest-a", socket.SOCK_DGRAM, port=9))
    assert refused(lambda: seen_by(SERVER, "guest-a", socket.SOCK_STREAM, port=9))


def test_routed_subnets(backend: firewall.Backend) -> None:
    backend.apply("nat-a", ruleset(policy("a", "10.9.0.0/24")))
    in_node("nat-a", f"ip route add 10.9.0.0/24 via {GUEST}")
    in_node("guest-a", "ip address add 10.9.0.1/24 dev lo")
    with serving("server"), opened("guest-a", socket.SOCK_DGRAM, "10.9.0.1") as client:
        client.connect((SERVER, PORT))
        client.send(b"?")
        assert client.recv(64).decode() == NAT["a"]


def test_between_private_subnets(backend: firewall.Backend, world: None) -> None:
    """Also where replies do not come back this way."""
    backend.apply("nat-a", ruleset(policy("a", "10.9.0.0/24")))
    in_node("nat-a", "ip address add 10.9.0.1/24 dev virbr10")
    with ExitStack() as stack:
        node(stack, "guest-c")
        patch("virbr10", "p-c", "guest-c", "eth0", "10.9.0.5/24")
        in_node("guest-c", "ip route add 10.0.0.0/24 dev eth0")
        in_node("guest-a", "sysctl -qw net.ipv4.conf.all.accept_redirects=0")
        in_node("guest-a", "sysctl -qw net.ipv4.conf.eth0.accept_redirects=0")
        in_node("nat-a", "sysctl -qw net.ipv4.conf.all.send_redirects=0")
        stack.enter_context(serving("guest-c"))
        assert seen_by("10.9.0.5", "guest-a", socket.SOCK_STREAM) == GUEST


def test_listing_tells_an_alteration(backend: firewall.Backend) -> None:
    before = backend.listing("nat-a")
    with serving("server"):
        seen_by(SERVER, "guest-a", socket.SOCK_STREAM)
    backend.apply("nat-a", ruleset(policy("a")))
    assert firewall.fingerprint(backend.listing("nat-a")) == firewall.fingerprint(before)
    inside(
        "nat-a",
        "nft insert rule inet natns forward accept"
        if backend.name == "nftables"
        else "iptables-legacy -I FORWARD -j ACCEPT",
    )
    assert backend.listing("nat-a") != before
    for _ in range(2):
        backend.clear("nat-a")
        assert backend.listing("nat-a") == ""


def test_reloading_cuts_no_connection(backend: firewall.Backend) -> None:
    with serving("server"), opened("guest-a", socket.SOCK_DGRAM, port=40004) as client:
        client.connect((SERVER, PORT))
        for _ in range(3):
            client.send(b"?")
            assert client.recv(64).decode() == NAT["a"]
            backend.apply("nat-a", ruleset(policy("a")))


# -- the host ------------------------------------------------------------------

TRANSIT = "192.168.150.0/24"

FOREIGN = {
    "none": "",
    "iptables-nft": "iptables-nft -P FORWARD DROP; iptables-nft -t nat -A POSTROUTING"
    " -s 172.17.0.0/16 -j MASQUERADE; iptables-nft -A FORWARD -i docker0 -j ACCEPT",
    "iptables-legacy": "iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -i docker0"
    " -m conntrack --ctstate NEW -m comment --comment 'two words' -j ACCEPT",
    "nft": "nft 'table inet filter { chain forward { type filter hook forward priority 5;"
    ' policy drop; iifname "docker0" accept; }; }\'',
    "firewalld": "nft 'table inet firewalld { chain filter_FORWARD { type filter hook forward"
    " priority 10; ct state established,related accept; reject with icmpx admin-prohibited; }; }'",
}


@pytest.fixture(params=list(FOREIGN))
def foreign(request: pytest.FixtureRequest, world: None) -> str:
    sh(FOREIGN[request.param])
    return str(request.param)


@pytest.fixture
def transit(world: None) -> Iterator[None]:
    """nat-t on a transit bridge, and the host a router with 192.168.0.2 on br0."""
    with ExitStack() as stack:
        sh("ip address add 192.168.0.2/24 dev br0; sysctl -qw net.ipv4.ip_forward=1")
        sh("ip link add natns-host type bridge; ip link set natns-host up")
        sh("ip address add 192.168.150.1/24 dev natns-host")
        node(stack, "nat-t")
        patch("natns-host", "p-up-t", "nat-t", "upstream", "192.168.150.2/24")
        in_node("nat-t", "ip route add default via 192.168.150.1")
        yield


def state() -> str:
    legacy = "".join(
        sh(f"iptables-legacy-save -t {table}")
        for table in sorted(Path("/proc/thread-self/net/ip_tables_names").read_text().split())
    )
    kept = [line for line in legacy.splitlines() if not line.startswith("#")]
    return sh("nft -s list ruleset") + "\n".join(line.split(" [")[0] for line in kept)


HOST_POLICY = host.HostPolicy(transits=(host.Transit("natns-host", IPv4Network(TRANSIT)),))


@pytest.mark.parametrize("name", ["nftables", "iptables"])
def test_transit_is_masqueraded(name: str, foreign: str, transit: None) -> None:
    if name == "iptables":
        # A legacy table once used stays for good: have them before.
        sh("iptables-legacy -t nat -S; iptables-legacy -S")
    before = state()
    assert host.differences(HOST_POLICY, name)
    for _ in range(2):
        host.ensure(HOST_POLICY, name)
        assert host.differences(HOST_POLICY, name) == ()
    with serving("server"):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            assert seen_by(SERVER, "nat-t", kind) == "192.168.0.2"
    in_node("server", f"ip route add {TRANSIT} via 192.168.0.2")
    with serving("nat-t"):
        assert ignored("192.168.150.2", "server", socket.SOCK_DGRAM)
    with Capture("server", "eth0") as wire:
        inject("nat-t", ip_packet("10.0.0.5", SERVER, 17, udp(9, 9)))
        assert wire.packets() == []
    if foreign == "iptables-nft":
        assert "NATNS-FORWARD" in sh("iptables-nft -S")
        assert "NATNS-FORWARD" in sh("iptables-nft -L")
    host.remove()
    assert state() == before
    host.remove()
    assert state() == before


def test_nothing_is_created_by_looking(world: None) -> None:
    before = state()
    host.differences(HOST_POLICY, "nftables")
    host.remove()
    assert state() == before
    assert Path("/proc/thread-self/net/ip_tables_names").read_text() == ""


TAMPERING = {
    "nftables": "nft flush chain ip filter NATNS-FORWARD; nft delete table inet natns;"
    " iptables-nft -I FORWARD -i docker1 -j DROP;"
    " iptables-legacy -D FORWARD 1; iptables-legacy -A FORWARD -j NATNS-FORWARD",
    "iptables": "iptables-legacy -t nat -F NATNS-POSTROUTING;"
    " iptables-legacy -I NATNS-FORWARD -j DROP; iptables-nft -F FORWARD",
}


@pytest.mark.parametrize("name", list(TAMPERING))
def test_alterations_are_named_and_mended(name: str, transit: None) -> None:
    sh(FOREIGN["iptables-nft"])
    sh(FOREIGN["iptables-legacy"])
    host.ensure(HOST_POLICY, name)
    sh(TAMPERING[name])
    found = host.differences(HOST_POLICY, name)
    assert len(found) >= 3
    host.ensure(HOST_POLICY, name)
    assert host.differences(HOST_POLICY, name) == ()
    host.ensure(host.HostPolicy(), name)
    assert "NATNS" not in state()
    assert "natns" not in state()


@pytest.mark.parametrize("name", ["nftables", "iptables"])
@pytest.mark.parametrize("drop", ["iptables-nft", "iptables-legacy"])
def test_twins_where_bridged_frames_are_filtered(name: str, drop: str, world: None) -> None:
    """bridge-nf-call-iptables=1, FORWARD drops, and a NAT rule that would hit private frames."""
    switch = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if not switch.exists():
        pytest.skip("this kernel has no br_netfilter")
    switch.write_text("1")
    nat = firewall.named(name)
    for letter in NAT:
        nat.apply(f"nat-{letter}", ruleset(policy(letter)))
    sh(FOREIGN[drop])
    sh("iptables-legacy -t raw -S; iptables-legacy -S")
    sh(f"{drop} -t nat -A POSTROUTING -s 10.0.0.0/24 -j SNAT --to-source 10.0.0.77")
    with serving("server"):
        assert ignored(SERVER, "guest-a", socket.SOCK_STREAM)
    wanted = host.HostPolicy(
        private=(host.Private("virbr10"), host.Private("virbr11")),
        provider=tuple(host.Provider("br0", IPv4Address(address)) for address in NAT.values()),
        bridge_nf=True,
    )
    before = state()
    host.ensure(wanted, name)
    assert host.differences(wanted, name) == ()
    with serving("server"), serving("nat-a", 53), Capture("nat-a", "virbr10") as inner:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            for letter, address in NAT.items():
                assert seen_by(SERVER, f"guest-{letter}", kind, source=40005) == address
        assert seen_by(GATEWAY, "guest-a", socket.SOCK_DGRAM, 53) == GUEST
        assert "10.0.0.77" not in {packet.source for packet in inner.packets()}
    assert GUEST not in sh("conntrack -L 2>/dev/null", check=False)
    assert switch.read_text().strip() == "1"
    host.remove()
    assert state() == before
