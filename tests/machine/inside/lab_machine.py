# SPDX-License-Identifier: LGPL-2.1-or-later
"""The world of an emulated machine: its networks, its outside, and what it says of itself.

lab, twin    isolated networks with one subnet, whose guests have one MAC, too
public       a third one, on the upstream wan, the router namespace
box          a domain in lab
provider     the namespace of the outside: gateway, a server behind it, clients
"""

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lab_base
import pytest
from lab import (
    ECHO_PORT,
    INTERNET,
    FastGuest,
    Host,
    LabError,
    RealGuest,
    Result,
    define_network,
    isolated,
    run,
    virsh,
    wait_for,
)
from lab_base import Closing
from lab_servers import WEB_PORT, Server
from lab_vps import ADDRESS, GATEWAY, greeting
from meant import MEANT

from libvirt_natns.kernel.netns import entered

OUTSIDE = "provider"
NIC = "ens3"
MAC = "52:54:00:00:00:05"
GUEST = "10.0.0.5"
BOX_MAC = "52:54:00:00:00:06"
LAB_PORT, TWIN_PORT, PUBLIC_PORT, BOX_PORT = 2201, 2202, 2203, 8080
SERVICE = "libvirt-natns.service"
LONG = 30.0
"""Seconds of waiting, times the lab's patience."""
PACKET = 10.0
"""Seconds of waiting for the answer to a packet, which the kernel sends again meanwhile."""
NAT = '<natns:nat xmlns:natns="urn:libvirt-natns:1">{}</natns:nat>'
DEBIAN = int(re.search(r'VERSION_ID="(\d+)', Path("/etc/os-release").read_text()).group(1))  # type: ignore[union-attr]
LIBVIRT = "libvirtd.service"
"""One daemon for all: Debian has no packages of the modular daemons, in release 13 neither."""


def network(name: str, bridge: str, port: int, more: str = "") -> str:
    """An isolated network with a guest at GUEST, whose port 22 is published at ``port``."""
    forward = (
        f'<natns:portForward guestAddress="{GUEST}">'
        f'<natns:range start="{port}" to="22"/></natns:portForward>'
    )
    hosts = [Host(MAC, GUEST, "web")]
    return isolated(name, bridge, hosts=hosts, metadata=NAT.format(more + forward))


LAB = network("lab", "virbr10", LAB_PORT)
TWIN = network("twin", "virbr11", TWIN_PORT)
PUBLIC = network("public", "virbr12", PUBLIC_PORT, '<natns:upstream name="wan"/>')


class Outside(Closing):
    """Servers of the outside that tell a client which address they see."""

    def __init__(self) -> None:
        self.echo = Server(OUTSIDE, "tcp", ECHO_PORT, address=INTERNET)
        self.web = Server(OUTSIDE, "http", WEB_PORT, address=INTERNET, name="outside")

    def down(self) -> None:
        self.echo.close()
        self.web.close()


@contextmanager
def guest_in(bridge: str, name: str) -> Iterator[FastGuest]:
    """A guest with MAC and a server on port 22; it has a lease if the network answers."""
    with FastGuest(bridge, MAC, name) as guest:
        guest.dhcp(timeout=30)
        guest.serve("tcp", 22)
        yield guest


def box() -> RealGuest:
    """The domain: it fetches a page outside, and its own page is published."""
    forward = f'<natns:portForward><natns:range start="{BOX_PORT}" to="80"/></natns:portForward>'
    url = f"http://{INTERNET}/name"
    return RealGuest("box", "lab", BOX_MAC, url=url, metadata=NAT.format(forward))


# --- packets


def reaches_out(guest: FastGuest, source: str = ADDRESS) -> bool:
    """True if a guest reaches the server outside, which sees ``source``."""
    return greeting(INTERNET, ECHO_PORT, guest.name, timeout=PACKET) == source


def answers(port: int, address: str = ADDRESS) -> bool:
    """True if a published port answers a client outside, and tells that client's address."""
    return greeting(address, port, OUTSIDE, timeout=PACKET) == GATEWAY


def box_answers() -> bool:
    """True if the domain's page is served outside."""
    page = run("curl", "-sS", "--max-time", "30", f"http://{ADDRESS}:{BOX_PORT}/",
               namespace=OUTSIDE, check=False).stdout  # fmt: skip
    return page == "this is box\n"


def start(xml: str) -> None:
    """Define a network, start it, and have it start with the machine."""
    define_network(xml)
    name = xml.partition("<name>")[2].partition("</name>")[0]
    virsh("net-start", name)
    virsh("net-autostart", name)


def passes(guest: FastGuest, port: int = LAB_PORT) -> None:
    """Wait until packets of a guest pass in both directions.  Raises LabError with the state."""
    try:
        wait_for(lambda: reaches_out(guest), LONG, f"{guest.name} to reach the outside", 0.5)
        wait_for(lambda: answers(port), LONG, f"port {port} to answer", 0.5)
    except LabError as error:
        state = virt_natns("status", check=False)
        raise LabError(f"{error}\n{state.stdout}{state.stderr}") from error


@contextmanager
def stream(port: int) -> Iterator[socket.socket]:
    """A connection from outside to a published port; it must carry to the end of the body."""
    with entered(OUTSIDE):
        connection = socket.socket()
    with connection:
        connection.settimeout(LONG * lab_base.patience)
        connection.connect((ADDRESS, port))
        assert connection.recv(100)
        assert_carries(connection)
        yield connection
        assert_carries(connection)


def assert_carries(connection: socket.socket) -> None:
    connection.sendall(b"still there?")
    assert connection.recv(100) == b"still there?"


# --- the machine

PACKAGES = Path("/srv")
QUIET = {"DEBIAN_FRONTEND": "noninteractive"}


def apt_get(*words: str) -> None:
    """Run apt-get, which finds all that it needs in the machine."""
    run("apt-get", "-q", "--yes", *words, env=QUIET)


def install() -> None:
    """Install the package of this checkout, or install it once more."""
    package = next(PACKAGES.glob("libvirt-natns_*.deb"))
    apt_get("install", "--reinstall", os.fspath(package))


def virt_natns(*arguments: str, check: bool = True) -> Result:
    """Run the installed command."""
    return run("virt-natns", *arguments, check=check, timeout=LONG)


def systemctl(*arguments: str, check: bool = True) -> str:
    """Run systemctl; returns its output."""
    return run("systemctl", *arguments, check=check, timeout=LONG).stdout.strip()


def is_active(unit: str) -> bool:
    return systemctl("is-active", unit, check=False) == "active"


def main_pid(unit: str) -> str:
    return systemctl("show", "-P", "MainPID", unit)


def healthy(*networks: str) -> bool:
    """True if these networks run, and status finds nothing wrong with them or the host."""
    document = json.loads(virt_natns("status", "--json", check=False).stdout or "{}")
    health = {each["network"]: each["health"] for each in document.get("networks", [])}
    fine = all(health.get(name) == "ok" for name in networks)
    return fine and not document["host"] and not document["stops"]


def settled(*networks: str) -> None:
    """Wait until networks are healthy.  Raises LabError with what status says."""
    try:
        wait_for(lambda: healthy(*networks), LONG, "networks to be healthy", 1.0)
    except LabError as error:
        state = virt_natns("status", check=False)
        raise LabError(f"{error}\n{state.stdout}{state.stderr}") from error


@contextmanager
def running(*units: str) -> Iterator[None]:
    """Services that run while the body does."""
    systemctl("start", *units)
    try:
        yield
    finally:
        systemctl("stop", *units)


def said(expression: str, *options: str) -> list[dict[str, Any]]:
    """Entries of this boot's journal with a message that matches."""
    lines = run("journalctl", "-b", "-o", "json", *options).stdout.splitlines()
    entries = [json.loads(line) for line in lines]
    return [each for each in entries if re.search(expression, message(each))]


def message(entry: dict[str, Any]) -> str:
    """Return the text of an entry; a text with odd bytes is a list of numbers."""
    text = entry.get("MESSAGE") or ""
    return bytes(text).decode(errors="replace") if isinstance(text, list) else str(text)


def denials() -> list[str]:
    """What AppArmor has denied in this boot."""
    return sorted({_event(message(each)) for each in said('apparmor="DENIED"', "-k")})


def _event(text: str) -> str:
    return re.sub(r"audit\([\d.:]+\)|\b(pid|type)=\d+", "", text)


def warnings() -> list[str]:
    """Warnings and errors of this boot that are not meant, each with its program."""
    found = []
    for entry in said("", "-p", "warning"):
        program = entry.get("SYSLOG_IDENTIFIER") or entry.get("_COMM") or "?"
        line = f"{program}: {message(entry)}"
        if not any(re.search(each.pattern, line) for each in MEANT):
            found.append(line)
    return found


def failed_units() -> list[str]:
    listed = systemctl("list-units", "--failed", "--plain", "--no-legend")
    return [line.split()[0] for line in listed.splitlines()]


def assert_nothing_wrong() -> None:
    """The machine's own record of this boot: no denial, failed unit or unmeant warning."""
    found = [f"denied: {line}" for line in denials()]
    found += [f"failed: {unit}" for unit in failed_units()]
    found += sorted(set(warnings()))
    if found:
        pytest.fail("\n".join(found), pytrace=False)
