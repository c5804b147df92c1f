# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make the kernel look up the MAC address on the way to an IPv4 address."""

import socket
import time
from contextlib import closing, suppress
from ipaddress import IPv4Address
from pathlib import Path

from libvirt_natns.errors import NatnsError
from libvirt_natns.kernel import netns

LIMIT = 0.3
"""Seconds in which the MAC address must be known."""

POLL = 0.01
"""Seconds between two looks at the ARP table."""

DISCARD = 9


def resolve(namespace: str, address: IPv4Address) -> None:
    """Have the kernel learn the MAC address of a station, or of the router on the way to it.

    A packet that leaves just before its link is removed would wait for the ARP answer, and
    get lost.  So the caller resolves the address first.
    """
    deadline = time.monotonic() + LIMIT
    with suppress(OSError, NatnsError), netns.entered(namespace):
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as link:
            link.sendto(b"", (str(address), DISCARD))
        while _is_asked_for() and time.monotonic() < deadline:
            time.sleep(POLL)


def _is_asked_for() -> bool:
    """True if an ARP request has no answer yet, in the thread's namespace."""
    lines = Path("/proc/thread-self/net/arp").read_text(errors="surrogateescape").splitlines()[1:]
    return any(line.split()[2:3] == ["0x0"] for line in lines)
