# SPDX-License-Identifier: LGPL-2.1-or-later
"""The addresses and routes at one end of the patch between a host and its router.

Made by us from nothing, unlike the NIC's: an address is known by itself and its
prefix, a route by its destination and gateway.
"""

import struct
from collections.abc import Iterator
from ipaddress import ip_address, ip_interface, ip_network

from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import wire
from libvirt_natns.kernel.wire import Wire
from libvirt_natns.records import dataclass
from libvirt_natns.upstream.router import nic, nic_objects

IFA_F_NODAD = 2
RTPROT_STATIC = 4
PROTOCOL = 5
"""Where a route's message says who has made it."""
SCOPE_LINK = 253
RTN_UNICAST = 1


@dataclass(frozen=True, slots=True)
class Side:
    """A link that is up, with its addresses and routes (destination, gateway).

    A gateway None: what is on the link itself.  ``settings`` as in ``nic.Capture``;
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


def ensure(side: Side) -> None:
    """Make it so; another time changes nothing.  Raises KernelError."""
    nic.write_settings(side.namespace, side.link, dict(side.settings))
    with nic.session(side.namespace) as opened:
        link = nic.find(opened, side.link)
        if link is None:
            raise KernelError(f"there is no link {side.link} in {side.namespace or 'the host'}")
        if not link.flags & nic.IFF_UP:
            body = wire.set_link(link.index, (), nic.IFF_UP, nic.IFF_UP)
            opened.change(wire.RTM_NEWLINK, body)
        for address in side.addresses:
            opened.change(wire.RTM_NEWADDR, _address(link.index, address), wire.REPLACE)
        found = nic.capture(side.namespace, side.link)
        for stray in _strays(side, found):
            nic.attempt(opened, wire.RTM_DELROUTE, stray.request(link.index))
        present = _routes(found)
        for destination, gateway in side.routes:
            if (destination, gateway) not in present:
                flags = nic_objects.RTNH_F_ONLINK if side.onlink else 0
                _add_route(opened, link.index, destination, gateway, flags)


def _routes(found: nic.Capture) -> set[tuple[str, str | None]]:
    return {(each.destination, each.gateway) for each in found.routes}


def _strays(side: Side, found: nic.Capture) -> list[nic_objects.Route]:
    """Routes that somebody has entered, and that are not wanted."""
    if not side.alone:
        return []
    entered = (each for each in found.routes if bytes.fromhex(each.body)[PROTOCOL] == RTPROT_STATIC)
    return [each for each in entered if (each.destination, each.gateway) not in side.routes]


def differences(side: Side) -> list[str]:
    """What is not so, in words."""
    where = f"{side.link} in {side.namespace or 'the host'}"
    if not nic.exists(side.namespace, side.link):
        return [f"{where} is missing"]
    found = nic.capture(side.namespace, side.link)
    if not found.flags & nic.IFF_UP:
        return [f"{where} is down"]
    return list(_differences(side, found, where))


def _differences(side: Side, found: nic.Capture, where: str) -> Iterator[str]:
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
    family = nic_objects.AF_INET if address.version == 4 else nic_objects.AF_INET6
    scope = SCOPE_LINK if address.is_link_local else 0
    header = struct.pack("=BBBBI", family, address.network.prefixlen, 0, scope, link)
    attributes = [
        (nic_objects.IFA_LOCAL, address.packed),
        (nic_objects.IFA_ADDRESS, address.packed),
    ]
    if family == nic_objects.AF_INET6:
        # Nobody else is on a patch.
        attributes.append((nic_objects.IFA_FLAGS, struct.pack("=I", IFA_F_NODAD)))
    return header + wire.packed(attributes)


def _add_route(opened: Wire, link: int, destination: str, gateway: str | None, hop: int) -> None:
    to = ip_network(destination)
    family = nic_objects.AF_INET if to.version == 4 else nic_objects.AF_INET6
    kind = (nic_objects.MAIN_TABLE, RTPROT_STATIC, 0, RTN_UNICAST, hop)
    attributes = [(nic_objects.RTA_DST, to.network_address.packed)] if to.prefixlen else []
    attributes += [(nic_objects.RTA_GATEWAY, ip_address(gateway).packed)] if gateway else []
    attributes.append((nic_objects.RTA_OIF, struct.pack("=i", link)))
    body = struct.pack("=BBBBBBBBI", family, to.prefixlen, 0, 0, *kind) + wire.packed(attributes)
    # Beside those of other links, which are none of ours to replace; ahead of them in IPv4.
    append = wire.NLM_F_APPEND if family == nic_objects.AF_INET6 else 0
    nic.attempt(opened, wire.RTM_NEWROUTE, body, wire.NLM_F_CREATE | append)
