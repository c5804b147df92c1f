# SPDX-License-Identifier: LGPL-2.1-or-later
"""Have a firewalld that runs read its files again, if that costs the administrator nothing.

firewalld knows a new zone only after a reload, and a reload forgets all changes that are in
no file.  So what firewalld has in force is compared with its files first.  Links are left
out of the comparison where another program puts them into their zones again: libvirt, Docker,
NetworkManager.
"""

import subprocess
from pathlib import Path

from libvirt_natns.daemons import firewalld
from libvirt_natns.errors import FirewallError
from libvirt_natns.kernel import processes

LISTINGS = (
    ("--list-all-zones",),
    ("--list-all-policies",),
    ("--get-ipsets",),
    ("--direct", "--get-all-chains"),
    ("--direct", "--get-all-rules"),
    ("--direct", "--get-all-passthroughs"),
)
LINKS = "interfaces:"
RETURNING = ("libvirt", "docker")
"""Beginnings of zones to which libvirt and Docker return their links after a reload."""
NETWORK_MANAGER = Path("/run/NetworkManager")

LIMIT = 60.0
"""Seconds that firewall-cmd may take: it is an interpreter that loads a lot."""

Lines = set[tuple[str, tuple[str, ...]]]
"""A zone or policy, "" for none, and the words of a line about it, sorted."""


def make_known(*, renewed: bool) -> str:
    """Have firewalld know our zone, and say how that went, in a line; "" for nothing to do.

    ``renewed``: firewalld may know an earlier version of the zone.
    """
    try:
        if not firewalld.is_running() or (firewalld.knows_zone() and not renewed):
            return ""
        if _is_as_in_files():
            firewalld.reload()
            return f"told firewalld to read the zone {firewalld.ZONE}"
    except FirewallError as error:
        return f"firewalld has not read the zone {firewalld.ZONE} ({error}): {firewalld.RELOAD}"
    return (
        f"firewalld has not read the zone {firewalld.ZONE} yet, and a reload drops changes that"
        f" are not permanent: {firewalld.RELOAD}"
    )


def _is_as_in_files() -> bool:
    """True if firewalld has nothing in force that is not in its files, too."""
    ipsets = _firewall_cmd("--get-ipsets").split()
    entries = [(f"--ipset={ipset}", "--get-entries") for ipset in ipsets]
    return all(
        comparable(_firewall_cmd(*words)) == comparable(_firewall_cmd("--permanent", *words))
        for words in (*LISTINGS, *entries)
    )


def comparable(listing: str) -> Lines:
    """Return a listing of zones or policies as lines to compare, without what comes back."""
    lines: Lines = set()
    section = ""
    managed = NETWORK_MANAGER.exists()
    for line in listing.splitlines():
        words = line.split()
        if not words:
            section = ""
        elif not line[0].isspace():
            section = words[0]
            # A zone with links is active, which the remarks in brackets behind its name say.
            words = [line.partition(" (")[0]]
        if not words or section.startswith(firewalld.ZONE):
            continue
        if words[0] == LINKS and (managed or section.startswith(RETURNING)):
            continue
        lines.add((section, tuple(sorted(words))))
    return lines


def _firewall_cmd(*words: str) -> str:
    """Return the answer of firewall-cmd.  Raises FirewallError."""
    path = processes.required("firewall-cmd", FirewallError("the program firewall-cmd is missing"))
    try:
        done = subprocess.run(
            [path, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=LIMIT,
            env={"PATH": processes.PATH, "LC_ALL": "C"},
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise FirewallError(f"firewall-cmd failed ({error})") from error
    if done.returncode != 0:
        raise FirewallError(f"firewall-cmd {words[0]} failed ({done.stderr.strip()})")
    return done.stdout
