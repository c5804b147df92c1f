# SPDX-License-Identifier: LGPL-2.1-or-later
"""Readers for values that only upstreams of the configuration have."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from itertools import combinations
from typing import Literal, TypeVar, cast, get_args

from libvirt_natns.addresses import AddressRange
from libvirt_natns.documents.config_table import Reader, TomlTable, one, several
from libvirt_natns.model.publication import PortProtocol, PortSet
from libvirt_natns.model.upstream import Helper

CLIENT_ID = re.compile(r"[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){1,254}")
PORT_SET = re.compile(r"(tcp|udp|sctp)/([0-9]{1,5})(?:-([0-9]{1,5}))?")

AnyAddress = TypeVar("AnyAddress", IPv4Address, IPv6Address)
AnyNetwork = TypeVar("AnyNetwork", IPv4Network, IPv6Network)


def subnet(make: Callable[[str, bool], AnyNetwork], longest: int, expected: str) -> Reader:
    """Return a reader for a whole subnet, of a prefix length up to ``longest``."""
    read_any = one(lambda value: make(value, False), expected)

    def read(table: TomlTable, key: str) -> AnyNetwork:
        value: AnyNetwork = read_any(table, key)
        try:
            make(table.data[key], True)
        except ValueError:
            raise table.wrong(key, table.data[key], f"{value}, the whole subnet") from None
        if value.prefixlen > longest:
            raise table.wrong(key, str(value), f"a prefix length up to {longest}")
        return value

    return read


def pool(expected: str) -> Reader:
    """Return a reader for ranges of IPv4 addresses, or "dhcp"."""
    read_ranges = several(_range4, expected)

    def read(table: TomlTable, key: str) -> tuple[AddressRange, ...] | Literal["dhcp"]:
        value = table.data[key]
        if value == "dhcp":
            return "dhcp"
        if not isinstance(value, list):
            raise table.wrong(key, value, f'an array, each {expected}, or "dhcp"')
        ranges: tuple[AddressRange, ...] = read_ranges(table, key)
        return ranges

    return read


def with_dhcp(read_value: Reader) -> Reader:
    """Return a reader that refuses the key without pool = "dhcp"."""

    def read(table: TomlTable, key: str) -> object:
        if table.data.get("pool") != "dhcp":
            raise table.error(key, "needs DHCP", 'pool = "dhcp"')
        return read_value(table, key)

    return read


def prefixes6(expected: str) -> Reader:
    """Return a reader for IPv6 prefixes that do not overlap."""
    read_prefixes = several(_prefix6, expected)

    def read(table: TomlTable, key: str) -> tuple[IPv6Network, ...]:
        prefixes: tuple[IPv6Network, ...] = read_prefixes(table, key)
        for first, second in combinations(prefixes, 2):
            if first.overlaps(second):
                raise table.error(key, f"{first} and {second} overlap", "separate prefixes")
        return prefixes

    return read


# Values; ValueError for a string of another form


def resolver(value: str) -> IPv4Address | IPv6Address:
    """Return the address of a resolver that a namespace can reach."""
    address = ip_address(value)
    # A namespace has a loopback of its own.
    if address.is_loopback or address.is_unspecified or address.is_multicast:
        raise ValueError(value)
    return address


def gateway4(value: str) -> IPv4Address:
    """Return the IPv4 address of a router."""
    address = IPv4Address(value)
    # The reserved block has the broadcast address of all networks.
    unusable = address.is_multicast or address.is_reserved
    if unusable or address.is_loopback or address.is_unspecified:
        raise ValueError(value)
    return address


def address6(value: str) -> IPv6Address:
    """Return the IPv6 address of a host."""
    address = IPv6Address(value)
    if address.is_unspecified or address.is_multicast:
        raise ValueError(value)
    return address


def _range4(value: str) -> AddressRange:
    if "/" in value:
        network = IPv4Network(value)
        return AddressRange(network.network_address, network.broadcast_address)
    return AddressRange(*_ends(value, IPv4Address))


def range6(value: str) -> AddressRange:
    """Return a range of IPv6 addresses: a range, an address or a subnet."""
    if "/" in value:
        network = IPv6Network(value)
        return AddressRange(network.network_address, network.broadcast_address)
    return AddressRange(*_ends(value, address6))


def _ends(value: str, make: Callable[[str], AnyAddress]) -> tuple[AnyAddress, AnyAddress]:
    first, dash, last = value.partition("-")
    start = make(first.strip())
    end = make(last.strip()) if dash else start
    if int(end) < int(start):
        raise ValueError(value)
    return start, end


def _prefix6(value: str) -> IPv6Network:
    prefix = IPv6Network(value)
    if prefix.prefixlen > 64:
        raise ValueError(value)
    return prefix


def client_id(value: str) -> str:
    """Return DHCP's option 61, octets with colons between them, in hexadecimal digits."""
    if not CLIENT_ID.fullmatch(value):
        raise ValueError(value)
    return value.replace(":", "").lower()


def helper(value: str) -> Helper:
    """Return a helper of conntrack."""
    if value not in get_args(Helper):
        raise ValueError(value)
    return cast("Helper", value)


def port_set(value: str) -> PortSet:
    """Return ports of a protocol: "tcp/22" or "udp/60000-61000"."""
    match = PORT_SET.fullmatch(value)
    if match is None:
        raise ValueError(value)
    first, last = int(match[2]), int(match[3] or match[2])
    if not 1 <= first <= last <= 65535:
        raise ValueError(value)
    return PortSet(cast("PortProtocol", match[1]), first, last)
