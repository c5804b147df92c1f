# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes that have loaded python-iptables, and fork for each request (fork servers).

python-iptables takes 0.1 s to load, and a process that has opened a table cannot open that of
another namespace.  So a server loads python-iptables and opens no table.  Each of its forks
enters the namespace of one request, does one verb in one family, and ends: ``iptables_child``.

A server ends when its process closes the socket, in any way.  Threads that ask at the same time
have a server each.  A thread that waits for iptables' lock holds up no other thread.
"""

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libvirt_natns import names
from libvirt_natns.errors import FirewallError
from libvirt_natns.kernel import processes

FORK_LIMIT = 25
"""Seconds that a request may take; it may wait for iptables' lock."""
TIME_LIMIT = 30.0
"""Seconds after which a server counts as stuck: longer, or a wait would begin once more."""
LIFETIME = 600.0
"""Seconds after which another server takes over: iptables may have been upgraded."""
SPARE = 2
"""Servers that are kept for the next requests."""

SERVER = "from libvirt_natns.firewall.iptables_child import serve; serve()"
SERVER_OPTIONS = "-IWignore"
"""Isolated, and without warnings about python-iptables' old code."""

FRAME = struct.Struct("!Q")
"""The length of a message, ahead of the message.  A request's length brings a descriptor."""

OWN_NAMESPACE = "/proc/thread-self/ns/net"


@dataclass(frozen=True, slots=True)
class IptablesServer:
    """A server: its process, our end of its socket, its environment, and when it was started."""

    process: "subprocess.Popen[bytes]"
    link: socket.socket
    environment: Mapping[str, str]
    since: float

    @property
    def is_fit(self) -> bool:
        """True if the server runs, as a new one would, and has not run for too long."""
        return (
            self.process.poll() is None
            and self.environment == _environment()
            and time.monotonic() - self.since < LIFETIME
        )

    def ask(self, request: bytes) -> dict[str, Any]:
        """Have a request done in the calling thread's namespace.  Raises OSError."""
        namespace = os.open(OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            socket.send_fds(self.link, [FRAME.pack(len(request))], [namespace])
        finally:
            os.close(namespace)
        self.link.sendall(request)
        (length,) = FRAME.unpack(self._received(FRAME.size))
        answer: dict[str, Any] = json.loads(self._received(length))
        return answer

    def end(self) -> None:
        """End the server, even one that is stuck."""
        self.link.close()
        self.process.kill()
        self.process.wait()

    def _received(self, length: int) -> bytes:
        some = bytearray()
        while len(some) < length:
            more = self.link.recv(min(length - len(some), 1 << 20))
            if not more:
                raise ConnectionResetError("its process has ended")
            some += more
        return bytes(some)


_lock = threading.Lock()
_spare: dict[int, list[IptablesServer]] = {}
"""Servers without a request, by the id of this process: a fork must not talk to them."""


def ask(request: Mapping[str, object]) -> dict[str, Any]:
    """Have a server do a request in the calling thread's namespace; return its answer.

    ``iptables_child`` says what is in both.  Raises FirewallError where no server can be started
    or heard.
    """
    data = json.dumps({**request, "limit": FORK_LIMIT}).encode()
    server = _borrowed()
    if server is not None:
        try:
            return _asked(server, data)
        except OSError:
            # A signal to all of our processes ends a server as well.  Verbs may be repeated.
            pass
    try:
        return _asked(_started(), data)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise FirewallError("cannot run python-iptables", str(error)) from error


def _asked(server: IptablesServer, data: bytes) -> dict[str, Any]:
    """Ask a server, and keep it for the next request if it has answered."""
    try:
        answer = server.ask(data)
    except BaseException:
        # The rest of the answer would pass for that to the next request.
        server.end()
        raise
    with _lock:
        spare = _spare.setdefault(os.getpid(), [])
        if len(spare) < SPARE:
            spare.append(server)
            return answer
    server.end()
    return answer


def _borrowed() -> IptablesServer | None:
    while True:
        with _lock:
            spare = _spare.get(os.getpid())
            if not spare:
                return None
            server = spare.pop()
        if server.is_fit:
            return server
        server.end()


def _started() -> IptablesServer:
    """Start a server.  Raises OSError."""
    link, other = socket.socketpair()
    link.settimeout(TIME_LIMIT)
    environment = _environment()
    try:
        with other:
            process = subprocess.Popen(
                names.python_command(SERVER, options=SERVER_OPTIONS),
                stdin=other.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=environment,
                # A key that interrupts our command must not end it amid a change.
                start_new_session=True,
            )
    except BaseException:
        link.close()
        raise
    return IptablesServer(process, link, environment, time.monotonic())


def search_path() -> list[str]:
    """Return our module path, where a server looks for python-iptables after its own."""
    return [entry for entry in sys.path if Path(entry).is_absolute()]


def _environment() -> dict[str, str]:
    kept = ("IPTABLES_LIBDIR", "XTABLES_LIBDIR", "XTABLES_LOCKFILE")
    own = {key: os.environ[key] for key in kept if key in os.environ}
    return {"PATH": processes.PATH, "LC_ALL": "C", **own}
