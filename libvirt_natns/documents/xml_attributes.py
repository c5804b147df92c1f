# SPDX-License-Identifier: LGPL-2.1-or-later
"""The attributes of ``<natns:nat>`` and of the elements in it, a line each.

The form of each value is the schema's, in xml/, with the words of a refusal.  A reader here
gives the value its type, and refuses what no schema can: host bits in a subnet, for example.

Readers also refuse a value of another form.  The commands that edit metadata read it as its
author wrote it, before a schema has seen it.

Limit: ``<natns:ip>`` and all in it have the shape of libvirt's ``<ip>``; ``xml_values`` reads
both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Generic, TypeVar, cast

from libvirt_natns.addresses import Address, IPNetwork, network_of
from libvirt_natns.documents.xml_values import Element, address_in, is_special, mac, value_error
from libvirt_natns.model.metadata import DefaultRoute
from libvirt_natns.model.publication import PortProtocol
from libvirt_natns.model.upstream import Helper

MAX_PORT = 65535
PORT = re.compile(r"[0-9]{1,5}")

TCP: PortProtocol = "tcp"

AUTO = 0
"""The port of start="auto", which is yet to be chosen."""

T = TypeVar("T")
M = TypeVar("M")


class XmlAttribute(Generic[T, M]):
    """An attribute: its name, the reader of its value, and its value where it is missing."""

    def __init__(self, name: str, read: Callable[[Element, str], T], missing: M) -> None:
        self.name = name
        self._read = read
        self._missing = missing

    def of(self, element: Element) -> T | M:
        """Return the value that an element has.  Raises DocumentError for a wrong value."""
        return self._read(element, self.name) if self.name in element.attrib else self._missing

    def required(self, element: Element) -> T:
        """Return the value that an element has.  Raises DocumentError also without a value."""
        return self._read(element, self.name)


# Readers


def _text(element: Element, name: str) -> str:
    return element.attrib[name]


def _mac(element: Element, name: str) -> str | None:
    return mac(element.attrib.get(name))


def _is_yes(element: Element, name: str) -> bool:
    return element.attrib.get(name) == "yes"


def _is_not_no(element: Element, name: str) -> bool:
    return element.attrib.get(name) != "no"


def _default_route(element: Element, name: str) -> DefaultRoute:
    return cast("DefaultRoute", element.attrib[name])


def _helpers(element: Element, name: str) -> tuple[Helper, ...]:
    words = element.attrib[name].replace(",", " ").split()
    return tuple(cast("Helper", word) for word in dict.fromkeys(words) if word != "none")


def _protocol(element: Element, name: str) -> PortProtocol:
    return cast("PortProtocol", element.attrib[name])


def _port_or_auto(element: Element, name: str) -> int:
    return AUTO if element.attrib.get(name) == "auto" else _port(element, name)


def _port(element: Element, name: str) -> int:
    value = element.attrib.get(name, "")
    if not PORT.fullmatch(value):
        raise value_error(element, name, f"a port from 1 to {MAX_PORT}")
    return int(value)


def _host(element: Element, name: str) -> Address:
    return _single(element, name, address_in(element, name))


def _host4(element: Element, name: str) -> Address:
    return _single(element, name, address_in(element, name, 4))


def _host6(element: Element, name: str) -> IPv6Address | None:
    address = _single(element, name, address_in(element, name, 6))
    return address if isinstance(address, IPv6Address) else None


def _host_or_auto(element: Element, name: str) -> Address | None:
    return None if element.attrib.get(name) == "auto" else _host(element, name)


def _listen_address(element: Element, name: str) -> Address:
    address = address_in(element, name)
    # With the upstream "host", forwards listen on the host's own addresses.  The
    # kernel sends no packet from ::1 to another link.
    if isinstance(address, IPv4Address) and address.is_loopback:
        return address
    return _single(element, name, address)


def _single(element: Element, name: str, address: Address) -> Address:
    if is_special(address):
        raise value_error(element, name, "the address of a single host")
    return address


def _subnets(element: Element, name: str) -> tuple[IPNetwork, ...]:
    texts = element.attrib.get(name, "").replace(",", " ").split()
    try:
        return tuple(network_of(text) for text in texts)
    except ValueError:
        # The schema has checked the form, so a source has host bits beside its prefix.
        right = [str(ip_network(text, strict=False)) for text in texts]
        raise value_error(element, name, f"whole subnets: {', '.join(right)}") from None


# Elements


class NatXml:
    """``<natns:nat>``; a guest's has neither ``enabled`` nor ``helpers``."""

    enabled = XmlAttribute("enabled", _is_not_no, missing=True)
    default_route = XmlAttribute("defaultRoute", _default_route, None)
    helpers = XmlAttribute("helpers", _helpers, None)


class UpstreamXml:
    """``<natns:upstream>``: the upstream of a network, and the addresses wanted there."""

    name = XmlAttribute("name", _text, None)
    address = XmlAttribute("address", _host4, None)
    address6 = XmlAttribute("address6", _host6, None)


class NicXml:
    """The attributes that select a NIC of a guest."""

    network = XmlAttribute("network", _text, None)
    mac = XmlAttribute("mac", _mac, None)


class InterfaceXml(NicXml):
    """``<natns:interface>``: a NIC of a guest."""

    default_route = XmlAttribute("defaultRoute", _default_route, None)


class ForwardXml(NicXml):
    """``<natns:portForward>``; a network's has no attribute that selects a NIC."""

    proto = XmlAttribute("proto", _protocol, TCP)
    address = XmlAttribute("address", _listen_address, None)
    source = XmlAttribute("source", _subnets, ())
    guest_address = XmlAttribute("guestAddress", _host, None)


class AddressXml(NicXml):
    """``<natns:address>``: an upstream address of a guest's own; None for "auto"."""

    address = XmlAttribute("address", _host_or_auto, None)


class PortsXml:
    """The ports of ``<natns:range>`` and ``<natns:allow>``; ``start`` may be ``AUTO``."""

    start = XmlAttribute("start", _port_or_auto, None)
    end = XmlAttribute("end", _port, None)


class RangeXml(PortsXml):
    """``<natns:range>`` of a forward."""

    to = XmlAttribute("to", _port, None)
    to_end = XmlAttribute("toEnd", _port, None)
    exclude = XmlAttribute("exclude", _is_yes, missing=False)


class AllowXml(PortsXml):
    """``<natns:allow>`` of ``<natns:address>``."""

    proto = XmlAttribute("proto", _protocol, TCP)
