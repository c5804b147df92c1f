# SPDX-License-Identifier: LGPL-2.1-or-later
"""Everything that a network could leave behind in the host, as a comparable value.

What changes by itself is left out: interface indexes, timers, counters, process
ids, learned neighbours and, on purpose, natns' state database.
"""

import difflib
import json
import re
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from lab_base import run

NAMESPACES = Path("/run/netns")
DIRECTORIES = (
    Path("/run/libvirt-natns"),
    NAMESPACES,
    Path("/var/lib/libvirt-natns"),
)
DATABASE = re.compile(r"\.(db|sqlite3?)(-\w+)?$")
LINK_LOCAL = "fe80:"
"""IPv6 addresses that the kernel makes by itself, as soon as a link has a carrier."""
KERNELS_OWN_ROUTE = re.compile(rf"{LINK_LOCAL}|(local|anycast|multicast) .*:")
RULE = re.compile(r"\d+:\s")
VOLATILE = re.compile(r" (expires \S+|valid_lft \S+|preferred_lft \S+|linkdown|dead)")


@dataclass(frozen=True)
class Snapshot:
    """The host's state: sections of sorted lines.  Compare with ``==``."""

    sections: dict[str, tuple[str, ...]]

    def __getitem__(self, section: str) -> tuple[str, ...]:
        return self.sections[section]

    def diff(self, later: "Snapshot") -> str:
        """What a later snapshot has more (+) or less (-), section by section."""
        lines: list[str] = []
        for section, before in self.sections.items():
            after = later.sections[section]
            if before != after:
                lines.append(f"{section}:")
                lines += _changes(before, after)
        return "\n".join(lines)


def _changes(before: Iterable[str], after: Iterable[str]) -> list[str]:
    differences = difflib.ndiff(list(before), list(after))
    return [f"  {line}" for line in differences if line[0] in "+-"]


def snapshot() -> Snapshot:
    """The state of the namespace that this is called in (the sandbox's host)."""
    # Few processes: each test takes two snapshots at least.
    links = json.loads(run("ip", "-j", "-d", "address").stdout)
    rules, routes = _routing()
    sections = {
        "links": [_link(link) for link in links],
        "addresses": _addresses(links),
        "routes": routes,
        "rules": rules,
        "namespaces": [entry.name for entry in NAMESPACES.glob("*")],
        "nftables": _nftables(),
        "iptables": _legacy_iptables(),
        "processes": _processes(),
        "files": _files(),
        "sysctls": _sysctls(),
    }
    ordered = {"nftables", "iptables"}
    return Snapshot(
        {
            name: tuple(lines if name in ordered else sorted(lines))
            for name, lines in sections.items()
        }
    )


def remaining(
    before: Snapshot, look: Callable[[], Snapshot] = snapshot, timeout: float = 5.0
) -> str:
    """Wait until the host is as it was; return what differs when the time is up, "" for nothing.

    The kernel ends namespaces, and links into them, in its own time.  So these are waited
    for first, without a process.
    """
    deadline = time.monotonic() + timeout
    while not _has_names_of(before) and time.monotonic() < deadline:
        time.sleep(0.02)
    while (difference := before.diff(look())) and time.monotonic() < deadline:
        time.sleep(0.1)
    return difference


def _has_names_of(before: Snapshot) -> bool:
    """True if the host's links and namespaces have the names of a snapshot."""
    # /sys shows those of the namespace that it was mounted in, and some tests live in another.
    links = {name for _, name in socket.if_nameindex()}
    namespaces = {entry.name for entry in NAMESPACES.glob("*")}
    return links == {line.split()[0] for line in before["links"]} and namespaces == set(
        before["namespaces"]
    )


OWN_ACCEPT = 'accept comment "libvirt-natns"'
"""Ends a rule of ours in somebody else's table: whichever comes first, all of them accept."""


def _is_own_accept(line: str) -> bool:
    return line.endswith(OWN_ACCEPT)


def _nftables() -> list[str]:
    lines = run("nft", "-s", "list", "ruleset").stdout.splitlines()
    found: list[str] = []
    groups = ((ours, list(group)) for ours, group in groupby(lines, _is_own_accept))
    for ours, rules in groups:
        found += sorted(rules) if ours else rules
    return found


def _routing() -> tuple[list[str], list[str]]:
    """Rules and routes of both families; one that does not exist has none."""
    asked = "rule show\nroute show table all\n"
    rules: list[str] = []
    routes: list[str] = []
    for family in ("-4", "-6"):
        told = run("ip", family, "-o", "-force", "-batch", "-", input=asked, check=False).stdout
        for line in told.splitlines():
            kept = " ".join(VOLATILE.sub("", line).split())
            if RULE.match(line):
                rules.append(kept)
            elif not KERNELS_OWN_ROUTE.match(kept):
                routes.append(kept)
    return rules, routes


def _link(link: dict[str, Any]) -> str:
    fields = {
        "altnames": " ".join(sorted(link.get("altnames", []))),
        "master": link.get("master", ""),
        "mtu": link["mtu"],
        "state": link["operstate"],
        "mac": link.get("address", ""),
        "kind": link.get("linkinfo", {}).get("info_kind", ""),
    }
    return " ".join([link["ifname"], *(f"{key}={value}" for key, value in fields.items() if value)])


def _addresses(links: Iterable[dict[str, Any]]) -> list[str]:
    found = []
    for link in links:
        for entry in link.get("addr_info", []):
            if not entry["local"].startswith(LINK_LOCAL):
                found.append(f"{link['ifname']} {entry['local']}/{entry['prefixlen']}")
    return found


def _legacy_iptables() -> list[str]:
    lines: list[str] = []
    for family, program in (("ip", "iptables"), ("ip6", "ip6tables")):
        present = Path(f"/proc/net/{family}_tables_names")
        if present.exists() and present.read_text().split():
            saved = run(f"{program}-legacy-save", check=False).stdout
            tables = re.findall(r"^\*.*?^COMMIT$", saved, re.DOTALL | re.MULTILINE)
            lines += [line for table in tables for line in _table(table)]
    return lines


def _table(saved: str) -> list[str]:
    """A table's lines; none for one that was only looked at, which the kernel keeps."""
    lines = [re.sub(r" \[\d+:\d+\]$", "", line) for line in saved.splitlines()]
    return lines if any(not line.endswith(" ACCEPT") for line in lines[1:-1]) else []


LOOKS = ("nft -j -s -t list ruleset", "nft -s -f -", "nft -s -p -f -")
"""The service looks at rules by these programs, at any moment and for some milliseconds."""


CHILDREN = (
    "nft -i -j -s -t",
    "iptables_child import serve; serve()",
    "look_server import main; main()",
)
"""A process of ours keeps such children as long as it lives itself."""


def _processes() -> list[str]:
    """Command lines of all processes, but for looks at rules, and children that are kept."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        line = _command(directory)
        if line.endswith(CHILDREN) and (_parent(directory) != 1 or _ends(directory)):
            continue
        if line and not line.endswith(LOOKS) and not _becomes_another(directory, line):
            found.append(line)
    return found


def _command(process: Path) -> str:
    try:
        words = (process / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return b" ".join(words).decode(errors="replace")


def _parent(process: Path) -> int:
    return _ids(process)[0]


def _ids(process: Path) -> tuple[int, int]:
    """Return the parent and the session of a process; 0 for a process that has ended."""
    try:
        _, parent, _, session, *_ = (process / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    return int(parent), int(session)


def _becomes_another(process: Path, line: str) -> bool:
    """True for a fork that has yet to run its program, or a command of the command server.

    The services are forks, too, with sessions of their own.
    """
    parent, session = _ids(process)
    return session != int(process.name) and line == _command(Path("/proc", str(parent)))


def _ends(process: Path) -> bool:
    """True if an orphan ends within a second: the pipe to it has just been closed."""
    for _ in range(100):
        if not _command(process):
            return True
        time.sleep(0.01)
    return False


def _files() -> list[str]:
    found = []
    for directory in DIRECTORIES:
        for file in directory.rglob("*"):
            if not DATABASE.search(file.name):
                found.append(f"{file}{'/' if file.is_dir() else ''}")
    return found


def _sysctls() -> list[str]:
    root = Path("/proc/sys/net")
    files = [root / "ipv4/ip_forward"]
    for pattern in ("ipv4/conf/*/forwarding", "ipv6/conf/*/forwarding", "bridge/bridge-nf-call-*"):
        files += root.glob(pattern)
    found = []
    for file in files:
        try:
            found.append(f"{file.relative_to('/proc/sys')} = {file.read_text().strip()}")
        except FileNotFoundError:
            continue
    return found
