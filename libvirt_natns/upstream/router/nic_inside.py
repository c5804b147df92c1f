# SPDX-License-Identifier: LGPL-2.1-or-later
"""The NIC as it must be in its router namespace, derived from its capture in the host.

The host's own IPv6 addresses move to the patch between host and router; the NIC answers its
neighbours for them.
"""

from collections.abc import Iterable
from dataclasses import replace
from socket import AF_INET6

from libvirt_natns.kernel import netlink
from libvirt_natns.upstream.router import nic_addresses, nic_lease, nic_neighbours, nic_sources
from libvirt_natns.upstream.router.nic_addresses import NicAddress
from libvirt_natns.upstream.router.nic_snapshot import Capture
from libvirt_natns.upstream.router.target import Target

SETTINGS = {
    "ipv4/conf/forwarding": "1",
    "ipv4/conf/send_redirects": "0",
    "ipv6/conf/forwarding": "1",
    # An address of the host must not become an address of the router, too.
    "ipv6/conf/autoconf": "0",
    "ipv6/conf/proxy_ndp": "1",
    # By default the kernel lets a neighbour wait up to 0.8 s for an answer.
    "ipv6/neigh/proxy_delay": "0",
}
"""Settings of the NIC, see ``link_settings``."""


def inside(target: Target, before: Capture) -> Capture:
    """Return the NIC as it must be in its router namespace."""
    advertised = any(
        route.family == AF_INET6 and route.protocol == netlink.RTPROT_RA for route in before.routes
    ) or any(address.leased for address in before.ipv6)
    settings = {**SETTINGS, "ipv6/conf/accept_ra": "2" if advertised else "0"}
    wanted = without_host(before, target.addresses6, settings)
    if target.transit6:
        own6 = (nic_addresses.single(target.own6),) if target.own6 else ()
        wanted = replace(
            wanted,
            # For ndppd: each ndppd that ends would switch it off for the others.
            flags=wanted.flags | netlink.IFF_ALLMULTI,
            addresses=(*wanted.addresses, *own6),
        )
    if nic_sources.leads_leased(before):
        leased_first = sorted(wanted.addresses, key=lambda address: address not in _leased(before))
        wanted = replace(wanted, addresses=tuple(leased_first))
    return nic_lease.without_leased(wanted) if nic_lease.current(target) else wanted


def _leased(before: Capture) -> list[NicAddress]:
    return [address for address in before.ipv4 if address.leased]


def without_host(before: Capture, hosts: Iterable[str], settings: dict[str, str]) -> Capture:
    """Return a capture without the host's IPv6 addresses, for which the NIC answers instead.

    IPv6 addresses that stay do not expire: in the namespace, advertisements make no
    addresses, and so renew none.  Of ``settings``, those that the kernel has are set.
    """
    moved = set(hosts)
    present = {key for key, _ in before.settings}
    changed = {key: text for key, text in settings.items() if key in present}
    return replace(
        before,
        flags=before.flags | netlink.IFF_UP,
        settings=tuple(sorted((dict(before.settings) | changed).items())),
        addresses=tuple(
            address.for_good() if address.family == AF_INET6 else address
            for address in before.addresses
            if address.ip not in moved
        ),
        routes=tuple(
            route.without_source() if route.source in moved else route
            for route in before.routes
            # The kernel makes such a route with an address that is alone in its subnet.
            if route.destination.removesuffix("/128") not in moved
        ),
        foreign=(),
        links=(),
        neighbours=(*before.neighbours, *map(nic_neighbours.proxy, sorted(moved))),
    )
