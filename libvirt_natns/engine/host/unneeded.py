# SPDX-License-Identifier: LGPL-2.1-or-later
"""Recorded parts of the host that no network needs any more: told, and removed."""

from collections.abc import Callable, Iterable

from libvirt_natns.addresses import network_of
from libvirt_natns.daemons import dns_relay
from libvirt_natns.engine.host import ipv6_forwarding as host_ipv6
from libvirt_natns.engine.host import relays
from libvirt_natns.engine.host.forwarding import forwarding_of
from libvirt_natns.engine.host.libvirt_status import active_networks
from libvirt_natns.engine.host.needs import Needs
from libvirt_natns.engine.host.policy import GLOBAL_FORWARDING
from libvirt_natns.engine.host.record import HostRecord, save, stray_routes, unneeded_bridges
from libvirt_natns.kernel.session import Kernel

Announcing = Callable[[str], None]
"""Is called ahead of each change, which it is told in words."""


def differences(needs: Needs, record: HostRecord) -> list[str]:
    """Return the parts that are left over, in words."""
    return [
        *(relays.left_over(bridge) for bridge in relays.unneeded(needs)),
        *(f"bridge {bridge} is left over" for bridge in unneeded_bridges(needs, record)),
        *(f"the route to {route[0]} is left over" for route in stray_routes(needs, record)),
    ]


def remove(kernel: Kernel, needs: Needs, record: HostRecord, announce: Announcing) -> list[str]:
    """Remove relays, bridges, forwarding, routes and settings; return what was left over."""
    silent = relays.unneeded(needs)
    for bridge in silent:
        announce(f"end the DNS relay on {bridge}")
        dns_relay.stop(bridge)
    bridges = unneeded_bridges(needs, record)
    for bridge in bridges:
        announce(f"delete the bridge {bridge}")
        kernel.host.links.delete(bridge)
        kernel.host.policy_rules.replace_marked(bridge, ())
        record.bridges.remove(bridge)
    if not needs.transits and record.forwarding:
        if kernel.host.sysctls.get(GLOBAL_FORWARDING) == "0":
            for link in record.forwarding:
                kernel.host.sysctls.set(forwarding_of(link), "0")
        record.forwarding = []
    stray = stray_routes(needs, record)
    remove_routes(kernel, stray, record, announce)
    if not needs.routes6 and record.settings:
        announce("stop forwarding IPv6")
        if not any(each.forwards6 for each in active_networks()):
            host_ipv6.put_back(kernel, record.settings)
        record.settings = {}
    lines = [relays.left_over(bridge) for bridge in silent]
    lines += [f"bridge {bridge} was left over" for bridge in bridges]
    return lines + [f"the route to {route[0]} was left over" for route in stray]


def remove_routes(
    kernel: Kernel, routes: Iterable[list[str]], record: HostRecord, announce: Announcing
) -> None:
    """Remove routes as the record has them, and note each one's removal."""
    for route in routes:
        destination, _, link = route
        announce(f"remove the route to {destination}")
        kernel.host.routes.remove(network_of(destination), link)
        if route in record.routes:
            record.routes.remove(route)
            save(record)
