# SPDX-License-Identifier: LGPL-2.1-or-later
"""What networks on a router get in IPv6, decided when it comes up.

The private prefix of the transit bridge is made of what is this machine's alone, as
RFC 4193 has it, so it is the same each time.  So is the router's own address, as
RFC 7217 makes one: networks whose prefixes others may have, too, leave by it.  It is
taken only where the host leaves the NIC none, and where nobody else has it.
"""

from collections.abc import Collection, Iterator
from hashlib import sha256
from ipaddress import IPv6Address, IPv6Network, ip_address

from libvirt_natns import firewall, names
from libvirt_natns.errors import FirewallError, UpstreamError
from libvirt_natns.kernel import address_probe
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.upstream import Upstream
from libvirt_natns.records import dataclass
from libvirt_natns.upstream.router import nic_objects
from libvirt_natns.upstream.router.nic import Capture

PRIVATE = 0xFD << 120
UNIQUE_LOCAL = IPv6Network("fc00::/7")
LONGEST = 120
"""Of a subnet in which an address that nobody gave us may be taken."""

ALONE = 127
"""The prefix length from which an address tells nothing of what is around it."""

TRIES = 4
LISTENING = 0.05
"""Seconds.  Nobody else has an address that was made of a hash, but for a copy of this machine."""


@dataclass(frozen=True, slots=True)
class Ipv6:
    """As in ``Target``; all empty where networks get none."""

    transit: str = ""
    subnet: str = ""
    own: str = ""


def choose(config: Config, wanted: Upstream, before: Capture, hosts: Collection[str]) -> Ipv6:
    """What networks get, where the NIC is like that and ``hosts`` are the host's addresses."""
    try:
        firewall.choose(config.firewall, ipv6=True)
    except FirewallError:
        return Ipv6()
    subnet = wanted.subnet6 or _subnet_of(before)
    kept = {each.ip for each in before.ipv6} - set(hosts)
    own = None if kept or subnet is None else _free(wanted, before, subnet)
    if not kept and own is None:
        return Ipv6()
    return Ipv6(str(_transit(wanted, before)), str(subnet or ""), str(own or ""))


def _subnet_of(before: Capture) -> IPv6Network | None:
    """The subnet that the outside knows the NIC's addresses by."""
    for each in before.ipv6:
        if each.prefix < ALONE and ip_address(each.ip) not in UNIQUE_LOCAL:
            return IPv6Network((each.ip, each.prefix), strict=False)
    return None


def _bits(*words: str) -> int:
    text = " ".join((names.machine_id(), *words))
    return int.from_bytes(sha256(text.encode()).digest())


def _transit(wanted: Upstream, before: Capture) -> IPv6Network:
    identifier = _bits(wanted.name, before.mac, "transit") >> 216 << 80
    return IPv6Network((PRIVATE | identifier, 64))


def _free(wanted: Upstream, before: Capture, subnet: IPv6Network) -> IPv6Address | None:
    """An address of a subnet that is nobody's; None where there is none for us."""
    if subnet.prefixlen > LONGEST:
        return None
    for address in _candidates(wanted, before, subnet):
        if not _is_taken(before, address):
            return address
    return None


def _candidates(wanted: Upstream, before: Capture, subnet: IPv6Network) -> Iterator[IPv6Address]:
    for number in range(TRIES):
        bits = _bits(wanted.name, before.mac, str(subnet), str(number))
        address = subnet[bits % subnet.num_addresses]
        if address != subnet.network_address:
            yield address


def _is_taken(before: Capture, address: IPv6Address) -> bool:
    gateways = {each.gateway for each in before.routes if each.family == nic_objects.AF_INET6}
    if str(address) in gateways | {each.ip for each in before.ipv6}:
        return True
    try:
        return bool(address_probe.probe(before.name, [address], LISTENING))
    except UpstreamError:
        # At a boot, when the NIC has not been set up yet, nobody can be asked.
        return False
