# SPDX-License-Identifier: LGPL-2.1-or-later
"""Spans of whole numbers, such as ports or addresses: the first and the last number."""

from collections.abc import Iterable, Iterator

Span = tuple[int, int]
"""The first and the last number, both included."""


def span_text(first: int, last: int) -> str:
    """Return a span as it is written: a single number, or "8000-8010"."""
    return str(first) if first == last else f"{first}-{last}"


def remaining(span: Span, excluded: Iterable[Span]) -> Iterator[Span]:
    """Yield the parts of a span that remain without the excluded spans, in order."""
    start, end = span
    for first, last in sorted(excluded):
        if start < first and start <= end:
            yield start, min(first - 1, end)
        start = max(start, last + 1)
    if start <= end:
        yield start, end
