# SPDX-License-Identifier: LGPL-2.1-or-later
"""DNS relays of the host that no network needs any more."""

from libvirt_natns.daemons import dns_relay
from libvirt_natns.engine.host.needs import Needs


def unneeded(needs: Needs) -> list[str]:
    """Return the bridges with a relay, or its files, that no network asks."""
    needed = {segment.bridge for segment in needs.transits if segment.has_relay}
    return [bridge for bridge in dns_relay.present() if bridge not in needed]


def left_over(bridge: str) -> str:
    """Return the difference of a relay that no network asks, in words."""
    return f"the DNS relay on {bridge} is left over"
