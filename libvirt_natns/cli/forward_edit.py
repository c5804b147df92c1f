# SPDX-License-Identifier: LGPL-2.1-or-later
"""The change that a forward, added or removed, makes to a guest's metadata.

Only the typed forward is changed: other forwards, comments and everything else in
``<natns:nat>`` stay as they were written.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from libvirt_natns.addresses import Address, Family
from libvirt_natns.cli.forward_spec import Spec
from libvirt_natns.documents.xml_attributes import ForwardXml, RangeXml, XmlAttribute
from libvirt_natns.documents.xml_ports import span_of
from libvirt_natns.documents.xml_values import NS, Element, MutableElement
from libvirt_natns.engine.publication.choices import Selector
from libvirt_natns.errors import ConflictError, DocumentError, NatnsError
from libvirt_natns.model.publication import PortProtocol
from libvirt_natns.spans import Span, remaining, span_text

AddressAttribute = XmlAttribute[Address, None]


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a new forward, as they were typed."""

    network: str | None = None
    mac: str | None = None
    source: str | None = None
    guest_address: str | None = None


@dataclass(frozen=True, slots=True)
class ListenLookup:
    """Facts that the listing of forwards shows and the metadata does not have.

    ``listens`` returns the addresses at which a forward without ``address`` may listen; none
    while the network is down.  ``chosen`` returns the port that was chosen for a forward, a
    protocol and a target; None while it is not known.
    """

    listens: Callable[[Selector], Collection[str]]
    chosen: Callable[[Selector, PortProtocol, int], int | None]


# -- adding --------------------------------------------------------------------


def add(nat: MutableElement, spec: Spec, options: Options) -> None:
    """Append a forward to a ``<natns:nat>``.

    Raises ConflictError for a forward that exists, and NatnsError for ports of another forward.
    """
    attributes = _attributes(spec, options)
    ports_there = _range_attributes(spec)
    for forward in nat.findall(f"{NS}portForward"):
        there = {**forward.attrib, ForwardXml.proto.name: ForwardXml.proto.of(forward)}
        if there == attributes and any(
            dict(element.attrib) == ports_there for element in forward.findall(f"{NS}range")
        ):
            raise ConflictError(f"{spec} is forwarded already", "see virt-natns forward list")
    _check_free(nat, spec, options)
    new = nat.makeelement(f"{NS}portForward", attributes)
    new.append(new.makeelement(f"{NS}range", ports_there))
    nat.append(new)


def _check_free(nat: MutableElement, spec: Spec, options: Options) -> None:
    """Refuse ports that the guest publishes already, in the same place and another way."""
    mac = options.mac.lower() if options.mac else None
    family = _family_of(options.guest_address or options.source)
    for forward in nat.findall(f"{NS}portForward"):
        place = (ForwardXml.proto.of(forward), _usual(forward, ForwardXml.address))
        where = (ForwardXml.network.of(forward), ForwardXml.mac.of(forward))
        if (*place, *where) != (spec.proto, spec.address, options.network, mac):
            continue
        if family and _family(forward) not in (family, None):
            continue
        taken = next(_taken(forward, spec), None)
        if taken:
            raise NatnsError(
                f"{spec} is forwarded already, as a part of {spec.proto} {taken}",
                "choose another port, or remove that forward first",
            )


def _taken(forward: Element, spec: Spec) -> Iterator[str]:
    """Yield the ports of a forward that a typed forward would publish as well, as listed."""
    if spec.listen is None:
        ports = (RangeXml.to.required(element) for element in _autos(forward))
        yield from (f"auto:{to}" for to in ports if spec.target == (to, to))
        return
    for first, last in _spans(forward):
        if first <= spec.listen[1] and spec.listen[0] <= last:
            yield span_text(first, last)


def _attributes(spec: Spec, options: Options) -> dict[str, str]:
    wanted: dict[XmlAttribute[Any, Any], str | None] = {
        ForwardXml.proto: spec.proto,
        ForwardXml.address: spec.address,
        ForwardXml.network: options.network,
        ForwardXml.mac: options.mac,
        ForwardXml.guest_address: options.guest_address,
        ForwardXml.source: options.source,
    }
    return {declared.name: value for declared, value in wanted.items() if value is not None}


def _range_attributes(spec: Spec) -> dict[str, str]:
    target = spec.target
    if spec.listen is None:
        to = target[0] if target else 0
        return {RangeXml.start.name: "auto", RangeXml.to.name: str(to)}
    first, last = spec.listen
    attributes = {RangeXml.start.name: str(first)}
    if last > first:
        attributes[RangeXml.end.name] = str(last)
    if target and target != spec.listen:
        attributes[RangeXml.to.name] = str(target[0])
        if last > first and target[0] == target[1]:
            # A range of ports is forwarded onto a single port.
            attributes[RangeXml.to_end.name] = str(target[0])
    return attributes


# -- removing ------------------------------------------------------------------


def remove(nat: MutableElement, spec: Spec, lookup: ListenLookup) -> bool:
    """Take one forward out of a ``<natns:nat>``; True if it was there.

    Raises NatnsError where several forwards match, and DocumentError for ports that are none.
    """
    removals = [
        step
        for forward in nat.findall(f"{NS}portForward")
        if _listens(forward, spec, lookup)
        for step in _removals(cast("MutableElement", forward), spec, lookup)
    ]
    if len(removals) > 1:
        raise NatnsError(
            f"{spec} is forwarded {len(removals)} times",
            "name its address: ADDRESS:PORT, as virt-natns forward list shows it",
        )
    for step in removals:
        step()
    for forward in nat.findall(f"{NS}portForward"):
        if removals and not list(_spans(forward)) and not _autos(forward):
            nat.remove(forward)
    return bool(removals)


def _listens(forward: Element, spec: Spec, lookup: ListenLookup) -> bool:
    """True if a forward has the protocol and the address that were typed."""
    if ForwardXml.proto.of(forward) != spec.proto:
        return False
    given = _usual(forward, ForwardXml.address)
    if given is not None or spec.address is None:
        return spec.address in (None, given)
    family = _family(forward)
    return any(
        address == spec.address
        and (family is None or address == "*" or (":" in address) == (family == 6))
        for address in lookup.listens(_selector(forward))
    )


def _family(forward: Element) -> Family | None:
    """Return the family of a forward's guest, or of its clients; None where neither is named."""
    named = forward.attrib.get(ForwardXml.guest_address.name)
    return _family_of(named or forward.attrib.get(ForwardXml.source.name))


def _family_of(named: str | None) -> Family | None:
    """Return the family of an address or a list of subnets, as typed; None for None."""
    if not named:
        return None
    return 6 if ":" in named else 4


def _usual(forward: Element, declared: AddressAttribute) -> str | None:
    """Return an address in its usual spelling; other text stays as it is."""
    with suppress(DocumentError):
        address = declared.of(forward)
        return None if address is None else str(address)
    return forward.attrib.get(declared.name)


def _removals(
    forward: MutableElement, spec: Spec, lookup: ListenLookup
) -> Iterator[Callable[[], None]]:
    """Yield, for each place of the typed ports in a forward, a function that removes them."""
    for element in _autos(forward):
        if _is_meant(forward, element, spec, lookup):
            yield partial(forward.remove, element)
    if spec.listen is None:
        return
    whole = [element for element in _ranges(forward) if span_of(element) == spec.listen]
    if whole:
        yield from (partial(forward.remove, element) for element in whole)
    elif spec.listen in _spans(forward):
        # These ports remain of a range with excluded ports; they become excluded, too.
        yield partial(_exclude, forward, spec.listen)


def _is_meant(forward: Element, element: Element, spec: Spec, lookup: ListenLookup) -> bool:
    """True if a range with start="auto" is the range that was typed."""
    to = RangeXml.to.required(element)
    if spec.listen is None:
        return spec.target == (to, to)
    chosen = lookup.chosen(_selector(forward), spec.proto, to)
    return chosen is not None and spec.listen == (chosen, chosen)


def _selector(forward: Element) -> Selector:
    return Selector(
        ForwardXml.network.of(forward),
        ForwardXml.mac.of(forward),
        _usual(forward, ForwardXml.address),
        _usual(forward, ForwardXml.guest_address),
    )


def _exclude(forward: MutableElement, span: Span) -> None:
    first, last = map(str, span)
    attributes = {
        RangeXml.start.name: first,
        RangeXml.end.name: last,
        RangeXml.exclude.name: "yes",
    }
    forward.append(forward.makeelement(f"{NS}range", attributes))


def _autos(forward: Element) -> list[Element]:
    return [element for element in forward.findall(f"{NS}range") if _is_auto(element)]


def _is_auto(element: Element) -> bool:
    return element.attrib.get(RangeXml.start.name) == "auto"


def _ranges(forward: Element, *, excluded: bool = False) -> list[Element]:
    """Return a forward's ranges with fixed ports: the forwarded ranges, or the excluded ranges."""
    return [
        element
        for element in forward.findall(f"{NS}range")
        if not _is_auto(element) and RangeXml.exclude.of(element) == excluded
    ]


def _spans(forward: Element) -> Iterator[Span]:
    """Yield the ports of a forward's ranges that remain without the excluded ranges."""
    excluded = [span_of(element) for element in _ranges(forward, excluded=True)]
    for element in _ranges(forward):
        yield from remaining(span_of(element), excluded)
