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
from ipaddress import IPv4Network
from itertools import pairwise
from typing import cast

from libvirt_natns.addresses import Address, IPNetwork
from libvirt_natns.elements import (
    CONTROL,
    NS,
    Element,
    error,
    ipv4,
    local_name,
    mac,
    subnet,
    value_error,
)
from libvirt_natns.model import (
    AddressRequest,
    NatMetadata,
    PortForward,
    PortRange,
    PortSet,
    Protocol,
    Subnet,
)
from libvirt_natns.values import alternatives, shown

MAX_PORT = 65535

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
    upstream, ip = nat.find(f"{NS}upstream"), nat.find(f"{NS}ip")
    own = None if ip is None else _own_subnet(ip, subnets)
    _check_targets(nat, (own,) if own else subnets)
    return NatMetadata(
        enabled=nat.attrib.get("enabled") != "no",
        upstream=None if upstream is None else upstream.attrib.get("name"),
        address=None if upstream is None else _host_address(upstream, "address"),
        subnet=own,
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
    for host in nat.iter(f"{NS}host"):
        if not {"mac", "name"} & set(host.attrib):
            raise error(host, "has neither mac nor name", "at least one of the two")
    for element in nat:
        if {"network", "mac"} <= set(element.attrib):
            raise error(element, "has both network and mac", "one of the two at most")
    for ports in nat.findall(f"{NS}portForward/{NS}range"):
        _check_range_attributes(ports)


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
    ends = (network.network_address, network.broadcast_address)
    return address in network and address not in ends


def _is_special(address: Address) -> bool:
    """Whether no host can be reached by ``address``."""
    return (
        address.is_multicast
        or address.is_loopback
        or address.is_reserved
        or address in IPv4Network("0.0.0.0/8")
    )


def _host_address(element: Element, attribute: str) -> Address | None:
    """The address of a single host, None without the attribute."""
    if attribute not in element.attrib:
        return None
    address = ipv4(element, attribute)
    if _is_special(address):
        raise value_error(element, attribute, "the address of a single host")
    return address


# <natns:ip>


def _own_subnet(element: Element, others: tuple[Subnet, ...]) -> Subnet:
    if others:
        fact = f"address={shown(element.attrib['address'])} stands beside libvirt's own "
        fact += f"<ip address={shown(str(others[0].gateway))}>"
        raise error(element, fact, "one of the two: remove the other")
    own = subnet(element, NS)
    network = own.network
    if not 1 <= network.prefixlen <= 30:
        raise value_error(element, "netmask", "one from 128.0.0.0 to 255.255.255.252")
    if not _is_host_in(own.gateway, network) or _is_special(own.gateway):
        raise value_error(element, "address", f"a host's address in {network}")
    for each in element.iter(f"{NS}range"):
        _check_range(each, network)
    for each in element.iter(f"{NS}host"):
        _check_host(each, own)
    _check_unique(element)
    return own


def _check_range(element: Element, network: IPNetwork) -> None:
    for end in ("start", "end"):
        if not _is_host_in(ipv4(element, end), network):
            raise value_error(element, end, f"a host's address in {network}")
    if int(ipv4(element, "start")) > int(ipv4(element, "end")):
        raise value_error(element, "end", f"{element.attrib['start']} or higher")


def _check_host(element: Element, own: Subnet) -> None:
    address = ipv4(element, "ip")
    if not _is_host_in(address, own.network):
        raise value_error(element, "ip", f"a host's address in {own.network}")
    if address == own.gateway:
        raise value_error(element, "ip", "an address other than the gateway's")
    if element.attrib.get("name", "").lower() in DNSMASQ_KEYWORDS:
        raise value_error(element, "name", "a name that is no keyword of dnsmasq's")


def _check_unique(ip: Element) -> None:
    """No two fixed addresses alike: dnsmasq would not start."""
    lines: dict[str, int] = {}
    for element in ip.iter(f"{NS}host"):
        for attribute in {"ip", "mac"} & set(element.attrib):
            value = element.attrib[attribute].lower()
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
    return PortForward(
        proto=_protocol(element),
        ranges=tuple(ports for ports, _ in ranges),
        address=_listen_address(element),
        network=element.attrib.get("network"),
        mac=mac(element.attrib.get("mac")),
        guest_address=_host_address(element, "guestAddress"),
        sources=_sources(element),
    )


def _protocol(element: Element) -> Protocol:
    return cast("Protocol", element.attrib.get("proto", "tcp"))


def _listen_address(element: Element) -> Address | None:
    # With the upstream "host", forwards listen on the host's own addresses.
    if "address" in element.attrib and ipv4(element, "address").is_loopback:
        return ipv4(element, "address")
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


def _listener(forward: PortForward) -> tuple[object, ...]:
    """Where a forward's ports are published, as far as the metadata tells."""
    return forward.proto, forward.address, forward.network, forward.mac


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
        listener, ports = _listener(forward), _published(forward)
        both = ports & claimed.get(listener, 0)
        if both:
            line = next(
                each.sourceline
                for other, each in forwards
                if _listener(other) == listener and _published(other) & both
            )
            fact = f"publishes {forward.proto} port {(both & -both).bit_length() - 1}"
            raise error(element, fact, f"ports other than those of the one in line {line}")
        claimed[listener] = claimed.get(listener, 0) | ports


def _check_chosen(forwards: list[tuple[PortForward, Element]]) -> None:
    """No port of a guest is published at a chosen port twice: which is which?"""
    chosen: set[tuple[object, ...]] = set()
    for forward, element in forwards:
        for ports in (each for each in forward.ranges if each.auto):
            key = (*_listener(forward), forward.guest_address, ports.to)
            if key in chosen:
                fact = f"has start='auto' to='{ports.to}', for {forward.proto}, a second time"
                raise error(element, fact, "each port of the guest once")
            chosen.add(key)


def _sources(element: Element) -> tuple[IPNetwork, ...]:
    texts = element.attrib.get("source", "").replace(",", " ").split()
    try:
        return tuple(IPv4Network(text) for text in texts)
    except ValueError:
        # The schema saw to the form; what is left are host bits beside the prefix.
        right = [str(IPv4Network(text, strict=False)) for text in texts]
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
        address = ipv4(each, "guestAddress")
        if not any(_is_guest(address, subnet) for subnet in subnets):
            networks = [str(subnet.network) for subnet in subnets]
            place = alternatives(networks) if networks else "an <ip>, which is missing"
            raise value_error(each, "guestAddress", f"a guest's address in {place}")


def _is_guest(address: Address, subnet: Subnet) -> bool:
    return _is_host_in(address, subnet.network) and address != subnet.gateway


# <natns:address>


def _requests(nat: Element) -> tuple[AddressRequest, ...]:
    lines: dict[tuple[str | None, str | None], int] = {}
    requests = []
    for element in nat.findall(f"{NS}address"):
        request = _request(element)
        selector = (request.network, request.mac)
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
