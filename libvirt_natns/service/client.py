# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asking the resident service, and the words that both sides exchange.

The service speaks first: only a greeting that comes in time shows that it is
alive and of this version, and only then is it given any work.  So a service that
is stuck, or older than the hook, never does anything late that the hook has
meanwhile done itself.  The greeting has the state database's format, too: a service
cannot work on what a hook of another version has written.

    service: GREETING
    client:  KIND OPERATION SUB-OPERATION LENGTH newline, LENGTH octets
    service: "done" or "refused", newline, text to its end

The standard library's barest part, for hooks: ``socket`` alone takes longer to
import than an interpreter to start.
"""

import _socket
import time

SOCKET = "/run/libvirt-natns/service.sock"
FORMAT = 3
"""The state database's format, ``tables.VERSION``, which takes longer to import."""

GREETING = b"libvirt-natns 1 %d\n" % FORMAT
DONE, REFUSED = b"done", b"refused"
BLOCK = 65536

GREETING_LIMIT = 2.0
"""Seconds within which a service that is alive greets."""

LIMITS = {
    # Another network's start may have to be waited for.
    "start": 60.0,
    "started": 60.0,
    "stopped": 60.0,
    # And so may be the network's own.
    "changed": 60.0,
}
"""Seconds that an event may take, from the greeting to the end of the answer."""

LIMIT = 30.0
"""The same for all others."""


class Answer:
    """What the service says: whether it did what was asked, and its text."""

    __slots__ = ("done", "text")

    def __init__(self, done: bool, text: str) -> None:
        self.done = done
        self.text = text


def ask(kind: str, event: tuple[str, str], data: bytes = b"", path: str = SOCKET) -> Answer | None:
    """Have the service answer one event, or one question; None where it cannot.

    Whatever it had begun by then, doing the same again converges.
    """
    end = time.monotonic() + LIMITS.get(event[0], LIMIT)
    try:
        link = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    except OSError:
        return None
    try:
        link.settimeout(GREETING_LIMIT)
        link.connect(path)
        if _read_line(link) != GREETING:
            return None
        link.settimeout(_left(end))
        link.sendall(f"{kind} {event[0]} {event[1]} {len(data)}\n".encode() + data)
        return _answer(_read_all(link, end))
    except OSError:
        return None
    finally:
        link.close()


def _left(end: float) -> float:
    """Seconds until ``end``, of the monotonic clock.  Raises TimeoutError past it."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _read_line(link: _socket.socket) -> bytes:
    # It is sent at once and is short: it comes whole.
    return link.recv(len(GREETING))


def _read_all(link: _socket.socket, end: float) -> bytes:
    found = []
    while block := link.recv(BLOCK):
        found.append(block)
        link.settimeout(_left(end))
    return b"".join(found)


def _answer(told: bytes) -> Answer | None:
    verdict, newline, text = told.partition(b"\n")
    if not newline or verdict not in (DONE, REFUSED):
        # It ended on the way.
        return None
    return Answer(verdict == DONE, text.decode(errors="replace"))
