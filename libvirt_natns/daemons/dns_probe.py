# SPDX-License-Identifier: LGPL-2.1-or-later
"""A question to a DNS server, from the host or from inside a namespace (RFC 1035).

Only the fact of an answer matters: a server that refuses a name answers, too.
"""

import secrets
import socket
import struct
import time
from contextlib import closing
from typing import Literal

from libvirt_natns.addresses import Address
from libvirt_natns.kernel import netns

Reply = Literal["answers", "refuses", "silent"]
"""``refuses``: the port is closed.  ``silent``: no answer within the time, or no route."""

HEADER = struct.Struct("!6H")
RECURSE = 0x0100
"""The flag of a question that asks the server to ask others."""

TYPE_A, TYPE_NS, CLASS_INTERNET = 1, 2, 1
LONGEST = 4096
AGAIN = 0.3
"""Seconds until a question is sent once more: the first packets of a link may get lost."""


def question(name: str, kind: int = TYPE_A) -> tuple[int, bytes]:
    """Return a question for a name, "" for the root, with its number."""
    number = secrets.randbelow(1 << 16)
    labels = [label.encode("ascii") for label in name.split(".") if label]
    encoded = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    header = HEADER.pack(number, RECURSE, 1, 0, 0, 0)
    return number, header + encoded + struct.pack("!2H", kind, CLASS_INTERNET)


def ask(server: Address, port: int, name: str, limit: float, namespace: str | None = None) -> Reply:
    """Ask a server for a name by UDP, and return its reply within ``limit`` seconds.

    ``namespace`` None asks from the host.  Raises KernelError for a missing namespace.
    """
    number, octets = question(name, TYPE_A if name else TYPE_NS)
    family = socket.AF_INET if server.version == 4 else socket.AF_INET6
    with netns.entered(namespace):
        opened = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    with closing(opened):
        try:
            opened.connect((str(server), port))
            return _answer(opened, number, octets, time.monotonic() + limit)
        except ConnectionRefusedError:
            return "refuses"
        except OSError:
            return "silent"


def _answer(opened: socket.socket, number: int, octets: bytes, deadline: float) -> Reply:
    while (left := deadline - time.monotonic()) > 0:
        opened.send(octets)
        opened.settimeout(min(left, AGAIN))
        try:
            while opened.recv(LONGEST)[:2] != struct.pack("!H", number):
                pass
        except TimeoutError:
            continue
        return "answers"
    return "silent"
