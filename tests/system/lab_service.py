# SPDX-License-Identifier: LGPL-2.1-or-later
"""The resident service of the sandbox, as an administrator without systemd runs it."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import BinaryIO, Self

import lab_base
from lab_base import CHECKOUT, PYTHON, Closing, LabError, wait_for
from lab_commands import Started

SOCKET = Path("/run/libvirt-natns/service.sock")
LOG = Path("/run/tmp/service.log")
WAITING, CONNECTED = "02", "03"
"""A socket's states in /proc/net/unix: not accepted yet, and accepted."""

GREETING = b"libvirt-natns 1 3\n"


def services_log() -> str:
    """What all services of this sandbox have logged."""
    return LOG.read_text(errors="replace") if LOG.exists() else ""


class Service(Closing):
    """``virt-natns serve`` from the checkout; use it in a ``with``.

    ``prefix`` is a command that runs the one after it in its own place, as
    setpriv(1) does; ``log`` is the file that its standard error goes to.  Without a prefix the
    service is a fork of the command server, as hooks are, and loads no modules again.
    """

    def __init__(self, *prefix: str, log: Path = LOG) -> None:
        self._prefix = prefix
        self._log = log
        self._process: subprocess.Popen[bytes] | Started | None = None
        self._begin = len(services_log())

    def __enter__(self) -> Self:
        self.start()
        return self

    def down(self) -> None:
        """End it with the ``with``, if it still runs."""
        self.stop()

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the service, which must run."""
        if self._process is None or self._process.poll() is not None:
            raise LabError(f"the service does not run:\n{self.log()[-2000:]}")
        return self._process.pid

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self._log.open("ab") as written:
            server = lab_base.command_server
            if server is not None and server.interpreter and not self._prefix:
                self._process = server.start(("serve",), CHECKOUT, written)
            else:
                self._process = self._interpreter(written)
        wait_for(self.answers, timeout=20, what="the service")

    def _interpreter(self, log: BinaryIO) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [*self._prefix, PYTHON, "-m", "libvirt_natns", "serve"],
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            # A test's signals must not reach it, nor its end our terminal.
            start_new_session=True,
        )

    def answers(self) -> bool:
        """Whether it greets who connects."""
        assert self.pid
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(5)
            try:
                link.connect(os.fspath(SOCKET))
                return link.recv(len(GREETING)) == GREETING
            except OSError:
                return False

    def stop(self) -> None:
        """End it as systemd would, if it runs."""
        if self._process is not None and self.runs:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired, TimeoutError):
                self._process.wait(timeout=20)
                return
            self.kill()
            raise LabError(f"the service did not end:\n{self.log()[-2000:]}")

    def kill(self) -> None:
        """End it by SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(timeout=20)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def log(self) -> str:
        """What it has logged since it was first started."""
        return services_log()[self._begin :]

    def logged(self, *words: str, since: int = 0) -> list[str]:
        """Lines that contain all of ``words``, past the first ``since`` characters."""
        lines = self.log()[since:].splitlines()
        return [line for line in lines if all(word in line for word in words)]

    @property
    def answering(self) -> bool:
        """Whether any client is connected to it."""
        return self._has_clients(CONNECTED)

    @property
    def is_asked(self) -> bool:
        """True if it has not accepted a client; one that has gone since counts as well."""
        return self._has_clients(WAITING)

    @staticmethod
    def _has_clients(state: str) -> bool:
        rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
        return any(row[5] == state and row[-1] == os.fspath(SOCKET) for row in rows)

    def seconds(self) -> float:
        """Processor time that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def idle(self, quiet: float = 0.5) -> None:
        """Wait until it has nothing to do any more."""

        def rests() -> bool:
            before = self.seconds()
            time.sleep(quiet)
            return self.seconds() - before < 0.03

        wait_for(rests, timeout=30, what="the service's rest")
