# SPDX-License-Identifier: LGPL-2.1-or-later
"""Try a configuration of ours on dnsmasq before a network starts.

libvirt's own dnsmasq has read the text from which ours is derived.  A network of
``<natns:ip>`` has no dnsmasq of libvirt, so ``dnsmasq --test`` reads its configuration.
dnsmasq checks some values of the user's own ``<dnsmasq:options>`` only when it starts:
users, directories, options that exclude each other.  With such options, a dnsmasq is
started on trial.  It runs in a network namespace of its own without any link, and with the
capabilities of every other dnsmasq of ours.

Each trial locks its directory, and the kernel drops the lock with the process.  So a
directory without a lock was left by a kill.  The next trial removes it, and ends its daemon.

Limits: the lines of the hosts files are not checked; dnsmasq logs a bad line there and
goes on.  A trial reads and writes the files that the options name, as every start does.
"""

import os
import re
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from libvirt_natns.daemons import dnsmasq_config, dnsmasq_files, dnsmasq_process
from libvirt_natns.daemons.dnsmasq_process import START_LIMIT
from libvirt_natns.daemons.resolv_conf import Resolvers
from libvirt_natns.errors import DnsmasqError, LockError, NatnsError
from libvirt_natns.kernel import processes
from libvirt_natns.kernel.locks import locked
from libvirt_natns.model.network import Network
from libvirt_natns.names import RUN_DIRECTORY
from libvirt_natns.values import quoted, shown

PLACE = re.compile(r" at line (\d+) of \S+$")
"""Finds the number of the line that dnsmasq refuses."""

FOREGROUND = re.compile(r"\s*(keep-in-foreground|no-daemon|test|version|help)\s*$")
"""Options with which dnsmasq never becomes a daemon."""

REMEDY = "change the option in the network's XML"

PREFIX = "trial-"
"""The first part of the names of trials' directories, in the run-time directory."""


def check(network: Network) -> None:
    """Refuse a network if its dnsmasq would not start.  Raises DnsmasqError."""
    dnsmasq_process.program()
    if not network.writes_dnsmasq:
        return
    configuration = check_text(network)
    if network.dnsmasq_options:
        _try(network, configuration)


def check_text(network: Network) -> str:
    """Refuse a network if dnsmasq does not take the text of its configuration; return the text.

    No daemon is started, so any user may call it.  Raises DnsmasqError.
    """
    files = dnsmasq_config.make(network, None, Resolvers(), dnsmasq_config.LEAST_IPV6_MTU)
    _check_syntax(network, files.configuration)
    for option in network.dnsmasq_options:
        if FOREGROUND.match(option):
            raise DnsmasqError(
                f"network {quoted(network.name)}: dnsmasq does not become a daemon with"
                f" {shown(option)}",
                REMEDY,
            )
    return files.configuration


def _check_syntax(network: Network, configuration: str) -> None:
    try:
        done = subprocess.run(
            [
                dnsmasq_process.program(),
                "--test",
                "--conf-file=-",
                *dnsmasq_process.lease_options(),
            ],
            # Without a locale, as dnsmasq starts: the locale decides which names it takes.
            env={"PATH": processes.PATH},
            input=configuration.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            timeout=START_LIMIT,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise DnsmasqError("cannot run dnsmasq", str(error)) from error
    if done.returncode:
        raise _refusal(network, configuration, done.stderr, done.returncode)


def _refusal(network: Network, configuration: str, stderr: bytes, status: int) -> DnsmasqError:
    """Return dnsmasq's complaint as an error, with the refused line."""
    complaint = stderr.decode(errors="replace").strip().split("\n")[-1]
    complaint = complaint.removeprefix("dnsmasq: ") or f"exit status {status}"
    place = PLACE.search(complaint)
    lines = configuration.split("\n")
    if place is None or not 0 < int(place[1]) <= len(lines):
        fact = f"network {quoted(network.name)}: dnsmasq refuses its configuration"
        return DnsmasqError(fact, f"{complaint}; {REMEDY}")
    return DnsmasqError(
        f"network {quoted(network.name)}: dnsmasq refuses {shown(lines[int(place[1]) - 1])}",
        f"{complaint[: place.start()]}; {REMEDY}",
    )


def _try(network: Network, configuration: str) -> None:
    """Start a dnsmasq where it has no clients, and end it."""
    with suppress(NatnsError, OSError):
        tidy()
    directory = RUN_DIRECTORY / f"{PREFIX}{os.urandom(16).hex()}"
    with locked(directory):
        text, pid = directory / "conf", directory / "pid"
        ours = f"pid-file={dnsmasq_files.paths(network.uuid).pid}"
        try:
            text.write_bytes(configuration.replace(ours, f"pid-file={pid}").encode())
            status, complaint = _run(text, network.bridge)
        finally:
            _remove(directory)
    if status:
        raise _refusal(network, configuration, complaint, status)


def tidy() -> list[str]:
    """End and remove the trials that a kill has left; return the changes, in words.

    A trial that goes on is left alone.  Raises DnsmasqError where a daemon does not end.
    """
    done = []
    for directory in RUN_DIRECTORY.glob(f"{PREFIX}*"):
        with suppress(LockError), locked(directory, 0.0):
            # A trial may have removed its directory since it was listed.
            if (directory / "conf").exists():
                done.append("removed a trial of dnsmasq that was killed")
            _remove(directory)
    return done


def _remove(directory: Path) -> None:
    """End a trial's daemon, and remove its directory.  The caller has locked the directory."""
    # The user's own options may name another pid file, so it need not be there.
    dnsmasq_process.end_all(processes.read_pid(directory / "pid"), directory / "conf")
    shutil.rmtree(directory, ignore_errors=True)


def _run(configuration: Path, bridge: str) -> tuple[int, bytes]:
    """Have a dnsmasq become a daemon in a new network namespace.

    Return its exit status and its complaint.
    """
    # Confined as every start: the trial must refuse options that the capabilities forbid.
    command = ["unshare", "--net", "--", *dnsmasq_process.confined_program()]
    # A daemon would keep the other end of a pipe open, and the read would never end.
    with tempfile.TemporaryFile() as complaint:
        try:
            done = subprocess.run(
                [*command, f"--conf-file={configuration}", *dnsmasq_process.lease_options()],
                env={"PATH": processes.PATH, "VIR_BRIDGE_NAME": bridge},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaint,
                cwd="/",
                timeout=START_LIMIT,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise DnsmasqError("cannot run a trial of dnsmasq", str(error)) from error
        complaint.seek(0)
        return done.returncode, complaint.read()
