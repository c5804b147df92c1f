# SPDX-License-Identifier: LGPL-2.1-or-later
"""The resident service, seen from a command: its health, its start and its end."""

import json
import os
import signal
import socket
import stat
import struct
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from libvirt_natns import __version__
from libvirt_natns.engine.observer import HOST
from libvirt_natns.errors import InstallError, ServiceError
from libvirt_natns.kernel import processes
from libvirt_natns.service import client

SYSTEMD = Path("/run/systemd/system")
"""Exists where systemd runs, see sd_booted(3)."""

UNITS = ("libvirt-natns.socket", "libvirt-natns.service")
STOP_LIMIT = 90.0
"""Seconds that a service gets to end: events in progress have 60, other threads 26."""
STUCK_LIMIT = 5.0
"""Seconds that a service which does not answer gets to end."""
PEER = struct.Struct("3i")
"""SO_PEERCRED: the process, user and group that listen."""

NOT_RUNNING = "not running: hooks do the work themselves"
STUCK = "does not answer: hooks do the work themselves"


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """The health of the service.

    ``since`` is the time of its start, in seconds since the epoch.  ``given_up`` has the
    networks that the service does not heal any more, by uuid, with the reason.  The key
    ``HOST`` stands for what networks share.
    """

    state: Literal["running", "stuck", "absent"]
    pid: int | None = None
    version: str | None = None
    since: float | None = None
    given_up: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.state == "absent":
            return NOT_RUNNING + _how_to_start()
        if self.state == "stuck":
            return STUCK
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"running (pid {self.pid}, version {self.version}, since {when})"


def _how_to_start() -> str:
    """Return the command that starts the service, for a message; "" without systemd's units."""
    if SYSTEMD.is_dir():
        with suppress(InstallError):
            if _systemctl("cat", UNITS[1]).returncode == 0:
                return " (systemctl start libvirt-natns)"
    return ""


def ask() -> ServiceHealth:
    """Ask the service for its health.  Raises ServiceError for an answer without sense."""
    answer = client.ask("question", ("health", "-"))
    if answer is None:
        return ServiceHealth("stuck" if _listens() else "absent")
    try:
        fields = json.loads(answer.text)
        return ServiceHealth(
            "running", *(fields[key] for key in ("pid", "version", "since", "given_up"))
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ServiceError(
            f"the service gave an invalid answer ({answer.text[:80]})",
            "systemctl restart libvirt-natns",
        ) from error


def _listens() -> bool:
    """True if a process listens on the socket; a service that was killed leaves the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(client.GREETING_LIMIT)
        try:
            link.connect(client.SOCKET)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
    return True


# -- for status and doctor ---------------------------------------------------


def given_up(reason: str) -> str:
    """Return the health of a network, or the host, that the service does not heal any more."""
    return f"given up ({reason})"


def of_host(health: ServiceHealth) -> list[str]:
    """Return, in words, whether the service has given up what networks share."""
    why = health.given_up.get(HOST)
    return [given_up(why)] if why else []


def as_object(health: ServiceHealth) -> dict[str, Any]:
    """Return the health for ``status --json``."""
    return {
        "state": health.state,
        "pid": health.pid,
        "version": health.version,
        "since": health.since,
    }


def examine() -> str:
    """Examine the service for ``doctor``.  Raises ServiceError with the fault."""
    _check_socket()
    health = ask()
    if health.state == "stuck":
        raise ServiceError("the service does not answer", "systemctl restart libvirt-natns")
    if health.state == "running" and health.version != __version__:
        raise ServiceError(
            f"version {health.version} runs, and {__version__} is installed",
            "systemctl restart libvirt-natns",
        )
    if health.given_up:
        raise ServiceError(
            f"the service has given up healing ({'; '.join(health.given_up.values())})",
            "see virt-natns status",
        )
    return str(health)


def _check_socket() -> None:
    try:
        status = Path(client.SOCKET).lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise ServiceError(f"{client.SOCKET} is not a socket", "remove it, and start the service")
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != 0 or mode & 0o077:
        raise ServiceError(
            f"{client.SOCKET} has owner {status.st_uid} and mode {mode:04o} (expected 0 and 0600)",
            f"chown root {client.SOCKET}; chmod 0600 {client.SOCKET}",
        )


# -- starting and ending -----------------------------------------------------


def start() -> str:
    """Have systemd start the service now and at each boot; return the result in words.

    Raises InstallError where systemd knows the units and cannot start them.
    """
    if not SYSTEMD.is_dir():
        return "systemd does not run here: start the service with virt-natns serve"
    if not all(_systemctl("cat", unit).returncode == 0 for unit in UNITS):
        return "systemd does not know the service's units: see contrib/systemd"
    done = _systemctl("enable", "--now", *UNITS)
    if done.returncode != 0:
        raise InstallError("systemd cannot start the service", done.stderr.strip())
    return f"systemd runs {' and '.join(UNITS)}"


def end(*, disable: bool = True) -> str | None:
    """End the service, now and for good; return in words what was ended, if anything was.

    Without ``disable``, systemd starts the service again at the next boot.  Raises
    InstallError where the service does not end.
    """
    ended = [_end_units(disable=disable), _end_process()]
    return ", ".join(filter(None, ended)) or None


def _end_units(*, disable: bool) -> str | None:
    """Have systemd stop the service, where systemd knows it."""
    if not SYSTEMD.is_dir() or _systemctl("cat", UNITS[0]).returncode != 0:
        return None
    verb = ("disable", "--now") if disable else ("stop",)
    done = _systemctl(*verb, *UNITS)
    if done.returncode != 0:
        raise InstallError("systemd cannot stop the service", done.stderr.strip())
    return f"stopped {' and '.join(UNITS)}"


def _end_process() -> str | None:
    """End a service that listens still: a service that was started by hand, beside its units."""
    try:
        health = ask()
    except ServiceError:
        # Another version answers in another form.
        health = ServiceHealth("stuck")
    pid = _listener() if health.state == "stuck" else health.pid
    if health.state == "stuck" and pid is None:
        raise InstallError(
            "the service does not answer", "end the process virt-natns serve by hand"
        )
    if pid is None:
        return None
    _terminate(pid, STOP_LIMIT if health.state == "running" else STUCK_LIMIT)
    return f"ended the service (pid {pid})"


def _listener() -> int | None:
    """Return the process of a service that does not answer, or is of another version."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(client.GREETING_LIMIT)
        try:
            link.connect(client.SOCKET)
            pid = PEER.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))[0]
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return None
    named = any(b"virt-natns" in word or b"libvirt_natns" in word for word in words)
    return int(pid) if named and b"serve" in words else None


def _systemctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            # The PATH of root may begin with a directory of another user.
            [processes.program("systemctl") or "systemctl", "--no-ask-password", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise InstallError("cannot run systemctl", str(error)) from error


def _terminate(pid: int, limit: float) -> None:
    """End a service, and kill it after ``limit`` seconds.

    Killing loses nothing: hooks do the work that a service had begun.
    """
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            # A stopped process handles SIGTERM only after SIGCONT.
            for number in (signal.SIGTERM, signal.SIGCONT):
                signal.pidfd_send_signal(descriptor, number)
            if processes.has_ended(descriptor, time.monotonic() + limit):
                return
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            if not processes.has_ended(descriptor, time.monotonic() + limit):
                raise InstallError(f"the service (pid {pid}) does not end", f"kill {pid}")
        finally:
            os.close(descriptor)
