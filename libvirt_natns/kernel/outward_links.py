# SPDX-License-Identifier: LGPL-2.1-or-later
"""The links that lead out of the host, as its routes and the kernel's files tell it.

``routed`` are the links of routes, with True if a router is reached by the link
(``Routes.leading``).

A bridge leads out if a gateway is reached by it, or if it has a port that is no guest's: a NIC, a
bond, a VLAN. All other bridges are for guests and containers of this host.  A link that is neither
a bridge nor a bridge's port leads out: a NIC, a tunnel, a modem.  Ports of guests and networks do
not: for a moment, each of them has no bridge yet.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from libvirt_natns import names

INWARD = (names.GUEST_PREFIX, names.PRIVATE_PREFIX, names.UPSTREAM_PREFIX)
"""The beginnings of names of ports that lead to guests and networks."""

LINKS = Path("/sys/class/net")


def bridges(routed: Mapping[str, bool], but: Iterable[str]) -> tuple[str, ...]:
    """Return the bridges that lead out of the host, without the bridges in ``but``."""
    inner = set(but)
    return tuple(
        sorted(
            link
            for link in routed.keys() - inner
            if is_bridge(link) and (routed[link] or _has_outer_port(link))
        )
    )


def links(routed: Mapping[str, bool], but: Iterable[str]) -> tuple[str, ...]:
    """Return all links that lead out of the host, bridges among them."""
    inner = {"lo", *but}
    outer = set(bridges(routed, inner))
    found = (
        link.name
        for link in LINKS.iterdir()
        if link.name not in inner and not link.name.startswith(INWARD)
    )
    return tuple(
        sorted(
            link
            for link in found
            if link in outer or not (is_bridge(link) or (LINKS / link / "brport").exists())
        )
    )


def is_bridge(link: str) -> bool:
    """True if the host has a bridge of that name."""
    return (LINKS / link / "bridge").is_dir()


def _has_outer_port(bridge: str) -> bool:
    with suppress(OSError):
        return any(_is_outer(port.name) for port in (LINKS / bridge / "brif").iterdir())
    return False


def _is_outer(port: str) -> bool:
    """Return whether a port is a NIC, or stands on one; a VXLAN leads to guests elsewhere."""
    place = LINKS / port
    if (place / "device").exists():
        return True
    lower = any(place.glob("lower_*"))
    return lower and "DEVTYPE=vxlan" not in (place / "uevent").read_text(errors="replace")
