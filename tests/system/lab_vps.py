# SPDX-License-Identifier: LGPL-2.1-or-later
"""A rented server: the sandbox's host with one NIC, ens3, at a provider who trusts one MAC.

The provider is the namespace "provider": a switch that drops what comes from ens3
under any other MAC than the NIC's own, a router on it (IPv4 and IPv6), and beyond that one
a client and servers under addresses of their own.
"""

import json
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lab_base import Closing, ip, natns, run, wait_for
from lab_nodes import INTERNET, Capture
from lab_servers import ECHO_PORT, Server
from lab_snapshot import Snapshot, snapshot

from libvirt_natns.kernel.netns import entered

NAMESPACE = "provider"
STATE = Path("/var/lib/libvirt-natns/routers")
NIC = "ens3"
MAC = "52:54:00:00:03:10"
ADDRESS = "198.51.100.10"
GATEWAY = "198.51.100.1"
ADDRESS6 = "2001:db8:1::10"
GATEWAY6 = "fe80::1"
INTERNET6 = "2001:db8:ffff::80"
SWITCH = "switch"
PORT = "port"
HOST_LINK = "natns-wan"
ROUTER = "natns-router-wan"

CONFIG = f'''[upstreams.wan]
kind = "router"
nic = "{NIC}"
'''


def provider(*command: str, check: bool = True) -> str:
    """Run a command at the provider's."""
    return run(*command, namespace=NAMESPACE, check=check).stdout


class Vps(Closing):
    """The world; ``ipv6`` False for a provider without it, ``serving`` for one with servers."""

    def __init__(self, *, ipv6: bool = True, configured: bool = True, serving: bool = True) -> None:
        self.ipv6 = ipv6
        try:
            self._switch()
            if configured:
                self.configure()
            self.servers = [
                Server(NAMESPACE, "tcp", ECHO_PORT, address=address)
                for address in ((INTERNET, INTERNET6) if serving else ())
            ]
        except Exception:
            self.down()
            raise

    def _switch(self) -> None:
        ip(
            f"netns add {NAMESPACE}",
            f"link add {NIC} address {MAC} type veth peer name {PORT} netns {NAMESPACE}",
        )
        provider("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        ip(
            "link set lo up",
            f"link add {SWITCH} type bridge stp_state 0",
            f"link set {SWITCH} addrgenmode none up",
            f"link set {PORT} master {SWITCH} up",
            namespace=NAMESPACE,
        )
        provider("bridge", "link", "set", "dev", PORT, "learning", "off", "locked", "on")
        provider("bridge", "fdb", "replace", MAC, "dev", PORT, "master", "static")
        ip(
            f"address add {GATEWAY}/24 dev {SWITCH}",
            f"address add {INTERNET}/32 dev lo",
            f"address add {GATEWAY6}/64 dev {SWITCH} nodad",
            f"address add {INTERNET6}/128 dev lo nodad",
            *([f"route add 2001:db8:1::/64 dev {SWITCH}"] if self.ipv6 else []),
            namespace=NAMESPACE,
        )

    def configure(self) -> None:
        """Give the NIC its addresses and routes, as an administrator would."""
        ip(
            f"link set {NIC} up",
            f"address add {ADDRESS}/24 dev {NIC}",
            f"route add default via {GATEWAY}",
        )
        if self.ipv6:
            ip(
                f"address add {ADDRESS6}/64 dev {NIC} nodad",
                f"route add default via {GATEWAY6} dev {NIC}",
            )

    def sources(self, capture: Capture) -> set[str]:
        """The MAC addresses that sent what was captured at the provider's port."""
        return {line.split()[0] for line in capture.lines()} - {provider_mac()}

    @contextmanager
    def sniff(self) -> Iterator[Capture]:
        """Everything that leaves the NIC while the body runs."""
        capture = Capture(NAMESPACE, PORT, "inbound")
        try:
            yield capture
        finally:
            capture.close()

    def down(self) -> None:
        """Remove everything again, a router that a failed test left up as well."""
        if list(STATE.glob("*.json")):
            natns("router", "down", "wan", "--force", check=False)
        for server in getattr(self, "servers", []):
            server.close()
        ip(f"link del {NIC}", f"netns del {NAMESPACE}", check=False)
        wait_for(lambda: not Path("/sys/class/net", NIC).exists())
        shutil.rmtree(STATE, ignore_errors=True)


def state_of_host() -> Snapshot:
    """All of the host, and all of its NIC, that a router must put back as it was."""
    shown = {
        "link": ("-d", "link", "show", NIC),
        "addresses of the NIC": ("address", "show", NIC),
        "neighbours": ("neighbour", "show", "nud", "permanent"),
        "proxies": ("neighbour", "show", "proxy"),
        "proxies in IPv6": ("-6", "neighbour", "show", "proxy"),
    }
    sections = {name: _lines(*command) for name, command in shown.items()}
    sections["settings"] = tuple(_settings())
    sections["resolv.conf"] = _resolv_conf()
    whole = snapshot().sections
    # What routers are confirmed is remembered, as leases are.
    files = tuple(line for line in whole["files"] if not line.startswith(str(STATE)))
    return Snapshot({**whole, "files": files, **sections})


def _lines(*command: str) -> tuple[str, ...]:
    text = run("ip", "-o", *command, check=False).stdout
    # Lifetimes go on, and interfaces are numbered anew.
    text = re.sub(r"(valid_lft|preferred_lft) \d+sec", r"\1 some", text)
    text = re.sub(r"@if\d+|link-netnsid \d+| state \w+| tentative", "", text, flags=re.M)
    return tuple(sorted(" ".join(line.split()) for line in text.splitlines()))


def _settings() -> Iterator[str]:
    for kind in ("ipv4/conf", "ipv6/conf", "ipv4/neigh", "ipv6/neigh"):
        for file in sorted(Path("/proc/sys/net", kind, NIC).iterdir()):
            with suppress(OSError):
                yield f"{kind}/{file.name} = {file.read_text().strip()}"


def _resolv_conf() -> tuple[str, ...]:
    file = Path("/etc/resolv.conf")
    if file.is_symlink():
        return (f"-> {file.readlink()}",)
    return (oct(file.stat().st_mode), *file.read_text().splitlines()) if file.exists() else ()


def provider_mac() -> str:
    links = json.loads(provider("ip", "-j", "link", "show", SWITCH))
    return str(links[0]["address"])


def greeting(
    address: str, port: int, namespace: str | None = None, *, source: str = "", timeout: float = 3.0
) -> str:
    """Whom a TCP echo server says that it sees; "" where it is not reached in time."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with entered(namespace):
        client = socket.socket(family, socket.SOCK_STREAM)
    with client:
        client.settimeout(timeout)
        try:
            if source:
                client.bind((source, 0))
            client.connect((address, port))
            return client.recv(200).decode().rsplit(":", 1)[0]
        except OSError:
            return ""


def connection(address: str, port: int, namespace: str | None = None) -> socket.socket:
    """A connection to an echo server, past its greeting; the caller closes it."""
    client = dialled(address, port, namespace)
    client.recv(200)
    return client


def dialled(address: str, port: int, namespace: str | None = None) -> socket.socket:
    """A connection to a server; the caller closes it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with entered(namespace):
        client = socket.socket(family, socket.SOCK_STREAM)
    client.settimeout(5.0)
    client.connect((address, port))
    return client
