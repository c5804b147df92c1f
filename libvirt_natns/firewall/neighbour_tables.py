# SPDX-License-Identifier: LGPL-2.1-or-later
"""The room in the kernel's neighbour tables, which all namespaces share.

A table has ``gc_thresh3`` entries at most, on the whole machine.  The rules of each
network limit the entries that a hostile guest adds, see ``limits``.  The administrator
sets the size.
"""

from pathlib import Path
from typing import NamedTuple

from libvirt_natns.addresses import Family
from libvirt_natns.firewall import limits

SIZES: dict[Family, Path] = {
    4: Path("/proc/sys/net/ipv4/neigh/default/gc_thresh3"),
    6: Path("/proc/sys/net/ipv6/neigh/default/gc_thresh3"),
}

KEPT = 5
"""Seconds for which the kernel keeps each new entry."""

REACHABLE = 50
"""Seconds for which the kernel keeps the entry of a neighbour that answered, at most."""

WAYS = 4
"""Rules with a rate of their own for packets that make entries.

IPv4: forwarded packets by source, the same by destination, packets for the namespace, and
ARP requests.  IPv6 has neighbour solicitations in place of ARP requests, and also echo
requests from outside.  They fit in the set that only IPv4 has.
"""

PER_NETWORK = (
    2 * limits.KNOWN_SIZE
    + WAYS * (limits.BURST + KEPT * limits.RATE)
    + (limits.BURST + REACHABLE * limits.RATE)
)
"""Entries that new flows and ARP of a network can hold at one time by all ways together.

IPv4 has two sets of known addresses, of packets and of ARP.  The last line is replies of
guests that answer for every address.  Established flows are not counted.
"""


class Room(NamedTuple):
    """A finding: ``tight`` is a warning."""

    tight: bool
    said: str


def examine(networks: int) -> Room:
    """Return whether the tables have room for so many networks, as a line for people."""
    sizes = {path: size for path in SIZES.values() if (size := _size(path)) is not None}
    wanted = PER_NETWORK * networks
    small = [path for path, size in sizes.items() if size < wanted]
    if not small:
        return Room(tight=False, said=f"room for {networks} networks")
    rounded = 1 << (wanted - 1).bit_length()
    keys = " ".join(f"{key(path)}={rounded}" for path in small)
    least = min(sizes[path] for path in small)
    return Room(
        tight=True,
        said=f"{least} entries on this host, and {networks} networks may need {wanted}:"
        f" sysctl -w {keys}",
    )


def key(path: Path) -> str:
    """Return sysctl(8)'s name of a file below /proc/sys."""
    return ".".join(path.parts[3:])


def _size(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
