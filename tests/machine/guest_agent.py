# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of QEMU's guest agent: commands in a machine without a network to it."""

import base64
import json
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWER = 20.0
"""Seconds in which the agent answers a request; a command may take longer."""
POLL = 0.25
"""Seconds between two questions whether a command has ended."""


class AgentError(Exception):
    """The agent did not answer, or refused a request."""


@dataclass(frozen=True)
class Done:
    """A command that has ended; ``output`` is what it wrote on both streams."""

    status: int
    output: str


class GuestAgent:
    """The agent behind a socket of QEMU's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._read = b""

    def answers(self) -> bool:
        """True if the agent runs: it does not yet while the machine boots."""
        try:
            self._synchronize()
        except (AgentError, OSError):
            self.close()
            return False
        return True

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._read = None, b""

    def start(self, command: str) -> int:
        """Start a line of shell; returns its process id there."""
        arguments = {"path": "/bin/sh", "arg": ["-c", command], "capture-output": True}
        return int(self._ask("guest-exec", arguments)["pid"])

    def ended(self, pid: int) -> Done | None:
        """Return what became of a command; None while it runs."""
        state = self._ask("guest-exec-status", {"pid": pid})
        if not state["exited"]:
            return None
        streams = (state.get(name, "") for name in ("out-data", "err-data"))
        output = b"".join(base64.b64decode(data) for data in streams)
        # A signal is told as a shell tells it.
        status = state.get("exitcode", 128 + state.get("signal", 0))
        return Done(int(status), output.decode(errors="replace"))

    def run(self, command: str, timeout: float = 60.0) -> Done:
        """Run a line of shell to its end.  Raises AgentError after ``timeout`` seconds."""
        pid = self.start(command)
        deadline = time.monotonic() + timeout
        while (done := self.ended(pid)) is None:
            if time.monotonic() > deadline:
                raise AgentError(f"{command}: not done after {timeout:.0f} s")
            time.sleep(POLL)
        return done

    def _ask(self, request: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self._send({"execute": request, "arguments": arguments})
        answer = self._receive()
        if "error" in answer:
            raise AgentError(f"{request}: {answer['error'].get('desc')}")
        return dict(answer["return"])

    def _synchronize(self) -> None:
        """Have the agent forget half a request, and forget its late answers."""
        self.close()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER)
        self._socket.connect(str(self._path))
        number = secrets.randbelow(1 << 30)
        self._socket.settimeout(2.0)
        self._send({"execute": "guest-sync", "arguments": {"id": number}})
        while self._receive().get("return") != number:
            continue
        self._socket.settimeout(ANSWER)

    def _send(self, request: dict[str, Any]) -> None:
        if self._socket is None:
            raise AgentError("the agent is not connected")
        self._socket.sendall(json.dumps(request).encode() + b"\n")

    def _receive(self) -> dict[str, Any]:
        if self._socket is None:
            raise AgentError("the agent is not connected")
        while b"\n" not in self._read:
            try:
                data = self._socket.recv(65536)
            except TimeoutError as error:
                raise AgentError("the agent does not answer") from error
            if not data:
                raise AgentError("the machine has ended")
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        try:
            return dict(json.loads(line))
        except ValueError as error:
            raise AgentError(f"the agent answers {line[:80]!r}") from error
