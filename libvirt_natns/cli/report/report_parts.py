# SPDX-License-Identifier: LGPL-2.1-or-later
"""The parts of a bug report, each with its heading.

A part asks a program, or ``virt-natns`` itself, in a process of its own: a program that hangs or
crashes ends its part alone.  No part prints a file of others: a hook of another author is named,
with its owner and mode.
"""

import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from libvirt_natns import __version__, names
from libvirt_natns.cli import hook_files
from libvirt_natns.cli.report import bounded_output, rules_text
from libvirt_natns.daemons.text_files import text_if_any
from libvirt_natns.kernel import processes

Part = tuple[str, Callable[[], str]]
"""A heading, and a function that makes the text below it."""

MOST_NETWORKS = 8
"""Networks with their plan, links, routes and rules."""

ALL_RULES = 16 * 1024 * 1024
"""Bytes of a listing of all rules, most of them left out: a cluster's host has thousands."""

LOG_LINES = "400"
UNITS = ("libvirt-natns.socket", "libvirt-natns.service", "libvirt-natns-router@.service")
PROPERTIES = (
    "Id", "LoadState", "UnitFileState", "ActiveState", "SubState", "Result", "NRestarts",
    "FragmentPath", "DropInPaths",
)  # fmt: skip
OURS = re.compile(r"libvirt[-_]natns|virt-natns")
"""In a word of a process's command."""
PROGRAMS = (
    ("dnsmasq", "--version"),
    ("nft", "--version"),
    ("iptables", "--version"),
    ("ip", "-V"),
    ("systemctl", "--version"),
    ("dpkg-query", "-W", "libvirt-natns", "libvirt-daemon-system", "firewalld", "ufw"),
    ("rpm", "-q", "libvirt-natns", "libvirt-daemon", "firewalld"),
)
OF_LIBVIRT = "from libvirt_natns.cli.report import libvirt_excerpts; libvirt_excerpts.{}()"
DISTRIBUTIONS = ("lxml", "pyroute2", "libvirt-python", "prometheus-client", "python-iptables")
LIST_VERSIONS = """
import importlib.metadata, sys
print("Python", sys.version)
for name in sys.argv[1:]:
    try: print(name, importlib.metadata.version(name))
    except Exception as error: print(name, type(error).__name__)
"""
"""A program for the hooks' interpreter; to import a module might load modules of the kernel."""


def parts(network: str | None = None) -> Iterator[Part]:
    """Yield all parts of a report, or with the ``network`` alone as far as parts are networks'."""
    ours = bounded_output.of_our_command
    named = ("--", network) if network else ()
    yield "versions", _versions
    yield "configuration", _configuration
    for command in ("status", "check"):
        yield f"virt-natns {command}", partial(ours, command, *named)
    yield "virt-natns doctor", partial(ours, "doctor")
    yield "virt-natns forward list", partial(ours, "forward", "list")
    yield "virt-natns router status", partial(ours, "router", "status")
    yield "hooks", _hooks
    yield "service", _service
    yield "processes", _processes
    yield "log", _log
    yield "networks of libvirt", partial(_of_libvirt, "print_networks")
    yield "guests of libvirt", partial(_of_libvirt, "print_guests")
    yield "rules of the host", _rules
    yield "links of the host", _links
    yield "state", _state
    yield "AppArmor and SELinux", _confinement
    for name in _networks(network):
        yield f"plan of {name}", partial(ours, "plan", "--", name)
    for space in _namespaces(network):
        yield f"namespace {space}", partial(_namespace, space)


# -- versions and settings ---------------------------------------------------


def _versions() -> str:
    release = re.findall(r"(?m)^PRETTY_NAME=.*$", text_if_any(Path("/etc/os-release")))
    system = os.uname()
    lines = [
        f"libvirt-natns {__version__} in {names.library()}",
        *release,
        f"kernel {system.sysname} {system.release} {system.version} {system.machine}",
        f"up for {time.clock_gettime(time.CLOCK_BOOTTIME):.0f} s",
        f"hooks run with {hook_files.interpreter()}",
        bounded_output.of(hook_files.interpreter(), "-I", "-c", LIST_VERSIONS, *DISTRIBUTIONS),
    ]
    for program, *arguments in PROGRAMS:
        if processes.program(program):
            lines += bounded_output.of(program, *arguments).splitlines()[:4]
    return "\n".join(lines)


def _configuration() -> str:
    """Return the configuration without its comments, in which a person notes anything."""
    if not names.CONFIG_FILE.exists():
        return f"no file {names.CONFIG_FILE}: the defaults apply"
    lines = names.CONFIG_FILE.read_text(errors="replace").splitlines()
    return "\n".join(without_comment(line) for line in lines if without_comment(line))


def without_comment(line: str) -> str:
    """Return a line of TOML without its comment; a "#" within quotes begins none."""
    found = re.match(r"(?:\"(?:[^\"\\]|\\.)*\"|'[^']*'|[^#\"']|[\"'](?=[^\"']*$))*", line)
    return found[0].rstrip() if found else ""


def _hooks() -> str:
    """Return the hooks of ours and of others, without their content."""
    lines = []
    for file in sorted(hook_files.HOOKS_DIRECTORY.rglob("*")):
        status = file.lstat()
        if stat.S_ISDIR(status.st_mode):
            continue
        whose = "another's"
        if hook_files.is_ours(file):
            known = any(file in hook_files.places(hook) for hook in hook_files.HOOKS)
            whose = "ours" if known and hook_files.is_current(file) else "ours, of another version"
        mode = stat.filemode(status.st_mode)
        lines.append(f"{mode} {status.st_uid}:{status.st_gid} {status.st_size} {file} ({whose})")
    return "\n".join(lines) or f"no file in {hook_files.HOOKS_DIRECTORY}"


def _state() -> str:
    """Return the files of our state with their sizes; ``doctor`` tells whether they are whole."""
    lines = []
    for directory in (names.STATE_DIRECTORY, names.RUN_DIRECTORY):
        for file in sorted(directory.rglob("*"))[:200]:
            status = file.lstat()
            mode = stat.filemode(status.st_mode)
            lines.append(f"{mode} {status.st_uid}:{status.st_gid} {status.st_size} {file}")
    return "\n".join(lines)


# -- the service -------------------------------------------------------------


def _service() -> str:
    lines = [
        bounded_output.of(
            "systemctl", "show", "--no-pager", f"--property={','.join(PROPERTIES)}", unit
        )
        for unit in UNITS
        if Path("/run/systemd/system").is_dir()
    ]
    return "\n\n".join(lines) or "systemd does not run"


def _processes() -> str:
    """Return our processes: their state, the kernel's function they wait in, and their command."""
    lines = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):  # noqa: PTH208
        words = processes.command(pid)
        if pid == os.getpid() or not any(OURS.search(word) for word in words):
            continue
        status = text_if_any(Path(f"/proc/{pid}/status"))
        state = re.search(r"(?m)^State:\s*(.*)$", status)
        place = text_if_any(Path(f"/proc/{pid}/wchan")).strip("\0\n")
        lines.append(f"{pid} {state[1] if state else '?'} {place or '-'} {' '.join(words)}")
    return "\n".join(lines) or "no process of ours runs"


def _log() -> str:
    """Return the last lines of ours in the journal, or in the files of syslog."""
    options = ("--no-pager", "--no-hostname", "--output=short-iso", f"--lines={LOG_LINES}")
    ours = [f"_SYSTEMD_UNIT={UNITS[1]}", f"UNIT={UNITS[1]}", "SYSLOG_IDENTIFIER=libvirt-natns"]
    lines = [bounded_output.of("journalctl", *options, ours[0], "+", ours[1], "+", ours[2])]
    for file in (Path("/var/log/syslog"), Path("/var/log/messages")):
        if file.is_file():
            lines.append(f"{file}:")
            # The lines' own tag: lines of other programs may have any content.
            last = bounded_output.of("tail", "-n", "20000", str(file)).splitlines()
            lines += [line for line in last if re.search(r" libvirt-natns\[\d+\]: ", line)][-400:]
    return "\n".join(lines)


# -- libvirt, the host and the networks --------------------------------------


def _of_libvirt(function: str) -> str:
    return bounded_output.of(*names.python_command(OF_LIBVIRT.format(function)))


def _rules() -> str:
    listing = bounded_output.of("nft", "-s", "-t", "list", "ruleset", size=ALL_RULES)
    lines = [rules_text.of_nft(listing)]
    for family, word in (("ip", "iptables"), ("ip6", "ip6tables")):
        # nft lists a match of iptables by its name alone.  The program of legacy iptables would
        # load the kernel's modules where these are not loaded.
        loaded = text_if_any(Path(f"/proc/net/{family}_tables_names")).strip()
        for kind, there in (("nft", " xt " in listing), ("legacy", bool(loaded))):
            program = f"{word}-{kind}-save"
            if there and processes.program(program):
                saved = bounded_output.of(program, size=ALL_RULES)
                lines += [f"# {program}", rules_text.of_iptables(saved)]
    bridged = text_if_any(Path("/proc/sys/net/bridge/bridge-nf-call-iptables")).strip()
    return "\n".join([*lines, f"# bridge-nf-call-iptables: {bridged or 'not there'}"])


def _links() -> str:
    lines = [
        bounded_output.of("ip", *arguments)
        for arguments in (
            ("-details", "link", "show", "type", "bridge"),
            ("-brief", "address"),
            ("-4", "route"),
            ("-6", "route"),
            ("rule",),
        )
    ]
    resolvers = text_if_any(Path("/etc/resolv.conf")).splitlines()
    # A search domain is the name of a site.
    lines += [line for line in resolvers if line.startswith(("nameserver", "options"))]
    return "\n".join(lines)


def _networks(named: str | None) -> list[str]:
    """Return the names of networks that have a namespace, or the named one."""
    if named:
        return [named]
    listed = bounded_output.of(*names.python_command(OF_LIBVIRT.format("print_names")))
    return [line[1:] for line in listed.splitlines() if line.startswith("=")][:MOST_NETWORKS]


def _namespaces(named: str | None) -> list[str]:
    if named:
        return [names.namespace(named)]
    there = sorted(os.listdir(names.NETNS_DIRECTORY)) if names.NETNS_DIRECTORY.is_dir() else []  # noqa: PTH208
    routers = [name for name in there if name.startswith(names.ROUTER_PREFIX)]
    return [*routers, *[name for name in there if name.startswith("nat-")][:MOST_NETWORKS]]


def _namespace(name: str) -> str:
    inside = ("netns", "exec", name)
    lines = [
        bounded_output.of("ip", "-n", name, *arguments)
        for arguments in (
            ("-details", "-statistics", "link"),
            ("address",),
            ("-4", "route", "show", "table", "all"),
            ("-6", "route", "show", "table", "all"),
            ("rule",),
            ("neighbour",),
        )
    ]
    lines.append(bounded_output.of("ip", *inside, "nft", "-s", "-t", "list", "ruleset"))
    return "\n".join(line for line in lines if line)


def _confinement() -> str:
    security = Path("/sys/kernel/security/apparmor/profiles")
    enabled = text_if_any(Path("/sys/module/apparmor/parameters/enabled")).strip()
    profiles = text_if_any(security).splitlines()
    ours = re.compile(r"libvirt|natns|dnsmasq|virt|dhc|passt")
    lines = [
        f"AppArmor: {enabled or 'not there'}",
        *[line for line in profiles if ours.search(line) and not line.startswith("libvirt-")],
        f"SELinux: {text_if_any(Path('/sys/fs/selinux/enforce')).strip() or 'not there'}",
        "denials in the kernel's log:",
        bounded_output.of(
            "journalctl", "--no-pager", "--no-hostname", "--dmesg", "--lines=100",
            "--output=short-iso", "--grep=apparmor=.DENIED..*(libvirt|natns|dnsmasq|virt)",
        ),
    ]  # fmt: skip
    return "\n".join(lines)
