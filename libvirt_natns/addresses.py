# SPDX-License-Identifier: LGPL-2.1-or-later
"""Types and functions for addresses of either IP family.

``ipaddress`` has a class for each family, and no union of them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    summarize_address_range,
)
from typing import Literal

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface
"""An address with the prefix that it is in."""
IPNetwork = IPv4Network | IPv6Network
Family = Literal[4, 6]

FAMILIES: tuple[Family, Family] = (4, 6)

PLACEHOLDERS = range(1, 1 << 24)
"""As addresses 0.0.0.1 to 0.255.255.255, which no machine can have (RFC 1122)."""


@dataclass(frozen=True, slots=True)
class AddressRange:
    """Addresses from ``first`` to ``last``, both included, of one family."""

    first: Address
    last: Address

    def __contains__(self, address: object) -> bool:
        if not isinstance(address, IPv4Address | IPv6Address):
            return False
        same = address.version == self.first.version
        return same and int(self.first) <= int(address) <= int(self.last)

    @property
    def size(self) -> int:
        """Return the number of addresses."""
        return int(self.last) - int(self.first) + 1

    @property
    def networks(self) -> Iterator[IPNetwork]:
        """Yield the networks that together have exactly these addresses."""
        return summarize_address_range(self.first, self.last)

    def __str__(self) -> str:
        return f"{self.first}-{self.last}" if self.first != self.last else str(self.first)


def is_placeholder(address: Address) -> bool:
    """True for the placeholder of an address that a DHCP server has yet to lease.

    Ports published on a placeholder come into force when the address is known.
    """
    return address.version == 4 and int(address) in PLACEHOLDERS


def unless_placeholder(address: IPv4Address | None) -> IPv4Address | None:
    """Return a leased address; None where it is not known yet."""
    return None if address is None or is_placeholder(address) else address


def address_of(stored: int | str) -> Address:
    """Return the address of which ``stored`` made a value."""
    return IPv4Address(stored) if isinstance(stored, int) else IPv6Address(stored)


def stored(address: Address) -> int | str:
    """Return an address for the state database: SQLite's integers hold 64 bits."""
    return int(address) if isinstance(address, IPv4Address) else str(address)


def network_of(text: str) -> IPNetwork:
    """Return the network in a text of either family; ValueError for anything else."""
    return IPv6Network(text) if ":" in text else IPv4Network(text)


def parsed(text: str) -> Address:
    """Return the address in a text of either family; ValueError for anything else."""
    return IPv6Address(text) if ":" in text else IPv4Address(text)


def bracketed(address: Address | str) -> str:
    """Return an address as it stands ahead of a port: an IPv6 address in brackets."""
    return f"[{address}]" if ":" in str(address) else str(address)


def host_network(address: Address) -> IPNetwork:
    """Return the network of one address alone."""
    return IPv4Network(address) if isinstance(address, IPv4Address) else IPv6Network(address)


def inside(subnets: Iterable[IPNetwork], whole: IPv6Network) -> list[IPv6Network]:
    """Return the subnets in ``whole``, with ``whole`` itself as its two halves.

    Only a longer prefix takes precedence over the route of the link that has ``whole``.
    """
    parts: list[IPv6Network] = []
    for subnet in subnets:
        if isinstance(subnet, IPv6Network) and subnet.subnet_of(whole):
            parts += subnet.subnets() if subnet == whole else [subnet]
    return parts


def on_link(address: Address, prefix: int) -> Interface:
    """Return an address with the prefix of that length around it."""
    if isinstance(address, IPv4Address):
        return IPv4Interface((address, prefix))
    return IPv6Interface((address, prefix))


def default_route(family: Family) -> IPNetwork:
    """Return the network of all addresses of a family."""
    return IPv4Network("0.0.0.0/0") if family == 4 else IPv6Network("::/0")


def by_family(address: Address) -> tuple[int, int]:
    """Return a key that sorts addresses of both families, which Python does not compare."""
    return address.version, int(address)
