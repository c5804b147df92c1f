# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ``<natns:nat>`` element as a value, and what a schema cannot say about it.

The element satisfies its schema when it comes here, so every value has the
right form.  What is left: addresses that must lie in the network's subnet,
ranges that run backwards, names that dnsmasq takes for orders, claims that
meet.  Claims of *different* guests are not compared here.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from itertools import pairwise
from typing import cast

from libvirt_natns.elements import (
    CONTROL,
    NS,
    Element,
    error,
    ipv4,
    mac,
    subnet,
    value_error,
)
from libvirt_natns.model import NatMetadata, PortForward, PortRange, Protocol, Subnet
from libvirt_natns.values import alternatives, shown

MAX_PORT = 65535

# dnsmasq reads these in the place of a host's name as orders.
DNSMASQ_KEYWORDS = {"ignore", "infinite"}


def of_domain(nat: Element) -> NatMetadata:
    """What a domain's ``<natns:nat>`` says; DocumentError where it makes no sense."""
    return NatMetadata(forwards=_forwards(nat))


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
    for forward in nat.iter(f"{NS}portForward"):
        if {"network", "mac"} <= set(forward.attrib):
            raise error(forward, "has both network and mac", "one of the two at most")
        for ports in forward.iter(f"{NS}range"):
            if ports.attrib.get("exclude") == "yes" and "to" in ports.attrib:
                raise error(ports, "has exclude='yes' and to", "one of the two at most")


# Addresses


def _is_host_in(address: IPv4Address, network: IPv4Network) -> bool:
    """Whether a host in ``network`` may have ``address``."""
    ends = (network.network_address, network.broadcast_address)
    return address in network and address not in ends


def _is_special(address: IPv4Address) -> bool:
    """Whether no host can be reached by ``address``."""
    return (
        address.is_multicast
        or address.is_loopback
        or address.is_reserved
        or address in IPv4Network("0.0.0.0/8")
    )


def _host_address(element: Element, attribute: str) -> IPv4Address | None:
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


def _check_range(element: Element, network: IPv4Network) -> None:
    for end in ("start", "end"):
        if not _is_host_in(ipv4(element, end), network):
            raise value_error(element, end, f"a host's address in {network}")
    if ipv4(element, "start") > ipv4(element, "end"):
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
    return tuple(_forward(each) for each in nat.findall(f"{NS}portForward"))


def _forward(element: Element) -> PortForward:
    ranges = [(_port_range(each), each) for each in element.findall(f"{NS}range")]
    _check_ranges(element, ranges)
    return PortForward(
        proto=cast("Protocol", element.attrib.get("proto", "tcp")),
        ranges=tuple(ports for ports, _ in ranges),
        address=_listen_address(element),
        network=element.attrib.get("network"),
        mac=mac(element.attrib.get("mac")),
        guest_address=_host_address(element, "guestAddress"),
        sources=_sources(element),
    )


def _listen_address(element: Element) -> IPv4Address | None:
    # With the upstream "host", forwards listen on the host's own addresses.
    if "address" in element.attrib and ipv4(element, "address").is_loopback:
        return ipv4(element, "address")
    return _host_address(element, "address")


def _port_range(element: Element) -> PortRange:
    start = int(element.attrib["start"])
    end = int(element.attrib.get("end", start))
    to = int(element.attrib.get("to", start))
    if end < start:
        raise value_error(element, "end", f"{start} or higher")
    if to + end - start > MAX_PORT:
        expected = f"{MAX_PORT - (end - start)} at most, for {end - start + 1} ports"
        raise value_error(element, "to", expected)
    return PortRange(start, end, to, exclude=element.attrib.get("exclude") == "yes")


def _check_ranges(forward: Element, ranges: list[tuple[PortRange, Element]]) -> None:
    """Every port of a forward has one target, and there is one to forward."""
    published = [(ports, each) for ports, each in ranges if not ports.exclude]
    if not published:
        raise error(forward, "has ranges with exclude='yes' only", "at least one without")
    published.sort(key=lambda item: item[0].start)
    for (one, first), (other, second) in pairwise(published):
        if other.start <= one.end:
            expected = f"ports other than those of the <natns:range> in line {first.sourceline}"
            raise value_error(second, "start", expected)


def _sources(element: Element) -> tuple[IPv4Network, ...]:
    texts = element.attrib.get("source", "").replace(",", " ").split()
    try:
        return tuple(IPv4Network(text) for text in texts)
    except ValueError:
        # The schema saw to the form; what is left are host bits beside the prefix.
        right = [str(IPv4Network(text, strict=False)) for text in texts]
        raise value_error(element, "source", f"whole subnets: {', '.join(right)}") from None


def _check_targets(nat: Element, subnets: tuple[Subnet, ...]) -> None:
    """A network's own forwards go to guests in it."""
    for each in nat.findall(f"{NS}portForward"):
        address = ipv4(each, "guestAddress")
        if not any(_is_guest(address, subnet) for subnet in subnets):
            networks = [str(subnet.network) for subnet in subnets]
            place = alternatives(networks) if networks else "an <ip>, which is missing"
            raise value_error(each, "guestAddress", f"a guest's address in {place}")


def _is_guest(address: IPv4Address, subnet: Subnet) -> bool:
    return _is_host_in(address, subnet.network) and address != subnet.gateway


__all__ = ["check_characters", "check_combinations", "of_domain", "of_network"]
