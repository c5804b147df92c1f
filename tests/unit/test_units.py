# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd's units: what they must say, and must not."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from libvirt_natns import names
from libvirt_natns.cli import commands, service_control
from libvirt_natns.daemons import libvirt_events
from libvirt_natns.service import (
    arrivals,
    client,
    healer,
    libvirt_watch,
    look,
    server,
    starts,
    workqueue,
)

CHECKOUT = Path(__file__).resolve().parents[2]
UNITS = CHECKOUT / "contrib" / "systemd"

NEW_MOUNT_NAMESPACE = (
    "BindPaths", "BindReadOnlyPaths", "DynamicUser", "ExecPaths", "InaccessiblePaths",
    "MountAPIVFS", "MountFlags", "NoExecPaths", "PrivateDevices", "PrivateMounts",
    "PrivateNetwork", "PrivateTmp", "ProcSubset", "ProtectControlGroups", "ProtectHome",
    "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables",
    "ProtectProc", "ProtectSystem", "ReadOnlyPaths", "ReadWritePaths", "RootDirectory",
    "RootImage", "TemporaryFileSystem",
)  # fmt: skip
"""Settings after which the host would not see the namespaces that the service makes."""


def settings(unit: str) -> dict[str, list[str]]:
    """The values of each setting, in their order."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / unit).read_text().splitlines():
        match = re.match(r"(\w+)=(.*)", line)
        if match:
            found.setdefault(match[1], []).append(match[2])
    return found


def test_names_are_those_that_the_program_knows() -> None:
    assert all((UNITS / unit).is_file() for unit in service_control.UNITS)
    assert settings("libvirt-natns.socket")["ListenStream"] == [client.SOCKET]
    # systemd looks for the program as a shell does, below /usr/local and /usr.
    assert settings("libvirt-natns.service")["ExecStart"] == ["virt-natns serve"]


def test_the_socket_is_roots() -> None:
    assert settings("libvirt-natns.socket")["SocketMode"] == ["0600"]


def test_dnsmasq_outlives_the_service() -> None:
    service = settings("libvirt-natns.service")
    assert service["KillMode"] == ["process"]
    assert service["OOMPolicy"] == ["continue"]
    # Its own files are there, too.
    assert "RuntimeDirectory" not in service


def test_the_host_sees_the_namespaces() -> None:
    assert not set(NEW_MOUNT_NAMESPACE) & set(settings("libvirt-natns.service"))


def test_hooks_are_answered_to_their_end() -> None:
    limit = float(settings("libvirt-natns.service")["TimeoutStopSec"][0])
    parts = (server, starts, arrivals, libvirt_watch, healer, workqueue, look)
    needed = sum(part.STOP_LIMIT for part in parts) + libvirt_events.END_LIMIT
    assert limit > needed
    assert needed < service_control.STOP_LIMIT


def test_licenses_are_named() -> None:
    for unit in UNITS.iterdir():
        assert unit.read_text().startswith("# SPDX-License-Identifier: LGPL-2.1-or-later\n")


def test_a_router_comes_up_ahead_of_all_that_uses_it() -> None:
    router = settings("libvirt-natns-router@.service")
    ahead = set(" ".join(router["Before"]).split())
    assert {"network-online.target", "libvirtd.service", "virtnetworkd.service"} <= ahead
    assert "libvirt-natns.service" in ahead
    conditions = {each.replace("%i", "wan") for each in router["ConditionPathExists"]}
    kinds = ("kept", "restore", "json")
    assert conditions == {f"|{names.router_file('wan', kind)}" for kind in kinds}
    (after,) = router["ExecStopPost"]
    assert after.replace("%i", "wan") == f"-/bin/sh {names.router_file('wan', 'restore')}"
    assert not set(NEW_MOUNT_NAMESPACE) & set(router)
    # The namespace would end with the unit otherwise.
    assert router["RemainAfterExit"] == ["yes"]
    for verb in ("ExecStart", "ExecStop"):
        words = router[verb][0].removeprefix("virt-natns ").replace("%i", "wan")
        assert commands.make_parser().parse_args(words.split()).name == "wan"


def test_both_units_have_the_same_bounds() -> None:
    """A router's boot does what the service does, and is held by the same limits."""
    service, router = settings("libvirt-natns.service"), settings("libvirt-natns-router@.service")
    for key in (
        "CapabilityBoundingSet", "RestrictNamespaces", "SystemCallFilter",
        "KeyringMode", "LockPersonality", "RestrictAddressFamilies", "SystemCallArchitectures",
    ):  # fmt: skip
        assert service[key] == router[key], key
    # AppArmor's profile of dnsmasq could not run libvirt's lease helper.
    assert "NoNewPrivileges" not in service.keys() | router.keys()
    assert service["RestrictNamespaces"] == ["net"]
    # dnsmasq and DHCP clients are in the service's cgroup.
    assert "IPAddressDeny" not in service


def test_systemd_takes_the_units() -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze here")
    for unit in ("libvirt-natns.service", "libvirt-natns-router@.service"):
        done = subprocess.run(
            [program, "security", "--offline=yes", "--threshold=70", UNITS / unit],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if "unrecognized option" in done.stderr:
            pytest.skip("an older systemd-analyze")
        assert done.returncode == 0, done.stdout[-200:] + done.stderr
        assert "Unknown" not in done.stderr
