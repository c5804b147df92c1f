# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks that any user of the host may try to hold: networks and guests start all the same."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from lab import (
    Provider,
    Service,
    define_network,
    isolated,
    natns,
    remove_config,
    virsh,
    wait_for,
    write_config,
)
from lab_domains import create, destroy, domain, nic, ports

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
RUN = "/run/libvirt-natns"
PLACES = (
    "/run/netns",
    "/run/libvirt-natns",
    "/run/xtables.lock",
    "/var/lib/libvirt-natns",
    "/etc/libvirt-natns",
)
MOST = 50.0
"""Seconds for all of it: one lock that is waited for costs a minute."""


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Have an unprivileged user lock a path; whether that could be done."""
    process = subprocess.Popen(
        [*NOBODY, "flock", "-n", os.fspath(path), "sh", "-c", "echo held; exec sleep 300"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline() == "held\n"
    finally:
        # Its child has the lock, too.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def paths() -> Iterator[Path]:
    """All that is ours, or that we lock."""
    for place in map(Path, PLACES):
        yield place
        if place.is_dir() and place.name != "netns":
            yield from place.rglob("*")


@pytest.mark.parametrize("resident", [False, True], ids=["hooks-iptables", "service-nftables"])
def test_nothing_waits_for_a_strangers_lock(
    installed: None, provider: Provider, resident: bool
) -> None:
    write_config(provider.config(firewall="nftables" if resident else "iptables"))
    with ExitStack() as cleanup:
        cleanup.callback(remove_config)
        if resident:
            cleanup.enter_context(Service())
        # Everything there can be, before: files, directories, sockets.
        for name, bridge in (("a", "virbr10"), ("b", "virbr11")):
            define_network(isolated(name, bridge))
        virsh("net-start", "a")
        create(domain("web", nic("a", "52:54:00:00:00:05"), publishes=ports("start='80' to='80'")))
        locked = [path for path in paths() if cleanup.enter_context(held(path))]
        assert Path("/run/netns") in locked
        # Of what we lock, ourselves or by SQLite, nobody else may open anything.
        assert not [path for path in locked if path.is_dir() and path.is_relative_to(RUN)]
        assert not [path for path in locked if path.is_relative_to("/var/lib/libvirt-natns")]
        began = time.monotonic()
        virsh("net-start", "b")
        create(domain("mail", nic("b", "52:54:00:00:00:06"), publishes=ports("start='25' to='25'")))
        destroy("web", "mail")
        assert natns("check", check=False).stdout == ""
        natns("sync")
        virsh("net-destroy", "b")
        virsh("net-destroy", "a")
        assert time.monotonic() - began < MOST
        wait_for(lambda: not Path("/run/netns/nat-b").exists())
