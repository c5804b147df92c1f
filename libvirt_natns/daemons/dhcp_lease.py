# SPDX-License-Identifier: LGPL-2.1-or-later
"""A DHCP lease of ours: read from the files that the client's script has written.

    lease    the server's values, NAME=VALUE a line, as long as the lease is valid
    times    the client that got the lease, when (seconds since boot), for how many seconds

Values that the server got wrong are left out.  ``lease_check`` judges which of the others
make sense on this host.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

from libvirt_natns.model.subnet import StaticRoute

MTU = re.compile(r"[0-9]{1,5}")
LEAST_MTU = 576
"""Octets that every IPv4 host can take; a server that names fewer is not believed."""

NO_ADDRESS = IPv4Address(0)


@dataclass(frozen=True, slots=True)
class DhcpLease:
    """The values that a server has sent.

    ``until`` is the end of the lease in seconds since boot, suspended time included; None for
    a lease without end.  ``mtu`` is in octets.  ``on_link`` are destinations that, as the
    server says, need no gateway.
    """

    address: IPv4Interface
    server: IPv4Address | None = None
    gateway: IPv4Address | None = None
    dns: tuple[IPv4Address, ...] = ()
    mtu: int | None = None
    routes: tuple[StaticRoute, ...] = ()
    until: float | None = None
    on_link: tuple[IPv4Network, ...] = ()


def read(directory: Path) -> DhcpLease | None:
    """Return the lease that a client holds; None without a lease, or where it makes no sense."""
    try:
        text = (directory / "lease").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return parse(text, _until(directory))


def parse(text: str, until: float | None = None) -> DhcpLease | None:
    """Return the lease that a client's script has written; None where it makes no sense.

    Wrong values of the server are left out.  A wrong address makes the lease void.
    """
    values = dict(line.partition("=")[::2] for line in text.splitlines())
    mask = values.get("mask") or "32"
    try:
        address = IPv4Interface(f"{values.get('ip', '')}/{_prefix(mask)}")
    except ValueError:
        return None
    routes = _routes(values.get("routes", "").split())
    first = next(iter(_addresses(values.get("router", ""))), None)
    # Where a server names routes, its router option must be ignored (RFC 3442).
    default = next((gate for to, gate in routes if to.prefixlen == 0), None)
    return DhcpLease(
        address=address,
        server=next(iter(_addresses(values.get("server", ""))), None),
        gateway=default if routes else first,
        dns=tuple(a for a in _addresses(values.get("dns", "")) if not a.is_loopback),
        mtu=_mtu(values.get("mtu", "")),
        # A destination on the link itself has no gateway, so there is no route to set.
        routes=tuple(
            StaticRoute(to, gate) for to, gate in routes if to.prefixlen and gate != NO_ADDRESS
        ),
        until=until,
        on_link=tuple(to for to, gate in routes if to.prefixlen and gate == NO_ADDRESS),
    )


def _prefix(mask: str) -> str:
    """Return a mask as its prefix length.  Raises ValueError for text that is no mask.

    ``ipaddress`` would take a wildcard mask, 0.0.0.255, for a /24 as well.
    """
    if mask.isdecimal():
        return mask
    bits = int(IPv4Address(mask)) ^ 0xFFFFFFFF
    if bits & (bits + 1):
        raise ValueError(f"{mask} is not a subnet mask")
    return str(32 - bits.bit_length())


def _addresses(text: str) -> Iterable[IPv4Address]:
    for word in text.split():
        with suppress(AddressValueError):
            address = IPv4Address(word)
            if not (address.is_unspecified or address.is_multicast):
                yield address


def _routes(words: list[str]) -> list[tuple[IPv4Network, IPv4Address]]:
    """Return destinations with their gateways from words that name them in turn."""
    routes = []
    for destination, gateway in zip(words[::2], words[1::2], strict=False):
        with suppress(ValueError):
            routes.append((IPv4Network(destination, strict=False), IPv4Address(gateway)))
    return routes


def _mtu(text: str) -> int | None:
    return int(text) if MTU.fullmatch(text) and LEAST_MTU <= int(text) <= 65535 else None


def _until(directory: Path) -> float | None:
    """Return when a lease ends, in seconds since boot; None for a lease without end."""
    try:
        _, obtained, seconds = map(int, (directory / "times").read_text().split())
    except (OSError, ValueError):
        return None
    # All ones means no end (RFC 2131); a server that names no time means the same.
    return obtained + seconds if 0 < seconds < 2**32 - 1 else None
