# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ``<natns:nat>`` element as a value, and what a schema cannot say about it.

The element satisfies its schema when it comes here, so every value has the
right form.  What is left: addresses that must lie in the network's subnet,
ranges that run backwards, names that dnsmasq takes for orders, claims that
meet, NICs that a guest has not.  Claims of *different* guests are not compared
here, nor are a guest's networks known: that needs the networks' bridges.
"""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_network
from itertools import pairwise
from typing import cast

from libvirt_natns.addresses import FAMILIES, Address, Family, IPNetwork, network_of
from libvirt_natns.documents.xml_values import (
    CONTROL,
    NS,
    Element,
    address_in,
    error,
    family_of,
    local_name,
    mac,
    subnet,
    value_error,
)
from libvirt_natns.model.metadata import AddressRequest, NatMetadata, PortForward, PortRange
from libvirt_natns.model.publication import PortSet, Protocol
from libvirt_natns.model.subnet import Subnet
from libvirt_natns.values import alternatives, shown

MAX_PORT = 65535

IPV6_PREFIXES = range(64, 127)
"""Those that dnsmasq serves: shorter ones it refuses, in longer ones nobody else fits."""

LARGEST_RANGE = 1 << 16
"""Addresses of a range of DHCPv6: libvirt's own limit."""

# dnsmasq reads these in the place of a host's name as orders.
DNSMASQ_KEYWORDS = {"ignore", "infinite"}


def of_domain(nat: Element, macs: Collection[str]) -> NatMetadata:
    """What the ``<natns:nat>`` of a domain whose NICs have those ``macs`` says.

    DocumentError where it makes no sense.
    """
    for element in nat:
        _check_nic(element, macs)
    return NatMetadata(forwards=_forwards(nat), addresses=_requests(nat))


def of_network(nat: Element, subnets: tuple[Subnet, ...]) -> NatMetadata:
    """What the ``<natns:nat>`` of a network with those ``<ip>``s of libvirt's says.

    DocumentError where it makes no sense, in itself or in that network.
    """
    upstream = nat.find(f"{NS}upstream")
    own = _own_subnets(nat, subnets)
    _check_targets(nat, own or subnets)
    return NatMetadata(
        enabled=nat.attrib.get("enabled") != "no",
        upstream=None if upstream is None else upstream.attrib.get("name"),
        address=None if upstream is None else _host_address(upstream, "address", 4),
        address6=None if upstream is None else _address6(upstream),
        subnets=own,
        forwards=_forwards(nat),
    )


def check_characters(nat: Element) -> None:
    """Refuse what has no place in a value or between our elements."""
    for element in nat.iter():
        if not isinstance(element.tag, str):
            raise error(nat, "has a processing instruction", "none")
        for name, value in element.attrib.items():
            if CONTROL.search(value):
                raise value_error(element, name, "a value without control characters")


def check_combinations(nat: Element) -> None:
    """Attributes that the schema refuses together, or wants one of, in plain words."""
    for ip in nat.iter(f"{NS}ip"):
        if ("prefix" in ip.attrib) == ("netmask" in ip.attrib):
            has = "both prefix and" if "prefix" in ip.attrib else "neither prefix nor"
            raise error(ip, f"has {has} netmask", "one of the two")
        if family_of(ip) == 6 and "netmask" in ip.attrib:
            raise error(ip, "has family='ipv6' and netmask", "prefix instead")
        _check_prefix(ip)
    for host in nat.iter(f"{NS}host"):
        _check_host_attributes(host)
    for element in nat:
        if {"network", "mac"} <= set(element.attrib):
            raise error(element, "has both network and mac", "one of the two at most")
    for ports in nat.findall(f"{NS}portForward/{NS}range"):
        _check_range_attributes(ports)


def _check_prefix(ip: Element) -> None:
    """The schema allows those of both families where it does not know which it is."""
    if family_of(ip) == 6 and int(ip.attrib["prefix"]) not in IPV6_PREFIXES:
        raise value_error(ip, "prefix", "a prefix length from 64 to 126")
    if family_of(ip) == 4 and int(ip.attrib.get("prefix", 1)) > 30:
        raise value_error(ip, "prefix", "a prefix length from 1 to 30, or family='ipv6'")


def _check_host_attributes(host: Element) -> None:
    if {"mac", "id"} <= set(host.attrib):
        raise error(host, "has both mac and id", "one of the two at most")
    if not {"mac", "id", "name"} & set(host.attrib):
        raise error(host, "has neither mac nor name", "at least one of the two")


def _check_range_attributes(ports: Element) -> None:
    names = set(ports.attrib)
    if "start" not in names:
        raise error(ports, "has no attribute 'start'", "a port number from 1 to 65535 or auto")
    if ports.attrib["start"] == "auto":
        for other in sorted({"end", "exclude", "toEnd"} & names):
            raise error(ports, f"has start='auto' and {other}", "one of the two at most")
        if "to" not in names:
            fact = "has start='auto' and no attribute 'to'"
            raise error(ports, fact, "the guest's port, from 1 to 65535")
    elif ports.attrib.get("exclude") == "yes" and "to" in names:
        raise error(ports, "has exclude='yes' and to", "one of the two at most")
    elif "toEnd" in names and "to" not in names:
        raise error(ports, "has toEnd and no attribute 'to'", "the guest's first port as well")


# Addresses


def _is_host_in(address: Address, network: IPNetwork) -> bool:
    """Whether a host in ``network`` may have ``address``."""
    # In IPv6 the first address is all routers', and nothing is broadcast.
    taken = {network.network_address}
    if isinstance(network, IPv4Network):
        taken.add(network.broadcast_address)
    return address in network and address not in taken


def _is_special(address: Address) -> bool:
    """Whether no host can be reached by ``address``, from other links at least."""
    if address.is_multicast or address.is_loopback or address.is_reserved:
        return True
    if isinstance(address, IPv6Address):
        return address.is_link_local
    return address in IPv4Network("0.0.0.0/8")


def _host_address(element: Element, attribute: str, family: Family | None = None) -> Address | None:
    """The address of a single host, None without the attribute."""
    if attribute not in element.attrib:
        return None
    address = address_in(element, attribute, family)
    if _is_special(address):
        raise value_error(element, attribute, "the address of a single host")
    return address


def _address6(upstream: Element) -> IPv6Address | None:
    address = _host_address(upstream, "address6", 6)
    return address if isinstance(address, IPv6Address) else None


# <natns:ip>


def _own_subnets(nat: Element, others: tuple[Subnet, ...]) -> tuple[Subnet, ...]:
    found: dict[Family, Element] = {}
    for element in nat.findall(f"{NS}ip"):
        if others:
            fact = f"address={shown(element.attrib['address'])} stands beside libvirt's own "
            fact += f"<ip address={shown(str(others[0].gateway))}>"
            raise error(element, fact, "one of the two: remove the other")
        first = found.setdefault(family_of(element), element)
        if first is not element:
            fact = f"is the second of IPv{family_of(element)}, after the one in line "
            raise error(element, f"{fact}{first.sourceline}", "one of each family at most")
    return tuple(_own_subnet(each) for each in found.values())


def _own_subnet(element: Element) -> Subnet:
    own = subnet(element, NS)
    network = own.network
    if network.version == 4 and not 1 <= network.prefixlen <= 30:
        raise value_error(element, "netmask", "one from 128.0.0.0 to 255.255.255.252")
    if not _is_host_in(own.gateway, network) or _is_special(own.gateway):
        raise value_error(element, "address", f"a host's address in {network}")
    for each in element.iter(f"{NS}range"):
        _check_range(each, own)
    for each in element.iter(f"{NS}host"):
        _check_host(each, own)
    _check_unique(element)
    return own


def _check_range(element: Element, own: Subnet) -> None:
    network = own.network
    first, last = (address_in(element, end, own.gateway.version) for end in ("start", "end"))
    for end, address in (("start", first), ("end", last)):
        if not _is_host_in(address, network):
            raise value_error(element, end, f"a host's address in {network}")
    if int(first) > int(last):
        raise value_error(element, "end", f"{element.attrib['start']} or higher")
    if isinstance(first, IPv6Address) and int(last) - int(first) >= LARGEST_RANGE:
        highest = IPv6Address(int(first) + LARGEST_RANGE - 1)
        raise value_error(element, "end", f"{highest} at most, for {LARGEST_RANGE} addresses")


def _check_host(element: Element, own: Subnet) -> None:
    address = address_in(element, "ip", own.gateway.version)
    if not _is_host_in(address, own.network):
        raise value_error(element, "ip", f"a host's address in {own.network}")
    if address == own.gateway:
        raise value_error(element, "ip", "an address other than the gateway's")
    if element.attrib.get("name", "").lower() in DNSMASQ_KEYWORDS:
        raise value_error(element, "name", "a name that is no keyword of dnsmasq's")
    if "id" in element.attrib and own.gateway.version == 4:
        raise error(element, "has an attribute 'id'", "it with family='ipv6' only")


def _check_unique(ip: Element) -> None:
    """No two fixed addresses alike: dnsmasq would not start."""
    lines: dict[Address | str, int] = {}
    for element in ip.iter(f"{NS}host"):
        given = {
            each: element.attrib[each].lower() for each in ("mac", "id") if each in element.attrib
        }
        for attribute, value in {"ip": address_in(element, "ip"), **given}.items():
            if value in lines:
                expected = f"another than the <natns:host> in line {lines[value]}"
                raise value_error(element, attribute, expected)
            lines[value] = element.sourceline


# <natns:portForward>


def _forwards(nat: Element) -> tuple[PortForward, ...]:
    found = [(_forward(each), each) for each in nat.findall(f"{NS}portForward")]
    _check_claims(found)
    _check_chosen(found)
    return tuple(forward for forward, _ in found)


def _forward(element: Element) -> PortForward:
    ranges = [(_port_range(each), each) for each in element.findall(f"{NS}range")]
    _check_ranges(element, ranges)
    forward = PortForward(
        proto=_protocol(element),
        ranges=tuple(ports for ports, _ in ranges),
        address=_listen_address(element),
        network=element.attrib.get("network"),
        mac=mac(element.attrib.get("mac")),
        guest_address=_host_address(element, "guestAddress"),
        sources=_sources(element),
    )
    _check_family(element, forward)
    return forward


def _check_family(element: Element, forward: PortForward) -> None:
    """Nothing is translated from one family into the other."""
    found = {"address": forward.address, "guestAddress": forward.guest_address}
    named = {name: each.version for name, each in found.items() if each is not None}
    named |= {f"source {each}": each.version for each in forward.sources}
    for name, version in named.items():
        if version != forward.family:
            first = next(iter(named))
            fact = f"has {first} in IPv{forward.family} and {name} in IPv{version}"
            raise error(element, fact, "one family in all of a forward")


def _protocol(element: Element) -> Protocol:
    return cast("Protocol", element.attrib.get("proto", "tcp"))


def _listen_address(element: Element) -> Address | None:
    if "address" in element.attrib:
        # With the upstream "host", forwards listen on the host's own addresses.  The
        # kernel lets nobody leave from ::1.
        address = address_in(element, "address")
        if isinstance(address, IPv4Address) and address.is_loopback:
            return address
    return _host_address(element, "address")


def _port_range(element: Element) -> PortRange:
    if element.attrib["start"] == "auto":
        return PortRange(0, 0, int(element.attrib["to"]), auto=True)
    start, end = _ports(element)
    to = int(element.attrib.get("to", start))
    to_end = int(element.attrib.get("toEnd", to + end - start))
    if "toEnd" in element.attrib and to_end not in (to, to + end - start):
        ways = f"{to + end - start}, for {end - start + 1} ports, or {to}, for one"
        raise value_error(element, "toEnd", ways)
    if to_end > MAX_PORT:
        expected = f"{MAX_PORT - (end - start)} at most, for {end - start + 1} ports"
        raise value_error(element, "to", expected)
    excluded = element.attrib.get("exclude") == "yes"
    return PortRange(start, end, to, exclude=excluded, onto_one=to_end == to and end > start)


def _ports(element: Element) -> tuple[int, int]:
    """The first and the last port of a range."""
    start = int(element.attrib["start"])
    end = int(element.attrib.get("end", start))
    if end < start:
        raise value_error(element, "end", f"{start} or higher")
    return start, end


def _check_apart(elements: list[Element]) -> None:
    """No port stands in two of the ranges."""
    ranges = sorted(((*_ports(each), each) for each in elements), key=lambda item: item[:2])
    for (_, end, first), (start, _, second) in pairwise(ranges):
        if start <= end:
            other = f"<natns:{local_name(first.tag)}> in line {first.sourceline}"
            raise value_error(second, "start", f"ports other than those of the {other}")


def _check_ranges(forward: Element, ranges: list[tuple[PortRange, Element]]) -> None:
    """Every port of a forward has one target, and there is one to forward."""
    if all(ports.exclude for ports, _ in ranges):
        raise error(forward, "has ranges with exclude='yes' only", "at least one without")
    _check_apart([each for ports, each in ranges if not (ports.exclude or ports.auto)])


def _listeners(forward: PortForward) -> list[tuple[object, ...]]:
    """Where a forward's ports are published, as far as the metadata tells."""
    # One that names no family is for both.
    families = FAMILIES if forward.family is None else (forward.family,)
    place = (forward.proto, forward.address, forward.network, forward.mac)
    return [(family, *place) for family in families]


def _published(forward: PortForward) -> int:
    """The ports that a forward names and does not exclude: bit N for port N."""
    published = excluded = 0
    for ports in forward.ranges:
        bits = ((1 << (ports.end - ports.start + 1)) - 1) << ports.start
        if ports.exclude:
            excluded |= bits
        elif not ports.auto:
            published |= bits
    return published & ~excluded


def _check_claims(forwards: list[tuple[PortForward, Element]]) -> None:
    """No port stands in two forwards that listen in the same place."""
    claimed: dict[tuple[object, ...], int] = {}
    for forward, element in forwards:
        for listener in _listeners(forward):
            both = _published(forward) & claimed.get(listener, 0)
            if both:
                line = _first_claim(forwards, listener, both)
                fact = f"publishes {forward.proto} port {(both & -both).bit_length() - 1}"
                raise error(element, fact, f"ports other than those of the one in line {line}")
            claimed[listener] = claimed.get(listener, 0) | _published(forward)


def _first_claim(
    forwards: list[tuple[PortForward, Element]], listener: tuple[object, ...], ports: int
) -> int:
    """The line of the first forward that claims some of those ports."""
    return next(
        element.sourceline
        for forward, element in forwards
        if listener in _listeners(forward) and _published(forward) & ports
    )


def _check_chosen(forwards: list[tuple[PortForward, Element]]) -> None:
    """No port of a guest is published at a chosen port twice: which is which?"""
    chosen: set[tuple[object, ...]] = set()
    for forward, element in forwards:
        for ports in (each for each in forward.ranges if each.auto):
            place = (forward.proto, forward.address, forward.network, forward.mac)
            key = (*place, forward.guest_address, ports.to)
            if key in chosen:
                fact = f"has start='auto' to='{ports.to}', for {forward.proto}, a second time"
                raise error(element, fact, "each port of the guest once")
            chosen.add(key)


def _sources(element: Element) -> tuple[IPNetwork, ...]:
    texts = element.attrib.get("source", "").replace(",", " ").split()
    try:
        return tuple(network_of(text) for text in texts)
    except ValueError:
        # The schema saw to the form; what is left are host bits beside the prefix.
        right = [str(ip_network(text, strict=False)) for text in texts]
        raise value_error(element, "source", f"whole subnets: {', '.join(right)}") from None


def _check_nic(element: Element, macs: Collection[str]) -> None:
    """The NIC that an element selects by its MAC is one of the guest's."""
    if "mac" in element.attrib and mac(element.attrib["mac"]) not in macs:
        known = f": {alternatives(macs)}" if macs else ", of which there is none"
        expected = f"the MAC address of a NIC of the guest's in a network or on a bridge{known}"
        raise value_error(element, "mac", expected)


def _check_targets(nat: Element, subnets: tuple[Subnet, ...]) -> None:
    """A network's own forwards go to guests in it."""
    for each in nat.findall(f"{NS}portForward"):
        address = address_in(each, "guestAddress")
        if not any(_is_guest(address, subnet) for subnet in subnets):
            networks = [str(subnet.network) for subnet in subnets]
            place = alternatives(networks) if networks else "an <ip>, which is missing"
            raise value_error(each, "guestAddress", f"a guest's address in {place}")


def _is_guest(address: Address, subnet: Subnet) -> bool:
    return _is_host_in(address, subnet.network) and address != subnet.gateway


# <natns:address>


def _requests(nat: Element) -> tuple[AddressRequest, ...]:
    lines: dict[tuple[object, ...], int] = {}
    requests = []
    for element in nat.findall(f"{NS}address"):
        request = _request(element)
        # "auto" is of IPv4, but where the network has none.
        family = request.address.version if request.address else 4
        selector = (request.network, request.mac, family)
        if selector in lines:
            fact = f"selects the same NIC as the one in line {lines[selector]}"
            raise error(element, fact, "another network or mac")
        lines[selector] = element.sourceline
        requests.append(request)
    return tuple(requests)


def _request(element: Element) -> AddressRequest:
    auto = element.attrib.get("address", "auto") == "auto"
    return AddressRequest(
        address=None if auto else _host_address(element, "address"),
        network=element.attrib.get("network"),
        mac=mac(element.attrib.get("mac")),
        ports=_allowed(element),
    )


def _allowed(element: Element) -> tuple[PortSet, ...]:
    allowed = [(_protocol(each), each) for each in element.findall(f"{NS}allow")]
    for proto in dict.fromkeys(proto for proto, _ in allowed):
        _check_apart([each for other, each in allowed if other == proto])
    return tuple(PortSet(proto, *_ports(each)) for proto, each in allowed)


__all__ = ["check_characters", "check_combinations", "of_domain", "of_network"]
