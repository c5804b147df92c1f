# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service's log: structured lines on standard error, one for each change.

In logfmt (KEY=VALUE, values quoted where they must be), which journald and
people read alike.  Under systemd a line starts with its priority, as
sd-daemon(3) has it.
"""

import os
import sys
from threading import Lock
from typing import Literal, TextIO

Level = Literal["error", "warning", "notice", "info", "debug"]
PRIORITIES: dict[Level, int] = {"error": 3, "warning": 4, "notice": 5, "info": 6, "debug": 7}


class Journal:
    """Writes lines; safe for threads."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._lock = Lock()
        # systemd sets it where the stream is the journal's.
        self._under_systemd = "JOURNAL_STREAM" in os.environ

    def say(self, level: Level, what: str, **fields: object) -> None:
        """Log one thing: ``what`` happened, and particulars; None leaves a field out.

        Times are given in seconds, as numbers.
        """
        given = {key: value for key, value in fields.items() if value is not None}
        pairs = {"level": level, "event": what, **given}
        line = " ".join(f"{key}={_value(value)}" for key, value in pairs.items())
        prefix = f"<{PRIORITIES[level]}>" if self._under_systemd else ""
        with self._lock:
            self._stream.write(f"{prefix}{line}\n")
            self._stream.flush()


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    text = " ".join(str(value).split())
    if text and not set(text) & set(' "='):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
