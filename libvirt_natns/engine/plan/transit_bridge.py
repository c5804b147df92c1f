# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's part of an upstream of kind "host": its transit bridge, as data."""

from collections.abc import Iterable

from libvirt_natns import names
from libvirt_natns.addresses import Interface, on_link
from libvirt_natns.engine.operations.addresses import Addresses
from libvirt_natns.engine.operations.links import Sysctl, TransitBridge
from libvirt_natns.engine.operations.operation import Plan
from libvirt_natns.model import Upstream


def transit(upstream: Upstream, forwarding: Iterable[str]) -> Plan:
    """What the host itself needs for a completed upstream of kind "host".

    ``forwarding`` names the interfaces that must forward IPv4 besides the bridge:
    those that the host's own routes to the outside use.  In IPv6 forwarding is
    a matter of the whole host, and not decided here.
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
        # So that forwards answer on 127.0.0.1, too; the rules keep the bridge's
        # other side from using it.
        Sysctl(None, f"net/ipv4/conf/{upstream.bridge}/route_localnet", "1"),
    )


def _transit6(bridge: str) -> Iterable[Sysctl]:
    """A transit bridge that speaks IPv6 and believes nobody on it.

    Nobody else has its addresses.  Looked for all the same, they would not be there yet
    when the first network's first packets come: the look begins with the first port.
    """
    for key, value in (
        ("accept_dad", "0"),
        ("accept_ra", "0"),
        ("accept_redirects", "0"),
        ("disable_ipv6", "0"),
    ):
        yield Sysctl(None, f"net/ipv6/conf/{bridge}/{key}", value)
