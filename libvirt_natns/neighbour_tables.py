# SPDX-License-Identifier: LGPL-2.1-or-later
"""The room in the kernel's neighbour tables, which all namespaces share.

A table has ``gc_thresh3`` entries at most, on the whole machine.  The rules of each
network limit how many a hostile guest adds, see ``firewall.limits``; the size is the
administrator's.
"""

from pathlib import Path

from libvirt_natns.addresses import Family
from libvirt_natns.firewall import limits

SIZES: dict[Family, Path] = {
    4: Path("/proc/sys/net/ipv4/neigh/default/gc_thresh3"),
    6: Path("/proc/sys/net/ipv6/neigh/default/gc_thresh3"),
}

KEPT = 5
"""Seconds for which the kernel gives up no new entry."""

PER_NETWORK = limits.BURST + KEPT * limits.RATE
"""Entries that one hostile guest can hold at one time by one way to make them."""


def examine(networks: int) -> str:
    """Say whether the tables have room for so many networks."""
    sizes = {path: size for path in SIZES.values() if (size := _size(path)) is not None}
    wanted = PER_NETWORK * max(networks, 1)
    small = [path for path, size in sizes.items() if size < wanted]
    if not small:
        return f"room for {networks} networks"
    rounded = 1 << (wanted - 1).bit_length()
    keys = " ".join(f"{key(path)}={rounded}" for path in small)
    least = min(sizes[path] for path in small)
    return (
        f"tight: {least} entries on this host, {networks} networks may take {wanted}:"
        f" sysctl -w {keys}"
    )


def key(path: Path) -> str:
    """The name that sysctl(8) has for a file below /proc/sys."""
    return ".".join(path.parts[3:])


def _size(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
