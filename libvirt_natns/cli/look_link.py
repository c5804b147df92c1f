# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of the look server, as the server sees it: a request, and an answer or a stream.

No method waits.  Output for a slow reader is kept up to a limit.  A reader of the stream that lags
further behind gets the whole state instead of the changes between.
"""

import json
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from libvirt_natns.cli.look_jobs import Job
from libvirt_natns.cli.look_rules import Peer

GREETING = b"libvirt-natns look 1\n"

REQUEST_LIMIT = 1 << 20
"""Octets of a request, the XML of a network included."""

REQUEST_TIME = 5.0
"""Seconds that a client may take for its request."""

STALL_TIME = 60.0
"""Seconds that a client may take to read anything of what is there for it."""

QUEUE = 1 << 20
"""Octets that wait for a reader of the stream before it counts as lagging."""

BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class LookRequest:
    """A request: the words of a command line, and the XML for ``plan``."""

    words: tuple[str, ...]
    document: bytes


def parsed_request(line: bytes) -> LookRequest | None:
    """Return a request; None for octets that are none."""
    try:
        request = json.loads(line)
        words, document = request["argv"], request.get("document", "")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            return None
        return LookRequest(tuple(words), document.encode())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


class LookLink:
    """A connection; ``out`` has what is still to be sent."""

    def __init__(self, connection: socket.socket, peer: Peer) -> None:
        self.connection = connection
        self.peer = peer
        self.request: LookRequest | None = None
        self.job: Job | None = None
        self.lags = False
        self.streams = False
        self._ends = False
        self._in = bytearray()
        self._out = bytearray(GREETING)
        self._last = time.monotonic()

    @property
    def waits(self) -> bool:
        """True if octets wait to be sent."""
        return bool(self._out)

    @property
    def over(self) -> bool:
        """True if the answer is sent."""
        return self._ends and not self._out

    @property
    def deadline(self) -> float | None:
        """The time at which the connection is cut, unless something happens on it."""
        if self._out:
            return self._last + STALL_TIME
        return None if self.request else self._last + REQUEST_TIME

    def read(self) -> bool:
        """Read; false where the client sends no more, or too much."""
        try:
            octets = self.connection.recv(BLOCK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._in += octets
        return bool(octets) and len(self._in) <= REQUEST_LIMIT

    def take_request(self) -> bytes | None:
        """Return the line of the request once it is whole; the client may ask once."""
        line, newline, _ = self._in.partition(b"\n")
        return bytes(line) if newline and self.request is None else None

    def flush(self) -> bool:
        """Send as much as the client takes now; false where the client has gone."""
        while self._out:
            try:
                sent = self.connection.send(memoryview(self._out)[:BLOCK])
            except BlockingIOError:
                return True
            except OSError:
                return False
            del self._out[:sent]
            self._last = time.monotonic()
        return True

    def answer(self, status: int, out: str, err: str) -> None:
        """Append the answer, after which the connection ends."""
        self._queue({"status": status, "out": out, "err": err})
        self._ends = True

    def refuse(self, fact: str) -> None:
        """Append the answer that a request is refused."""
        self.answer(1, "", f"virt-natns: {fact}\n")

    def stream(self, line: bytes) -> None:
        """Append a line of the stream, unless the reader lags behind."""
        if self.lags or (self._out and len(self._out) + len(line) > QUEUE):
            self.lags = True
        else:
            self._start(line)

    def catch_up(self, state: bytes) -> None:
        """Append the whole state for a reader that lagged and has read all of the rest."""
        self.lags = False
        self._start(state)

    def _queue(self, answer: dict[str, Any]) -> None:
        self._start(json.dumps(answer).encode() + b"\n")

    def _start(self, octets: bytes) -> None:
        if not self._out:
            # Idle until now: the reader's time begins.
            self._last = time.monotonic()
        self._out += octets

    def close(self) -> None:
        """Close the connection, and end its job."""
        if self.job is not None:
            self.job.kill()
        with suppress(OSError):
            self.connection.close()
