# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports in ``<natns:range>`` and ``<natns:allow>``, which satisfy the schema."""

from itertools import pairwise
from typing import cast

from libvirt_natns.documents.xml_values import NS, Element, local_name, value_error
from libvirt_natns.model.metadata import PortRange
from libvirt_natns.model.publication import PortSet, Protocol

MAX_PORT = 65535


def protocol(element: Element) -> Protocol:
    """Return the protocol of a forward or of allowed ports."""
    return cast("Protocol", element.attrib.get("proto", "tcp"))


def port_range(element: Element) -> PortRange:
    """Return a forward's ``<natns:range>``; DocumentError for a range that cannot be."""
    if element.attrib["start"] == "auto":
        return PortRange(0, 0, int(element.attrib["to"]), auto=True)
    start, end = _ports(element)
    to = int(element.attrib.get("to", start))
    to_end = int(element.attrib.get("toEnd", to + end - start))
    if "toEnd" in element.attrib and to_end not in (to, to + end - start):
        ways = f"{to + end - start}, for {end - start + 1} ports, or {to}, for one"
        raise value_error(element, "toEnd", ways)
    if to_end > MAX_PORT:
        expected = f"at most {MAX_PORT - (end - start)}, for {end - start + 1} ports"
        raise value_error(element, "to", expected)
    excluded = element.attrib.get("exclude") == "yes"
    return PortRange(start, end, to, exclude=excluded, onto_one=to_end == to and end > start)


def _ports(element: Element) -> tuple[int, int]:
    """Return the first and the last port of a range."""
    start = int(element.attrib["start"])
    end = int(element.attrib.get("end", start))
    if end < start:
        raise value_error(element, "end", f"{start} or higher")
    return start, end


def check_apart(elements: list[Element]) -> None:
    """Refuse a port that stands in two of the ranges."""
    ranges = sorted(((*_ports(each), each) for each in elements), key=lambda item: item[:2])
    for (_, end, first), (start, _, second) in pairwise(ranges):
        if start <= end:
            other = f"<natns:{local_name(first.tag)}> in line {first.sourceline}"
            raise value_error(second, "start", f"ports other than those of {other}")


def allowed(element: Element) -> tuple[PortSet, ...]:
    """Return the ports that the ``<natns:allow>`` elements of an element name."""
    allow = [(protocol(child), child) for child in element.findall(f"{NS}allow")]
    for proto in dict.fromkeys(proto for proto, _ in allow):
        check_apart([child for other, child in allow if other == proto])
    return tuple(PortSet(proto, *_ports(child)) for proto, child in allow)
