# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ports by which the session of the calling process came in from outside.

sshd(8) names its connection in SSH_CONNECTION.  sudo(8) removes that variable, so the variables
of all parent processes are read.  A parent may also hold the connection itself, as sshd does.
A connection counts if a program listens on its port: otherwise the parent has made it.
mosh-server(1) talks by UDP, and has no connection.

Known limit: a session through a tunnel shows the tunnel's address, not the port of its packets.
Source: proc(5), ssh(1).
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from libvirt_natns.addresses import Address
from libvirt_natns.kernel.listening_ports import PORTS, address_of, listening
from libvirt_natns.model.publication import PortProtocol

PROCESSES = Path("/proc")
VARIABLE = b"SSH_CONNECTION"
TCP_ESTABLISHED = "01"
BY_UDP = "mosh-server"
FIRST_PROCESS = 1
"""The first process holds sockets for others, and starts no session."""


@dataclass(frozen=True, slots=True)
class Entrance:
    """A port of this machine by which a session came in; 0.0.0.0 and :: are all addresses."""

    proto: PortProtocol
    address: Address
    port: int


def entrances() -> set[Entrance]:
    """Return the ports by which the caller's session came in; none for a console."""
    found = set(_stated(os.environb.get(VARIABLE, b"")))
    for pid in _parents(os.getpid()):
        found.update(_named(pid))
        found.update(_held(pid))
    return found


def _parents(pid: int) -> Iterator[int]:
    """Yield a process and its parents, without the first process of the machine."""
    while pid > FIRST_PROCESS:
        yield pid
        try:
            stat = (PROCESSES / str(pid) / "stat").read_bytes()
        except OSError:
            return
        # The name of the program comes before, in parentheses, and may have any character.
        pid = int(stat.rpartition(b")")[2].split()[1])


def _named(pid: int) -> Iterator[Entrance]:
    """Yield the entrance that the variable of a process names, as the process started."""
    with suppress(OSError):
        for variable in (PROCESSES / str(pid) / "environ").read_bytes().split(b"\0"):
            name, _, value = variable.partition(b"=")
            if name == VARIABLE:
                yield from _stated(value)


def _stated(value: bytes) -> Iterator[Entrance]:
    """Yield the entrance that a value names: client and server, each with a port."""
    with suppress(ValueError):
        *_, address, port = value.decode().split()
        yield Entrance("tcp", _plain(address), int(port))


def _plain(text: str) -> Address:
    address = ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def _held(pid: int) -> Iterator[Entrance]:
    """Yield the entrances of the connections that a process holds open."""
    inodes = _sockets(pid)
    if not inodes:
        return
    listened = listening("tcp")
    for state, entrance, inode in _listed("tcp"):
        if inode in inodes and state == TCP_ESTABLISHED and entrance.port in listened:
            yield entrance
    with suppress(OSError):
        if (PROCESSES / str(pid) / "comm").read_text().strip() == BY_UDP:
            yield from (entrance for _, entrance, inode in _listed("udp") if inode in inodes)


def _sockets(pid: int) -> set[str]:
    """Return the inodes of a process's sockets."""
    inodes = set()
    with suppress(OSError):
        for descriptor in (PROCESSES / str(pid) / "fd").iterdir():
            with suppress(OSError):
                target = os.fspath(descriptor.readlink())
                if target.startswith("socket:["):
                    inodes.add(target.removeprefix("socket:[").removesuffix("]"))
    return inodes


def _listed(proto: PortProtocol) -> Iterator[tuple[str, Entrance, str]]:
    """Yield state, local end and inode of each socket of the calling thread's namespace."""
    for name in (proto, f"{proto}6"):
        lines: list[str] = []
        with suppress(OSError):
            lines = (PORTS / name).read_text().splitlines()[1:]
        for line in lines:
            fields = line.split()
            address, _, port = fields[1].rpartition(":")
            yield fields[3], Entrance(proto, address_of(address), int(port, 16)), fields[9]
