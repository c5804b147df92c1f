# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which of libvirt's daemons run, as far as their pid files tell.

systemd starts a daemon for whoever connects to its socket.  Who only wants to
listen must not: it looks here first, and then names the daemon in the URI, for
libvirt's own choice between the monolithic daemon and those of the drivers goes
by the sockets alone.
"""

from pathlib import Path

from libvirt_natns.records import dataclass

RUN = Path("/run")
PROCESSES = Path("/proc")
MONOLITHIC = "libvirtd"
NAME_LIMIT = 15
"""Characters of a process's name that the kernel keeps."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """One that runs: the URI of a driver's connection through it, and its process."""

    uri: str
    pid: int


@dataclass(frozen=True, slots=True)
class Driver:
    """A driver of libvirt's by its URI's scheme, and its own daemon where libvirt is modular."""

    scheme: str
    modular: str

    def daemon(self) -> Daemon | None:
        """The running daemon that has this driver; None while there is none."""
        for name, mode in ((self.modular, "direct"), (MONOLITHIC, "legacy")):
            pid = _running(name)
            if pid is not None:
                return Daemon(f"{self.scheme}:///system?mode={mode}", pid)
        return None


QEMU = Driver("qemu", "virtqemud")
LXC = Driver("lxc", "virtlxcd")
NETWORK = Driver("network", "virtnetworkd")


def _running(name: str) -> int | None:
    """The pid of a daemon; None where it has ended, tidily or not."""
    try:
        pid = int((RUN / f"{name}.pid").read_text())
        command = (PROCESSES / str(pid) / "comm").read_text().strip()
    except (OSError, ValueError):
        return None
    return pid if command == name[:NAME_LIMIT] else None
