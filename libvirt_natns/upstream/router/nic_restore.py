# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes a NIC what a capture says, in whichever namespace the NIC is.

``put`` converges: run again, also after a kill in its middle, it changes only what differs.
"""

import os
from socket import AF_INET6

from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import boot_clock, netlink
from libvirt_natns.kernel.netlink import (
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Socket,
)
from libvirt_natns.upstream.router import (
    link_settings,
    nic_link,
    nic_routes,
    nic_snapshot,
)
from libvirt_natns.upstream.router.nic_addresses import oldest_first
from libvirt_natns.upstream.router.nic_link import ListedLink, attempt
from libvirt_natns.upstream.router.nic_routes import NicRoute
from libvirt_natns.upstream.router.nic_snapshot import FLAGS, Capture

ACCEPT_DAD = "ipv6/conf/accept_dad"

PASSES = 16
"""How often refused routes are tried again: a route may need another route first."""


def put(namespace: str | None, wanted: Capture, *, alone: bool = True) -> None:
    """Make a NIC what a capture says.  Raises KernelError.

    ``alone``: addresses, neighbours and routes that the capture lacks are removed.
    """
    elapsed = max(0.0, boot_clock.now() - wanted.at)
    with nic_link.session(namespace) as sock:
        link = nic_link.require(sock, namespace, wanted.name)
        settings = dict(wanted.settings)
        # The addresses were in use all the time, so neighbours need not be asked about them.
        link_settings.write(namespace, wanted.name, {**settings, ACCEPT_DAD: "0"})
        _put_link(sock, link, wanted)
        if alone:
            _remove_others(sock, link.index, wanted)
        _put_addresses(sock, link.index, wanted, elapsed)
        _put_neighbours(sock, link.index, wanted)
        _put_routes(sock, link.index, wanted, elapsed)
        _put_rules(sock, wanted)
        link_settings.write(namespace, wanted.name, settings)


def _put_link(sock: Socket, link: ListedLink, wanted: Capture) -> None:
    numbers = (
        (netlink.IFLA_MTU, wanted.mtu),
        (netlink.IFLA_TXQLEN, wanted.queue),
        (netlink.IFLA_GROUP, wanted.group),
    )
    changed = [
        netlink.u32(kind, number)
        for kind, number in numbers
        if link.attributes.number(kind) != number
    ]
    if link.mac != wanted.mac:
        changed.append((netlink.IFLA_ADDRESS, bytes.fromhex(wanted.mac.replace(":", ""))))
    if link.alias != wanted.alias:
        changed.append((netlink.IFLA_IFALIAS, os.fsencode(wanted.alias)))
    if changed or link.flags & FLAGS != wanted.flags:
        body = netlink.change_link(link.index, changed, wanted.flags, FLAGS)
        sock.change(netlink.RTM_NEWLINK, body)
    nic_link.change_altnames(sock, link, wanted.altnames)


def _remove_others(sock: Socket, link: int, wanted: Capture) -> None:
    """Remove addresses, neighbours and routes that are not part of a capture."""
    addresses = {address.body for address in wanted.addresses}
    for address in list(nic_snapshot.addresses_of(sock, link)):
        # The kernel makes link-local IPv6 addresses by itself.
        by_kernel = address.family == AF_INET6 and not address.is_global
        if address.body not in addresses and not by_kernel:
            attempt(sock, netlink.RTM_DELADDR, address.request(link, 0))
    neighbours = {neighbour.body for neighbour in wanted.neighbours}
    for neighbour in list(nic_snapshot.neighbours_of(sock, link)):
        if neighbour.body not in neighbours:
            attempt(sock, netlink.RTM_DELNEIGH, neighbour.request(link))
    # Routes come last: the kernel has removed some with the addresses.
    routes = {route.body for route in wanted.routes}
    for route in list(nic_snapshot.routes_of(sock, link)):
        # A route that expires was advertised by a router, and is newer than the capture.
        if route.body not in routes and route.lasts and not route.is_link_local:
            attempt(sock, netlink.RTM_DELROUTE, route.request(link))


def _put_addresses(sock: Socket, link: int, wanted: Capture, elapsed: float) -> None:
    present = {address.body for address in nic_snapshot.addresses_of(sock, link)}
    for address in oldest_first(wanted.addresses):
        if address.body not in present:
            request = address.request(link, elapsed)
            attempt(sock, netlink.RTM_NEWADDR, request, NLM_F_CREATE | NLM_F_EXCL)


def _put_neighbours(sock: Socket, link: int, wanted: Capture) -> None:
    present = {neighbour.body for neighbour in nic_snapshot.neighbours_of(sock, link)}
    for neighbour in wanted.neighbours:
        if neighbour.body not in present:
            # Not EXCL: the kernel may have found the neighbour out by itself.
            request = neighbour.request(link)
            sock.change(netlink.RTM_NEWNEIGH, request, NLM_F_CREATE | NLM_F_REPLACE)


def _put_routes(sock: Socket, link: int, wanted: Capture, elapsed: float) -> None:
    present = {route.body for route in nic_snapshot.routes_of(sock, link)}
    foreign = {nic_routes.parse(body, -1).body for body in nic_snapshot.route_bodies(sock)}
    missing = [route for route in wanted.routes if route.body not in present]
    possible = _possible(sock, wanted) if wanted.foreign else ()
    missing += [route for route in possible if route.body not in foreign]
    _add_routes(sock, link, missing, elapsed)


def _possible(sock: Socket, wanted: Capture) -> list[NicRoute]:
    """Return the foreign routes with links that are still present, and up.

    Index and name must fit: another link may have the index by now.
    """
    names = dict(wanted.links)
    present = {
        link.index
        for link in nic_link.links(sock)
        if link.flags & netlink.IFF_UP and names.get(link.index, "") in ("", link.name)
    }
    return [route for route in wanted.foreign if route.links <= present]


def _add_routes(sock: Socket, link: int, missing: list[NicRoute], elapsed: float) -> None:
    problem: OSError | None = None
    for _ in range(PASSES):
        refused = []
        for route in missing:
            try:
                request = route.request(link, elapsed)
                attempt(sock, netlink.RTM_NEWROUTE, request, NLM_F_CREATE | NLM_F_APPEND)
            except OSError as error:
                problem = error
                refused.append(route)
        if not refused:
            return
        if len(refused) == len(missing):
            break
        missing = refused
    raise KernelError(f"the kernel refuses the {missing[0]}", str(problem)) from problem


def _put_rules(sock: Socket, wanted: Capture) -> None:
    tables = {route.table for route in wanted.routes}
    present = {rule.body for rule in nic_snapshot.rules_of(sock, wanted.name, tables)}
    for rule in wanted.rules:
        if rule.body not in present:
            flags = NLM_F_CREATE | NLM_F_EXCL
            attempt(sock, netlink.RTM_NEWRULE, bytes.fromhex(rule.body), flags)
