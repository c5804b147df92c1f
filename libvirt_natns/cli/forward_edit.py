# SPDX-License-Identifier: LGPL-2.1-or-later
"""Forwards as they are typed, and what adding or removing one makes of the metadata.

Only what was asked for is changed: other forwards, comments and everything else in
``<natns:nat>`` stay as they were written.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import cast

from libvirt_natns.addresses import Family, bracketed, parsed
from libvirt_natns.documents.xml_ports import MAX_PORT
from libvirt_natns.documents.xml_values import NS, Element, MutableElement, mac, value_error
from libvirt_natns.engine.forwards import Selector, ports
from libvirt_natns.errors import ConflictError, NatnsError
from libvirt_natns.model.publication import Protocol
from libvirt_natns.records import dataclass

PATTERN = re.compile(
    r"(?:(?P<address>[0-9]+(?:\.[0-9]+){3}|\*|\[[0-9A-Fa-f:.]+\]):)?(?P<listen>auto|[0-9]+(?:-[0-9]+)?)"
    r"(?::(?P<target>[0-9]+(?:-[0-9]+)?))?(?:/(?P<proto>tcp|udp|sctp))?"
)

NUMBER = re.compile(r"[0-9]{1,5}")

Span = tuple[int, int]
"""First and last port."""


@dataclass(frozen=True, slots=True)
class Spec:
    """``[ADDRESS:]PORTS[:PORTS][/PROTO]``; ``listen`` None stands for "auto".

    ``address`` "*", which only a listing writes, means all addresses of the host.  One of
    IPv6 stands in brackets, which are left out here.
    """

    proto: Protocol
    address: str | None
    listen: Span | None
    target: Span | None

    def __str__(self) -> str:
        where = f"{bracketed(self.address)}:" if self.address else ""
        told = ports(*self.listen) if self.listen else f"auto:{self.target and self.target[0]}"
        return f"{self.proto} {where}{told}"


@dataclass(frozen=True, slots=True)
class Options:
    """What may be said of a new forward besides, as it was typed."""

    network: str | None = None
    mac: str | None = None
    source: str | None = None
    guest_address: str | None = None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a forward's listing shows and the metadata does not say.

    ``listens`` tells where a forward without ``address`` may listen, ``chosen`` the port
    chosen for a forward, a protocol and a target.  That is nowhere, or None, where it is
    not known, the network being down.
    """

    listens: Callable[[Selector], Collection[str]]
    chosen: Callable[[Selector, Protocol, int], int | None]


# -- what is typed -------------------------------------------------------------


def parse(text: str) -> Spec:
    """What was typed; ValueError, in words, where it makes no sense."""
    match = PATTERN.fullmatch(text)
    if match is None:
        hint = ": an address of IPv6 stands in brackets" if "::" in text and "[" not in text else ""
        form = "[ADDRESS:]PORT[-PORT][:PORT[-PORT]][/tcp|udp|sctp]"
        raise ValueError(f"{text!r} is no {form}{hint}")
    address, listen = _address(match["address"]), match["listen"]
    target = _span(match["target"]) if match["target"] else None
    proto = cast("Protocol", match["proto"] or "tcp")
    if listen != "auto":
        return Spec(proto, address, _span(listen), target)
    if target is None or target[0] != target[1]:
        raise ValueError("auto needs one port of the guest's: auto:22")
    return Spec(proto, address, None, target)


def parse_new(text: str) -> Spec:
    """The same for a forward to be added."""
    spec = parse(text)
    if spec.address == "*":
        raise ValueError("* is the default: leave it out")
    if spec.listen and spec.target and spec.target[0] != spec.target[1]:
        counts = [last - first for first, last in (spec.listen, spec.target)]
        if counts[0] != counts[1]:
            raise ValueError(f"{text!r} has ranges of different lengths")
    return spec


def parse_old(text: str) -> Spec:
    """The same for one to be removed: no target, but for auto."""
    spec = parse(text)
    if spec.listen and spec.target:
        raise ValueError("what to remove is named by where it listens: [ADDRESS:]PORT[-PORT]")
    return spec


def _address(text: str | None) -> str | None:
    """An address without brackets, in its usual spelling."""
    if text in (None, "*"):
        return text
    try:
        # What is in brackets is of IPv6, and nothing else is.
        return str(IPv6Address(text[1:-1]) if text.startswith("[") else IPv4Address(text))
    except AddressValueError as error:
        raise ValueError(f"{text!r} is no IP address") from error


def _span(text: str) -> Span:
    first, _, last = text.partition("-")
    span = int(first), int(last or first)
    if not 1 <= span[0] <= span[1] <= MAX_PORT:
        raise ValueError(f"{text!r} is no port from 1 to {MAX_PORT}, nor a range of them")
    return span


# -- adding --------------------------------------------------------------------


def add(nat: MutableElement, spec: Spec, options: Options) -> None:
    """Append a forward to a ``<natns:nat>``.  Raises ConflictError for one that is there."""
    attributes = _attributes(spec, options)
    ports_there = _range_attributes(spec)
    for forward in nat.findall(f"{NS}portForward"):
        there = {"proto": "tcp", **forward.attrib}
        if there == attributes and any(
            dict(each.attrib) == ports_there for each in forward.findall(f"{NS}range")
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
    found = {"start": str(first)}
    if last > first:
        found["end"] = str(last)
    if target and target != spec.listen:
        found["to"] = str(target[0])
        if last > first and target[0] == target[1]:
            # All of them onto the one port.
            found["toEnd"] = str(target[0])
    return found


# -- removing ------------------------------------------------------------------


def remove(nat: MutableElement, spec: Spec, around: Surroundings) -> bool:
    """Take one forward out of a ``<natns:nat>``; returns whether it was there.

    Raises NatnsError where several are meant, and DocumentError for ports that are none.
    """
    found = [
        step
        for forward in nat.findall(f"{NS}portForward")
        if _listens(forward, spec, around)
        for step in _removals(cast("MutableElement", forward), spec, around)
    ]
    if len(found) > 1:
        raise NatnsError(
            f"{spec} is forwarded {len(found)} times",
            "say which: ADDRESS:PORT, as virt-natns forward list shows it",
        )
    for step in found:
        step()
    for forward in nat.findall(f"{NS}portForward"):
        if found and not list(_spans(forward)) and not _autos(forward):
            nat.remove(forward)
    return bool(found)


def _listens(forward: Element, spec: Spec, around: Surroundings) -> bool:
    """Whether a forward is of the protocol and the address that were typed."""
    if forward.attrib.get("proto", "tcp") != spec.proto:
        return False
    given = _usual(forward.attrib.get("address"))
    if given is not None or spec.address is None:
        return spec.address in (None, given)
    family = _family(forward)
    return any(
        each == spec.address and (family is None or each == "*" or (":" in each) == (family == 6))
        for each in around.listens(_selector(forward))
    )


def _family(forward: Element) -> Family | None:
    """The family of a forward's guest, or of its clients; None where neither is named."""
    named = forward.attrib.get("guestAddress") or forward.attrib.get("source")
    if not named:
        return None
    return 6 if ":" in named else 4


def _usual(address: str | None) -> str | None:
    """An address as the rest of the world spells it; what is none stays."""
    with suppress(ValueError):
        return str(parsed(address or ""))
    return address


def _removals(
    forward: MutableElement, spec: Spec, around: Surroundings
) -> Iterator[Callable[[], None]]:
    """What takes the typed ports out of a forward: once each time they stand there."""
    for each in _autos(forward):
        if _is_meant(forward, each, spec, around):
            yield partial(forward.remove, each)
    if spec.listen is None:
        return
    whole = [each for each in _ranges(forward) if _of(each) == spec.listen]
    if whole:
        yield from (partial(forward.remove, each) for each in whole)
    elif spec.listen in _spans(forward):
        # What a range has left beside its excluded ports: these go, too.
        yield partial(_exclude, forward, spec.listen)


def _is_meant(forward: Element, each: Element, spec: Spec, around: Surroundings) -> bool:
    """Whether a range with start="auto" is the one that was typed."""
    to = _number(each, "to")
    if spec.listen is None:
        return spec.target == (to, to)
    chosen = around.chosen(_selector(forward), spec.proto, to)
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
    return [each for each in forward.findall(f"{NS}range") if each.attrib.get("start") == "auto"]


def _ranges(forward: Element, excluded: str = "no") -> list[Element]:
    """A forward's ranges with fixed ports: those that count, or the excluded ones."""
    return [
        each
        for each in forward.findall(f"{NS}range")
        if each.attrib.get("start") != "auto" and each.attrib.get("exclude", "no") == excluded
    ]


def _of(each: Element) -> Span:
    first = _number(each, "start")
    return first, _number(each, "end") if "end" in each.attrib else first


def _number(each: Element, attribute: str) -> int:
    """A port; DocumentError where there is none: nobody has checked this document."""
    value = each.attrib.get(attribute, "")
    if not NUMBER.fullmatch(value):
        raise value_error(each, attribute, f"a port from 1 to {MAX_PORT}")
    return int(value)


def _spans(forward: Element) -> Iterator[Span]:
    """The ports that a forward's ranges have left without the excluded ones."""
    excluded = sorted(map(_of, _ranges(forward, "yes")))
    for start, end in map(_of, _ranges(forward)):
        for first, last in [*excluded, (end + 1, end + 1)]:
            if first > start and start <= end:
                yield start, min(first - 1, end)
            start = max(start, last + 1)
