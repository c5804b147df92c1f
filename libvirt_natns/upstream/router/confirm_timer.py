# SPDX-License-Identifier: LGPL-2.1-or-later
"""The timer of an unconfirmed router: a process that waits, and takes the router back.

The timer must outlive the login session that started it: the router may have cut that
session's connection.  Where systemd runs, the timer is a unit of its own, because logind may
end all processes of a session.  Elsewhere it is a process with a session of its own.
"""

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, repeat
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.errors import RouterError
from libvirt_natns.kernel import boot_clock, processes
from libvirt_natns.upstream.router import helper_command

SYSTEMD = Path("/run/systemd/system")
POLL = 0.1
"""Seconds between two looks for a confirmation."""

PAUSES = (1.0, 2.0, 5.0, 10.0)
"""Seconds until a failed rollback is tried again; the last pause repeats for ever."""


def arm(name: str, deadline: float) -> None:
    """Start the timer that takes a router back at its deadline.  Raises RouterError."""
    waiting = helper_command.line("expire", name, str(deadline))
    if SYSTEMD.is_dir() and _as_unit(name, waiting):
        return
    try:
        subprocess.Popen(
            waiting,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise RouterError("cannot start the rollback timer", str(error)) from error


def _as_unit(name: str, waiting: tuple[str, ...]) -> bool:
    program = processes.program("systemd-run") or "systemd-run"
    unit = f"{names.router_namespace(name)}-{os.getpid()}"
    try:
        done = subprocess.run(
            [program, "--quiet", "--collect", f"--unit={unit}", "--", *waiting],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


def wait(deadline: float, pending: Callable[[], bool], take_back: Callable[[], object]) -> None:
    """Take a router back at its deadline, unless it is confirmed before.

    ``pending`` is True while the router waits for a confirmation; an error of it counts as
    waiting.  A ``take_back`` that fails is tried again for as long as the router waits.
    """
    while boot_clock.now() < deadline:
        time.sleep(min(POLL, max(0.0, deadline - boot_clock.now())))
        if not _waits(pending):
            return
    for pause in chain(PAUSES, repeat(PAUSES[-1])):
        # After any failure: no other process may be left to take the NIC back.
        with suppress(Exception):
            take_back()
            return
        time.sleep(pause)
        if not _waits(pending):
            return


def _waits(pending: Callable[[], bool]) -> bool:
    try:
        return pending()
    except Exception:  # an unreadable journal does not say that the router was confirmed
        return True
