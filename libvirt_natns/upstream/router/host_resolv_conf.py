# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's /etc/resolv.conf while its NIC is away.

A file that an administrator wrote stays as it is: its servers answer through the
router as they did before.  A link into a program's own directory does not, nor do
servers that only a program on this host or on the NIC's own link knows: when the
NIC goes, that program forgets them.
"""

import os
from ipaddress import ip_address
from pathlib import Path

from libvirt_natns.daemons import resolv_conf
from libvirt_natns.records import dataclass

FILE = Path("/etc/resolv.conf")


@dataclass(frozen=True, slots=True)
class Resolver:
    """The file as it was: where it leads if it is a link, what it says if not, its mode.

    Both are None where there is no file.
    """

    link: str | None = None
    text: str | None = None
    mode: int = 0o644


def look(file: Path = FILE) -> Resolver:
    """The file as it is."""
    if file.is_symlink():
        return Resolver(link=os.fspath(file.readlink()))
    try:
        return Resolver(
            text=file.read_text(errors="surrogateescape"), mode=file.stat().st_mode & 0o777
        )
    except FileNotFoundError:
        return Resolver()


def restore(before: Resolver, file: Path = FILE) -> None:
    """Put the file back as it was, unless it is."""
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
    """The servers that the file must name instead; None where it can stay.

    An empty list where it cannot stay and no server is known.
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
    """Servers that are reached by routing alone."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                address = ip_address(words[1])
            except ValueError:
                continue
            if not (address.is_loopback or address.is_link_local):
                found.append(words[1])
    return found


def wanted(named: tuple[str, ...], before: Resolver, file: Path = FILE) -> Resolver:
    """The file with these servers and the search list that there was."""
    try:
        earlier = (before.text if before.link is None else file.read_text()) or ""
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
