# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ranges of addresses as plain numbers, for an IPv6 pool may have 2**64 addresses."""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from libvirt_natns.addresses import AddressRange, IPNetwork


class NamedSpan(NamedTuple):
    """A range of addresses as integers, and its name in messages."""

    first: int
    last: int
    text: str


def of_ranges(ranges: Iterable[AddressRange]) -> list[NamedSpan]:
    """Return the spans of ranges of one family."""
    return [
        NamedSpan(int(span.first), int(span.last), f"{span.first}-{span.last}") for span in ranges
    ]


def of_prefixes(prefixes: Iterable[IPNetwork]) -> list[NamedSpan]:
    """Return the spans of whole prefixes of one family."""
    return [
        NamedSpan(int(prefix.network_address), int(prefix.broadcast_address), str(prefix))
        for prefix in prefixes
    ]


def overlap(spans: list[NamedSpan]) -> NamedSpan | None:
    """Return the first span, by address, that begins within another."""
    return next((two for one, two in pairwise(sorted(spans)) if two.first <= one.last), None)


def size(spans: list[NamedSpan]) -> int:
    """Return the number of addresses in spans that do not overlap."""
    return sum(span.last - span.first + 1 for span in spans)
