# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small world of namespaces without libvirt, and packets that cross it.

The "host" is a network namespace too: each world has a fresh one, so whatever is
done to the host's rules goes with it.  Needs root and a /run/netns of its own.

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
from pathlib import Path

import pytest
from lab_base import Closing, ip

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[2]))

from libvirt_natns.addresses import network_of, parsed
from libvirt_natns.engine.plan.sysctls import SYSCTLS
from libvirt_natns.kernel import netns
from libvirt_natns.model.publication import Forward, PortProtocol

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
ETHERTYPE = 0x0800
STREAM, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
KINDS = (STREAM, DATAGRAM)
PORTS = (22, 23, 80, 2222, 7000, 7001, 7002, 8000, 8001, 8002, 8003, 40000)
"""On which every guest and the server answer, in TCP and UDP."""


SYSCTL = Path("/proc/sys")
"""Below, the files of net are those of the namespace that the thread is in."""


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
    inside(node, "; ".join(("set -e", *commands)))


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
    ip(f"netns add {name}")
    stack.callback(ip, f"netns del {name}")
    with netns.entered(name):
        (SYSCTL / "net/ipv6/conf/all/disable_ipv6").write_text("1")
    ip("link set lo up", namespace=name)


def patch(bridge: str, port: str, target: str, link: str, address: str, mac: str = "") -> None:
    """A veth pair from a bridge of the host into a node."""
    hardware = f"address {mac}" if mac else ""
    ip(
        f"link add {port} type veth peer name {link} {hardware} netns {target}",
        f"link set {port} master {bridge} up",
    )
    ip(f"address add {address} dev {link}", f"link set {link} up", namespace=target)


@contextmanager
def small_world() -> Iterator[ExitStack]:
    """A fresh host with the nodes above; what the stack is given ends with it."""
    with own_network(), ExitStack() as stack:
        (SYSCTL / "net/ipv6/conf/all/disable_ipv6").write_text("1")
        bridges = ("br0", "virbr10", "virbr11")
        ip("link set lo up", *(f"link add {name} up type bridge" for name in bridges))
        for name in ("server", "neighbour", "far", "nat-a", "nat-b", "guest-a", "guest-b"):
            node(stack, name)
        patch("br0", "p-server", "server", "eth0", f"{SERVER}/24")
        patch("br0", "p-neighbour", "neighbour", "eth0", f"{NEIGHBOUR}/24")
        ip(
            "link add eth1 type veth peer name eth0 netns far",
            "address add 203.0.113.1/24 dev eth1",
            "link set eth1 up",
            namespace="server",
        )
        in_node("server", "sysctl -qw net.ipv4.ip_forward=1")
        ip(
            f"address add {FAR}/24 dev eth0",
            "link set eth0 up",
            "route add default via 203.0.113.1",
            namespace="far",
        )
        for letter, bridge in (("a", "virbr10"), ("b", "virbr11")):
            patch(bridge, f"p-in-{letter}", f"nat-{letter}", bridge, f"{GATEWAY}/24")
            patch("br0", f"p-up-{letter}", f"nat-{letter}", "upstream", f"{NAT[letter]}/24")
            in_node(
                f"nat-{letter}",
                f"ip route add default via {SERVER}",
                "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0",
            )
            patch(bridge, f"p-{letter}", f"guest-{letter}", "eth0", f"{GUEST}/24", "52:54:00:0:0:5")
            ip(f"route add default via {GATEWAY}", namespace=f"guest-{letter}")
        yield stack


# -- packets -------------------------------------------------------------------


def opened(
    node: str | None,
    kind: int,
    address: str = "",
    port: int = 0,
    patience: float = SOON,
) -> socket.socket:
    """A bound socket; of IPv6 where the address is, be it "::"."""
    with netns.entered(node):
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if ":" in address:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    made.settimeout(patience)
    made.bind((address, port))
    return made


@contextmanager
def serving(node: str | None, port: int = PORT, address: str = "") -> Iterator[None]:
    """TCP and UDP services that answer with the address they saw."""
    with (
        opened(node, socket.SOCK_STREAM, address, port) as tcp,
        opened(node, socket.SOCK_DGRAM, address, port) as udp,
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
    guest: str | None,
    kind: int,
    port: int = PORT,
    source: int = 0,
    patience: float = SOON,
    address: str = "",
) -> str:
    """The address that a service at ``target`` sees when ``guest`` asks it."""
    address = address or ("::" if ":" in target else "")
    with opened(guest, kind, address, source, patience) as client:
        client.connect((target, port))
        if kind == socket.SOCK_DGRAM:
            client.send(b"?")
        return client.recv(64).decode()


def ignored(target: str, client: str | None, kind: int, port: int = PORT) -> bool:
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
    echo = summed(b"", struct.pack("!BBHHH", 8, 0, 0, 77, 1), 2)
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


class Capture(Closing):
    """All IPv4 packets that pass one interface of a node, in or out."""

    def __init__(self, node: str | None, link: str) -> None:
        with netns.entered(node):
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))
            self.socket.bind((link, 0x0003))
        self.socket.settimeout(QUIET)

    def down(self) -> None:
        self.socket.close()

    def packets(self) -> list[Packet]:
        """What has passed, once nothing has for a while."""
        found = []
        try:
            while True:
                data, address = self.socket.recvfrom(65535)
                packet = self.parse(address[1], data)
                if packet:
                    found.append(packet)
        except TimeoutError:
            return found

    def parse(self, ethertype: int, data: bytes) -> Packet | None:
        """Return the packet, if it is one to look at."""
        # Bridges ask for multicast groups now and then.
        if ethertype != ETHERTYPE or data[9] == socket.IPPROTO_IGMP:
            return None
        source, target = (socket.inet_ntoa(data[at : at + 4]) for at in (12, 16))
        return Packet(source, target, data[9], data[(data[0] & 15) * 4 :])


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def summed(pseudo: bytes, message: bytes, at: int) -> bytes:
    """Return a message with its checksum at an offset, over the pseudo header as well."""
    return message[:at] + struct.pack("!H", checksum(pseudo + message)) + message[at + 2 :]


def ip_packet(source: str, target: str, protocol: int, payload: bytes, ttl: int = 64) -> bytes:
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    pseudo = ends + struct.pack("!BBH", 0, protocol, len(payload))
    if protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        payload = summed(pseudo, payload, 16 if protocol == socket.IPPROTO_TCP else 6)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, ttl, protocol, 0) + ends
    return summed(b"", header, 10) + payload


def tcp(flags: int, source: int = 4444, target: int = PORT) -> bytes:
    return struct.pack("!HHIIBBHHH", source, target, 7, 7, 0x50, flags, 1024, 0, 0)


def udp(source: int, target: int, data: bytes = b"forged") -> bytes:
    return struct.pack("!HHHH", source, target, 8 + len(data), 0) + data


def crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def sctp_init(source: int, target: int, *, answer_to: int = 0) -> bytes:
    """An INIT, or the INIT ACK to one that bore this tag."""
    chunk = struct.pack("!BBHIIHHI", 2 if answer_to else 1, 0, 20, 77, 65535, 1, 1, 1)
    packet = struct.pack("!HHII", source, target, answer_to, 0) + chunk
    return packet[:8] + struct.pack("<I", crc32c(packet)) + packet[12:]


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


def mac(node: str | None, link: str) -> bytes:
    text = inside(node, f"ip -br link show {link}").split()[2]
    return bytes.fromhex(text.replace(":", ""))


# -- who answers -----------------------------------------------------------------


@contextmanager
def answering(
    *nodes: str | None, ports: tuple[int, ...] = PORTS, address: str = ""
) -> Iterator[None]:
    """Services in several nodes that say "node:port saw client"; then they talk on."""
    with ExitStack() as stack:
        listeners: dict[socket.socket, str] = {}
        for name in nodes:
            for port in ports:
                for kind in KINDS:
                    made = stack.enter_context(opened(name, kind, address, port))
                    listeners[made] = f"{name or 'host'}:{port}"
                    if kind == STREAM:
                        made.listen(32)
        done = threading.Event()
        thread = threading.Thread(target=_answer, args=(listeners, done))
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _answer(listeners: dict[socket.socket, str], done: threading.Event) -> None:
    connections: dict[socket.socket, str] = {}
    with ExitStack() as stack:
        while not done.is_set():
            for ready in select.select([*listeners, *connections], [], [], 0.05)[0]:
                if ready in connections:
                    _echo(ready, connections)
                elif ready.type == STREAM:
                    connection, peer = ready.accept()
                    stack.enter_context(connection)
                    connections[connection] = f"{listeners[ready]} saw {peer[0]}"
                    _echo(connection, connections, ask=False)
                else:
                    _, peer = ready.recvfrom(2048)
                    ready.sendto(f"{listeners[ready]} saw {peer[0]}".encode(), peer)


def _echo(
    connection: socket.socket, connections: dict[socket.socket, str], ask: bool = True
) -> None:
    try:
        if ask and not connection.recv(2048):
            raise ConnectionError
        connection.sendall(connections[connection].encode())
    except OSError:
        del connections[connection]


def asked(client: str | None, target: str, port: int, kind: int, address: str = "") -> str:
    """What the service says that ``client`` reaches at ``target``, from an address of its own."""
    with opened(client, kind, address or ("::" if ":" in target else "")) as question:
        question.connect((target, port))
        return again(question) if kind == DATAGRAM else question.recv(64).decode()


def again(question: socket.socket) -> str:
    """What the service says on a connection, or an association, that exists."""
    question.send(b"?")
    return question.recv(64).decode()


Target = tuple[str, int, int]


def silent(client: str | None, *targets: Target) -> list[Target]:
    """Those of the targets that answer within a while; a refusal counts as an answer."""
    with ExitStack() as stack:
        questions = {}
        for target, port, kind in targets:
            question = stack.enter_context(opened(client, kind, "::" if ":" in target else ""))
            question.setblocking(False)
            question.connect_ex((target, port))
            if kind == DATAGRAM:
                question.send(b"?")
            questions[question] = (target, port, kind)
        time.sleep(QUIET)
        streams = [question for question in questions if question.type == STREAM]
        answered = select.select(questions, streams, [], 0)
        return [questions[question] for question in {*answered[0], *answered[1]}]


def datagram_refused(client: str, target: str, port: int, address: str) -> bool:
    """True if the target refuses ``client``.

    The kernel limits the rate of ICMP errors, so a question without an answer is asked again.
    """
    for _ in range(3):
        try:
            asked(client, target, port, DATAGRAM, address)
        except ConnectionRefusedError:
            return True
        except TimeoutError:
            continue
        return False
    return False


def closed(client: str | None, target: str, port: int, kind: int) -> bool:
    """Whether it is refused at once."""
    start = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        asked(client, target, port, kind)
    return time.monotonic() - start < SOON / 2


# -- rules -----------------------------------------------------------------------


def harden(name: str) -> None:
    """The settings that a real namespace has."""
    for key, value in SYSCTLS:
        if "ipv6" not in key:
            in_node(name, f"sysctl -qw {key.replace('/', '.')}={value}")
    in_node(name, "for f in /proc/sys/net/ipv4/conf/*/send_redirects; do echo 0 >$f; done")


def forward(
    proto: PortProtocol,
    ports: str,
    to: str = "",
    *,
    address: str = NAT["a"],
    target: str = GUEST,
    sources: tuple[str, ...] = (),
) -> Forward:
    """ "8000-8003" onto "7000-7003" or onto "80"; without ``to``, onto the same."""
    first, last = _span(ports)
    return Forward(
        owner="",
        owner_name="",
        network="",
        proto=proto,
        address=parsed(address),
        first=first,
        last=last,
        target=parsed(target),
        to=_span(to or ports)[0],
        to_last=_span(to or ports)[1],
        sources=tuple(map(network_of, sources)),
    )


def _span(ports: str) -> tuple[int, int]:
    first, _, last = ports.partition("-")
    return int(first), int(last or first)


FOREIGN = {
    "none": "",
    "iptables-nft": "iptables-nft -P FORWARD DROP; iptables-nft -t nat -A POSTROUTING"
    " -s 172.17.0.0/16 -j MASQUERADE; iptables-nft -A FORWARD -i docker0 -j ACCEPT",
    "iptables-legacy": "iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -i docker0"
    " -m conntrack --ctstate NEW -m comment --comment 'two words' -j ACCEPT",
    "nft": "nft 'table inet filter { chain forward { type filter hook forward priority 5;"
    ' policy drop; iifname "docker0" accept; }; }\'',
    "firewalld": "nft 'table inet firewalld { chain filter_FWD_public {"
    " reject with icmpx admin-prohibited; }; chain filter_FORWARD_ZONES {"
    " goto filter_FWD_public; }; chain filter_FORWARD { type filter hook forward"
    " priority 10; ct state established,related accept; ct state invalid drop;"
    " jump filter_FORWARD_ZONES; reject with icmpx admin-prohibited; }; }'",
}


def state() -> str:
    legacy = "".join(
        sh(f"iptables-legacy-save -t {table}")
        for table in sorted(Path("/proc/thread-self/net/ip_tables_names").read_text().split())
    )
    kept = [line for line in legacy.splitlines() if not line.startswith("#")]
    return sh("nft -s list ruleset") + "\n".join(line.split(" [")[0] for line in kept)
