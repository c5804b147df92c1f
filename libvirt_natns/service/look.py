# SPDX-License-Identifier: LGPL-2.1-or-later
"""The socket for read-only commands and watchers, beside the socket for hooks.

The socket belongs to root and to members of group libvirt.  The kernel refuses the connections of
all other users.  The service itself reads nothing from this socket: with the first connection it
starts a process that does (``cli/look_server.py``).  So a flood there, a slow reader or a fault of
that code touches no hook.  The process ends a while after its last client, and costs nothing then.

The process learns by a pipe that something has changed, as long as it runs.  It ends with the pipe.
"""

import grp
import os
import select
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread

from libvirt_natns import names
from libvirt_natns.kernel.locks import OURS, make_directory
from libvirt_natns.service.log import Log

NAME = "look.sock"
GROUP = "libvirt"
"""Members of this group have the full access of libvirt's own socket, which is root's access."""

BACKLOG = 64

PROGRAM = "from libvirt_natns.cli.look_server import main; main()"
LISTENER = "NATNS_LOOK_LISTENER"
"""The environment's variable with the number of the listening socket."""

PAUSE = 5.0
"""Seconds until another process is started after one that failed."""

STOP_LIMIT = 1.0
"""Seconds that the process and its thread get to end with the service."""

BELL = b"x"


def path() -> Path:
    """Return the path of the socket."""
    return names.RUN_DIRECTORY / NAME


def group_id() -> int | None:
    """Return the id of group libvirt; None where this machine has no such group."""
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return None


def listen() -> socket.socket:
    """Return the listening socket, for root and the group alone.  Raises OSError."""
    place = path()
    make_directory(place.parent)
    place.parent.chmod(OURS)
    # A service that was killed has left its socket.
    place.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Only root can connect, until the socket has its group.  The mask of the process is
        # not changed for that, as other threads make files.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(os.fspath(place))
        group = group_id()
        if group is not None:
            os.chown(place, 0, group)
            place.chmod(0o660)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


class Look:
    """Keeps the socket, and has a process serve it while there are clients."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._listener: socket.socket | None = None
        self._inode = 0
        self._end, self._wake = socket.socketpair()
        self._thread = Thread(target=self._run, name="look", daemon=True)
        # The pipe's end, and the lock that keeps it from being closed during a write.
        self._bell: int | None = None
        self._lock = Lock()

    def start(self) -> None:
        """Open the socket.  A machine that refuses it has no read-only commands."""
        try:
            self._listener = listen()
            self._inode = path().stat().st_ino
        except OSError as error:
            self._log.say("error", "look", error=error)
            return
        self._thread.start()

    def stop(self) -> None:
        """Close the socket, and end the process that serves it."""
        if self._listener is None:
            return
        self._wake.send(BELL)
        self._thread.join(STOP_LIMIT)
        self._listener.close()
        with suppress(OSError):
            if path().stat().st_ino == self._inode:
                path().unlink()

    def changed(self, *_: object) -> None:
        """Tell watchers, if there are any, that something may have changed.

        Any thread may call this, also within the answer to a hook: it never waits.
        """
        if self._bell is None:
            return
        with self._lock, suppress(OSError):
            if self._bell is not None:
                # A full pipe has told already.
                os.write(self._bell, BELL)

    # -- the thread --------------------------------------------------------

    def _run(self) -> None:
        assert self._listener is not None
        while self._ready(self._listener):
            begin = time.monotonic()
            try:
                status = self._serve(self._listener)
            except OSError as error:
                self._log.say("error", "look", error=error)
                status = None
            if status != 0:
                if status is not None:
                    self._log.say("error", "look", status=status, seconds=time.monotonic() - begin)
                if self._ready(self._end, PAUSE):
                    return

    def _ready(self, awaited: socket.socket, seconds: float | None = None) -> bool:
        """Wait for a socket to be readable; false for the end of the service, or of the time."""
        ready = _readable(awaited.fileno(), self._end.fileno(), seconds=seconds)
        over = self._end.fileno() in ready
        return over if awaited is self._end else bool(ready) and not over

    def _serve(self, listener: socket.socket) -> int:
        """Have a process serve the socket until it ends; return its status.  Raises OSError."""
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            process = subprocess.Popen(
                names.python_command(PROGRAM),
                stdin=reader,
                stdout=subprocess.DEVNULL,
                cwd="/",
                env={**os.environ, LISTENER: str(listener.fileno())},
                pass_fds=(listener.fileno(),),
                start_new_session=True,
            )
        except OSError:
            os.close(writer)
            raise
        finally:
            os.close(reader)
        with self._lock:
            self._bell = writer
        try:
            return self._wait(process)
        finally:
            self._hang_up()

    def _wait(self, process: "subprocess.Popen[bytes]") -> int:
        ended = os.pidfd_open(process.pid)
        try:
            if ended not in _readable(ended, self._end.fileno()):
                self._hang_up()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_LIMIT / 2)
                process.kill()
        finally:
            os.close(ended)
        return process.wait()

    def _hang_up(self) -> None:
        with self._lock:
            if self._bell is not None:
                os.close(self._bell)
            self._bell = None


def _readable(*descriptors: int, seconds: float | None = None) -> set[int]:
    """Wait for one of some descriptors to be readable, and return the readable ones."""
    # Not select(2): the numbers may be above 1023.
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {found for found, _ in poll.poll(None if seconds is None else seconds * 1000)}
