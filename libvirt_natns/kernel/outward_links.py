# SPDX-License-Identifier: LGPL-2.1-or-later
"""The links that lead out of the host, as the kernel's files tell it.

A bridge leads out if a gateway is reached by it, or if it has a port that is no guest's: a NIC, a
bond, a VLAN. All other bridges are for guests and containers of this host.  A link that is neither
a bridge nor a bridge's port leads out: a NIC, a tunnel, a modem.  Ports of guests and networks do
not: for a moment, each of them has no bridge yet.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from libvirt_natns import names

INWARD = (names.GUEST_PREFIX, names.PRIVATE_PREFIX, names.UPSTREAM_PREFIX)
"""The beginnings of names of ports that lead to guests and networks."""

LINKS = Path("/sys/class/net")
ROUTES = Path("/proc/thread-self/net/route")
ROUTES6 = Path("/proc/thread-self/net/ipv6_route")
RTF_GATEWAY = 0x2
NO_GATEWAY = "0" * 8


def bridges(but: Iterable[str]) -> tuple[str, ...]:
    """Return the bridges that lead out of the host, without the bridges in ``but``."""
    routed = dict(_routes())
    inner = set(but)
    return tuple(
        sorted(
            link
            for link in routed.keys() - inner
            if is_bridge(link) and (routed[link] or _has_outer_port(link))
        )
    )


def links(but: Iterable[str]) -> tuple[str, ...]:
    """Return all links that lead out of the host, bridges among them."""
    inner = {"lo", *but}
    outer = set(bridges(inner))
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


def _routes() -> Iterator[tuple[str, bool]]:
    """Yield the links of the host's routes, each with True if it leads to a gateway."""
    found: dict[str, bool] = {}
    with suppress(OSError):
        for line in ROUTES.read_text(errors="surrogateescape").splitlines()[1:]:
            link, _, gateway, *_ = line.split()
            found[link] = found.get(link, False) or gateway != NO_GATEWAY
    with suppress(OSError):
        for line in ROUTES6.read_text(errors="surrogateescape").splitlines():
            *_, flags, link = line.split()
            found[link] = found.get(link, False) or bool(int(flags, 16) & RTF_GATEWAY)
    yield from found.items()


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
