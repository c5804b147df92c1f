# SPDX-License-Identifier: LGPL-2.1-or-later
"""The DHCP leases of guests, as libvirt's lease helper writes them to a file for each bridge."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libvirt_natns.daemons.libvirt_dnsmasq import LIBVIRT_DIRECTORY

LeaseEntry = dict[str, Any]
"""A lease by the helper's keys: "ip-address", "mac-address" and "expiry-time" among them."""


@dataclass(frozen=True, slots=True)
class GuestLease:
    """A guest's DHCP lease.

    ``mac`` is "" where the helper does not learn it, as of some clients of DHCPv6.  ``expires`` is
    in seconds since the epoch; None for a lease without end.  ``hostname`` is the guest's word.
    ``guest`` is the name of the guest in libvirt; None where no guest has that MAC address.
    """

    mac: str
    address: str
    hostname: str | None
    expires: int | None
    guest: str | None = None


def leases(bridge: str) -> list[GuestLease]:
    """Return the leases of a bridge that have not expired."""
    return [
        GuestLease(
            mac=_text(entry, "mac-address").lower(),
            address=_text(entry, "ip-address"),
            hostname=_text(entry, "hostname") or None,
            expires=int(entry.get("expiry-time", 0)) or None,
        )
        for entry in current(bridge)
    ]


def _text(entry: LeaseEntry, key: str) -> str:
    value = entry.get(key, "")
    return value if isinstance(value, str) else ""


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
