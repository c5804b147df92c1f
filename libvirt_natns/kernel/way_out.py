# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's own answer by which link a packet leaves, rules and all tables included."""

import socket
import struct
from contextlib import suppress

from libvirt_natns.addresses import Address, Family
from libvirt_natns.kernel import netlink
from libvirt_natns.kernel.netlink import Attrs, Socket

RTA_SRC, RTA_IIF = 2, 3
_SOCKET_FAMILIES: dict[Family, int] = {4: socket.AF_INET, 6: socket.AF_INET6}


def link_towards(destination: Address, source: Address | None = None, iif: str = "") -> str | None:
    """Return the link by which a packet leaves the caller's namespace; None without a route.

    With ``iif`` and ``source``, the packet is forwarded, and comes from that link.
    """
    attributes = [(netlink.RTA_DST, destination.packed)]
    with suppress(OSError):
        if iif and source is not None:
            index = struct.pack("=I", socket.if_nametoindex(iif))
            attributes += [(RTA_SRC, source.packed), (RTA_IIF, index)]
        return _ask(destination, attributes)
    return None


def _ask(destination: Address, attributes: list[tuple[int, bytes]]) -> str | None:
    family: Family = 4 if destination.version == 4 else 6
    length = destination.max_prefixlen
    is_forwarded = len(attributes) > 1
    header = struct.pack(
        "=BBBBBBBBI", _SOCKET_FAMILIES[family], length, length * is_forwarded, *[0] * 6
    )
    with Socket() as session:
        body = session.get(netlink.RTM_GETROUTE, header + netlink.pack(attributes))
    index = Attrs.parse(body or b"", 12).number(netlink.RTA_OIF) if body else None
    return socket.if_indextoname(index) if index else None
