# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports that programs of the host itself listen on.

A forward of an upstream of kind "host" listens on the host's own addresses: it
must not take the port of its sshd away.  Source: proc(5).
"""

import struct
from collections.abc import Iterable, Iterator
from functools import cache
from ipaddress import ip_address
from pathlib import Path

from libvirt_natns.addresses import Address
from libvirt_natns.errors import ConflictError
from libvirt_natns.kernel import processes
from libvirt_natns.model.publication import Forward, PortProtocol

PORTS = Path("/proc/thread-self/net")
"""The files of the calling thread's namespace; /proc/net has those of the main thread's."""

TCP_LISTEN = "0A"
UDP_UNCONNECTED = "07"


Listener = tuple[Address, int]
"""An address and a port on which a program listens; 0.0.0.0 and :: are all addresses."""


def listeners(proto: PortProtocol) -> set[Listener]:
    """Return the listeners of the calling thread's namespace that take any client."""
    return {listener for listener, _ in _sockets(proto)}


def of_process(pid: int, proto: PortProtocol) -> set[Listener]:
    """Return the listeners of a process in the calling thread's namespace."""
    mine = set(processes.descriptors(pid).values())
    return {listener for listener, inode in _sockets(proto) if f"socket:[{inode}]" in mine}


def _sockets(proto: PortProtocol) -> Iterator[tuple[Listener, str]]:
    """Yield the listening sockets of the calling thread's namespace, each with its inode."""
    state = TCP_LISTEN if proto == "tcp" else UDP_UNCONNECTED
    for name in (proto, f"{proto}6"):
        try:
            lines = (PORTS / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 3 and fields[3] == state:
                address, _, port = fields[1].rpartition(":")
                inode = fields[9] if len(fields) > 9 else ""
                yield (address_of(address), int(port, 16)), inode


def address_of(digits: str) -> Address:
    """Return an address that the kernel shows as words in the machine's byte order."""
    words = [int(digits[start : start + 8], 16) for start in range(0, len(digits), 8)]
    address = ip_address(struct.pack(f"={len(words)}I", *words))
    return getattr(address, "ipv4_mapped", None) or address


def listening(proto: PortProtocol) -> set[int]:
    """Return the ports on which a program listens, on any address."""
    return {port for _, port in listeners(proto)}


def taken(found: Iterable[Listener], address: Address) -> set[int]:
    """Return the ports that a forward on an address would take away from listeners.

    A forward on all addresses takes them from each listener of its family.  A program that
    listens on all of IPv6's addresses listens in IPv4 as well, unless it asked not to.
    """
    return {
        port
        for listens, port in found
        if (
            listens.version == address.version
            and (listens == address or listens.is_unspecified or address.is_unspecified)
        )
        or (listens.version == 6 and listens.is_unspecified)
    }


def check_free(forwards: Iterable[Forward]) -> None:
    """Refuse forwards that would take a port away from a program of the host.

    Raises ConflictError.
    """
    # Where there are many connections, the kernel takes milliseconds to list them.
    known = cache(listeners)
    for forward in forwards:
        _check_free(forward, taken(known(forward.proto), forward.address))


def _check_free(forward: Forward, listened: set[int]) -> None:
    lost = listened & set(range(forward.first, forward.last + 1))
    if lost:
        raise ConflictError(
            f"{forward.owner_name}: a program of the host listens on {forward.proto}"
            f" port {min(lost)}",
            "choose another port, or start='auto'",
        )
