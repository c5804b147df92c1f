# SPDX-License-Identifier: LGPL-2.1-or-later
"""The addresses and routes at one end of the patch between a host and its router.

Made by us from nothing, unlike the NIC's: an address is known by itself and its
prefix, a route by its destination and gateway.
"""

import struct
from collections.abc import Iterator
from ipaddress import ip_address, ip_interface, ip_network
from socket import AF_INET, AF_INET6

from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netlink
from libvirt_natns.kernel.netlink import Socket
from libvirt_natns.records import dataclass
from libvirt_natns.upstream.router import link_settings, nic_link, nic_snapshot
from libvirt_natns.upstream.router.nic_routes import NicRoute
from libvirt_natns.upstream.router.nic_snapshot import Capture

IFA_F_NODAD = 2
RTPROT_STATIC = 4
PROTOCOL = 5
"""Where a route's message says who has made it."""
SCOPE_LINK = 253
RTN_UNICAST = 1


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """A link that is up, with its addresses and routes (destination, gateway).

    A gateway None: what is on the link itself.  ``settings`` as in ``Capture``;
    ``onlink``: gateways are on the link, whatever its addresses say.  ``alone``: it has no
    other routes than these and those of its addresses.
    """

    namespace: str | None
    link: str
    addresses: tuple[str, ...]
    routes: tuple[tuple[str, str | None], ...]
    settings: tuple[tuple[str, str], ...]
    onlink: bool = False
    alone: bool = False


def ensure(side: LinkConfig) -> None:
    """Make it so; another time changes nothing.  Raises KernelError."""
    link_settings.write(side.namespace, side.link, dict(side.settings))
    with nic_link.session(side.namespace) as opened:
        link = nic_link.find(opened, side.link)
        if link is None:
            raise KernelError(f"there is no link {side.link} in {side.namespace or 'the host'}")
        if not link.flags & netlink.IFF_UP:
            body = netlink.change_link(link.index, (), netlink.IFF_UP, netlink.IFF_UP)
            opened.change(netlink.RTM_NEWLINK, body)
        for address in side.addresses:
            opened.change(
                netlink.RTM_NEWADDR,
                _address(link.index, address),
                netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE,
            )
        found = nic_snapshot.capture(side.namespace, side.link)
        for stray in _strays(side, found):
            nic_link.attempt(opened, netlink.RTM_DELROUTE, stray.request(link.index))
        present = _routes(found)
        for destination, gateway in side.routes:
            if (destination, gateway) not in present:
                flags = netlink.RTNH_F_ONLINK if side.onlink else 0
                _add_route(opened, link.index, destination, gateway, flags)


def _routes(found: Capture) -> set[tuple[str, str | None]]:
    return {(each.destination, each.gateway) for each in found.routes}


def _strays(side: LinkConfig, found: Capture) -> list[NicRoute]:
    """Routes that somebody has entered, and that are not wanted."""
    if not side.alone:
        return []
    entered = (each for each in found.routes if bytes.fromhex(each.body)[PROTOCOL] == RTPROT_STATIC)
    return [each for each in entered if (each.destination, each.gateway) not in side.routes]


def differences(side: LinkConfig) -> list[str]:
    """What is not so, in words."""
    where = f"{side.link} in {side.namespace or 'the host'}"
    if not nic_link.exists(side.namespace, side.link):
        return [f"{where} is missing"]
    found = nic_snapshot.capture(side.namespace, side.link)
    if not found.flags & netlink.IFF_UP:
        return [f"{where} is down"]
    return list(_differences(side, found, where))


def _differences(side: LinkConfig, found: Capture, where: str) -> Iterator[str]:
    present = {f"{each.ip}/{each.prefix}" for each in found.addresses}
    for address in side.addresses:
        if str(ip_interface(address)) not in present:
            yield f"{where} lacks the address {address}"
    routes = _routes(found)
    for destination, gateway in side.routes:
        if (destination, gateway) not in routes:
            via = f" via {gateway}" if gateway else ""
            yield f"the route {destination}{via} on {where} is missing"
    for stray in _strays(side, found):
        yield f"the {stray} on {where} is left over"
    settings = dict(found.settings)
    for key, text in side.settings:
        if settings.get(key, text) != text:
            yield f"setting {key} of {where} is {settings[key]} instead of {text}"


def _address(link: int, text: str) -> bytes:
    address = ip_interface(text)
    family = AF_INET if address.version == 4 else AF_INET6
    scope = SCOPE_LINK if address.is_link_local else 0
    header = struct.pack("=BBBBI", family, address.network.prefixlen, 0, scope, link)
    attributes = [
        (netlink.IFA_LOCAL, address.packed),
        (netlink.IFA_ADDRESS, address.packed),
    ]
    if family == AF_INET6:
        # Nobody else is on a patch.
        attributes.append((netlink.IFA_FLAGS, struct.pack("=I", IFA_F_NODAD)))
    return header + netlink.pack(attributes)


def _add_route(opened: Socket, link: int, destination: str, gateway: str | None, hop: int) -> None:
    to = ip_network(destination)
    family = AF_INET if to.version == 4 else AF_INET6
    kind = (netlink.RT_TABLE_MAIN, RTPROT_STATIC, 0, RTN_UNICAST, hop)
    attributes = [(netlink.RTA_DST, to.network_address.packed)] if to.prefixlen else []
    attributes += [(netlink.RTA_GATEWAY, ip_address(gateway).packed)] if gateway else []
    attributes.append((netlink.RTA_OIF, struct.pack("=i", link)))
    body = struct.pack("=BBBBBBBBI", family, to.prefixlen, 0, 0, *kind) + netlink.pack(attributes)
    # Beside those of other links, which are none of ours to replace; ahead of them in IPv4.
    append = netlink.NLM_F_APPEND if family == AF_INET6 else 0
    nic_link.attempt(opened, netlink.RTM_NEWROUTE, body, netlink.NLM_F_CREATE | append)
