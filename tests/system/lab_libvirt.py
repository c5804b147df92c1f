# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sandbox's libvirtd, and networks as its users write them."""

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

from lab_base import LabError, run, virsh, wait_for

LOG = Path("/var/log/libvirt/libvirtd.log")


def _read_pid(daemon: str) -> int | None:
    """The pid of a running daemon, from the file it writes; None where it is not."""
    try:
        pid = int(Path(f"/run/{daemon}.pid").read_text())
        command = Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ValueError):
        return None
    return pid if command == daemon else None


class Libvirtd:
    """libvirtd (with virtlogd, for the consoles) of the sandbox."""

    @property
    def pid(self) -> int | None:
        return _read_pid("libvirtd")

    def start(self) -> None:
        """Start both daemons where they do not run, and wait until they answer."""
        if _read_pid("virtlogd") is None:
            run("virtlogd", "-d")
        if self.pid is None:
            run("libvirtd", "-d")
            self._answers()

    def _answers(self) -> None:
        with contextlib.suppress(LabError):
            wait_for(lambda: virsh("uri", check=False).returncode == 0, timeout=15)
            return
        raise LabError(f"libvirtd does not answer:\n{self.log()[-2000:]}")

    def stop(self) -> None:
        """End libvirtd; networks and guests go on running."""
        pid = self.pid
        if pid is None:
            return
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), timeout=15, what="libvirtd's end")

    def restart(self) -> None:
        """Stop and start: running networks and guests are found again."""
        self.stop()
        self.start()

    def reload(self) -> None:
        """Make libvirtd read its configuration and hook directory again."""
        pid = self.pid
        if pid is None:
            raise LabError("libvirtd does not run: it cannot be reloaded")
        before = self.log().count("Reloading configuration on SIGHUP")
        os.kill(pid, signal.SIGHUP)
        with contextlib.suppress(LabError):
            # Logged as information only: where that is filtered out, a moment must do.
            wait_for(
                lambda: self.log().count("Reloading configuration on SIGHUP") > before, timeout=0.3
            )
        self._answers()

    def prime(self) -> None:
        """Start and destroy one network, before any hooks are installed.

        libvirt's firewall chains appear with its first network and stay.
        """
        start_network(isolated("prime", "virbr-prime", address="172.31.255.1"))
        virsh("net-destroy", "prime")
        virsh("net-undefine", "prime")

    def log(self) -> str:
        """libvirtd's log so far: its warnings, and all of its hooks and networks."""
        return LOG.read_text(errors="replace") if LOG.exists() else ""


@dataclass(frozen=True)
class Host:
    """A reserved address: ``<host>`` of a network's ``<dhcp>``."""

    mac: str
    ip: str
    name: str | None = None

    def xml(self) -> str:
        name = f" name={quoteattr(self.name)}" if self.name else ""
        return f"<host mac={quoteattr(self.mac)}{name} ip={quoteattr(self.ip)}/>"


def isolated(
    name: str,
    bridge: str | None = None,
    *,
    address: str | None = "10.0.0.1",
    netmask: str = "255.255.255.0",
    dhcp: tuple[str, str] | Literal["stock"] | None = "stock",
    hosts: Sequence[Host] = (),
    metadata: str = "",
    domain: str | None = "",
    mtu: int | None = None,
    uuid: str | None = None,
    more: str = "",
) -> str:
    """The XML of an isolated network, in the form that virt-manager writes.

    ``address`` None: no ``<ip>`` at all.  ``dhcp`` is the range's two ends, by
    default addresses 100 to 200 of the subnet; None: no ``<dhcp>``.  ``domain``
    defaults to the network's name, None leaves it out.  ``metadata`` is what
    stands inside ``<metadata>``; ``more`` is added before ``<ip>``.  Without a
    ``bridge``, libvirt chooses one.
    """
    wanted = f" name={quoteattr(bridge)}" if bridge else ""
    called = name if domain == "" else domain
    lines = [
        "<network>",
        f"  <name>{escape(name)}</name>",
        f"  <uuid>{uuid}</uuid>" if uuid else "",
        f"  <metadata>{metadata}</metadata>" if metadata else "",
        f'  <bridge{wanted} stp="on" delay="0"/>',
        f'  <mtu size="{mtu}"/>' if mtu else "",
        f"  <domain name={quoteattr(called)}/>" if called else "",
        more,
        _ip(IPv4Interface(f"{address}/{netmask}"), dhcp, hosts) if address else "",
        "</network>",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def _ip(
    interface: IPv4Interface,
    dhcp: tuple[str, str] | Literal["stock"] | None,
    hosts: Sequence[Host],
) -> str:
    head = f'  <ip address="{interface.ip}" netmask="{interface.netmask}"'
    if dhcp is None and not hosts:
        return f"{head}/>"
    if dhcp == "stock":
        dhcp = (str(interface.network[100]), str(interface.network[200]))
    served = [f'<range start="{dhcp[0]}" end="{dhcp[1]}"/>'] if dhcp else []
    served += [host.xml() for host in hosts]
    return f"{head}>\n    <dhcp>\n      " + "\n      ".join(served) + "\n    </dhcp>\n  </ip>"


def define_network(xml: str) -> None:
    """Define a network without starting it."""
    file = Path(f"/run/tmp/network-{os.getpid()}-{time.monotonic_ns()}.xml")
    file.write_text(xml)
    try:
        virsh("net-define", os.fspath(file))
    finally:
        file.unlink()


def start_network(xml: str) -> str:
    """Define and start a network; returns its name.  Raises CommandError."""
    define_network(xml)
    name = xml.partition("<name>")[2].partition("</name>")[0]
    virsh("net-start", name)
    return name


@dataclass(frozen=True)
class Objects:
    """Names of the domains and networks that libvirt knows."""

    domains: frozenset[str]
    networks: frozenset[str]


def objects() -> Objects:
    """Everything that is defined or runs."""
    domains = virsh("list", "--all", "--name").stdout
    networks = virsh("net-list", "--all", "--name").stdout
    return Objects(frozenset(_lines(domains)), frozenset(_lines(networks)))


def _lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if line.strip()}


def clear(keep: Objects | None = None) -> None:
    """Destroy and undefine all domains and networks, those in ``keep`` apart."""
    kept = keep or Objects(frozenset(), frozenset())
    found = objects()
    for domain in sorted(found.domains - kept.domains):
        virsh("destroy", domain, check=False)
        virsh("undefine", domain, check=False)
    for network in sorted(found.networks - kept.networks):
        virsh("net-destroy", network, check=False)
        virsh("net-undefine", network, check=False)
