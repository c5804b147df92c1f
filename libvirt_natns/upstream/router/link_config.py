# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses, routes and settings of a link that we configure ourselves.

Unlike the NIC's objects, these are compared by their values: an address by itself and its
prefix length, a route by its destination and gateway.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network
from socket import AF_INET, AF_INET6

from libvirt_natns.kernel import netlink
from libvirt_natns.kernel.netlink import NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE, Socket
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations.operation import ApplyContext, Operation
from libvirt_natns.upstream.router import link_settings, nic_link, nic_snapshot
from libvirt_natns.upstream.router.nic_addresses import FOREVER
from libvirt_natns.upstream.router.nic_routes import NicRoute
from libvirt_natns.upstream.router.nic_snapshot import Capture


@dataclass(frozen=True, slots=True)
class LinkConfig(Operation):
    """A link that is up, with its addresses and routes (destination, gateway).

    A route without a gateway leads to stations on the link.  ``settings`` as in ``Capture``.
    ``onlink``: gateways need not be in a subnet of the link.  ``alone``: all static routes
    but these are removed.  ``sources`` are addresses of packets, by the route's destination.
    New flows use ``deprecated`` addresses only if they ask for them.
    """

    namespace: str | None
    link: str
    addresses: tuple[str, ...]
    routes: tuple[tuple[str, str | None], ...]
    settings: tuple[tuple[str, str], ...]
    onlink: bool = False
    alone: bool = False
    sources: tuple[tuple[str, str], ...] = ()
    deprecated: tuple[str, ...] = ()

    def describe(self) -> str:
        where = f"{self.link} in {self.namespace or 'the host'}"
        sources = dict(self.sources)
        routes = (
            f"route {to}{_via(by)}{_from(sources.get(to))} on {where}" for to, by in self.routes
        )
        return "\n".join([f"address {', '.join(self.addresses) or 'none'} on {where}", *routes])

    def differs(self, kernel: Kernel) -> list[str]:
        return differences(self)

    def ensure(self, context: ApplyContext) -> None:
        configure(self)


def _via(gateway: str | None) -> str:
    return f" via {gateway}" if gateway else ""


def _from(source: str | None) -> str:
    return f" from {source}" if source else ""


def configure(wanted: LinkConfig) -> None:
    """Configure a link; a second call changes nothing.  Raises KernelError."""
    link_settings.write(wanted.namespace, wanted.link, dict(wanted.settings))
    with nic_link.session(wanted.namespace) as sock:
        link = nic_link.require(sock, wanted.namespace, wanted.link)
        if not link.flags & netlink.IFF_UP:
            body = netlink.change_link(link.index, (), netlink.IFF_UP, netlink.IFF_UP)
            sock.change(netlink.RTM_NEWLINK, body)
        for address in _oldest_first(wanted.addresses):
            request = _address(link.index, address, deprecated=address in wanted.deprecated)
            sock.change(netlink.RTM_NEWADDR, request, NLM_F_CREATE | NLM_F_REPLACE)
        present = nic_snapshot.capture(wanted.namespace, wanted.link)
        strays = _strays(wanted, present)
        for stray in strays:
            nic_link.attempt(sock, netlink.RTM_DELROUTE, stray.request(link.index))
        routes = _routes(present, strays)
        for destination, gateway in wanted.routes:
            if (destination, gateway) not in routes:
                _add_route(sock, link.index, destination, gateway, wanted)


def _oldest_first(addresses: tuple[str, ...]) -> list[str]:
    """Return addresses in the order in which they must be made, see ``nic_addresses``."""
    six = [address for address in addresses if ":" in address]
    return [*(address for address in addresses if address not in six), *reversed(six)]


def _routes(present: Capture, strays: list[NicRoute]) -> set[tuple[str, str | None]]:
    return {(route.destination, route.gateway) for route in present.routes if route not in strays}


def _strays(wanted: LinkConfig, present: Capture) -> list[NicRoute]:
    """Return routes with another source than wanted, and static routes that are not wanted."""
    sources = dict(wanted.sources)
    strays = []
    for route in present.routes:
        if (route.destination, route.gateway) in wanted.routes:
            is_stray = sources.get(route.destination, route.source) != route.source
        else:
            is_stray = wanted.alone and route.protocol == netlink.RTPROT_STATIC
        if is_stray:
            strays.append(route)
    return strays


def differences(wanted: LinkConfig) -> list[str]:
    """Return in words how a link differs from its configuration."""
    where = f"{wanted.link} in {wanted.namespace or 'the host'}"
    if not nic_link.exists(wanted.namespace, wanted.link):
        return [f"{where} is missing"]
    present = nic_snapshot.capture(wanted.namespace, wanted.link)
    if not present.flags & netlink.IFF_UP:
        return [f"{where} is down"]
    return list(_differences(wanted, present, where))


def _differences(wanted: LinkConfig, present: Capture, where: str) -> Iterator[str]:
    addresses = {f"{address.ip}/{address.prefix}" for address in present.addresses}
    for address in wanted.addresses:
        if str(ip_interface(address)) not in addresses:
            yield f"{where} lacks the address {address}"
    strays = _strays(wanted, present)
    routes = _routes(present, strays)
    for destination, gateway in wanted.routes:
        if (destination, gateway) not in routes:
            yield f"the route {destination}{_via(gateway)} on {where} is missing"
    for stray in strays:
        yield f"the {stray} on {where} is left over"
    settings = dict(present.settings)
    for key, text in wanted.settings:
        if settings.get(key, text) != text:
            yield f"setting {key} of {where} is {settings[key]} instead of {text}"


def _address(link: int, text: str, *, deprecated: bool = False) -> bytes:
    address = ip_interface(text)
    family = AF_INET if address.version == 4 else AF_INET6
    scope = netlink.RT_SCOPE_LINK if address.is_link_local else 0
    header = struct.pack("=BBBBI", family, address.network.prefixlen, 0, scope, link)
    attributes = [
        (netlink.IFA_LOCAL, address.packed),
        (netlink.IFA_ADDRESS, address.packed),
    ]
    if family == AF_INET6:
        # A patch has no other station that could have the address.
        attributes.append(netlink.u32(netlink.IFA_FLAGS, netlink.IFA_F_NODAD))
    if deprecated:
        lifetimes = struct.pack("=IIII", 0, FOREVER, 0, 0)
        attributes.append((netlink.IFA_CACHEINFO, lifetimes))
    return header + netlink.pack(attributes)


def _add_route(
    sock: Socket, link: int, destination: str, gateway: str | None, wanted: LinkConfig
) -> None:
    to = ip_network(destination)
    source = dict(wanted.sources).get(destination)
    hop = netlink.RTNH_F_ONLINK if wanted.onlink else 0
    family = AF_INET if to.version == 4 else AF_INET6
    kind = (netlink.RT_TABLE_MAIN, netlink.RTPROT_STATIC, 0, netlink.RTN_UNICAST, hop)
    attributes = [(netlink.RTA_DST, to.network_address.packed)] if to.prefixlen else []
    attributes += [(netlink.RTA_GATEWAY, ip_address(gateway).packed)] if gateway else []
    attributes += [(netlink.RTA_PREFSRC, ip_address(source).packed)] if source else []
    attributes.append((netlink.RTA_OIF, struct.pack("=i", link)))
    body = struct.pack("=BBBBBBBBI", family, to.prefixlen, 0, 0, *kind) + netlink.pack(attributes)
    # Routes of other links are not ours to replace.  In IPv4 ours goes ahead of them.
    append = NLM_F_APPEND if family == AF_INET6 else 0
    nic_link.attempt(sock, netlink.RTM_NEWROUTE, body, NLM_F_CREATE | append)
