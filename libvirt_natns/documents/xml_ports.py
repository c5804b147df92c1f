# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports in ``<natns:range>`` and ``<natns:allow>``."""

from itertools import pairwise

from libvirt_natns.documents.xml_attributes import AUTO, MAX_PORT, AllowXml, PortsXml, RangeXml
from libvirt_natns.documents.xml_values import NS, Element, local_name, value_error
from libvirt_natns.model.metadata import PortRange
from libvirt_natns.model.publication import PortSet
from libvirt_natns.spans import Span


def port_range(element: Element) -> PortRange:
    """Return a forward's ``<natns:range>``; DocumentError for a range that cannot be."""
    if RangeXml.start.required(element) == AUTO:
        return PortRange(AUTO, AUTO, RangeXml.to.required(element), auto=True)
    start, end = _ports(element)
    to, to_end = RangeXml.to.of(element), RangeXml.to_end.of(element)
    to = start if to is None else to
    if to_end not in (None, to, to + end - start):
        ways = f"{to + end - start}, for {end - start + 1} ports, or {to}, for one"
        raise value_error(element, RangeXml.to_end.name, ways)
    to_end = to + end - start if to_end is None else to_end
    if to_end > MAX_PORT:
        expected = f"at most {MAX_PORT - (end - start)}, for {end - start + 1} ports"
        raise value_error(element, RangeXml.to.name, expected)
    excluded = RangeXml.exclude.of(element)
    return PortRange(start, end, to, exclude=excluded, onto_one=to_end == to and end > start)


def span_of(element: Element) -> Span:
    """Return the first and the last port of an element, as they are written."""
    start = PortsXml.start.required(element)
    end = PortsXml.end.of(element)
    return start, start if end is None else end


def _ports(element: Element) -> Span:
    """Return the first and the last port; DocumentError for a range that runs backwards."""
    start, end = span_of(element)
    if end < start:
        raise value_error(element, PortsXml.end.name, f"{start} or higher")
    return start, end


def check_apart(elements: list[Element]) -> None:
    """Refuse a port that stands in two of the ranges."""
    ranges = sorted(((*_ports(each), each) for each in elements), key=lambda item: item[:2])
    for (_, end, first), (start, _, second) in pairwise(ranges):
        if start <= end:
            other = f"<natns:{local_name(first.tag)}> in line {first.sourceline}"
            raise value_error(second, PortsXml.start.name, f"ports other than those of {other}")


def allowed(element: Element) -> tuple[PortSet, ...]:
    """Return the ports that the ``<natns:allow>`` elements of an element name."""
    allow = [(AllowXml.proto.of(child), child) for child in element.findall(f"{NS}allow")]
    for proto in dict.fromkeys(proto for proto, _ in allow):
        check_apart([child for other, child in allow if other == proto])
    return tuple(PortSet(proto, *_ports(child)) for proto, child in allow)
