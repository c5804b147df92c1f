# SPDX-License-Identifier: LGPL-2.1-or-later
"""IPv6 of the networks on a router, decided when the router comes up.

The private prefix of the transit bridge (RFC 4193) is derived from the machine's id, so it is
the same each time.  The router's own address is derived likewise (RFC 7217).  Networks with
private prefixes leave by it.  The router takes an address of its own only where the host
leaves the NIC no IPv6 address.  No other station may have the address.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import IPv6Address, IPv6Network, ip_address
from socket import AF_INET6

from libvirt_natns import names
from libvirt_natns.errors import FirewallError, UpstreamError
from libvirt_natns.firewall import backends
from libvirt_natns.kernel import address_probe
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.upstream import RouterUpstream
from libvirt_natns.upstream.router.nic_snapshot import Capture

PRIVATE = 0xFD << 120
UNIQUE_LOCAL = IPv6Network("fc00::/7")
LONGEST = 120
"""The longest prefix of a subnet in which the router may take an address of its own choice."""

ALONE = 127
"""From this prefix length on, an address says nothing about a subnet around it."""

TRIES = 4
LISTENING = 0.05
"""Seconds.  Only a copy of this machine derives the same address."""


@dataclass(frozen=True, slots=True)
class Ipv6:
    """The IPv6 fields of a ``Target``; all empty where networks get no IPv6."""

    transit: str = ""
    subnet: str = ""
    own: str = ""


def choose(config: Config, wanted: RouterUpstream, before: Capture, hosts: Collection[str]) -> Ipv6:
    """Return the IPv6 of networks, for a NIC as ``before`` and ``hosts``, the host's addresses."""
    try:
        backends.choose(config.firewall, ipv6=True)
    except FirewallError:
        return Ipv6()
    subnet = wanted.subnet6 or _subnet_of(before)
    kept = {address.ip for address in before.ipv6} - set(hosts)
    own = None if kept or subnet is None else _free(wanted, before, subnet)
    if not kept and own is None:
        return Ipv6()
    return Ipv6(str(_transit(wanted, before)), str(subnet or ""), str(own or ""))


def _subnet_of(before: Capture) -> IPv6Network | None:
    """Return the subnet by which the outside knows the NIC's addresses, or None."""
    for address in before.ipv6:
        if address.prefix < ALONE and ip_address(address.ip) not in UNIQUE_LOCAL:
            return IPv6Network((address.ip, address.prefix), strict=False)
    return None


def _bits(*words: str) -> int:
    text = " ".join((names.machine_id(), *words))
    return int.from_bytes(sha256(text.encode()).digest())


def _transit(wanted: RouterUpstream, before: Capture) -> IPv6Network:
    identifier = _bits(wanted.name, before.mac, "transit") >> 216 << 80
    return IPv6Network((PRIVATE | identifier, 64))


def _free(wanted: RouterUpstream, before: Capture, subnet: IPv6Network) -> IPv6Address | None:
    """Return a free address of a subnet, or None."""
    if subnet.prefixlen > LONGEST:
        return None
    for address in _candidates(wanted, before, subnet):
        if not _is_taken(before, address):
            return address
    return None


def _candidates(
    wanted: RouterUpstream, before: Capture, subnet: IPv6Network
) -> Iterator[IPv6Address]:
    for number in range(TRIES):
        bits = _bits(wanted.name, before.mac, str(subnet), str(number))
        address = subnet[bits % subnet.num_addresses]
        if address != subnet.network_address:
            yield address


def _is_taken(before: Capture, address: IPv6Address) -> bool:
    gateways = {route.gateway for route in before.routes if route.family == AF_INET6}
    if str(address) in gateways | {address.ip for address in before.ipv6}:
        return True
    try:
        return bool(address_probe.probe(before.name, [address], LISTENING))
    except UpstreamError:
        # At a boot the NIC may be down, and no station can be asked.
        return False
