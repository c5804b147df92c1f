# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's active networks, by its status files: a hook cannot ask libvirt."""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from libvirt_natns.documents import xml_sniff

LIBVIRT_STATUS = Path("/run/libvirt/network")
LIBVIRT_NETWORKS = Path("/etc/libvirt/qemu/networks")

STATUS_LIMIT = 5.0
"""Seconds in which libvirt writes a network's status file, after the end of its hooks."""

STATUS_PAUSE = 0.02


def active_networks() -> Iterator[xml_sniff.Glance]:
    """Yield a cheap look at each active network of libvirt."""
    for file in LIBVIRT_STATUS.glob("*.xml"):
        with suppress(OSError):
            yield xml_sniff.at_network(file.read_bytes())


def forwards(network: str) -> bool:
    """True if libvirt leads a network outside: it has a ``<forward>`` of any mode.

    The definition counts for a network that is not active.  False for an unknown network.
    """
    for directory in (LIBVIRT_STATUS, LIBVIRT_NETWORKS):
        with suppress(OSError):
            return xml_sniff.at_network((directory / f"{network}.xml").read_bytes()).forwards
    return False


def isolated_bridges() -> set[str]:
    """Return bridges of libvirt's active networks without ``<forward>``, which lead nowhere."""
    return {seen.bridge for seen in active_networks() if not seen.forwards} - {""}


def await_status(network: str) -> None:
    """Wait for the status file of a network that starts, for ``STATUS_LIMIT`` seconds at most.

    libvirt writes it after the last hook.
    """
    end = time.monotonic() + STATUS_LIMIT
    while not (LIBVIRT_STATUS / f"{network}.xml").exists() and time.monotonic() < end:
        time.sleep(STATUS_PAUSE)
