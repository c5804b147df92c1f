# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attributes of ``<natns:nat>`` that the schema refuses together, in plain words.

The schema's own reason for such a refusal names no attribute.  ``check`` runs where
``xml_schema_errors`` has found no single attribute or element to blame.
"""

from libvirt_natns.documents.xml_values import CONTROL, NS, Element, error, family_of, value_error

IPV6_PREFIXES = range(64, 127)
"""Prefix lengths that dnsmasq serves: it refuses shorter prefixes, and a longer one has no
room for a guest."""


def check_characters(nat: Element) -> None:
    """Refuse control characters in a value, and processing instructions."""
    for element in nat.iter():
        if not isinstance(element.tag, str):
            raise error(nat, "has a processing instruction", "none")
        for name, value in element.attrib.items():
            if CONTROL.search(value):
                raise value_error(element, name, "a value without control characters")


def check(nat: Element) -> None:
    """Refuse attributes that exclude each other, and elements that lack one of several."""
    for ip in nat.iter(f"{NS}ip"):
        if ("prefix" in ip.attrib) == ("netmask" in ip.attrib):
            has = "both prefix and" if "prefix" in ip.attrib else "neither prefix nor"
            raise error(ip, f"has {has} netmask", "either prefix or netmask")
        if family_of(ip) == 6 and "netmask" in ip.attrib:
            raise error(ip, "has family='ipv6' and netmask", "prefix instead")
        _check_prefix(ip)
    for host in nat.iter(f"{NS}host"):
        _check_host_attributes(host)
    for element in nat:
        if {"network", "mac"} <= set(element.attrib):
            raise error(element, "has both network and mac", "at most one of the two")
        if element.tag == f"{NS}interface" and not {"network", "mac"} & set(element.attrib):
            raise error(element, "has neither network nor mac", "either of the two")
    for ports in nat.findall(f"{NS}portForward/{NS}range"):
        _check_range_attributes(ports)


def _check_prefix(ip: Element) -> None:
    """Refuse a prefix of the other family; the schema may not know an element's family."""
    if family_of(ip) == 6 and int(ip.attrib["prefix"]) not in IPV6_PREFIXES:
        raise value_error(ip, "prefix", "a prefix length from 64 to 126")
    if family_of(ip) == 4 and int(ip.attrib.get("prefix", 1)) > 30:
        raise value_error(ip, "prefix", "a prefix length from 1 to 30, or family='ipv6'")


def _check_host_attributes(host: Element) -> None:
    if {"mac", "id"} <= set(host.attrib):
        raise error(host, "has both mac and id", "at most one of the two")
    if not {"mac", "id", "name"} & set(host.attrib):
        raise error(host, "has neither mac nor name", "at least one of the two")


def _check_range_attributes(ports: Element) -> None:
    names = set(ports.attrib)
    if "start" not in names:
        raise error(ports, "has no attribute 'start'", "a port number from 1 to 65535 or auto")
    if ports.attrib["start"] == "auto":
        for other in sorted({"end", "exclude", "toEnd"} & names):
            raise error(ports, f"has start='auto' and {other}", "at most one of the two")
        if "to" not in names:
            fact = "has start='auto' and no attribute 'to'"
            raise error(ports, fact, "the guest's port, from 1 to 65535")
    elif ports.attrib.get("exclude") == "yes" and "to" in names:
        raise error(ports, "has exclude='yes' and to", "at most one of the two")
    elif "toEnd" in names and "to" not in names:
        raise error(ports, "has toEnd and no attribute 'to'", "the guest's first port as well")
