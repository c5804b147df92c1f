# SPDX-License-Identifier: LGPL-2.1-or-later
"""firewalld, asked over D-Bus: the zone of a link, and our own zone for links of ours.

firewalld 2 owns its nftables table: the kernel lets no other process change a rule in it.
So firewalld itself must let our packets pass, as libvirt's zone does for libvirt's networks.
A zone of ours, and two policies, say so (``cli.firewalld_files``).

The program busctl, of systemd, asks.  It is a child with a time limit: a library for D-Bus may
abort its process, and a firewalld that hangs gives no answer.  busctl takes some 5 ms.

Limit: a start, a reload or a restart of firewalld forgets the zones of links.
"""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

from libvirt_natns.errors import FirewallError
from libvirt_natns.kernel import processes

ZONE = "natns"
"""Our zone.  firewalld takes at most 17 characters."""

BUS = "org.fedoraproject.FirewallD1"
OBJECT = "/org/fedoraproject/FirewallD1"
ZONES = f"{BUS}.zone"

RUN = Path("/run/firewalld")
"""Exists once firewalld has run since the boot."""
SYSTEM_BUS = Path("/run/dbus/system_bus_socket")

ANSWER_LIMIT = 4
"""Seconds that firewalld may take for an answer; a reload takes it one or two."""

UNKNOWN_ZONE = "INVALID_ZONE"
RELOAD = "firewall-cmd --reload"


class NotRunningError(FirewallError):
    """firewalld does not run."""


def may_run() -> bool:
    """True if firewalld may be running; the look costs next to nothing where it was never."""
    return RUN.is_dir() and SYSTEM_BUS.exists()


def is_running() -> bool:
    """True if firewalld runs.  Raises FirewallError where D-Bus does not answer."""
    if not may_run():
        return False
    driver = "org.freedesktop.DBus"
    done = _busctl("call", driver, "/org/freedesktop/DBus", driver, "NameHasOwner", "s", BUS)
    if done.returncode != 0:
        raise FirewallError(f"D-Bus does not answer ({done.stderr.strip()})")
    return bool(json.loads(done.stdout)["data"][0])


def place(links: Iterable[str]) -> list[str]:
    """Put links that are in no zone into our zone, and return those links.

    A link in another zone stays there, as an administrator has put it there.  Returns an
    empty list where firewalld does not run, or does not know our zone.  Raises FirewallError
    where firewalld refuses, or does not answer.
    """
    placed = []
    try:
        for link in links:
            if not zone_of(link):
                _ask("changeZoneOfInterface", ZONE, link)
                placed.append(link)
    except NotRunningError:
        pass
    except FirewallError as error:
        if UNKNOWN_ZONE not in str(error):
            raise
    return placed


def withdraw(links: Iterable[str]) -> None:
    """Take links out of our zone; a link in another zone stays there.  Raises FirewallError."""
    for link in links:
        try:
            if zone_of(link) == ZONE:
                _ask("removeInterface", ZONE, link)
        except NotRunningError:
            return


def outside_zones(links: Iterable[str]) -> list[str]:
    """Return the links that are in no zone, where firewalld runs and knows our zone.

    Raises FirewallError as ``place``.
    """
    try:
        outside = [link for link in links if not zone_of(link)]
        return outside if outside and knows_zone() else []
    except NotRunningError:
        return []


def zone_of(link: str) -> str:
    """Return the zone of a link; "" for a link of which firewalld was not told."""
    return str(_ask("getZoneOfInterface", link))


def knows_zone() -> bool:
    """True if the firewalld that runs has our zone."""
    return ZONE in list(_ask("getZones"))


def is_strict() -> bool:
    """True if firewalld rejects ports that others publish (StrictForwardPorts, firewalld 2.3)."""
    settings = (BUS, f"{OBJECT}/config", f"{BUS}.config")
    done = _busctl("get-property", *settings, "StrictForwardPorts")
    return done.returncode == 0 and bool(json.loads(done.stdout)["data"] == "yes")


def reload() -> None:
    """Have firewalld read its files again, which forgets changes that are in no file."""
    _ask("reload", interface=BUS)


def _ask(method: str, *arguments: str, interface: str = ZONES) -> str | list[str]:
    """Call a method of firewalld with arguments that are all strings.

    Raises NotRunningError, and FirewallError.
    """
    signature = ("s" * len(arguments),) if arguments else ()
    done = _busctl("call", BUS, OBJECT, interface, method, *signature, *arguments)
    if done.returncode == 0:
        answer: list[str | list[str]] = json.loads(done.stdout or '{"data": [""]}')["data"]
        return answer[0]
    if not is_running():
        raise NotRunningError("firewalld does not run")
    said = done.stderr.strip().removeprefix("Call failed: ")
    raise FirewallError(f"firewalld refuses {method} ({said})", "systemctl status firewalld")


def _busctl(*words: str) -> "subprocess.CompletedProcess[str]":
    """Run busctl.  Raises FirewallError where it is missing, or where D-Bus does not answer."""
    path = processes.required(
        "busctl",
        FirewallError(
            "the program busctl is missing, by which firewalld is asked", "install systemd"
        ),
    )
    # A firewalld that was stopped must not be started by our question.
    options = ("--system", "--no-pager", "--auto-start=no", "--json=short")
    try:
        return subprocess.run(
            [path, *options, f"--timeout={ANSWER_LIMIT}", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            # The time limit of busctl itself begins once D-Bus has let it in.
            timeout=ANSWER_LIMIT + 1,
            env={"PATH": processes.PATH, "LC_ALL": "C"},
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise FirewallError(f"firewalld cannot be asked ({error})") from error
