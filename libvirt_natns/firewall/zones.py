# SPDX-License-Identifier: LGPL-2.1-or-later
"""Conntrack zones: a table of connections of its own for each private bridge.

Where bridged frames pass through the host's rules, twins with equal addresses and ports
would be the same connection.  In a zone of its own each of them is one, and has a state
that libvirt's network filters can ask for.

The number begins with a checksum of the bridge's name.  A network that comes again gets
its number again, and another network hardly ever gets one that was in use: entries of
a bridge that has gone live on for a while.
"""

import zlib
from collections.abc import Iterable, Mapping

FIRST, COUNT = 20000, 40000
"""Numbers are 16 bits wide.  Open vSwitch and OpenStack count from below."""


def preferred(bridge: str) -> int:
    """The zone that a bridge has unless another one has it."""
    return FIRST + zlib.crc32(bridge.encode()) % COUNT


def assigned(bridges: Iterable[str], taken: Mapping[str, int]) -> dict[str, int]:
    """A zone for each bridge, different from all others; those in ``taken`` stay as they are."""
    wanted = sorted(bridges)
    found = {bridge: taken[bridge] for bridge in wanted if bridge in taken}
    used = set(taken.values())
    for bridge in wanted:
        if bridge not in found:
            zone = preferred(bridge)
            while zone in used:
                zone = FIRST + (zone + 1 - FIRST) % COUNT
            found[bridge] = zone
            used.add(zone)
    return found
