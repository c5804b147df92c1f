# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts that libvirt has given up, as the kernel and /proc show them.

No hook tells of a start that fails after our `start` hook: libvirt deletes its bridge
and reports the error.  A hook must not ask libvirt.  So it looks at the bridge, and at
the age of libvirt's daemon: no start outlives its daemon.

A slow start that is taken for a failed one loses little: its `started` hook makes all
of it anew.
"""

import os
import socket
from pathlib import Path

from libvirt_natns.daemons import libvirtd
from libvirt_natns.daemons.libvirtd import LibvirtDaemon
from libvirt_natns.kernel.boot_clock import now
from libvirt_natns.state.networks import NetworkRecord

BRIDGE_LIMIT = 1.0
"""Seconds from the end of our `start` hook until libvirt has made its bridge.

It takes milliseconds; the rest is for a machine that is busy."""

PROCESSES = Path("/proc")


def is_given_up(record: NetworkRecord) -> bool:
    """True if the start that a record tells of cannot come to its `started` any more."""
    if not record.this_boot or record.state not in ("preparing", "starting"):
        return False
    if not record.unfinished or outlived_daemon(record):
        return True
    return record.state == "starting" and lacks_bridge(record)


def lacks_bridge(record: NetworkRecord, limit: float = BRIDGE_LIMIT) -> bool:
    """True if a start has had ``limit`` seconds for its bridge, and there is none."""
    return bool(record.bridge) and now() - record.since > limit and not has_link(record.bridge)


def may_be_given_up(record: NetworkRecord) -> bool:
    """True if the bridge is missing, but for so short a time that libvirt may just make it."""
    return record.state == "starting" and lacks_bridge(record, 0.0) and not is_given_up(record)


def has_link(name: str) -> bool:
    """True if the host has a link of that name."""
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def outlived_daemon(record: NetworkRecord) -> bool:
    """True if libvirt's daemon for networks was started after the record was made."""
    daemon = libvirtd.NETWORK.daemon()
    began = daemon and started_at(daemon)
    return bool(began and began > record.since)


def started_at(daemon: LibvirtDaemon) -> float | None:
    """Return when a daemon was started, in seconds since boot; None if it has ended."""
    try:
        fields = (PROCESSES / str(daemon.pid) / "stat").read_bytes().rpartition(b") ")[2].split()
    except OSError:
        return None
    # Field 22 of proc(5): clock ticks, rounded down.
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")
