# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answering what hooks and people ask over the service's socket.

``client`` describes what is said.  Each connection has a thread: one that waits
for its network never keeps another one waiting.
"""

import socket
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from selectors import EVENT_READ, DefaultSelector
from threading import Lock, Thread, current_thread
from typing import Protocol

from libvirt_natns.daemons import systemd
from libvirt_natns.documents.xml_sniff import at_domain, at_network
from libvirt_natns.engine import events
from libvirt_natns.engine.factory import Resident
from libvirt_natns.errors import FormatError, NatnsError, describe
from libvirt_natns.model.configuration import Config
from libvirt_natns.records import dataclass
from libvirt_natns.service.client import DONE, GREETING, REFUSED
from libvirt_natns.service.log import Journal, Level

HEADER_LIMIT = 256
DATA_LIMIT = 1 << 26
"""Octets of XML; libvirt itself takes less."""

REQUEST_LIMIT = 10.0
"""Seconds that a client may take to say what it wants."""

STOP_LIMIT = 60.0
"""Seconds that connections in progress get when the service is to end."""

SHORTAGE = 0.2
"""Seconds of rest where the process is short of descriptors or threads."""

CREDENTIALS = struct.Struct("3i")

Question = Callable[[], str]
"""What answers a person, rather than a hook.  Raises NatnsError."""


class Meter(Protocol):
    """Counts what was answered."""

    def answered(self, hook: str, operation: str, outcome: str, seconds: float) -> None:
        """An answer was given, with ``outcome`` "done" or "refused"."""


@dataclass(frozen=True, slots=True)
class Request:
    """One event, or one question (``kind`` "question")."""

    kind: str
    event: tuple[str, str]
    data: bytes

    @property
    def name(self) -> str:
        """Whom it is about, for the log."""
        look = at_network if self.kind == "network" else at_domain
        return look(self.data).name if self.data else ""


class Answering:
    """Takes connections and answers them until it is stopped."""

    def __init__(
        self,
        sessions: Resident,
        journal: Journal,
        meter: Meter,
        questions: Mapping[str, Question],
    ) -> None:
        self._sessions = sessions
        self._journal = journal
        self._meter = meter
        self._questions = questions
        self._threads: set[Thread] = set()
        self._lock = Lock()
        self._end, self._wake = socket.socketpair()
        for each in (self._end, self._wake):
            each.setblocking(False)

    # -- connections -------------------------------------------------------

    def stop(self) -> None:
        """Take no more connections; safe in a signal's handler."""
        with suppress(BlockingIOError):
            self._wake.send(b"x")

    def run(self, listener: socket.socket, watchdog: float | None = None) -> None:
        """Answer all that comes, and what is in progress at the end.

        ``watchdog`` is the interval, in seconds, of signs of life to systemd.
        """
        listener.setblocking(False)
        with DefaultSelector() as selector:
            selector.register(listener, EVENT_READ)
            selector.register(self._end, EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select(watchdog)]
                if watchdog is not None:
                    systemd.notify("WATCHDOG=1")
                if self._end in ready:
                    break
                if listener in ready:
                    self._accept(listener)
        listener.close()
        self._finish()

    def _accept(self, listener: socket.socket) -> None:
        try:
            link, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            self._short_of("descriptors", error)
            return
        thread = Thread(target=self._serve, args=(link,), daemon=True)
        with self._lock:
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as error:
            # The hook does the work itself then.
            link.close()
            self._threads.discard(thread)
            self._short_of("threads", error)

    def _short_of(self, what: str, error: Exception) -> None:
        self._journal.say("error", "overload", short_of=what, error=error)
        # The connection still waits, and would be noticed again at once.
        time.sleep(SHORTAGE)

    def _finish(self) -> None:
        deadline = time.monotonic() + STOP_LIMIT
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _serve(self, link: socket.socket) -> None:
        """One connection, from its greeting to what is done after the answer."""
        try:
            # An OSError: the client has gone, and what was begun is done.
            with suppress(OSError), link:
                follow_up = self._converse(link)
                link.close()
                if follow_up is not None:
                    self._go_on(follow_up)
        finally:
            with self._lock:
                self._threads.discard(current_thread())

    def _go_on(self, follow_up: events.FollowUp) -> None:
        try:
            follow_up(self._sessions)
        except Exception as error:  # a fault here must not end without a word
            self._log_failure("after the answer", error)

    def _converse(self, link: socket.socket) -> events.FollowUp | None:
        if _peer(link) != 0:
            return None
        link.settimeout(REQUEST_LIMIT)
        link.sendall(GREETING)
        try:
            return self._reply(link)
        except FormatError as error:
            # Another version is installed by now: its hooks do the work, and systemd
            # starts its service in our place.
            self._journal.say("error", "outdated", error=error)
            self.stop()
        return None

    def _reply(self, link: socket.socket) -> events.FollowUp | None:
        """Answer what the client wants.  Raises FormatError, and answers nothing then."""
        request = _request(link)
        if request is None:
            # It may be a hook of another version, which did not like the greeting.
            self._check_format()
            return None
        start = time.monotonic()
        verdict, text, follow_up = self._answer(request)
        with suppress(OSError):
            link.sendall(verdict + b"\n" + text.encode())
        taken = time.monotonic() - start
        # What follows an answer must not depend on its being counted.
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
            # Who needs it will say so.
            return

    # -- answers -----------------------------------------------------------

    def _answer(self, request: Request) -> tuple[bytes, str, events.FollowUp | None]:
        try:
            if request.kind == "question":
                return DONE, self._questions[request.event[0]](), None
            answered = events.answer(request.kind, request.event, request.data, self._sessions)
        except FormatError:
            raise
        except Exception as error:  # the service must answer, whatever it is
            line, more = describe(error)
            self._journal.say(
                "warning", "refused", hook=request.kind, operation=request.event[0],
                name=request.name or None, error=line,
            )  # fmt: skip
            for each in more:
                self._journal.say("error", "traceback", line=each)
            return REFUSED, line, None
        return DONE, "", answered

    def _log_failure(self, when: str, error: Exception) -> None:
        line, more = describe(error)
        level: Level = "warning" if isinstance(error, NatnsError) else "error"
        self._journal.say(level, "failed", when=when, error=line)
        for each in more:
            self._journal.say("error", "traceback", line=each)


def _peer(link: socket.socket) -> int:
    """The user id of who has connected."""
    told = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    return int(CREDENTIALS.unpack(told)[1])


def _request(link: socket.socket) -> Request | None:
    """What the client wants; None where it has gone, or makes no sense."""
    with link.makefile("rb") as stream:
        header = stream.readline(HEADER_LIMIT).decode(errors="replace").split()
        if len(header) != 4 or not header[3].isdecimal():
            return None
        kind, operation, sub_operation, length = header
        if int(length) > DATA_LIMIT:
            return None
        data = stream.read(int(length))
    return Request(kind, (operation, sub_operation), data) if len(data) == int(length) else None
