# SPDX-License-Identifier: LGPL-2.1-or-later
"""The DHCP leases of guests, as libvirt's lease helper writes them to a file for each bridge."""

import json
import time
from pathlib import Path
from typing import Any

from libvirt_natns.daemons.libvirt_dnsmasq import LIBVIRT_DIRECTORY

LeaseEntry = dict[str, Any]
"""A lease by the helper's keys: "ip-address", "mac-address" and "expiry-time" among them."""


def current(bridge: str) -> list[LeaseEntry]:
    """Return the leases of a bridge that have not expired; none without a readable file."""
    file = Path(LIBVIRT_DIRECTORY, f"{bridge}.status")
    try:
        entries = json.loads(file.read_text() or "[]")
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, dict) and _holds(entry)]


def _holds(entry: LeaseEntry) -> bool:
    """True if a lease has not expired; False for a time that is no number."""
    # An infinite lease expires at 0.
    expiry = entry.get("expiry-time", 0)
    return isinstance(expiry, (int, float)) and (expiry == 0 or expiry > time.time())
