# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service's log: structured lines on standard error, one for each change.

A line is in logfmt (KEY=VALUE, values quoted where they must be), for journald and for
people.  Under systemd a line starts with its priority, as in sd-daemon(3).

A log that cannot be written fails no work, and delays none for long.  The disk may be
full, and the reader may have ended or may read no more.  Lines are lost then and
counted; their number comes before the next line that can be written.
"""

import io
import os
import select
import sys
from collections.abc import Callable
from threading import Lock
from typing import Literal, TextIO

from libvirt_natns.errors import describe

Level = Literal["error", "warning", "notice", "info", "debug"]
PRIORITIES: dict[Level, int] = {"error": 3, "warning": 4, "notice": 5, "info": 6, "debug": 7}

PATIENCE = 0.5
"""Seconds that a line waits for a reader that does not read.  While lines are being
lost, no line waits."""


class Log:
    """Writes lines; safe for threads.  No method raises OSError."""

    def __init__(self, stream: TextIO | None = sys.stderr) -> None:
        self._stream = stream
        self._lock = Lock()
        self._lost = 0
        # A line that was cut off must not run into the next one.
        self._within_line = False
        self._heard: Callable[[], None] = lambda: None
        # systemd sets the variable where the stream is the journal's.
        self._under_systemd = "JOURNAL_STREAM" in os.environ

    def hear(self, heard: Callable[[], None]) -> None:
        """Have ``heard`` called after each line: an event that is logged has changed something."""
        self._heard = heard

    def say(self, level: Level, what: str, **fields: object) -> None:
        """Log the event ``what`` with its particulars; None leaves a field out.

        Times are numbers of seconds.
        """
        line = self._line(level, what, fields)
        with self._lock:
            gap = "\n" if self._within_line else ""
            if self._lost:
                gap += self._line("warning", "lost", {"lines": self._lost})
            if self._write(gap + line):
                self._lost = 0
            else:
                self._lost += 1
        self._heard()

    def say_error(self, level: Level, what: str, error: Exception, **fields: object) -> str:
        """Log an error with its particulars, and return it as one line.

        An error that no person is meant to read is followed by lines with its traceback.
        """
        line, more = describe(error)
        self.say(level, what, **fields, error=line)
        for text in more:
            self.say("error", "traceback", line=text)
        return line

    def _line(self, level: Level, what: str, fields: dict[str, object]) -> str:
        given = {key: value for key, value in fields.items() if value is not None}
        pairs = {"level": level, "event": what, **given}
        line = " ".join(f"{key}={_value(value)}" for key, value in pairs.items())
        prefix = f"<{PRIORITIES[level]}>" if self._under_systemd else ""
        return f"{prefix}{line}\n"

    def _write(self, text: str) -> bool:
        """Write to the stream; False where not all of the text could be written."""
        # Python sets no standard error where the process was started without one.
        if self._stream is None:
            return False
        try:
            descriptor = self._stream.fileno()
        except (io.UnsupportedOperation, ValueError):
            return self._write_buffered(text)
        octets = memoryview(text.encode(errors="replace"))
        try:
            # Past Python's buffer, which grows with all that it cannot write.
            while octets and self._takes_more(descriptor):
                octets = octets[os.write(descriptor, octets[: select.PIPE_BUF]) :]
                self._within_line = bool(octets)
        except OSError:
            return False
        return not octets

    def _takes_more(self, descriptor: int) -> bool:
        """True if a write of ``PIPE_BUF`` octets would not block, after some patience."""
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        return bool(poll.poll(0 if self._lost else PATIENCE * 1000))

    def _write_buffered(self, text: str) -> bool:
        try:
            assert self._stream is not None
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            return False
        return True


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    text = " ".join(str(value).split())
    if text and not set(text) & set(' "='):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
