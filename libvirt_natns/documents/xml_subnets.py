# SPDX-License-Identifier: LGPL-2.1-or-later
"""``<natns:ip>`` of a network, and the checks that a schema cannot make.

Addresses lie in the subnet, ranges do not run backwards, and no fixed address stands
twice.  No host has a name that dnsmasq reads as a keyword.
"""

from ipaddress import IPv6Address

from libvirt_natns.addresses import Address, Family
from libvirt_natns.documents.xml_values import (
    NS,
    Element,
    address_in,
    error,
    family_of,
    is_host_in,
    is_special,
    subnet,
    value_error,
)
from libvirt_natns.model.subnet import Subnet
from libvirt_natns.values import shown

LARGEST_RANGE = 1 << 16
"""Addresses of a range of DHCPv6: libvirt's own limit."""

# dnsmasq reads these in the place of a host's name as orders.
DNSMASQ_KEYWORDS = {"ignore", "infinite"}


def own_subnets(nat: Element, others: tuple[Subnet, ...]) -> tuple[Subnet, ...]:
    """Return the subnets of ``<natns:ip>``; ``others`` come from libvirt's ``<ip>``.

    DocumentError for a subnet that is refused, and for both kinds in one network.
    """
    by_family: dict[Family, Element] = {}
    for element in nat.findall(f"{NS}ip"):
        if others:
            fact = f"address={shown(element.attrib['address'])} is set beside libvirt's own "
            fact += f"<ip address={shown(str(others[0].gateway))}>"
            raise error(element, fact, "either <ip> or <natns:ip>")
        first = by_family.setdefault(family_of(element), element)
        if first is not element:
            fact = f"is the second IPv{family_of(element)} subnet, after line "
            raise error(element, f"{fact}{first.sourceline}", "at most one of each family")
    return tuple(_own_subnet(element) for element in by_family.values())


def _own_subnet(element: Element) -> Subnet:
    own = subnet(element, NS)
    network = own.network
    if network.version == 4 and not 1 <= network.prefixlen <= 30:
        raise value_error(element, "netmask", "a netmask from 128.0.0.0 to 255.255.255.252")
    if not is_host_in(own.gateway, network) or is_special(own.gateway):
        raise value_error(element, "address", f"a host address in {network}")
    for span in element.iter(f"{NS}range"):
        _check_range(span, own)
    for host in element.iter(f"{NS}host"):
        _check_host(host, own)
    _check_unique(element)
    return own


def _check_range(element: Element, own: Subnet) -> None:
    network = own.network
    first, last = (address_in(element, end, own.gateway.version) for end in ("start", "end"))
    for end, address in (("start", first), ("end", last)):
        if not is_host_in(address, network):
            raise value_error(element, end, f"a host address in {network}")
    if int(first) > int(last):
        raise value_error(element, "end", f"{element.attrib['start']} or higher")
    if isinstance(first, IPv6Address) and int(last) - int(first) >= LARGEST_RANGE:
        highest = IPv6Address(int(first) + LARGEST_RANGE - 1)
        raise value_error(element, "end", f"at most {highest}, for {LARGEST_RANGE} addresses")


def _check_host(element: Element, own: Subnet) -> None:
    address = address_in(element, "ip", own.gateway.version)
    if not is_host_in(address, own.network):
        raise value_error(element, "ip", f"a host address in {own.network}")
    if address == own.gateway:
        raise value_error(element, "ip", "an address other than the gateway")
    if element.attrib.get("name", "").lower() in DNSMASQ_KEYWORDS:
        raise value_error(element, "name", "a name that is not a keyword of dnsmasq")
    if "id" in element.attrib and own.gateway.version == 4:
        raise error(element, "has an attribute 'id'", "id only with family='ipv6'")


def _check_unique(ip: Element) -> None:
    """Refuse two equal fixed addresses: dnsmasq would not start."""
    lines: dict[Address | str, int] = {}
    for element in ip.iter(f"{NS}host"):
        given = {
            each: element.attrib[each].lower() for each in ("mac", "id") if each in element.attrib
        }
        for attribute, value in {"ip": address_in(element, "ip"), **given}.items():
            if value in lines:
                expected = f"a value other than that of <natns:host> in line {lines[value]}"
                raise value_error(element, attribute, expected)
            lines[value] = element.sourceline
