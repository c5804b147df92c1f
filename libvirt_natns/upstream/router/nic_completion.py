# SPDX-License-Identifier: LGPL-2.1-or-later
"""Completes a NIC's capture from the confirmed settings, for a boot before the NIC is set up."""

from dataclasses import replace
from socket import AF_INET, AF_INET6
from typing import Any, TypeVar

from libvirt_natns.kernel import netlink
from libvirt_natns.upstream.router.nic_addresses import NicAddress
from libvirt_natns.upstream.router.nic_neighbours import NicNeighbour
from libvirt_natns.upstream.router.nic_routes import NicRoute
from libvirt_natns.upstream.router.nic_rules import NicRule
from libvirt_natns.upstream.router.nic_snapshot import Capture

Listed = TypeVar("Listed", NicRoute, NicNeighbour, NicRule)


def completed(present: Capture, kept: Capture) -> Capture:
    """Return a capture, completed from what was ``kept`` of the NIC.

    A family that lacks its addresses or its default route gets all that was kept of it.
    A NIC with a global address that was not kept is another NIC, or was configured anew, and
    stays as it is.  Hardware, names, and link-local addresses of another MAC are never kept.
    """
    if not {address.ip for address in (*present.ipv4, *present.ipv6)} <= {
        address.ip for address in (*kept.ipv4, *kept.ipv6)
    }:
        return present
    kept = replace(kept, name=present.name)
    wanted = kept if present.mac == kept.mac else _without_link_local(kept)
    if present.is_bare:
        return replace(
            wanted,
            index=present.index,
            mac=present.mac,
            altnames=present.altnames,
            at=present.at,
        )
    for family, directory in ((AF_INET, "ipv4/"), (AF_INET6, "ipv6/")):
        if _lacks(present, kept, family):
            present = _with_family(present, wanted, family, directory)
    return present


def _lacks(present: Capture, kept: Capture, family: int) -> bool:
    """True if a family has lost all its addresses, or its default route."""

    def has(capture: Capture) -> tuple[bool, bool]:
        addresses = any(a.family == family for a in (*capture.ipv4, *capture.ipv6))
        return addresses, any(r.is_default and r.family == family for r in capture.routes)

    return any(had and not now for had, now in zip(has(kept), has(present), strict=True))


def _without_link_local(capture: Capture) -> Capture:
    stay = (a for a in capture.addresses if a.family == AF_INET or a.is_global)
    return replace(capture, addresses=tuple(stay))


def _with_family(present: Capture, kept: Capture, family: int, directory: str) -> Capture:
    """Return a capture with all that was kept of one family added."""
    settings = {key: text for key, text in kept.settings if key.startswith(directory)}
    changes: dict[str, Any] = {
        "routes": _joined(present.routes, kept.routes, family),
        "foreign": _joined(present.foreign, kept.foreign, family),
        "neighbours": _joined(present.neighbours, kept.neighbours, family),
        "rules": _joined(present.rules, kept.rules, family),
    }
    return replace(
        present,
        flags=present.flags | kept.flags & netlink.IFF_UP,
        addresses=_with_addresses(present, kept, family),
        settings=tuple(sorted((dict(present.settings) | settings).items())),
        **changes,
    )


def _with_addresses(present: Capture, kept: Capture, family: int) -> tuple[NicAddress, ...]:
    """Return addresses with those that were kept of a family, in the order that they had.

    The order decides which address is the source of packets (``nic_addresses``).
    """
    ips = {address.ip for address in present.addresses}
    missing = [a for a in kept.addresses if a.family == family and a.ip not in ips]
    places = {(a.ip, a.prefix): place for place, a in enumerate(kept.addresses)}
    return tuple(
        sorted(
            (*present.addresses, *missing),
            key=lambda address: places.get((address.ip, address.prefix), len(places)),
        )
    )


def _joined(
    present: tuple[Listed, ...], kept: tuple[Listed, ...], family: int
) -> tuple[Listed, ...]:
    bodies = {listed.body for listed in present}
    missing = []
    for listed in kept:
        # The first octet of a message is its family.
        if bytes.fromhex(listed.body)[0] == family and listed.body not in bodies:
            missing.append(listed)
    return present + tuple(missing)
