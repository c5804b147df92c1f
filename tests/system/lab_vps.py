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
from types import TracebackType
from typing import Self

from lab_base import natns, run, wait_for
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


class Vps:
    """The world; ``ipv6`` False for a provider without it, ``serving`` for one with servers."""

    def __init__(self, *, ipv6: bool = True, configured: bool = True, serving: bool = True) -> None:
        self.ipv6 = ipv6
        run("ip", "netns", "add", NAMESPACE)
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
        run("ip", "link", "add", NIC, "address", MAC, "type", "veth",
            "peer", "name", PORT, "netns", NAMESPACE)  # fmt: skip
        provider("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        provider("ip", "link", "set", "lo", "up")
        provider("ip", "link", "add", SWITCH, "type", "bridge", "stp_state", "0")
        provider("ip", "link", "set", SWITCH, "addrgenmode", "none", "up")
        provider("ip", "link", "set", PORT, "master", SWITCH, "up")
        provider("bridge", "link", "set", "dev", PORT, "learning", "off", "locked", "on")
        provider("bridge", "fdb", "replace", MAC, "dev", PORT, "master", "static")
        provider("ip", "address", "add", f"{GATEWAY}/24", "dev", SWITCH)
        provider("ip", "address", "add", f"{INTERNET}/32", "dev", "lo")
        provider("ip", "address", "add", f"{GATEWAY6}/64", "dev", SWITCH, "nodad")
        provider("ip", "address", "add", f"{INTERNET6}/128", "dev", "lo", "nodad")
        if self.ipv6:
            provider("ip", "route", "add", "2001:db8:1::/64", "dev", SWITCH)

    def configure(self) -> None:
        """Give the NIC its addresses and routes, as an administrator would."""
        run("ip", "link", "set", NIC, "up")
        run("ip", "address", "add", f"{ADDRESS}/24", "dev", NIC)
        run("ip", "route", "add", "default", "via", GATEWAY)
        if self.ipv6:
            run("ip", "address", "add", f"{ADDRESS6}/64", "dev", NIC, "nodad")
            run("ip", "route", "add", "default", "via", GATEWAY6, "dev", NIC)

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    def down(self) -> None:
        """Remove everything again, a router that a failed test left up as well."""
        if list(STATE.glob("*.json")):
            natns("router", "down", "wan", "--force", check=False)
        for server in getattr(self, "servers", []):
            server.close()
        run("ip", "link", "del", NIC, check=False)
        run("ip", "netns", "del", NAMESPACE, check=False)
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
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with entered(namespace):
        client = socket.socket(family, socket.SOCK_STREAM)
    client.settimeout(5.0)
    client.connect((address, port))
    client.recv(200)
    return client
