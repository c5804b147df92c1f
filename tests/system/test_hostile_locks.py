# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks and processes that any user of the host may have: all starts all the same."""

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
ODD_PROCESSES = """
import ctypes, os, signal
libc = ctypes.CDLL(None)
libc.prctl(15, b"x\\xff) Z (", 0, 0, 0)
if os.fork() == 0:
    os._exit(0)
os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
fields = open("/proc/self/stat", "rb").read().rpartition(b")")[2].split()
first = int(fields[45]) & ~4095
libc.munmap(ctypes.c_void_p(first), ctypes.c_size_t((int(fields[46]) - first + 4095) & ~4095))
os.write(1, b"ready\\n")
signal.pause()
"""
"""A zombie, and a process without a command line; the names of both are not UTF-8."""

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


def test_nothing_minds_a_strangers_processes(installed: None, provider: Provider) -> None:
    """A network's start, sync, doctor and the end search all processes."""
    write_config(provider.config())
    define_network(isolated("a", "virbr10"))
    command = [*NOBODY, "/usr/bin/python3", "-c", ODD_PROCESSES]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, cwd="/") as stranger,
        ExitStack() as cleanup,
    ):
        cleanup.callback(remove_config)
        cleanup.callback(stranger.kill)
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == b"ready\n"
        assert Path(f"/proc/{stranger.pid}/cmdline").read_bytes() == b""
        virsh("net-start", "a")
        assert Path("/run/netns/nat-a").exists()
        assert natns("check").stdout == ""
        assert natns("sync").stdout == ""
        doctor = natns("doctor", check=False)
        assert "Traceback" not in doctor.stdout + doctor.stderr
        assert "internal error" not in doctor.stdout + doctor.stderr
        virsh("net-destroy", "a")
        assert not Path("/run/netns/nat-a").exists()
