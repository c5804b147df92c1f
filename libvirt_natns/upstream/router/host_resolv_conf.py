# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's /etc/resolv.conf while its NIC is in the router namespace.

An administrator's file stays as it is: its servers answer through the router as before.
A link into a program's own directory is replaced, and so are servers on the host itself or
on the NIC's link.  The program behind them forgets its servers when the NIC goes.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from libvirt_natns.daemons import resolv_conf
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations.operation import ApplyContext, Operation

FILE = Path("/etc/resolv.conf")


@dataclass(frozen=True, slots=True)
class Resolver:
    """The file at a time: the target of a link, or the text and mode of a file.

    ``link`` and ``text`` are None where the file is missing.
    """

    link: str | None = None
    text: str | None = None
    mode: int = 0o644


def look(file: Path = FILE) -> Resolver:
    """Return the file as it is."""
    if file.is_symlink():
        return Resolver(link=os.fspath(file.readlink()))
    try:
        return Resolver(
            text=file.read_text(errors="surrogateescape"), mode=file.stat().st_mode & 0o777
        )
    except FileNotFoundError:
        return Resolver()


def restore(before: Resolver, file: Path = FILE) -> None:
    """Write the file as it was, unless it is so."""
    if look(file) == before:
        return
    fresh = file.with_name(f"{file.name}.natns")
    fresh.unlink(missing_ok=True)
    if before.link is not None:
        fresh.symlink_to(before.link)
    elif before.text is not None:
        fresh.write_text(before.text, errors="surrogateescape")
        fresh.chmod(before.mode)
    else:
        file.unlink(missing_ok=True)
        return
    fresh.replace(file)


def servers(
    before: Resolver, configured: tuple[str, ...] = (), file: Path = FILE
) -> list[str] | None:
    """Return the servers that the file must name; None where the file can stay as it is.

    An empty list means that the file cannot stay, and no server is known.
    """
    if configured:
        return list(configured)
    text = before.text if before.link is None else None
    usable = _usable(text or "")
    if usable or (before.text is None and before.link is None):
        return None
    try:
        listed = _usable(file.read_text(errors="replace"))
    except OSError:
        listed = []
    return listed or [str(server) for server in resolv_conf.host_resolvers().servers]


def _usable(text: str) -> list[str]:
    """Return the servers of a file that are neither on the host nor on a link."""
    servers = resolv_conf.nameservers(text)
    return [str(server) for server in servers if resolv_conf.is_outside(server)]


def wanted(named: tuple[str, ...], before: Resolver, file: Path = FILE) -> Resolver:
    """Return the file with these servers, and the search list that was in it."""
    try:
        earlier = (
            before.text if before.link is None else file.read_text(errors="surrogateescape")
        ) or ""
    except OSError:
        earlier = ""
    kept = (["search"], ["domain"], ["options"])
    search = [line for line in earlier.splitlines() if line.split()[:1] in kept]
    lines = [
        "# libvirt-natns: as long as the router is up; virt-natns router down puts back the former",
        *(f"nameserver {server}" for server in named),
        *search,
    ]
    return Resolver(text="\n".join([*lines, ""]))


@dataclass(frozen=True, slots=True)
class ResolvConf(Operation):
    """The file with the servers that it must name; without servers it stays as it is.

    ``before`` is the file before the router, which the way back restores.
    """

    servers: tuple[str, ...]
    before: Resolver

    def describe(self) -> str:
        return f"{FILE} names {', '.join(self.servers)}" if self.servers else ""

    def differs(self, kernel: Kernel) -> list[str]:
        if not self.servers or look() == wanted(self.servers, self.before):
            return []
        return [f"{FILE} does not name {', '.join(self.servers)}"]

    def ensure(self, context: ApplyContext) -> None:
        restore(wanted(self.servers, self.before))

    def take_back(self, kernel: Kernel) -> None:
        restore(self.before)
