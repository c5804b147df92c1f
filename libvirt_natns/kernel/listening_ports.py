# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports that programs of the host itself listen on.

A forward of an upstream of kind "host" listens on the host's own addresses: it
must not take the port of its sshd away.  Source: proc(5).
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from libvirt_natns.errors import ConflictError
from libvirt_natns.model.publication import Forward, PortProtocol

PORTS = Path("/proc/thread-self/net")
"""The files of the calling thread's namespace; /proc/net has those of the main thread's."""

TCP_LISTEN = "0A"
UDP_UNCONNECTED = "07"


def listening(proto: PortProtocol) -> set[int]:
    """Return the ports of the thread's namespace on which a program listens for all clients."""
    state = TCP_LISTEN if proto == "tcp" else UDP_UNCONNECTED
    ports = set()
    for name in (proto, f"{proto}6"):
        try:
            lines = (PORTS / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 3 and fields[3] == state:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def check_free(forwards: Iterable[Forward]) -> None:
    """Refuse forwards that would take a port away from a program of the host.

    Raises ConflictError.
    """
    # Where there are many connections, the kernel takes milliseconds to list them.
    known = cache(listening)
    for forward in forwards:
        _check_free(forward, known(forward.proto))


def _check_free(forward: Forward, listened: set[int]) -> None:
    taken = listened & set(range(forward.first, forward.last + 1))
    if taken:
        raise ConflictError(
            f"{forward.owner_name}: a program of the host listens on {forward.proto}"
            f" port {min(taken)}",
            "choose another port, or start='auto'",
        )
