# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses, and what is made of them, of either family of the Internet protocol.

The standard library has a class a family and no name for both.
"""

from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from typing import Literal

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface
"""An address with the prefix that it is in."""
IPNetwork = IPv4Network | IPv6Network
Family = Literal[4, 6]

FAMILIES: tuple[Family, Family] = (4, 6)


def address_of(stored: int | str) -> Address:
    """The address that ``stored`` made a value of."""
    return IPv4Address(stored) if isinstance(stored, int) else IPv6Address(stored)


def stored(address: Address) -> int | str:
    """An address for the state database: SQLite's integers hold 64 bits."""
    return int(address) if isinstance(address, IPv4Address) else str(address)


def network_of(text: str) -> IPNetwork:
    """A network in either family's text; ValueError for anything else."""
    return IPv6Network(text) if ":" in text else IPv4Network(text)


def parsed(text: str) -> Address:
    """An address in either family's text; ValueError for anything else."""
    return IPv6Address(text) if ":" in text else IPv4Address(text)


def host_network(address: Address) -> IPNetwork:
    """The network of one address alone."""
    return IPv4Network(address) if isinstance(address, IPv4Address) else IPv6Network(address)


def on_link(address: Address, prefix: int) -> Interface:
    """An address with the prefix of that length around it."""
    if isinstance(address, IPv4Address):
        return IPv4Interface((address, prefix))
    return IPv6Interface((address, prefix))


def default_route(family: Family) -> IPNetwork:
    """All of a family."""
    return IPv4Network("0.0.0.0/0") if family == 4 else IPv6Network("::/0")


def by_family(address: Address) -> tuple[int, int]:
    """What sorts addresses of both families, which Python does not compare."""
    return address.version, int(address)
