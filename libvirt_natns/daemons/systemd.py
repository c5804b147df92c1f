# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service's talk with systemd: sd_listen_fds(3), sd_notify(3).

The functions do nothing in a process that systemd did not start.
"""

import os
import socket
from contextlib import suppress

FIRST_PASSED = 3
"""The first file descriptor that systemd passes."""

NOTIFY_LIMIT = 1.0
"""Seconds that a message to systemd may wait for room."""


def passed_socket() -> socket.socket | None:
    """Return the listening socket that systemd holds for the service, if it does."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    if int(os.environ.get("LISTEN_FDS", "0")) < 1:
        return None
    os.set_inheritable(FIRST_PASSED, False)
    return socket.socket(fileno=FIRST_PASSED)


def notify(message: str) -> None:
    """Tell systemd the state of the service, such as ``READY=1``."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        # The name of an abstract socket starts with a zero byte.
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        # A systemd that does not read must not keep the service from answering.
        link.settimeout(NOTIFY_LIMIT)
        link.sendto(message.encode(), address)


def watchdog_interval() -> float | None:
    """Return the seconds between two signs of life; None where systemd wants none."""
    for_us = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if for_us and microseconds.isdigit() else None
