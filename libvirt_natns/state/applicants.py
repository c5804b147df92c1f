# SPDX-License-Identifier: LGPL-2.1-or-later
"""Applicants for upstream addresses, and the addresses that no applicant may have."""

from dataclasses import dataclass

from libvirt_natns.addresses import Address, Family
from libvirt_natns.errors import LeaseError
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import Segment
from libvirt_natns.values import quoted


@dataclass(frozen=True, slots=True)
class Applicant:
    """A network that leases an upstream address, or a guest that leases its own address.

    ``key`` is the lease's key in the state database, ``who`` the applicant's name in messages.
    The ``wanted`` address stands in ``attribute`` of ``element``.
    """

    key: str
    who: str
    wanted: Address | None = None
    element: str = "natns:upstream"
    attribute: str = "address"
    family: Family = 4


def applicant(network: Network, family: Family = 4) -> Applicant:
    """Return a network as the applicant for its upstream address of a family."""
    return Applicant(
        network.uuid,
        f"network {quoted(network.name)}",
        wanted_address(network, family),
        attribute="address" if family == 4 else "address6",
        family=family,
    )


def wanted_address(network: Network, family: Family) -> Address | None:
    """Return the upstream address that a network's metadata asks for."""
    if network.nat is None:
        return None
    return network.nat.address if family == 4 else network.nat.address6


def check_wanted(who: Applicant, segment: Segment, wanted: Address) -> None:
    """Refuse an upstream address that an applicant asks for and cannot have.

    Raises LeaseError.
    """
    side = segment.side(who.family)
    reserved = reserved_addresses(segment, who.family)
    if side.prefix_length is None:
        problem = f"is refused, as the upstream has no IPv{who.family} subnet"
    elif not side.holds(wanted):
        problem = f"is not in its {f'subnet {side.subnet}' if side.subnet else 'pool'}"
    elif wanted in reserved:
        problem = f"is its {reserved[wanted]}"
    else:
        return
    raise LeaseError(
        f"{who.who}: the wanted address {wanted} of upstream {segment.name} {problem}",
        f"choose another address in <{who.element} {who.attribute}='...'/>",
    )


def can_keep(address: Address, segment: Segment) -> bool:
    """True if a network that runs can keep its address, inside the pool or not."""
    side = segment.side_of(address)
    return side.holds(address) and address not in reserved_addresses(segment, side.family)


def reserved_addresses(segment: Segment, family: Family = 4) -> dict[Address, str]:
    """Return the addresses of an upstream's subnet that no network may have, with their use."""
    side = segment.side(family)
    reserved: dict[Address, str] = {}
    if side.subnet is not None and side.subnet.prefixlen < side.subnet.max_prefixlen - 1:
        if family == 4:
            reserved[side.subnet.broadcast_address] = "broadcast address"
        # In IPv6 the first address means any router there (RFC 4291, 2.6.1).
        first = "network address" if family == 4 else "anycast address"
        reserved[side.subnet.network_address] = first
    for server in segment.dns:
        if server.version == family:
            reserved[server] = "DNS server"
    if side.gateway is not None:
        reserved[side.gateway] = "gateway"
    return reserved
