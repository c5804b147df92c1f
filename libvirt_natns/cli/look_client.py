# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client's end of the socket for read-only commands and watchers.

``look_server`` describes the protocol.
"""

import argparse
import json
import os
import select
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from libvirt_natns.cli import look_rules, plan
from libvirt_natns.cli.look_link import BLOCK, GREETING, REQUEST_LIMIT
from libvirt_natns.errors import NatnsError, ServiceError
from libvirt_natns.service import look

GREETING_LIMIT = 15.0
"""Seconds for the greeting: the first client waits for a process that loads all modules."""

ANSWER_LIMIT = 150.0
"""Seconds for an answer: a command may take 60, after commands of other users."""

LARGEST = REQUEST_LIMIT // 2
"""Octets of a file for ``plan``: JSON makes them more."""

MEMBERS = "only root and members of group libvirt can do this"
START = "start the service: systemctl start libvirt-natns"


class LookLostError(ServiceError):
    """The service has ended, does not run, or does not let us in: perhaps for a moment."""


class ReaderGoneError(Exception):
    """The reader of our own output has gone."""


def applies(words: Sequence[str], options: argparse.Namespace) -> bool:
    """True if the service runs this command for a user who is not root."""
    watches = getattr(options, "watch", False)
    return not watches and look_rules.command_of(words) is not None and os.geteuid() != 0


def run(words: Sequence[str], options: argparse.Namespace) -> int:
    """Have the service run a command, print its output, and return its exit status.

    Raises ServiceError.
    """
    document = b""
    if look_rules.command_of(words) == ("plan",):
        # The service reads no file for a member: the member's own rights count.
        document = plan.read_file(options.network) or b""
        if len(document) > LARGEST:
            raise NatnsError(f"{options.network} is larger than {LARGEST} octets", "use sudo")
    request = {"argv": list(words), "document": document.decode(errors="replace")}
    with _connected() as connection:
        connection.settimeout(ANSWER_LIMIT)
        answer = next(_lines(_asked(connection, request)), None)
    if answer is None:
        raise LookLostError("the service has ended before it answered", START)
    sys.stdout.write(answer["out"])
    sys.stderr.write(answer["err"])
    return int(answer["status"])


def stream() -> Iterator[dict[str, Any]]:
    """Yield the lines of the stream of changes until the service ends.

    Raises ServiceError, LookLostError where no service runs, or ReaderGoneError.
    """
    with _connected() as connection:
        connection.settimeout(None)
        asked = _asked(connection, {"argv": list(look_rules.STREAM)})
        for line in _lines(asked, _wait_with_reader):
            if "status" in line:
                fact = str(line["err"]).strip().removeprefix("virt-natns: ")
                raise ServiceError(fact)
            yield line


def _asked(connection: socket.socket, request: dict[str, Any]) -> socket.socket:
    # A service that has too many clients answers at once, and reads no request.
    with suppress(BrokenPipeError):
        connection.sendall(json.dumps(request).encode() + b"\n")
    return connection


@contextmanager
def _connected() -> Iterator[socket.socket]:
    """Open a connection that the service has greeted.  Raises ServiceError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(GREETING_LIMIT)
        try:
            connection.connect(os.fspath(look.path()))
            greeting = connection.recv(len(GREETING), socket.MSG_WAITALL)
        except PermissionError as error:
            # Also for a moment while the service opens its socket.
            raise LookLostError(
                MEMBERS, "use sudo, or add the user to group libvirt and log in again"
            ) from error
        except TimeoutError as error:
            raise LookLostError("the service does not answer", "use sudo") from error
        except OSError as error:
            raise LookLostError(*_absent()) from error
        if not greeting:
            raise LookLostError(MEMBERS, "use sudo")
        if greeting != GREETING:
            raise ServiceError(
                "the service is of another version", "systemctl restart libvirt-natns"
            )
        try:
            yield connection
        except TimeoutError as error:
            raise ServiceError("the service does not answer", "use sudo") from error
        except (OSError, ValueError) as error:
            raise LookLostError(f"the service has ended ({error})", START) from error


def _absent() -> tuple[str, str]:
    if os.geteuid() == 0:
        return "the service does not run", START
    return "only root can do this while the service does not run", f"use sudo, or {START}"


def _lines(
    connection: socket.socket, wait: Callable[[socket.socket], None] = lambda _: None
) -> Iterator[dict[str, Any]]:
    """Yield the objects that come, a line each.  Raises OSError or ValueError."""
    rest = b""
    wait(connection)
    while octets := connection.recv(BLOCK):
        *lines, rest = (rest + octets).split(b"\n")
        yield from map(json.loads, lines)
        wait(connection)


def _wait_with_reader(connection: socket.socket) -> None:
    """Wait for news, for as long as our own output has a reader.  Raises ReaderGoneError."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    # For its errors alone: the other end of the pipe, or the terminal, has gone.
    poll.register(sys.stdout.fileno(), 0)
    if not any(descriptor == connection.fileno() for descriptor, _ in poll.poll()):
        raise ReaderGoneError
