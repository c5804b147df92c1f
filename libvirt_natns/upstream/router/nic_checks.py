# SPDX-License-Identifier: LGPL-2.1-or-later
"""Judges a NIC: whether it can move to a namespace and back, and how it differs from a capture."""

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from libvirt_natns.kernel import netlink
from libvirt_natns.kernel.netlink import Socket
from libvirt_natns.upstream.router import nic_link, nic_routes
from libvirt_natns.upstream.router.nic_link import ListedLink
from libvirt_natns.upstream.router.nic_snapshot import Capture, capture, route_bodies

TIED = ("bridge", "bond", "team")
"""Kinds of links that have ports, which would stay behind."""

NicFault = tuple[str, str]
"""The reason why a NIC cannot move, and its remedy."""


# -- faults ------------------------------------------------------------------


def fault_of(name: str) -> NicFault | None:
    """Return why a NIC of the host cannot move and come back as it was; None where it can."""
    if Path("/sys/class/net", name, "phy80211").exists():
        return "is a Wi-Fi card, which cannot move by itself", 'use an upstream of kind "host"'
    with nic_link.session(None) as sock:
        link = nic_link.find(sock, name)
        if link is None:
            return "does not exist", "see ip link"
        return _link_fault(sock, link, name) or _route_fault(sock, link.index)


def _link_fault(sock: Socket, link: ListedLink, name: str) -> NicFault | None:
    if link.master:
        return "is part of a bridge or bond", 'use an upstream of kind "bridge"'
    if link.kind in TIED:
        return f"is a {link.kind}, which cannot move with its ports", "name a single NIC"
    upper = _upper(sock, link)
    if upper:
        return f"carries {upper}, which would stay behind", f"remove {upper} first"
    if link.attributes.nested(netlink.IFLA_XDP).number(netlink.IFLA_XDP_ATTACHED):
        return "has an XDP program", f"remove it (ip link set {name} xdp off)"
    if _has_discipline(sock, link.index):
        return "has traffic control that a move would lose", f"tc qdisc del dev {name} root"
    return None


def _upper(sock: Socket, link: ListedLink) -> str:
    """Return the name of a link that is made on top of a link, such as a VLAN; "" without any."""
    for other in nic_link.links(sock):
        below = other.attributes.number(netlink.IFLA_LINK) == link.index
        elsewhere = other.attributes.get(netlink.IFLA_LINK_NETNSID) is not None
        if below and other.index != link.index and other.kind != "veth" and not elsewhere:
            return other.name
    return ""


def _has_discipline(sock: Socket, link: int) -> bool:
    """True if a link has traffic control that was set: the kernel's own has no handle."""
    for body in nic_link.dump(sock, netlink.RTM_GETQDISC, bytes(20)):
        index, handle = struct.unpack_from("=4xiI", body)
        if index == link and handle:
            return True
    return False


def _route_fault(sock: Socket, link: int) -> NicFault | None:
    for body in route_bodies(sock):
        links = nic_routes.links_of(body)
        if link not in links:
            continue
        route = nic_routes.parse(body, link)
        if nic_routes.has_next_hop_object(body):
            return f"has a {route} by a nexthop object", "set a plain route instead (ip route)"
        if links != {link}:
            return f"shares a {route} with other links", "set a route over one link instead"
    return None


# -- comparison --------------------------------------------------------------


def differences(namespace: str | None, wanted: Capture) -> list[str]:
    """Return in words how a NIC differs from a capture."""
    if not nic_link.exists(namespace, wanted.name):
        return [f"{wanted.name} is missing in {namespace or 'the host'}"]
    return list(_differences(capture(namespace, wanted.name), wanted))


def _differences(present: Capture, wanted: Capture) -> Iterator[str]:
    name = wanted.name
    for key, what in (("mac", "the MAC"), ("mtu", "the MTU")):
        if getattr(present, key) != getattr(wanted, key):
            value, expected = getattr(present, key), getattr(wanted, key)
            yield f"{what} of {name} is {value} instead of {expected}"
    if present.flags & netlink.IFF_UP != wanted.flags & netlink.IFF_UP:
        yield f"{name} is {'up' if present.flags & netlink.IFF_UP else 'down'}"
    settings = dict(present.settings)
    for key, text in wanted.settings:
        if settings.get(key, text) != text:
            yield f"setting {key} of {name} is {settings[key]} instead of {text}"
    for key in ("addresses", "routes", "neighbours", "rules"):
        bodies = {listed.body for listed in getattr(present, key)}
        for listed in getattr(wanted, key):
            if listed.body not in bodies:
                yield f"{listed} of {name} is missing"


def without_expiring(wanted: Capture) -> Capture:
    """Return a capture without routes that expire: others may have replaced them by now."""
    return replace(wanted, routes=tuple(route for route in wanted.routes if route.lasts))
