# SPDX-License-Identifier: LGPL-2.1-or-later
"""The process behind the socket for read-only commands and watchers.

The service starts it with the first client, and it ends by itself a while after the last one
(``service/look.py``).  A client that is neither root nor in group libvirt gets no octet.

    server: GREETING
    client: {"argv": [...], "document": "..."} newline
    server: {"status": 0, "out": "...", "err": "..."} newline, or the lines of the stream

A single thread serves all clients, and each command runs in a fork.  Each user has a bounded share
of connections and commands, and root has one of its own.
"""

import os
import select
import socket
import time
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path

from libvirt_natns.cli import look_rules
from libvirt_natns.cli.look_answer import answer
from libvirt_natns.cli.look_jobs import Job, start
from libvirt_natns.cli.look_link import LookLink, LookRequest, parsed_request
from libvirt_natns.cli.look_rules import Peer
from libvirt_natns.cli.look_stream import Stream
from libvirt_natns.daemons.libvirt_dnsmasq import LIBVIRT_DIRECTORY
from libvirt_natns.service import look
from libvirt_natns.service.inotify import DirectoryMonitor

LINGER = 30.0
"""Seconds until the process ends without clients."""

MOST = 48
"""Connections of all members together; root has as many of its own."""

MOST_OF_USER = 8
"""Connections of one member."""

JOBS = 2
"""Commands of members that run at once, and of root; of a single member, one."""

NICE = 5
OOM_SCORE = "500"
"""The process gives way to hooks, and is killed ahead of them where memory is short."""

BELL = 0
"""The descriptor of the pipe that tells of changes, and that ends with the service."""

HUNG_UP = select.EPOLLHUP | select.EPOLLERR


class LookServer:
    """Serves the clients of a listening socket."""

    def __init__(self, listener: socket.socket, group: int | None) -> None:
        self._listener = listener
        self._group = group
        self._epoll = select.epoll()
        self._links: dict[int, LookLink] = {}
        self._jobs: dict[int, LookLink] = {}
        self._waiting: deque[LookLink] = deque()
        # Connections that are closed after the events of a round: no other has their number then.
        self._dropped: list[LookLink] = []
        self._stream = Stream()
        self._leases = DirectoryMonitor(Path(LIBVIRT_DIRECTORY))
        self._idle_since = time.monotonic()
        for opened in (listener, BELL, self._leases):
            self._epoll.register(opened, select.EPOLLIN)

    def run(self) -> None:
        """Serve clients until there has been none for a while, or the service ends."""
        while True:
            for descriptor, events in self._epoll.poll(self._pause()):
                if descriptor == BELL:
                    if not _drained():
                        return
                    self._stream.note()
                elif descriptor == self._listener.fileno():
                    self._accept()
                elif descriptor == self._leases.fileno():
                    self._leases_changed()
                else:
                    self._attend(descriptor, events)
            over = self._on_time(time.monotonic())
            while self._dropped:
                self._dropped.pop().close()
            if over:
                return

    def end(self) -> None:
        """End all commands and connections."""
        for link in self._links.values():
            link.close()
        if self._stream.job is not None:
            self._stream.job.kill()

    # -- connections -------------------------------------------------------

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            # The client has gone, or descriptors are short: it waits in the queue then.
            return
        peer = look_rules.peer(connection, self._group)
        if peer is None:
            connection.close()
            return
        connection.setblocking(False)
        link = LookLink(connection, peer)
        if self._is_full(peer):
            link.refuse("there are too many read-only commands and watchers: end some of them")
        self._links[connection.fileno()] = link
        self._epoll.register(connection.fileno(), select.EPOLLIN)
        self._push(link)

    def _is_full(self, peer: Peer) -> bool:
        links = [link for link in self._links.values() if link.peer.is_root == peer.is_root]
        own = [link for link in links if link.peer == peer]
        return len(links) >= MOST or (not peer.is_root and len(own) >= MOST_OF_USER)

    def _attend(self, descriptor: int, events: int) -> None:
        if descriptor in self._jobs:
            self._finish(self._jobs[descriptor])
        elif self._stream.job is not None and descriptor == self._stream.job.descriptor:
            self._looked(self._stream.job)
        elif descriptor in self._links:
            self._serve(self._links[descriptor], events)

    def _serve(self, link: LookLink, events: int) -> None:
        if events & HUNG_UP:
            self._drop(link)
            return
        if events & select.EPOLLIN and link.request is None:
            more = link.read()
            line = link.take_request()
            if line is not None:
                self._ask(link, line)
            elif not more:
                self._drop(link)
                return
        self._push(link)

    def _ask(self, link: LookLink, line: bytes) -> None:
        link.request = request = parsed_request(line)
        if request is None:
            link.request = LookRequest((), b"")
            link.refuse("the request is malformed: install one version of virt-natns")
        elif request.words == look_rules.STREAM:
            self._stream.add(link)
        elif look_rules.command_of(request.words) is None:
            link.refuse("only root can do this: use sudo")
        else:
            self._waiting.append(link)

    def _push(self, link: LookLink) -> None:
        """Send, and wait for what can happen next on the connection."""
        if not link.flush() or link.over:
            self._drop(link)
            return
        self._stream.catch_up(link)
        reads = 0 if link.request else select.EPOLLIN
        writes = select.EPOLLOUT if link.waits else 0
        self._epoll.modify(link.connection.fileno(), reads | writes)

    def _drop(self, link: LookLink) -> None:
        self._links.pop(link.connection.fileno(), None)
        with suppress(OSError, ValueError):
            self._epoll.unregister(link.connection.fileno())
        self._stream.remove(link)
        with suppress(ValueError):
            self._waiting.remove(link)
        self._dropped.append(link)
        self._idle_since = time.monotonic()

    # -- commands ----------------------------------------------------------

    def _start_jobs(self) -> None:
        for link in list(self._waiting):
            busy = [each.peer for each in self._jobs.values()]
            alike = [peer for peer in busy if peer.is_root == link.peer.is_root]
            if len(alike) >= JOBS or (not link.peer.is_root and link.peer in busy):
                continue
            self._waiting.remove(link)
            assert link.request is not None
            try:
                link.job = start(partial(answer, link.request, link.peer))
            except OSError as error:
                link.refuse(f"cannot run a command now: {error.strerror}")
                self._push(link)
                continue
            self._jobs[link.job.descriptor] = link
            self._epoll.register(link.job.descriptor, select.EPOLLIN)

    def _finish(self, link: LookLink) -> None:
        assert link.job is not None
        self._forget(link.job)
        outcome = link.job.finish()
        link.job = None
        if link in self._links.values():
            if outcome.status < 0:
                link.refuse("the command took too long: try again, or use sudo")
            else:
                link.answer(outcome.status, outcome.out, outcome.err)
            self._push(link)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.descriptor, None)
        self._epoll.unregister(job.descriptor)

    # -- the stream --------------------------------------------------------

    def _leases_changed(self) -> None:
        if any(name.endswith(".status") for name, _ in list(self._leases.changes())):
            self._stream.note()

    def _looked(self, job: Job) -> None:
        self._forget(job)
        self._stream.looked(job.finish())
        for link in [each for each in self._links.values() if each.streams]:
            self._push(link)

    # -- time --------------------------------------------------------------

    def _pause(self) -> float | None:
        deadlines = [link.deadline for link in self._links.values()]
        deadlines += [job.deadline for job in self._running()]
        deadlines.append(self._stream.due)
        deadlines.append(None if self._links else self._idle_since + LINGER)
        known = [each for each in deadlines if each is not None]
        return max(0.0, min(known) - time.monotonic()) if known else None

    def _running(self) -> list[Job]:
        jobs = [link.job for link in self._jobs.values()] + [self._stream.job]
        return [job for job in jobs if job is not None]

    def _on_time(self, now: float) -> bool:
        """Do what is due; true where the process is to end."""
        for link in list(self._links.values()):
            if link.deadline is not None and now >= link.deadline:
                self._drop(link)
        for job in self._running():
            if now >= job.deadline:
                job.kill()
        self._start_jobs()
        if self._stream.due is not None and now >= self._stream.due:
            self._look()
        return not self._links and not self._running() and now >= self._idle_since + LINGER

    def _look(self) -> None:
        try:
            job = self._stream.look()
        except OSError:
            # Another look is due in a while.
            return
        self._epoll.register(job.descriptor, select.EPOLLIN)


def _drained() -> bool:
    """Read all news of changes; false where the service has ended."""
    try:
        while octets := os.read(BELL, 4096):
            if len(octets) < 4096:
                return True
    except BlockingIOError:
        return True
    return False


def main() -> None:
    """Serve the socket that the service has passed."""
    os.nice(NICE)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
    passed = int(os.environ.pop(look.LISTENER))
    # The lowest free number: the service's own may be beyond those that a fork closes.
    listener = socket.socket(fileno=os.dup(passed))
    os.close(passed)
    server = LookServer(listener, look.group_id())
    try:
        server.run()
    finally:
        server.end()
    # A connection that came at last is left to the next process.
    os._exit(0)
