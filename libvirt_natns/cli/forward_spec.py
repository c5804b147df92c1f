# SPDX-License-Identifier: LGPL-2.1-or-later
"""Forwards as they are typed: ``[ADDRESS:]PORTS[:PORTS][/PROTO]``."""

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import cast

from libvirt_natns.addresses import bracketed
from libvirt_natns.documents.xml_attributes import MAX_PORT
from libvirt_natns.model.publication import PortProtocol
from libvirt_natns.spans import Span, span_text

PATTERN = re.compile(
    r"(?:(?P<address>[0-9]+(?:\.[0-9]+){3}|\*|\[[0-9A-Fa-f:.]+\]):)?(?P<listen>auto|[0-9]+(?:-[0-9]+)?)"
    r"(?::(?P<target>[0-9]+(?:-[0-9]+)?))?(?:/(?P<proto>tcp|udp|sctp))?"
)


@dataclass(frozen=True, slots=True)
class Spec:
    """A forward; ``listen`` None stands for "auto".

    ``address`` "*", which only a listing writes, means all addresses of the host.  An IPv6
    address stands in brackets, which are left out here.
    """

    proto: PortProtocol
    address: str | None
    listen: Span | None
    target: Span | None

    def __str__(self) -> str:
        where = f"{bracketed(self.address)}:" if self.address else ""
        span = span_text(*self.listen) if self.listen else f"auto:{self.target and self.target[0]}"
        return f"{self.proto} {where}{span}"


NEW, OLD = "2222:22, 8000-8010 or auto:22/udp", "2222, 8000-8010 or 53/udp"
"""Examples of a forward to add, and of a forward to remove."""


def parse(text: str, example: str = NEW) -> Spec:
    """Return the forward that was typed.  Raises ValueError, in words, for other text."""
    match = PATTERN.fullmatch(text)
    if match is None:
        hint = ": an IPv6 address needs brackets" if "::" in text and "[" not in text else ""
        form = "[ADDRESS:]PORT[-PORT][:PORT[-PORT]][/tcp|udp|sctp]"
        raise ValueError(f"{text!r} is not {form}{hint}, for example {example}")
    address, listen = _address(match["address"]), match["listen"]
    target = _span(match["target"]) if match["target"] else None
    proto = cast("PortProtocol", match["proto"] or "tcp")
    if listen != "auto":
        return Spec(proto, address, _span(listen), target)
    if target is None or target[0] != target[1]:
        raise ValueError("auto needs one port of the guest: auto:22")
    return Spec(proto, address, None, target)


def parse_new(text: str) -> Spec:
    """Return the forward to add.  Raises ValueError."""
    spec = parse(text)
    if spec.address == "*":
        raise ValueError("* is the default: leave it out")
    if spec.listen and spec.target and spec.target[0] != spec.target[1]:
        counts = [last - first for first, last in (spec.listen, spec.target)]
        if counts[0] != counts[1]:
            raise ValueError(f"{text!r} has ranges of different lengths")
    return spec


def parse_old(text: str) -> Spec:
    """Return the forward to remove, which has no target, except for auto.  Raises ValueError."""
    spec = parse(text, OLD)
    if spec.listen and spec.target:
        raise ValueError("remove needs the listening address and port: [ADDRESS:]PORT[-PORT]")
    return spec


def _address(text: str | None) -> str | None:
    """Return an address without brackets, in its usual spelling."""
    if text in (None, "*"):
        return text
    try:
        # IPv6 addresses, and no others, stand in brackets.
        return str(IPv6Address(text[1:-1]) if text.startswith("[") else IPv4Address(text))
    except AddressValueError as error:
        raise ValueError(f"{text!r} is not an IP address") from error


def _span(text: str) -> Span:
    first, _, last = text.partition("-")
    span = int(first), int(last or first)
    if not 1 <= span[0] <= span[1] <= MAX_PORT:
        raise ValueError(f"{text!r} is neither a port from 1 to {MAX_PORT} nor a range of ports")
    return span
