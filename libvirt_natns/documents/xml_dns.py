# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's ``<dns>``, ``<domain>`` and ``<dnsmasq:options>`` of a network.

libvirt writes them into dnsmasq's configuration for a network with an ``<ip>``, and we
do for a network with ``<natns:ip>``.  So the form of each value is checked: a comma or
a line break in a value would mean something else to dnsmasq.  The text of a ``<txt>`` may
be anything that fits in a line.  Each value of ``dnsmasq:options`` is a line of its own,
as with libvirt itself.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, ip_address

from libvirt_natns.daemons.dnsmasq_from_xml import LONGEST_LINE, text_record
from libvirt_natns.documents.xml_values import CONTROL, Element, error, value_error
from libvirt_natns.model.dns import Dns, DnsHost, Forwarder, ServiceRecord, TextRecord

DNSMASQ = "{http://libvirt.org/schemas/network/dnsmasq/1.0}"

DOMAIN = re.compile(r"[^\s,#\"'\\/\x00-\x1f\x7f-\x9f]{1,253}")
"""A name that has no other meaning in any line of dnsmasq's configuration."""

NUMBER = re.compile(r"[0-9]{1,5}")
MAX_NUMBER = 65535


def options(network: Element) -> tuple[str, ...]:
    """Return the values of a network's ``<dnsmasq:option>`` elements."""
    elements = network.findall(f"{DNSMASQ}options/{DNSMASQ}option")
    return tuple(option.attrib.get("value", "") for option in elements)


def check_options(network: Element) -> None:
    """Refuse an option of more than one line; libvirt writes each option as it is."""
    for each in network.findall(f"{DNSMASQ}options/{DNSMASQ}option"):
        if CONTROL.search(each.attrib.get("value", "")):
            raise value_error(each, "value", "a value without control characters")


def parse(network: Element) -> Dns | None:
    """Return the ``<dns>`` of a network; None where it turns DNS off.

    DocumentError for values that have no place in dnsmasq's syntax.
    """
    element = network.find("dns")
    if element is None:
        return Dns()
    if element.attrib.get("enable") == "no":
        return None
    return Dns(
        forward_plain_names=element.attrib.get("forwardPlainNames") != "no",
        forwarders=tuple(_forwarder(each) for each in element.findall("forwarder")),
        hosts=tuple(_host(each) for each in element.findall("host")),
        texts=tuple(_text(each) for each in element.findall("txt")),
        services=tuple(_service(each) for each in element.findall("srv")),
    )


def _forwarder(element: Element) -> Forwarder:
    forwarder = Forwarder(_name(element, "domain"), _address(element, "addr"))
    if forwarder == Forwarder():
        raise error(element, "has neither domain nor addr", "at least one of the two")
    return forwarder


def _host(element: Element) -> DnsHost:
    address = _address(element, "ip")
    if address is None:
        raise value_error(element, "ip", "an IP address")
    names = tuple((each.text or "").strip() for each in element.findall("hostname"))
    for name in names:
        if not DOMAIN.fullmatch(name):
            raise error(element, f"has <hostname> {name!r}", "a host name")
    if not names:
        raise error(element, "has no <hostname>", "at least one")
    return DnsHost(address, names)


def _text(element: Element) -> TextRecord:
    value = element.attrib.get("value", "")
    if CONTROL.search(value):
        raise value_error(element, "value", "a value without control characters")
    record = TextRecord(_required(element, "name"), value)
    excess = len(text_record(record).encode()) - LONGEST_LINE
    if excess > 0:
        raise value_error(element, "value", f"a value shorter by {excess} octets")
    return record


def _service(element: Element) -> ServiceRecord:
    return ServiceRecord(
        service=_required(element, "service"),
        protocol=_required(element, "protocol"),
        domain=_name(element, "domain"),
        target=_name(element, "target"),
        port=_number(element, "port"),
        priority=_number(element, "priority"),
        weight=_number(element, "weight"),
    )


def _name(element: Element, attribute: str) -> str | None:
    value = element.attrib.get(attribute)
    if value and not DOMAIN.fullmatch(value):
        raise value_error(element, attribute, "a name without spaces, commas, quotes, # or /")
    return value or None


def _required(element: Element, attribute: str) -> str:
    value = _name(element, attribute)
    if value is None:
        raise error(element, f"has no {attribute}", f"a value for {attribute}")
    return value


def _address(element: Element, attribute: str) -> IPv4Address | IPv6Address | None:
    value = element.attrib.get(attribute)
    if not value:
        return None
    try:
        address = ip_address(value)
    except ValueError:
        raise value_error(element, attribute, "an IP address") from None
    if "%" in value:
        raise value_error(element, attribute, "an IP address without an interface")
    return address


def _number(element: Element, attribute: str) -> int:
    value = element.attrib.get(attribute, "0")
    if not NUMBER.fullmatch(value) or int(value) > MAX_NUMBER:
        raise value_error(element, attribute, f"a number from 0 to {MAX_NUMBER}")
    return int(value)
