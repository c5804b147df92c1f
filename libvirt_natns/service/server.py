# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service's end of its socket: answers events of hooks, and questions of people.

``client`` describes the protocol.  Each connection has a thread of its own, so a
connection that waits for its network delays no other.
"""

import signal
import socket
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from selectors import EVENT_READ, DefaultSelector
from threading import Lock, Thread, current_thread
from typing import Protocol

from libvirt_natns.daemons import systemd
from libvirt_natns.documents.xml_sniff import at_domain, at_network
from libvirt_natns.engine import events
from libvirt_natns.engine.factory import Resident
from libvirt_natns.errors import FormatError, NatnsError
from libvirt_natns.model.configuration import Config
from libvirt_natns.service.client import DONE, GREETING, REFUSED
from libvirt_natns.service.log import Level, Log

HEADER_LIMIT = 256
DATA_LIMIT = 1 << 26
"""Octets of XML; libvirt itself takes less."""

REQUEST_LIMIT = 10.0
"""Seconds that a client may take for its request."""

STOP_LIMIT = 60.0
"""Seconds that connections in progress get when the service is to end."""

SHORTAGE = 0.2
"""Seconds of rest where the process is short of descriptors or threads."""

SIGNALS = 4096
"""Octets of signals that are read at once; each of them has been handled by then."""

CREDENTIALS = struct.Struct("3i")

Question = Callable[[], str]
"""Returns the text of an answer to a person.  Raises NatnsError."""


class Meter(Protocol):
    """Counts answers."""

    def answered(self, hook: str, operation: str, outcome: str, seconds: float) -> None:
        """Count an answer; ``outcome`` is "done" or "refused"."""


@dataclass(frozen=True, slots=True)
class Request:
    """An event, or a question (``kind`` "question")."""

    kind: str
    event: tuple[str, str]
    data: bytes

    @property
    def name(self) -> str:
        """Return the name of the network or guest, for the log."""
        look = at_network if self.kind == "network" else at_domain
        return look(self.data).name if self.data else ""


class Server:
    """Takes connections and answers them until it is stopped."""

    def __init__(
        self,
        sessions: Resident,
        log: Log,
        meter: Meter,
        questions: Mapping[str, Question],
    ) -> None:
        self._sessions = sessions
        self._log = log
        self._meter = meter
        self._questions = questions
        self._threads: set[Thread] = set()
        self._lock = Lock()
        self._end, self._wake = socket.socketpair()
        self._signals, self._wakeup = socket.socketpair()
        for end in (self._end, self._wake, self._signals, self._wakeup):
            end.setblocking(False)

    # -- connections -------------------------------------------------------

    def stop(self) -> None:
        """Take no more connections; safe in a signal's handler."""
        with suppress(BlockingIOError):
            self._wake.send(b"x")

    def handle(self, handlers: Mapping[signal.Signals, Callable[[], None]]) -> None:
        """Have ``run`` call these at signals.  The caller is the main thread, as ``run``'s is.

        The interpreter calls a handler when the main thread runs again.  A signal to another
        thread, or just ahead of the wait for connections, does not end that wait: its octet does.
        """
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number, handler in handlers.items():
            signal.signal(number, lambda *_, handler=handler: handler())

    def run(self, listener: socket.socket, watchdog: float | None = None) -> None:
        """Answer connections until ``stop``, and finish those that are in progress then.

        ``watchdog`` is the interval, in seconds, of signs of life to systemd.
        """
        listener.setblocking(False)
        with DefaultSelector() as selector:
            selector.register(listener, EVENT_READ)
            selector.register(self._end, EVENT_READ)
            selector.register(self._signals, EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select(watchdog)]
                if watchdog is not None:
                    systemd.notify("WATCHDOG=1")
                if self._signals in ready:
                    self._signals.recv(SIGNALS)
                if self._end in ready:
                    break
                if listener in ready:
                    self._accept(listener)
        listener.close()
        self._finish()

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            self._short_of("descriptors", error)
            return
        thread = Thread(target=self._serve, args=(connection,), daemon=True)
        with self._lock:
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as error:
            # The hook does the work itself then.
            connection.close()
            self._threads.discard(thread)
            self._short_of("threads", error)

    def _short_of(self, what: str, error: Exception) -> None:
        self._log.say("error", "overload", short_of=what, error=error)
        # The connection still waits, and would be noticed again at once.
        time.sleep(SHORTAGE)

    def _finish(self) -> None:
        deadline = time.monotonic() + STOP_LIMIT
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _serve(self, connection: socket.socket) -> None:
        """Serve one connection, from the greeting to the work after the answer."""
        try:
            # On an OSError the client has gone, but its event is done.
            with suppress(OSError), connection:
                follow_up = self._converse(connection)
                connection.close()
                if follow_up is not None:
                    self._go_on(follow_up)
        finally:
            with self._lock:
                self._threads.discard(current_thread())

    def _go_on(self, follow_up: events.FollowUp) -> None:
        try:
            follow_up(self._sessions)
        except Exception as error:  # a fault here must be logged
            level: Level = "warning" if isinstance(error, NatnsError) else "error"
            self._log.say_error(level, "failed", error, when="after the answer")

    def _converse(self, connection: socket.socket) -> events.FollowUp | None:
        if _peer(connection) != 0:
            return None
        connection.settimeout(REQUEST_LIMIT)
        connection.sendall(GREETING)
        try:
            return self._reply(connection)
        except FormatError as error:
            # Another version is installed by now.  Its hooks do the work themselves, and
            # systemd starts its service in our place.
            self._log.say("error", "outdated", error=error)
            self.stop()
        return None

    def _reply(self, connection: socket.socket) -> events.FollowUp | None:
        """Answer a client's request.  Raises FormatError, and answers nothing then."""
        request = _request(connection)
        if request is None:
            # The client may be a hook of another version, which rejects our greeting.
            self._check_format()
            return None
        start = time.monotonic()
        verdict, text, follow_up = self._answer(request)
        with suppress(OSError):
            connection.sendall(verdict + b"\n" + text.encode())
        taken = time.monotonic() - start
        # An error in counting must not stop the work after the answer.
        with suppress(Exception):
            self._meter.answered(request.kind, request.event[0], verdict.decode(), taken)
        return follow_up

    def _check_format(self) -> None:
        """Raise FormatError where the state database is another version's."""
        try:
            with self._sessions.engine(Config()):
                return
        except FormatError:
            raise
        except NatnsError:
            # An event that needs the database reports the error.
            return

    # -- answers -----------------------------------------------------------

    def _answer(self, request: Request) -> tuple[bytes, str, events.FollowUp | None]:
        try:
            if request.kind == "question":
                return DONE, self._questions[request.event[0]](), None
            answered = events.answer(request.kind, request.event, request.data, self._sessions)
        except FormatError:
            raise
        except Exception as error:  # the service must answer after any error
            line = self._log.say_error(
                "warning", "refused", error, hook=request.kind, operation=request.event[0],
                name=request.name or None,
            )  # fmt: skip
            return REFUSED, line, None
        return DONE, "", answered


def _peer(connection: socket.socket) -> int:
    """Return the user id of the process at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    return int(CREDENTIALS.unpack(credentials)[1])


def _request(connection: socket.socket) -> Request | None:
    """Read a client's request; None where the client has gone, or the request is malformed."""
    with connection.makefile("rb") as stream:
        header = stream.readline(HEADER_LIMIT).decode(errors="replace").split()
        if len(header) != 4 or not header[3].isdecimal():
            return None
        kind, operation, sub_operation, length = header
        if int(length) > DATA_LIMIT:
            return None
        data = stream.read(int(length))
    return Request(kind, (operation, sub_operation), data) if len(data) == int(length) else None
