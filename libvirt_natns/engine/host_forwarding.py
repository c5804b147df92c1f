# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tell whether the host forwards for a network of others what our rules still drop.

libvirt switches forwarding on when a network with ``<forward>`` starts.  Rules of ours may
drop new flows between other links then, as the host did not forward before.

The standard library's barest part, for hooks.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from libvirt_natns.documents.xml_sniff import Glance

HOST_FILE = "/run/libvirt-natns/host.json"
IP_FORWARD = "/proc/sys/net/ipv4/ip_forward"


def is_altered(seen: "Glance") -> bool:
    """True if a network that has started, or ended, makes the host's rules wrong."""
    if not seen.forwards:
        return False
    record = _read(HOST_FILE)
    if not record:
        return False
    import json

    try:
        ways = json.loads(record)["ways"]
        closed, closed6 = bool(ways.get("closed")), bool(ways.get("closed6"))
    except (ValueError, LookupError, TypeError, AttributeError):
        return False
    if closed and _read(IP_FORWARD).strip() == b"1":
        return True
    return closed6 and seen.forwards6


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""
