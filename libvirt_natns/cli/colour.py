# SPDX-License-Identifier: LGPL-2.1-or-later
"""Colours of health words and verdicts, for a person at a terminal.

Commands print plain text. The stream to the terminal paints it, line by line. So a pipe, a file
and a test never get an escape sequence. A command without a brush here is never painted.
https://no-color.org is respected, and so is a terminal without colours.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import TextIO

from libvirt_natns.cli.unhandled import UNTOUCHED

GREEN, YELLOW, RED = 32, 33, 31

WORDS = (
    (GREEN, re.compile(r"ok|published|up$")),
    (RED, re.compile(r"broken|damaged|no way out|no names|no router|given up|stopped by|overdue")),
    (
        YELLOW,
        re.compile(
            r"warn|may be stopped|isolated|not handled|preparing|starting|waiting|reserved|pending"
            r"|unconfirmed|half-done"
        ),
    ),
)
"""The colour of a text by its beginning; every other text is plain."""

MARKS = {"!": RED, "-": YELLOW, "#": YELLOW}
"""The marks of lines below a table, see ``status``."""

HEADINGS = ("HEALTH", "STATE")
"""Headings of last columns that have verdicts."""

Brush = Callable[[str], str]
"""Paints a line without its end."""


def is_wanted(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """True if a stream leads to a terminal with colours, and its user has not refused them."""
    if environment.get("NO_COLOR") or environment.get("TERM", "dumb") == "dumb":
        return False
    try:
        return stream.isatty()
    except ValueError:
        # The stream is closed.
        return False


def brush_of(command: str) -> Brush | None:
    """Return a new brush for the output of a command; None for a command without colours."""
    make = BRUSHES.get(command)
    return make() if make else None


def painted(text: str, colour: int | None = None) -> str:
    """Return a text in a colour; by default, in the colour of its beginning."""
    if colour is None:
        colour = next((number for number, words in WORDS if words.match(text)), None)
    return text if colour is None else f"\033[{colour}m{text}\033[0m"


class TableBrush:
    """Paints the last column of a table, and the marks of the lines below a row."""

    def __init__(self) -> None:
        self._column: int | None = None

    def __call__(self, line: str) -> str:
        """Return a line, painted."""
        if line.endswith(HEADINGS):
            self._column = line.rindex(" ") + 1
            return line
        if line.startswith("  ") and line[2:3] in MARKS and line[3:4] == " ":
            return f"  {painted(line[2], MARKS[line[2]])}{line[3:]}"
        # A cell begins behind two blanks: a line of another kind has a word there.
        if self._column is None or line[self._column - 2 : self._column] != "  ":
            return line
        return line[: self._column] + painted(line[self._column :])


def _verdict(line: str) -> str:
    """Return a line with a painted verdict of ``doctor`` at a line's beginning."""
    verdict, blank, rest = line.partition(" ")
    return painted(verdict) + blank + rest


def _difference(line: str) -> str:
    """Return a line with the painted name of a network, or the painted word "note"."""
    name, colon, rest = line.partition(": ")
    return painted(name, YELLOW if name == "note" else RED) + colon + rest if colon else line


def _untouched(line: str) -> str:
    """Return a line with the painted verdict of ``plan`` about a network without a router."""
    return line.replace(UNTOUCHED, painted(UNTOUCHED, YELLOW), 1)


def _validity(line: str) -> str:
    """Return a line with the painted verdict of ``validate``, behind the name of a file."""
    if ": valid" in line:
        return f": {painted('valid', GREEN)}".join(line.rsplit(": valid", 1))
    return f": {painted('wrong', RED)}".join(line.split(": wrong", 1))


BRUSHES: Mapping[str, Callable[[], Brush]] = {
    "status": TableBrush,
    "forward": TableBrush,
    "doctor": lambda: _verdict,
    "check": lambda: _difference,
    "plan": lambda: _untouched,
    "validate": lambda: _validity,
}


class Painted:
    """A text stream; a brush paints its whole lines.

    Everything but writing is left to the wrapped stream.
    """

    def __init__(self, stream: TextIO, brush: Brush) -> None:
        self._stream = stream
        self._brush = brush
        self._begun = ""

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write all lines that are whole by now."""
        lines = (self._begun + text).split("\n")
        self._begun = lines.pop()
        if lines:
            self._stream.write("".join(f"{self._brush(line)}\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        """Write a line that has no end yet, and flush the stream."""
        begun, self._begun = self._begun, ""
        if begun:
            self._stream.write(self._brush(begun))
        self._stream.flush()
