# SPDX-License-Identifier: LGPL-2.1-or-later
"""The picture as text: a column for each network, with its guests above and its upstream below.

A row ends where it would be wider than a terminal.  A text that is wider is cut into lines.
"""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from libvirt_natns.cli.diagram.picture import (
    NONE,
    DrawnNetwork,
    Picture,
    cells,
    first_of,
    widest,
)

WIDTH = 80
GAP = "  "
INDENT = "   "
MOST_FORWARDS = 5
MOST_GUESTS = 5
"""Lines at most; the last says how many more there are."""


@dataclass(frozen=True, slots=True)
class Column:
    """The texts of a network: ``above`` stands on its bridge, ``box`` in its namespace's box."""

    above: tuple[str, ...]
    bridge: tuple[str, ...]
    box: tuple[str, ...]

    @property
    def width(self) -> int:
        """The columns of a terminal, with the edges of the box."""
        return widest((*self.above, *self.bridge, *self.box)) + 4


def draw(picture: Picture, width: int = WIDTH) -> str:
    """Return the picture as text; no line is wider than ``width``."""
    if not picture.networks:
        return f"{NONE}\n"
    parts = []
    for upstream, networks in picture.by_upstream:
        # The line of the upstream's bridge ends with its name.
        room = width - 1 - cells(upstream.bridge)
        columns = [_column(network, room - 4) for network in networks]
        rows = ["\n".join(_row(row, upstream.bridge)) for row in _rows(columns, room)]
        said = textwrap.fill(
            f"({upstream.text})",
            width,
            initial_indent=INDENT,
            subsequent_indent=f"{INDENT} ",
            # A name stays whole.
            break_on_hyphens=False,
        )
        parts.append("\n\n".join(rows) + f"\n{said}\n")
    return "\n".join(parts)


def _column(network: DrawnNetwork, width: int) -> Column:
    guests = first_of([guest.text for guest in network.guests], MOST_GUESTS)
    forwards = first_of(network.forward_texts, MOST_FORWARDS)
    head = f"{network.namespace}: {network.health}"
    return Column(
        _cut(guests, width),
        _cut((network.name, network.bridge), width),
        _cut((head, *network.gateways, *network.outside, *forwards), width),
    )


def _cut(texts: Iterable[str], width: int) -> tuple[str, ...]:
    """Return the texts, cut into lines that are at most ``width`` wide, after a blank if any."""
    lines = []
    for text in texts:
        line = ""
        for character in text:
            if cells(line + character) > width:
                end = line.rfind(" ") + 1 or len(line)
                lines.append(line[:end])
                line = line[end:]
            line += character
        lines.append(line)
    return tuple(lines)


def _rows(columns: Iterable[Column], width: int) -> Iterator[list[Column]]:
    row: list[Column] = []
    used = 0
    for column in columns:
        if row and used + column.width > width:
            yield row
            row, used = [], 0
        row.append(column)
        used += column.width + len(GAP)
    yield row


def _row(columns: Sequence[Column], bridge: str) -> Iterator[str]:
    height = max(len(column.above) for column in columns)
    for number in range(height):
        yield _line(_above(column, number - height) for column in columns)
    if height:
        yield _line(_center("|" if column.above else "", column.width) for column in columns)
    height = max(len(column.bridge) for column in columns)
    for number in range(height):
        yield _line(
            _center(_at(column.bridge, number - height), column.width) for column in columns
        )
    yield _line(_center("|", column.width) for column in columns)
    yield _line(_edge(column) for column in columns)
    for number in range(max(len(column.box) for column in columns)):
        yield _line(f"| {_left(_at(column.box, number), column.width - 4)} |" for column in columns)
    yield _line(_edge(column) for column in columns)
    yield _line(_center("|", column.width) for column in columns)
    joined = "-" * len(GAP)
    yield joined.join("+".center(column.width, "-") for column in columns) + f" {bridge}"


def _above(column: Column, number: int) -> str:
    """Return a line of the guests, which stand as a block above the middle of the box."""
    block = widest(column.above)
    return _center(_left(_at(column.above, number), block), column.width)


def _at(texts: Sequence[str], number: int) -> str:
    """Return the text of that number, which counts from the end if it is negative."""
    return texts[number] if -len(texts) <= number < len(texts) else ""


def _left(text: str, width: int) -> str:
    return text + " " * (width - cells(text))


def _center(text: str, width: int) -> str:
    """Return a text in the middle, as ``str.center`` does, of columns instead of characters."""
    return text.center(width - cells(text) + len(text))


def _line(parts: Iterable[str]) -> str:
    return GAP.join(parts).rstrip()


def _edge(column: Column) -> str:
    return "+" + "+".center(column.width, "-")[1:-1] + "+"
