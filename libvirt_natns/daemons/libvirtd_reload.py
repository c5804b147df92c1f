# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reload libvirt's daemons, so that they look for hooks again.

A daemon looks for hooks when it starts or reloads, and not in between.  A note in the state
directory lists the daemons that have reloaded for us.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from libvirt_natns import names

DAEMONS = ("libvirtd", "virtnetworkd", "virtqemud", "virtlxcd")
RELOAD_LIMIT = 10.0
"""Seconds that a daemon's reload may take: it renews the firewall rules of every network."""

RELOAD_BEGINS = 0.3
"""Seconds within which a daemon begins to reload; a daemon that does not is busy otherwise."""


@dataclass(frozen=True, slots=True)
class Process:
    """A running libvirt daemon; ``started`` is in clock ticks since boot."""

    name: str
    pid: int
    started: int

    @property
    def start_time(self) -> float:
        """The start of the process, in seconds since the epoch."""
        since_boot = self.started / os.sysconf("SC_CLK_TCK")
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


def running() -> list[Process]:
    """Return the running libvirt daemons that see the hooks we see.

    A daemon in another mount namespace, such as a container's, has hooks of its own.
    """
    own = Path("/proc/self/ns/mnt").stat().st_ino
    processes = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (entry / "stat").read_text().partition(" (")[2].rpartition(") ")
            if name in DAEMONS and (entry / "ns/mnt").stat().st_ino == own:
                processes.append(Process(name, int(entry.name), int(rest.split()[19])))
        except OSError:
            continue
    return processes


def reload() -> tuple[str, ...]:
    """Have the running libvirt daemons look for hooks again (SIGHUP); return their names.

    A daemon that its socket starts later looks for hooks then.
    """
    signalled = []
    for daemon in running():
        # A daemon that is reloading looked before our files changed.  It ignores a second
        # signal until it is done.
        _await(partial(_at_rest, daemon.pid), RELOAD_LIMIT)
        try:
            os.kill(daemon.pid, signal.SIGHUP)
        except ProcessLookupError:
            continue
        signalled.append(daemon)
    for daemon in signalled:
        # The next reload, by another program, must not be ignored either.  A reload that
        # begins and ends between two looks is done as well.
        if _await(partial(_reloads, daemon.pid), RELOAD_BEGINS):
            _await(partial(_at_rest, daemon.pid), RELOAD_LIMIT)
    note = {"told": [[daemon.pid, daemon.started] for daemon in signalled]}
    # Without the note, doctor asks for one unnecessary reload.
    with suppress(OSError):
        names.STATE_DIRECTORY.mkdir(mode=0o700, parents=True, exist_ok=True)
        _note_file().write_text(json.dumps(note))
    return tuple(daemon.name for daemon in signalled)


def _reloads(pid: int) -> bool:
    """True if a daemon is reloading: libvirt runs the reload in a thread of its own."""
    for thread in Path(f"/proc/{pid}/task").glob("*/comm"):
        try:
            if thread.read_text().strip() == "daemon-reload":
                return True
        except OSError:
            continue
    return False


def _at_rest(pid: int) -> bool:
    return not _reloads(pid)


def _await(condition: Callable[[], bool], limit: float) -> bool:
    """Wait until a condition holds, at most ``limit`` seconds; True if it holds."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def blind(since: float) -> tuple[str, ...]:
    """Return the names of running daemons that have not looked for hooks since a time.

    ``since`` is in seconds since the epoch: the time at which the newest hook was installed.
    """
    try:
        reloaded = list(json.loads(_note_file().read_text())["told"])
    except (OSError, ValueError, KeyError, TypeError):
        reloaded = []
    return tuple(
        daemon.name
        for daemon in running()
        # Both clocks count whole ticks only.
        if [daemon.pid, daemon.started] not in reloaded and daemon.start_time + 1 < since
    )


def _note_file() -> Path:
    return names.STATE_DIRECTORY / "told.json"
