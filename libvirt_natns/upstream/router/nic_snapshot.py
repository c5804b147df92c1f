# SPDX-License-Identifier: LGPL-2.1-or-later
"""A capture of a NIC: the settings, addresses, routes, neighbours and rules in the kernel.

A link that moves to another namespace keeps its hardware's settings and loses the rest.  The
kernel sets the link down, and forgets its addresses, routes, neighbours and settings below
/proc/sys/net.  ``capture`` reads all of them, and ``nic_restore`` makes them again.

Known limits: a capture lacks neighbours that the kernel has found out, counters, and multicast
groups that programs have joined.  It lacks traffic control, too; ``nic_checks.fault_of``
refuses a NIC that has some.
"""

import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from socket import AF_INET, AF_INET6
from typing import Any

from libvirt_natns.kernel import boot_clock, netlink
from libvirt_natns.kernel.netlink import Socket
from libvirt_natns.upstream.router import (
    link_settings,
    nic_addresses,
    nic_link,
    nic_neighbours,
    nic_routes,
    nic_rules,
)
from libvirt_natns.upstream.router.nic_addresses import NicAddress
from libvirt_natns.upstream.router.nic_neighbours import NicNeighbour
from libvirt_natns.upstream.router.nic_routes import NicRoute
from libvirt_natns.upstream.router.nic_rules import NicRule

FLAGS = (
    netlink.IFF_UP
    | netlink.IFF_NOARP
    | netlink.IFF_PROMISC
    | netlink.IFF_ALLMULTI
    | netlink.IFF_MULTICAST
)
"""Flags of a link that an administrator can set."""


@dataclass(frozen=True, slots=True)
class Capture:
    """A NIC, as it was ``at`` a time (seconds since boot).

    ``index`` is its interface index, which rules and programs may know; ``permanent`` is
    the MAC address that the hardware came with, "" where the kernel knows none.
    ``settings`` by directory and key, see ``link_settings``.  ``foreign`` routes lead over
    other links, with an address of the NIC as their packets' source; they go with the address.
    ``links`` are these other links, by index and name.
    """

    name: str
    index: int
    mac: str
    mtu: int
    flags: int
    queue: int
    group: int
    alias: str
    altnames: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    addresses: tuple[NicAddress, ...] = ()
    routes: tuple[NicRoute, ...] = ()
    foreign: tuple[NicRoute, ...] = ()
    neighbours: tuple[NicNeighbour, ...] = ()
    rules: tuple[NicRule, ...] = ()
    at: float = 0.0
    links: tuple[tuple[int, str], ...] = ()
    permanent: str = ""

    @property
    def ipv4(self) -> tuple[NicAddress, ...]:
        """IPv4 addresses that stations beyond the segment can use."""
        return tuple(a for a in self.addresses if a.family == AF_INET and a.is_global)

    @property
    def ipv6(self) -> tuple[NicAddress, ...]:
        """IPv6 addresses that stations beyond the segment can use."""
        return tuple(a for a in self.addresses if a.family == AF_INET6 and a.is_global)

    @property
    def is_bare(self) -> bool:
        """True if the NIC has no address that stations beyond the segment can use."""
        return not (self.ipv4 or self.ipv6)


# -- files -------------------------------------------------------------------


def as_object(capture: Capture) -> dict[str, Any]:
    """Return a capture for a JSON file."""
    return asdict(capture)


def from_object(data: dict[str, Any]) -> Capture:
    """Return a capture from an object of ``as_object``, also of another version.

    Fields that this version does not have are left out.  Raises TypeError, KeyError,
    AttributeError or ValueError for any other content.
    """
    makers: dict[str, type[Any]] = {
        "addresses": NicAddress, "routes": NicRoute, "foreign": NicRoute,
        "neighbours": NicNeighbour, "rules": NicRule,
    }  # fmt: skip
    made = known_fields(Capture, data)
    for key, make in makers.items():
        made[key] = tuple(make(**known_fields(make, listed)) for listed in data[key])
        for listed in made[key]:
            bytes.fromhex(listed.body)
    made["altnames"] = tuple(data["altnames"])
    # Captures of earlier versions have none.
    made["links"] = tuple((index, name) for index, name in data.get("links", ()))
    made["settings"] = tuple((key, text) for key, text in data["settings"])
    return Capture(**made)


def known_fields(kind: type, data: dict[str, Any]) -> dict[str, Any]:
    """Return the members of a JSON object that are fields of a record."""
    return {field.name: data[field.name] for field in fields(kind) if field.name in data}


# -- looking -----------------------------------------------------------------


def capture(namespace: str | None, name: str) -> Capture:
    """Return all of a NIC.  Raises KernelError where it is missing."""
    with nic_link.session(namespace) as sock:
        return _capture(sock, namespace, name)


def _capture(sock: Socket, namespace: str | None, name: str) -> Capture:
    link = nic_link.require(sock, namespace, name)
    addresses = tuple(addresses_of(sock, link.index))
    routes = tuple(routes_of(sock, link.index))
    foreign = tuple(_foreign(sock, link.index, {address.ip for address in addresses}))
    return Capture(
        name=name,
        index=link.index,
        mac=link.mac,
        permanent=link.permanent,
        mtu=link.attributes.number(netlink.IFLA_MTU) or 0,
        flags=link.flags & FLAGS,
        queue=link.attributes.number(netlink.IFLA_TXQLEN) or 0,
        group=link.attributes.number(netlink.IFLA_GROUP) or 0,
        alias=link.alias,
        altnames=link.altnames,
        settings=tuple(sorted(link_settings.read(namespace, name).items())),
        addresses=addresses,
        routes=routes,
        foreign=foreign,
        neighbours=tuple(neighbours_of(sock, link.index)),
        rules=tuple(rules_of(sock, name, {route.table for route in routes})),
        at=boot_clock.now(),
        links=tuple(sorted(_links_of(sock, foreign))),
    )


def addresses_of(sock: Socket, link: int) -> Iterator[NicAddress]:
    """Yield the addresses of a link."""
    for body in nic_link.dump(sock, netlink.RTM_GETADDR, bytes(8)):
        if struct.unpack_from("=I", body, 4)[0] == link:
            yield nic_addresses.parse(body)


def route_bodies(sock: Socket) -> Iterator[bytes]:
    """Yield the messages of all routes but those that the kernel makes with an address."""
    for family in (AF_INET, AF_INET6):
        for body in nic_link.dump(sock, netlink.RTM_GETROUTE, bytes([family]) + bytes(11)):
            # For a family that the kernel lacks, the kernel lists the others again.
            if body[0] == family and not nic_routes.is_by_kernel(body):
                yield body


def routes_of(sock: Socket, link: int) -> Iterator[NicRoute]:
    """Yield the routes that lead over a link."""
    for body in route_bodies(sock):
        if link in nic_routes.links_of(body):
            yield nic_routes.parse(body, link)


def _foreign(sock: Socket, link: int, addresses: set[str]) -> Iterator[NicRoute]:
    for body in route_bodies(sock):
        if link not in nic_routes.links_of(body):
            route = nic_routes.parse(body, -1)
            if route.source in addresses:
                yield route


def _links_of(sock: Socket, foreign: tuple[NicRoute, ...]) -> Iterator[tuple[int, str]]:
    indexes = {index for route in foreign for index in route.links}
    for link in nic_link.links(sock) if indexes else ():
        if link.index in indexes:
            yield link.index, link.name


def neighbours_of(sock: Socket, link: int) -> Iterator[NicNeighbour]:
    """Yield the static neighbours of a link, and the addresses that it answers for."""
    for flags in (0, netlink.NTF_PROXY):
        header = bytes(10) + bytes([flags]) + bytes(1)
        for body in nic_link.dump(sock, netlink.RTM_GETNEIGH, header):
            neighbour = nic_neighbours.parse(body)
            if neighbour and struct.unpack_from("=i", body, 4)[0] == link:
                yield neighbour


def rules_of(sock: Socket, name: str, tables: set[int]) -> Iterator[NicRule]:
    """Yield the rules that name a link, or choose one of its routing tables."""
    for family in (AF_INET, AF_INET6):
        for body in nic_link.dump(sock, netlink.RTM_GETRULE, bytes([family]) + bytes(11)):
            rule = nic_rules.parse(body)
            if rule.priority in nic_rules.DEFAULT_PRIORITIES:
                continue
            if rule.names(name) or rule.table in tables:
                yield rule
