# SPDX-License-Identifier: LGPL-2.1-or-later
"""``<natns:portForward>`` of a network or guest, and the checks that a schema cannot make.

A forward has addresses of one family.  No port stands in two forwards that listen in the
same place.  Forwards of *different* guests are not compared here: the state database
refuses the second claim.
"""

from libvirt_natns.addresses import FAMILIES
from libvirt_natns.documents.xml_attributes import ForwardXml
from libvirt_natns.documents.xml_ports import check_apart, port_range
from libvirt_natns.documents.xml_values import (
    NS,
    Element,
    address_in,
    error,
    is_host_in,
    value_error,
)
from libvirt_natns.model.metadata import PortForward, PortRange
from libvirt_natns.model.subnet import Subnet
from libvirt_natns.values import alternatives


def forwards(nat: Element) -> tuple[PortForward, ...]:
    """Return the forwards of a network or guest; DocumentError for a forward that is refused."""
    pairs = [(_forward(element), element) for element in nat.findall(f"{NS}portForward")]
    _check_claims(pairs)
    _check_chosen(pairs)
    return tuple(forward for forward, _ in pairs)


def check_targets(nat: Element, subnets: tuple[Subnet, ...]) -> None:
    """Refuse a network's own forward to an address that no guest in it can have."""
    for element in nat.findall(f"{NS}portForward"):
        address = address_in(element, ForwardXml.guest_address.name)
        if not any(
            is_host_in(address, subnet.network) and address != subnet.gateway for subnet in subnets
        ):
            networks = [str(subnet.network) for subnet in subnets]
            place = alternatives(networks) if networks else "an <ip>, but the network has none"
            raise value_error(
                element, ForwardXml.guest_address.name, f"the address of a guest in {place}"
            )


def _forward(element: Element) -> PortForward:
    ranges = [(port_range(child), child) for child in element.findall(f"{NS}range")]
    _check_ranges(element, ranges)
    forward = PortForward(
        proto=ForwardXml.proto.of(element),
        ranges=tuple(ports for ports, _ in ranges),
        address=ForwardXml.address.of(element),
        network=ForwardXml.network.of(element),
        mac=ForwardXml.mac.of(element),
        guest_address=ForwardXml.guest_address.of(element),
        sources=ForwardXml.source.of(element),
    )
    _check_family(element, forward)
    return forward


def _check_family(element: Element, forward: PortForward) -> None:
    """Refuse addresses of both families: no family is translated into the other."""
    addresses = {"address": forward.address, "guestAddress": forward.guest_address}
    versions = {name: address.version for name, address in addresses.items() if address is not None}
    versions |= {f"source {source}": source.version for source in forward.sources}
    for name, version in versions.items():
        if version != forward.family:
            first = next(iter(versions))
            fact = f"has {first} in IPv{forward.family} and {name} in IPv{version}"
            raise error(element, fact, "addresses of one family")


def _check_ranges(forward: Element, ranges: list[tuple[PortRange, Element]]) -> None:
    """Refuse a port with two targets, and a forward without ports."""
    if all(ports.exclude for ports, _ in ranges):
        raise error(
            forward, "has ranges with exclude='yes' only", "at least one range without exclude"
        )
    check_apart([child for ports, child in ranges if not (ports.exclude or ports.auto)])


def _check_claims(forwards: list[tuple[PortForward, Element]]) -> None:
    """Refuse a port in two forwards that listen in the same place."""
    claimed: dict[tuple[object, ...], int] = {}
    for forward, element in forwards:
        for listener in _listeners(forward):
            both = _published(forward) & claimed.get(listener, 0)
            if both:
                line = _first_claim(forwards, listener, both)
                fact = f"publishes {forward.proto} port {(both & -both).bit_length() - 1}"
                raise error(element, fact, f"ports other than those in line {line}")
            claimed[listener] = claimed.get(listener, 0) | _published(forward)


def _first_claim(
    forwards: list[tuple[PortForward, Element]], listener: tuple[object, ...], ports: int
) -> int:
    """Return the line of the first forward that claims some of ``ports``."""
    return next(
        element.sourceline
        for forward, element in forwards
        if listener in _listeners(forward) and _published(forward) & ports
    )


def _listeners(forward: PortForward) -> list[tuple[object, ...]]:
    """Return the places where a forward's ports are published, as the metadata says."""
    # A forward without addresses is for both families.
    families = FAMILIES if forward.family is None else (forward.family,)
    place = (forward.proto, forward.address, forward.network, forward.mac)
    return [(family, *place) for family in families]


def _published(forward: PortForward) -> int:
    """Return the ports that a forward names and does not exclude: bit N for port N."""
    published = excluded = 0
    for ports in forward.ranges:
        bits = ((1 << (ports.end - ports.start + 1)) - 1) << ports.start
        if ports.exclude:
            excluded |= bits
        elif not ports.auto:
            published |= bits
    return published & ~excluded


def _check_chosen(forwards: list[tuple[PortForward, Element]]) -> None:
    """Refuse two chosen ports for one port of a guest: nothing tells them apart."""
    chosen: set[tuple[object, ...]] = set()
    for forward, element in forwards:
        for ports in (span for span in forward.ranges if span.auto):
            place = (forward.proto, forward.address, forward.network, forward.mac)
            key = (*place, forward.guest_address, ports.to)
            if key in chosen:
                fact = f"has start='auto' to='{ports.to}', for {forward.proto}, a second time"
                raise error(element, fact, "each port of the guest once")
            chosen.add(key)
