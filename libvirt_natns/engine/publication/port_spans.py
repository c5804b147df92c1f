# SPDX-License-Identifier: LGPL-2.1-or-later
"""Port ranges of a forward, without the excluded ports."""

from libvirt_natns.model.metadata import PortForward, PortRange
from libvirt_natns.spans import Span, remaining

PortSpan = tuple[int, int, int, int]
"""First and last port, and the first and last port of the target."""


def spans(forward: PortForward) -> list[PortSpan]:
    """Return a forward's fixed ports without the excluded ones."""
    fixed = [span for span in forward.ranges if not span.auto]
    excluded = [(span.start, span.end) for span in fixed if span.exclude]
    return [
        (first, last, *_targets(span, first, last))
        for span in fixed
        if not span.exclude
        for first, last in remaining((span.start, span.end), excluded)
    ]


def _targets(span: PortRange, first: int, last: int) -> Span:
    """Return the ports of the target that a part of a range leads to."""
    if span.onto_one:
        return span.to, span.to
    return span.to + first - span.start, span.to + last - span.start
