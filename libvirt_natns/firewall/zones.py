# SPDX-License-Identifier: LGPL-2.1-or-later
"""Conntrack zones: a table of connections of its own for each private bridge.

Where bridged frames pass through the host's rules, connections of twins with equal addresses
and ports would be the same connection.  With a zone for each bridge they are different
connections, each with a state that libvirt's network filters can ask for.

The number of a zone begins with a checksum of the bridge's name.  A network that comes again
gets its number again.  Another network hardly ever gets a number that was in use: conntrack
entries of a deleted bridge live on for a while.
"""

import zlib
from collections.abc import Iterable, Mapping

FIRST, COUNT = 20000, 40000
"""Numbers are 16 bits wide.  Open vSwitch and OpenStack count from below."""


def preferred(bridge: str) -> int:
    """Return the zone that a bridge has unless another bridge has the zone."""
    return FIRST + zlib.crc32(bridge.encode()) % COUNT


def assigned(bridges: Iterable[str], taken: Mapping[str, int]) -> dict[str, int]:
    """Return a zone for each bridge, different from all others; zones in ``taken`` stay."""
    wanted = sorted(bridges)
    zones = {bridge: taken[bridge] for bridge in wanted if bridge in taken}
    used = set(taken.values())
    for bridge in wanted:
        if bridge not in zones:
            zone = preferred(bridge)
            while zone in used:
                zone = FIRST + (zone + 1 - FIRST) % COUNT
            zones[bridge] = zone
            used.add(zone)
    return zones
