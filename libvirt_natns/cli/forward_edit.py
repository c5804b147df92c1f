# SPDX-License-Identifier: LGPL-2.1-or-later
"""The change that a forward, added or removed, makes to a guest's metadata.

Only the typed forward is changed: other forwards, comments and everything else in
``<natns:nat>`` stay as they were written.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from typing import cast

from libvirt_natns.addresses import Family, parsed
from libvirt_natns.cli.forward_spec import Spec
from libvirt_natns.documents.xml_ports import MAX_PORT
from libvirt_natns.documents.xml_values import NS, Element, MutableElement, mac, value_error
from libvirt_natns.engine.publication.choices import Selector
from libvirt_natns.errors import ConflictError, NatnsError
from libvirt_natns.model.publication import Protocol
from libvirt_natns.records import dataclass
from libvirt_natns.spans import Span, remaining

NUMBER = re.compile(r"[0-9]{1,5}")


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
    chosen: Callable[[Selector, Protocol, int], int | None]


# -- adding --------------------------------------------------------------------


def add(nat: MutableElement, spec: Spec, options: Options) -> None:
    """Append a forward to a ``<natns:nat>``.  Raises ConflictError for a forward that exists."""
    attributes = _attributes(spec, options)
    ports_there = _range_attributes(spec)
    for forward in nat.findall(f"{NS}portForward"):
        there = {"proto": "tcp", **forward.attrib}
        if there == attributes and any(
            dict(element.attrib) == ports_there for element in forward.findall(f"{NS}range")
        ):
            raise ConflictError(f"{spec} is forwarded already", "see virt-natns forward list")
    new = nat.makeelement(f"{NS}portForward", attributes)
    new.append(new.makeelement(f"{NS}range", ports_there))
    nat.append(new)


def _attributes(spec: Spec, options: Options) -> dict[str, str]:
    wanted = {
        "proto": spec.proto,
        "address": spec.address,
        "network": options.network,
        "mac": options.mac,
        "guestAddress": options.guest_address,
        "source": options.source,
    }
    return {name: value for name, value in wanted.items() if value is not None}


def _range_attributes(spec: Spec) -> dict[str, str]:
    target = spec.target
    if spec.listen is None:
        return {"start": "auto", "to": str(target[0] if target else 0)}
    first, last = spec.listen
    attributes = {"start": str(first)}
    if last > first:
        attributes["end"] = str(last)
    if target and target != spec.listen:
        attributes["to"] = str(target[0])
        if last > first and target[0] == target[1]:
            # A range of ports is forwarded onto a single port.
            attributes["toEnd"] = str(target[0])
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
    if forward.attrib.get("proto", "tcp") != spec.proto:
        return False
    given = _usual(forward.attrib.get("address"))
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
    named = forward.attrib.get("guestAddress") or forward.attrib.get("source")
    if not named:
        return None
    return 6 if ":" in named else 4


def _usual(address: str | None) -> str | None:
    """Return an address in its usual spelling; other text stays as it is."""
    with suppress(ValueError):
        return str(parsed(address or ""))
    return address


def _removals(
    forward: MutableElement, spec: Spec, lookup: ListenLookup
) -> Iterator[Callable[[], None]]:
    """Yield, for each place of the typed ports in a forward, a function that removes them."""
    for element in _autos(forward):
        if _is_meant(forward, element, spec, lookup):
            yield partial(forward.remove, element)
    if spec.listen is None:
        return
    whole = [element for element in _ranges(forward) if _ports(element) == spec.listen]
    if whole:
        yield from (partial(forward.remove, element) for element in whole)
    elif spec.listen in _spans(forward):
        # These ports remain of a range with excluded ports; they become excluded, too.
        yield partial(_exclude, forward, spec.listen)


def _is_meant(forward: Element, element: Element, spec: Spec, lookup: ListenLookup) -> bool:
    """True if a range with start="auto" is the range that was typed."""
    to = _number(element, "to")
    if spec.listen is None:
        return spec.target == (to, to)
    chosen = lookup.chosen(_selector(forward), spec.proto, to)
    return chosen is not None and spec.listen == (chosen, chosen)


def _selector(forward: Element) -> Selector:
    given = forward.attrib
    return Selector(
        given.get("network"),
        mac(given.get("mac")),
        _usual(given.get("address")),
        _usual(given.get("guestAddress")),
    )


def _exclude(forward: MutableElement, span: Span) -> None:
    attributes = {"start": str(span[0]), "end": str(span[1]), "exclude": "yes"}
    forward.append(forward.makeelement(f"{NS}range", attributes))


def _autos(forward: Element) -> list[Element]:
    return [
        element
        for element in forward.findall(f"{NS}range")
        if element.attrib.get("start") == "auto"
    ]


def _ranges(forward: Element, excluded: str = "no") -> list[Element]:
    """Return a forward's ranges with fixed ports: the forwarded ranges, or the excluded ranges."""
    return [
        element
        for element in forward.findall(f"{NS}range")
        if element.attrib.get("start") != "auto" and element.attrib.get("exclude", "no") == excluded
    ]


def _ports(element: Element) -> Span:
    first = _number(element, "start")
    return first, _number(element, "end") if "end" in element.attrib else first


def _number(element: Element, attribute: str) -> int:
    """Return a port.  Raises DocumentError for other text.

    The metadata may come from any author, and no other code has checked it.
    """
    value = element.attrib.get(attribute, "")
    if not NUMBER.fullmatch(value):
        raise value_error(element, attribute, f"a port from 1 to {MAX_PORT}")
    return int(value)


def _spans(forward: Element) -> Iterator[Span]:
    """Yield the ports of a forward's ranges that remain without the excluded ranges."""
    excluded = [*map(_ports, _ranges(forward, "yes"))]
    for span in map(_ports, _ranges(forward)):
        yield from remaining(span, excluded)
