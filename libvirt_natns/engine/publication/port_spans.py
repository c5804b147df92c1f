# SPDX-License-Identifier: LGPL-2.1-or-later
"""Port ranges of a forward, without the excluded ports."""

from libvirt_natns.model.metadata import PortForward, PortRange

PortSpan = tuple[int, int, int, int]
"""First and last port, and the first and last port of the target."""


def spans(forward: PortForward) -> list[PortSpan]:
    """Return a forward's fixed ports without the excluded ones."""
    excluded = sorted(
        (span.start, span.end) for span in forward.ranges if span.exclude and not span.auto
    )
    spans = []
    for span in forward.ranges:
        if not span.exclude and not span.auto:
            spans += _without(span, excluded)
    return spans


def _without(span: PortRange, excluded: list[tuple[int, int]]) -> list[PortSpan]:
    spans = []
    start = span.start
    for first, last in [*excluded, (span.end + 1, span.end + 1)]:
        if first > start and start <= span.end:
            end = min(first - 1, span.end)
            to = span.to if span.onto_one else span.to + start - span.start
            spans.append((start, end, to, to if span.onto_one else to + end - start))
        start = max(start, last + 1)
    return spans
