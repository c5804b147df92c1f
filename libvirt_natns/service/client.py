# SPDX-License-Identifier: LGPL-2.1-or-later
"""The clients' end of the service's socket, and the protocol.

The service speaks first.  A greeting that comes in time shows that the service is alive
and of this version.  Only then does the service get any work.  So a service that is
stuck, or older than the hook, never does late what the hook has done itself.  The
greeting has the state database's format, too, as a service cannot use another format.

    service: GREETING
    client:  KIND OPERATION SUB-OPERATION LENGTH newline, LENGTH octets
    service: "done" or "refused", newline, text to its end

Hooks import this module.  So the module imports only the barest parts of the standard
library: ``socket`` takes longer to import than an interpreter takes to start.
"""

import _socket
import time

SOCKET = "/run/libvirt-natns/service.sock"
FORMAT = 3
"""The state database's format, ``schema.VERSION``, which takes longer to import."""

GREETING = b"libvirt-natns 1 %d\n" % FORMAT
DONE, REFUSED = b"done", b"refused"
BLOCK = 65536

GREETING_LIMIT = 2.0
"""Seconds in which a service that is alive greets."""

LIMITS = {
    # Another network's start may have to be waited for.
    "start": 60.0,
    "started": 60.0,
    "stopped": 60.0,
    # The network's own start may have to be waited for.
    "changed": 60.0,
}
"""Seconds that an event may take, from the greeting to the end of the answer."""

LIMIT = 30.0
"""The same for all other events."""


class Answer:
    """The service's answer: whether it did as asked, and its text."""

    __slots__ = ("done", "text")

    def __init__(self, done: bool, text: str) -> None:
        self.done = done
        self.text = text


def ask(
    kind: str, event: tuple[str, str], data: bytes = b"", path: str | None = None
) -> Answer | None:
    """Have the service answer an event or a question; None where it does not answer.

    The service may have begun the work then; doing the work again converges.
    """
    end = time.monotonic() + LIMITS.get(event[0], LIMIT)
    try:
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    except OSError:
        return None
    try:
        connection.settimeout(GREETING_LIMIT)
        connection.connect(path or SOCKET)
        # The greeting is short and sent at once, so it comes whole.
        if connection.recv(len(GREETING)) != GREETING:
            return None
        connection.settimeout(_left(end))
        connection.sendall(f"{kind} {event[0]} {event[1]} {len(data)}\n".encode() + data)
        return _answer(_read_all(connection, end))
    except OSError:
        return None
    finally:
        connection.close()


def _left(end: float) -> float:
    """Return the seconds until ``end`` of the monotonic clock.  Raises TimeoutError past it."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _read_all(connection: _socket.socket, end: float) -> bytes:
    blocks = []
    while block := connection.recv(BLOCK):
        blocks.append(block)
        connection.settimeout(_left(end))
    return b"".join(blocks)


def _answer(octets: bytes) -> Answer | None:
    verdict, newline, text = octets.partition(b"\n")
    if not newline or verdict not in (DONE, REFUSED):
        # The service has ended in between.
        return None
    return Answer(verdict == DONE, text.decode(errors="replace"))
