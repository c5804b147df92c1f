# SPDX-License-Identifier: LGPL-2.1-or-later
"""firewalld itself, of Debian 12 and 13, with a D-Bus of the sandbox's own.

Each runs in its own release's root (contrib/firewalld-roots), and reads the sandbox's
/etc/firewalld.  Programs of the machine ask it: busctl, libvirtd, and a firewall-cmd that is
put into an empty place of the PATH.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from lab_base import CACHE, Closing, LabError, Result, run, wait_for
from lab_libvirt import Libvirtd

Release = Literal["bookworm", "trixie"]
RELEASES: tuple[Release, ...] = ("bookworm", "trixie")
"""firewalld 1.x, and 2.x, which owns its table."""

CONFIG = Path("/etc/firewalld")
BUS = Path("/run/dbus")
PLACE = Path("/usr/local/sbin")
LIBVIRTS = Path("/usr/lib/firewalld")
"""libvirt's own zones and policies, without which it starts no network beside firewalld."""
LOG = Path("/run/tmp/firewalld.log")
RUN = Path("/run/firewalld")
SHARED = (Path("/dev"), Path("/proc"), Path("/sys"), BUS, RUN, LOG.parent, CONFIG)
"""Directories that it shares with the sandbox: not all of /run, where namespaces come and go."""


BUS_CONFIG = """<busconfig>
  <type>system</type>
  <listen>unix:path=/run/dbus/system_bus_socket</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/>
  </policy>
</busconfig>
"""
"""No program is started on demand, polkit above all: firewalld then asks for root alone."""


class SystemBus(Closing):
    """The system's D-Bus of the sandbox, which libvirtd knows."""

    def __init__(self) -> None:
        BUS.mkdir(exist_ok=True)
        config = BUS / "natns-lab.conf"
        config.write_text(BUS_CONFIG)
        done = run("dbus-daemon", f"--config-file={config}", "--fork", "--print-pid")
        self._pid = int(done.stdout)
        # libvirtd looks for it once.
        Libvirtd().restart()

    def down(self) -> None:
        """End it, and let libvirtd forget it."""
        Libvirtd().stop()
        os.kill(self._pid, signal.SIGTERM)
        wait_for(lambda: not Path(f"/proc/{self._pid}").exists(), what="the end of D-Bus")
        shutil.rmtree(BUS)
        Libvirtd().start()


class Firewalld(Closing):
    """firewalld of a release; its files in /etc/firewalld are there until ``down``.

    ``settings`` are lines in place of those of firewalld.conf.
    """

    def __init__(self, release: Release, *settings: str) -> None:
        self.root = root_of(release)
        self._process: subprocess.Popen[bytes] | None = None
        self._cleanup = ExitStack()
        CONFIG.mkdir(exist_ok=True)
        self._kept = Path(tempfile.mkdtemp(prefix="firewalld-"))
        shutil.copytree(CONFIG, self._kept, dirs_exist_ok=True)
        shutil.copytree(self.root / "etc/firewalld", CONFIG, dirs_exist_ok=True)
        for file in LIBVIRTS.glob("*/libvirt*.xml"):
            shutil.copy(file, CONFIG / file.parent.name)
        conf = CONFIG / "firewalld.conf"
        changed = {line.partition("=")[0] for line in settings}
        kept = [
            each for each in conf.read_text().splitlines() if each.partition("=")[0] not in changed
        ]
        conf.write_text("\n".join([*kept, *settings, ""]))
        RUN.mkdir(exist_ok=True)
        for directory in SHARED:
            target = f"{self.root}{directory}"
            Path(target).mkdir(parents=True, exist_ok=True)
            run("mount", "--bind", directory, target)
            self._cleanup.callback(run, "umount", "-l", target)
        run("mount", "-t", "tmpfs", "firewall-cmd", PLACE)
        self._cleanup.callback(run, "umount", "-l", PLACE)
        (PLACE / "firewall-cmd").write_text(
            f'#!/bin/sh\nexec chroot {self.root} /usr/bin/python3 /usr/bin/firewall-cmd "$@"\n'
        )
        (PLACE / "firewall-cmd").chmod(0o755)
        self.start()

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of firewalld, which must run."""
        if self._process is None or self._process.poll() is not None:
            raise LabError(f"firewalld does not run:\n{self.log()}")
        return self._process.pid

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = ("/usr/bin/python3", "/usr/sbin/firewalld", "--nofork", "--nopid")
        self._process = subprocess.Popen(
            ["chroot", self.root, *command, "--log-file", os.fspath(LOG)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(self._runs, timeout=30, what="firewalld")

    def _runs(self) -> bool:
        assert self.pid
        return bool(self._asked("zone", "getZones"))

    @staticmethod
    def _asked(interface: str, method: str, *words: str) -> str:
        """The answer of a method, as busctl prints it: it is quicker than firewall-cmd."""
        name, place = "org.fedoraproject.FirewallD1", "/org/fedoraproject/FirewallD1"
        command = ("busctl", "--system", "--auto-start=no", "call", name, place)
        where = f"{name}.{interface}" if interface else name
        return run(*command, where, method, *words, check=False).stdout.strip()

    def stop(self) -> None:
        """End it as systemd would; missing is fine."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(timeout=30)

    def restart(self) -> None:
        """End it and start it again."""
        self.stop()
        self.start()

    def reload(self) -> None:
        """Have it read its files again, as ``systemctl reload`` does; wait for the end."""
        self._asked("", "reload")

    def freeze(self) -> None:
        """Let it hang, until ``thaw``."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def cmd(self, *words: str, check: bool = True) -> Result:
        """Run firewall-cmd."""
        return run("firewall-cmd", *words, check=check, timeout=60)

    def zone_of(self, link: str) -> str:
        """The zone of a link; "" for none."""
        return self._asked("zone", "getZoneOfInterface", "s", link).partition('"')[2].strip('"')

    def log(self) -> str:
        """The end of its log."""
        return LOG.read_text()[-2000:] if LOG.exists() else ""

    def down(self) -> None:
        """End it, and remove its files."""
        self.stop()
        self._cleanup.close()
        shutil.rmtree(RUN)
        shutil.rmtree(CONFIG)
        shutil.move(self._kept, CONFIG)


def root_of(release: Release) -> Path:
    """The root in which a release's firewalld runs."""
    root = CACHE / "firewalld" / release
    if not (root / "usr/sbin/firewalld").exists():
        raise LabError("no firewalld to test with: run contrib/firewalld-roots")
    return root
