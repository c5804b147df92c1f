# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's part of an upstream of kind "host": its transit bridge, as data."""

from collections.abc import Iterable

from libvirt_natns import names
from libvirt_natns.addresses import Interface, on_link
from libvirt_natns.engine.operations.addressing import Addresses
from libvirt_natns.engine.operations.links import Sysctl, TransitBridge
from libvirt_natns.engine.operations.operation import Plan
from libvirt_natns.model.upstream import Upstream


def transit(upstream: Upstream, forwarding: Iterable[str]) -> Plan:
    """Return the host's own part of a completed upstream of kind "host".

    ``forwarding`` names the interfaces that must forward IPv4 besides the bridge: the host's
    own routes to the outside use them.  IPv6 forwarding concerns the whole host, and is not
    decided here.
    """
    assert upstream.bridge and upstream.subnet and upstream.gateway
    gateways: list[Interface] = [on_link(upstream.gateway, upstream.subnet.prefixlen)]
    if upstream.subnet6 and upstream.gateway6:
        gateways.append(on_link(upstream.gateway6, upstream.subnet6.prefixlen))
    keys = [f"net/ipv4/conf/{link}/forwarding" for link in (upstream.bridge, *forwarding)]
    return (
        TransitBridge(
            upstream.bridge,
            f"natns-transit-{upstream.name}",
            names.mac(upstream.name, "transit"),
        ),
        *([] if len(gateways) < 2 else _transit6(upstream.bridge)),
        Addresses(None, upstream.bridge, tuple(gateways)),
        *(Sysctl(None, key, "1") for key in keys),
        # Forwards answer on 127.0.0.1, too.  The rules keep the bridge's other side from
        # using that.
        Sysctl(None, f"net/ipv4/conf/{upstream.bridge}/route_localnet", "1"),
    )


def _transit6(bridge: str) -> Iterable[Sysctl]:
    """Yield settings of a transit bridge that speaks IPv6 and accepts no advertisement.

    The bridge's addresses are unique.  Duplicate address detection begins with the first
    port, and would hold the addresses back from the first network's first packets.
    """
    for key, value in (
        ("accept_dad", "0"),
        ("accept_ra", "0"),
        ("accept_redirects", "0"),
        ("disable_ipv6", "0"),
    ):
        yield Sysctl(None, f"net/ipv6/conf/{bridge}/{key}", value)
