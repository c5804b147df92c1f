# SPDX-License-Identifier: LGPL-2.1-or-later
"""The running daemons of libvirt, as their pid files tell.

systemd starts a daemon for a client that connects to its socket.  A client that only wants
to listen must not start one.  So it looks for a running daemon here first.  It then names
the daemon in the URI: libvirt chooses between the monolithic daemon and the drivers' daemons
by the sockets alone.
"""

from dataclasses import dataclass
from pathlib import Path

RUN = Path("/run")
PROCESSES = Path("/proc")
MONOLITHIC = "libvirtd"
NAME_LIMIT = 15
"""Characters of a process's name that the kernel keeps."""


@dataclass(frozen=True, slots=True)
class LibvirtDaemon:
    """A running daemon: the URI of a driver's connection through it, and its process."""

    uri: str
    pid: int


@dataclass(frozen=True, slots=True)
class Driver:
    """A driver of libvirt by its URI's scheme, and its daemon where libvirt is modular."""

    scheme: str
    modular: str

    def daemon(self) -> LibvirtDaemon | None:
        """Return the running daemon that has this driver; None while there is none."""
        for name, mode in ((self.modular, "direct"), (MONOLITHIC, "legacy")):
            pid = _running(name)
            if pid is not None:
                return LibvirtDaemon(f"{self.scheme}:///system?mode={mode}", pid)
        return None


QEMU = Driver("qemu", "virtqemud")
LXC = Driver("lxc", "virtlxcd")
NETWORK = Driver("network", "virtnetworkd")


def _running(name: str) -> int | None:
    """Return the process id of a daemon; None after its end, whether tidy or not."""
    try:
        pid = int((RUN / f"{name}.pid").read_text())
        command = (PROCESSES / str(pid) / "comm").read_text().strip()
    except (OSError, ValueError):
        return None
    return pid if command == name[:NAME_LIMIT] else None
