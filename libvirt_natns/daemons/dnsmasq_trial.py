# SPDX-License-Identifier: LGPL-2.1-or-later
"""Try a configuration of ours on dnsmasq before a network starts.

libvirt's own dnsmasq has read what ours is derived from.  A network of ``<natns:ip>``
has none, so its configuration is given to ``dnsmasq --test``.  Some values of the
user's own ``<dnsmasq:options>`` are looked at by a dnsmasq that starts only (users,
directories, options that exclude each other): with such options, one is started on
trial, in a network namespace of its own without any link, and with the capabilities of
every other dnsmasq of ours.

Each trial locks its directory.  The kernel drops the lock with the process, so a directory
without a lock is one that a kill has left: the next trial removes it, and ends its daemon.

Limits: what is in the hosts files is not looked at; dnsmasq logs a bad line there and
goes on.  A trial reads and writes the files that the options name, as every start does.
"""

import os
import re
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from libvirt_natns.daemons import dnsmasq, dnsmasq_config
from libvirt_natns.daemons.dnsmasq import START_LIMIT
from libvirt_natns.daemons.resolv_conf import Resolvers
from libvirt_natns.errors import DnsmasqError, LockError, NatnsError
from libvirt_natns.kernel import processes
from libvirt_natns.kernel.locks import locked
from libvirt_natns.model.network import Network
from libvirt_natns.names import RUN_DIRECTORY
from libvirt_natns.values import shown

PLACE = re.compile(r" at line (\d+) of \S+$")
"""How dnsmasq names the line that it refuses."""

FOREGROUND = re.compile(r"\s*(keep-in-foreground|no-daemon|test|version|help)\s*$")
"""Options with which dnsmasq never becomes a daemon."""

REMEDY = "change what says so in the network's XML"

PREFIX = "trial-"
"""How the names of trials' directories begin, in the run-time directory."""


def check(network: Network) -> None:
    """Refuse a network whose dnsmasq would not start.  Raises DnsmasqError."""
    dnsmasq.program()
    if not network.writes_dnsmasq:
        return
    files = dnsmasq_config.make(network, None, Resolvers(), dnsmasq_config.LEAST_IPV6_MTU)
    _check_syntax(network, files.configuration)
    for option in network.dnsmasq_options:
        if FOREGROUND.match(option):
            raise DnsmasqError(
                f"network {network.name}: dnsmasq is no daemon with {shown(option)}", REMEDY
            )
    if network.dnsmasq_options:
        _try(network, files.configuration)


def _check_syntax(network: Network, configuration: str) -> None:
    try:
        done = subprocess.run(
            [dnsmasq.program(), "--test", "--conf-file=-", *dnsmasq.lease_options()],
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
    """dnsmasq's complaint, with the line that it is about."""
    complaint = stderr.decode(errors="replace").strip().split("\n")[-1]
    complaint = complaint.removeprefix("dnsmasq: ") or f"exit status {status}"
    place = PLACE.search(complaint)
    lines = configuration.split("\n")
    if place is None or not 0 < int(place[1]) <= len(lines):
        fact = f"network {network.name}: dnsmasq refuses its configuration"
        return DnsmasqError(fact, f"{complaint}; {REMEDY}")
    return DnsmasqError(
        f"network {network.name}: dnsmasq refuses {shown(lines[int(place[1]) - 1])}",
        f"{complaint[: place.start()]}; {REMEDY}",
    )


def _try(network: Network, configuration: str) -> None:
    """Start a dnsmasq where it has no clients, and end it."""
    with suppress(NatnsError, OSError):
        tidy()
    directory = RUN_DIRECTORY / f"{PREFIX}{os.urandom(16).hex()}"
    with locked(directory):
        text, pid = directory / "conf", directory / "pid"
        ours = f"pid-file={dnsmasq_config.paths(network.uuid).pid}"
        try:
            text.write_bytes(configuration.replace(ours, f"pid-file={pid}").encode())
            status, complaint = _run(text, network.bridge or "")
        finally:
            _remove(directory)
    if status:
        raise _refusal(network, configuration, complaint, status)


def tidy() -> list[str]:
    """End and remove the trials that a kill has left; returns what was done, in words.

    A trial that goes on is left alone.  Raises DnsmasqError where a daemon does not end.
    """
    done = []
    for directory in RUN_DIRECTORY.glob(f"{PREFIX}*"):
        with suppress(LockError), locked(directory, 0.0):
            # It may have ended and gone since it was listed.
            if (directory / "conf").exists():
                done.append("removed a trial of dnsmasq that was killed")
            _remove(directory)
    return done


def _remove(directory: Path) -> None:
    """End a trial's daemon, and remove its directory.  The directory is locked."""
    # The user's own options may name another pid file, so it need not be there.
    dnsmasq.end_all(processes.read_pid(directory / "pid"), directory / "conf")
    shutil.rmtree(directory, ignore_errors=True)


def _run(configuration: Path, bridge: str) -> tuple[int, bytes]:
    """Have a dnsmasq become a daemon in a new network namespace.

    Returns its exit status and its complaint.
    """
    # As every start of ours: what the capabilities do not permit is refused here, too.
    command = ["unshare", "--net", "--", *dnsmasq.confined_program()]
    # A file, not a pipe: a daemon that kept the pipe open would keep us waiting.
    with tempfile.TemporaryFile() as complaint:
        try:
            done = subprocess.run(
                [*command, f"--conf-file={configuration}", *dnsmasq.lease_options()],
                env={"PATH": processes.PATH, "VIR_BRIDGE_NAME": bridge},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaint,
                cwd="/",
                timeout=START_LIMIT,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise DnsmasqError("cannot try dnsmasq", str(error)) from error
        complaint.seek(0)
        return done.returncode, complaint.read()
