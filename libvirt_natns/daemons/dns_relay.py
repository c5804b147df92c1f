# SPDX-License-Identifier: LGPL-2.1-or-later
"""The DNS relay: a dnsmasq in the host, which asks the host's resolvers for networks.

The dnsmasq of each namespace asks the relay on its transit bridge.  The relay asks as the
host's own programs do.  So a resolver may have a loopback address, a link-local address or
the address of a guest's gateway, and a stub may divide domains among servers.
dnsmasq reads /etc/resolv.conf again by itself when the file changes.

The relay keeps no answers: each network's dnsmasq has a cache of its own.  A relay that cannot
run leaves its complaint in a file.  Networks then ask the host's resolvers themselves.

The host's resolver may ask a network's DNS, which asks the relay again.  The loop ends by
itself.  dnsmasq does not ask again what it is asking already, and limits its questions.
"""

import os
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from libvirt_natns import names
from libvirt_natns.addresses import Address
from libvirt_natns.daemons import dns_probe, dnsmasq_process
from libvirt_natns.daemons.dnsmasq_process import START_LIMIT
from libvirt_natns.daemons.text_files import text_if_any
from libvirt_natns.errors import DnsmasqError, KernelError
from libvirt_natns.kernel import processes
from libvirt_natns.kernel.defer import Later, at_once
from libvirt_natns.kernel.locks import OURS, make_directory

RESOLV_CONF = Path("/etc/resolv.conf")

OWN_NAME = "relay.libvirt-natns.invalid"
"""A name that the relay knows itself, to be asked for whether the relay answers."""

QUESTIONS = 5000
"""Questions that may wait for an answer at once; each network's dnsmasq has 150 at most."""

PORTS = (32768, 60999)
"""The ports that the relay asks from, as the kernel's own choice is by default.

A port that a program of the host uses cannot be published at that moment.
"""

ANSWER_LIMIT = 2.0
"""Seconds in which a relay answers a namespace, its start included."""

AGAIN_LIMIT = 0.5
"""Seconds in which a relay that runs answers a namespace, on a busy machine, too."""

POLL = 0.01

CAPABILITIES = ("net_bind_service", "setuid", "setgid", "setpcap", "chown", "dac_override")
"""The needs of dnsmasq until it changes its user; the process that serves keeps the first."""


@dataclass(frozen=True, slots=True)
class Relay:
    """The relay on a transit bridge, with the bridge's own addresses."""

    bridge: str
    addresses: tuple[Address, ...]
    port: int


@dataclass(frozen=True, slots=True)
class RelayFiles:
    """The files of a relay; ``complaint`` says why the relay does not serve."""

    configuration: Path
    pid: Path
    starting: Path
    complaint: Path


def paths(bridge: str) -> RelayFiles:
    """Return the files of the relay on a bridge."""
    directory = names.relay_directory(bridge)
    return RelayFiles(
        *(directory / name for name in ("dnsmasq.conf", "pid", "starting", "complaint"))
    )


def present() -> list[str]:
    """Return the bridges that have a relay, or files of a relay."""
    directories = names.RUN_DIRECTORY.glob(f"{names.RELAY_PREFIX}*")
    return sorted(each.name.removeprefix(names.RELAY_PREFIX) for each in directories)


def complaint(bridge: str) -> str:
    """Return why the relay on a bridge does not serve; "" if it does."""
    return text_if_any(paths(bridge).complaint).strip()


def differences(relay: Relay) -> list[str]:
    """Return, in words, each difference of a relay; none where all is well.

    A relay with a complaint is no difference: no repair helps until the reason is gone.
    """
    if complaint(relay.bridge):
        return []
    if running(relay.bridge) is None:
        return [f"the DNS relay on {relay.bridge} is not running"]
    if text_if_any(paths(relay.bridge).configuration) != configuration(relay):
        return [f"the DNS relay on {relay.bridge} runs with an outdated configuration"]
    return []


def configuration(relay: Relay) -> str:
    """Return the configuration of a relay, with the place of the host's resolvers today."""
    lines = [
        "strict-order",
        f"port={relay.port}",
        "bind-interfaces",
        "except-interface=lo",
        *(f"listen-address={address}" for address in relay.addresses),
        "no-hosts",
        "cache-size=0",
        f"dns-forward-max={QUESTIONS}",
        f"min-port={PORTS[0]}",
        f"max-port={PORTS[1]}",
        f"address=/{OWN_NAME}/{relay.addresses[0]}",
        *source(),
        f"pid-file={paths(relay.bridge).pid}",
    ]
    return "\n".join([*lines, ""])


def source() -> tuple[str, ...]:
    """Return the lines that name the file with the host's resolvers.

    dnsmasq watches the directory that the file is in at the relay's start.  A link that
    leads elsewhere by now needs another start, so the comment names the file.
    """
    real = Path(os.path.realpath(RESOLV_CONF))
    if not real.parent.is_dir():
        # dnsmasq does not start without the directory.
        return (f"# {real}: no such directory", "no-resolv")
    return (f"# {real}", f"resolv-file={RESOLV_CONF}")


# -- starting ----------------------------------------------------------------


def running(bridge: str) -> int | None:
    """Return the process id of the relay on a bridge that runs, or is about to."""
    files = paths(bridge)
    word = dnsmasq_process.option(files.configuration)
    # In this order: when the starting process has ended, the daemon is there.
    for file in (files.starting, files.pid):
        pid = processes.from_pid_file(file, word)
        if pid is not None and processes.lives_in(pid, None):
            return pid
    return None


def ensure(relay: Relay, later: Later = at_once) -> None:
    """Run the relay with today's configuration; ``later`` waits for its start.

    Raises OSError.  A relay that will not run leaves a complaint.  ``later`` reports it.
    """
    if not differences(relay):
        return
    files = paths(relay.bridge)
    _end(relay.bridge)
    make_directory(files.pid.parent)
    files.pid.parent.chmod(OURS)
    files.configuration.write_text(configuration(relay))
    files.complaint.unlink(missing_ok=True)
    try:
        _start(relay.bridge, later)
    except OSError as error:
        complain(relay.bridge, str(error))
    except DnsmasqError as error:
        # A network starts without a relay, too.
        if not complaint(relay.bridge):
            complain(relay.bridge, str(error))


def _start(bridge: str, later: Later) -> None:
    files = paths(bridge)
    # A daemon would keep the other end of a pipe open, and the read would never end.
    said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 _await_daemon closes it
    process = subprocess.Popen(
        [
            *processes.confined(*CAPABILITIES),
            dnsmasq_process.program(),
            dnsmasq_process.option(files.configuration),
        ],
        env={"PATH": processes.PATH},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=said,
        cwd="/",
        start_new_session=True,
    )
    files.starting.write_text(str(process.pid))
    later(partial(_await_daemon, bridge, process, said))


def _await_daemon(bridge: str, process: subprocess.Popen[bytes], said: IO[str]) -> None:
    """Wait until the relay serves.  Raises DnsmasqError with its complaint if it will not."""
    with said:
        descriptor = os.pidfd_open(process.pid)
        try:
            # Popen.wait would sleep for up to 50 ms at a time.
            if not processes.has_ended(descriptor, time.monotonic() + START_LIMIT):
                process.kill()
        finally:
            os.close(descriptor)
        # The relay may have been ended already, with its last network.
        if process.wait() != 0 and paths(bridge).configuration.exists():
            said.seek(0)
            why = said.read().strip().split("\n")[-1].removeprefix("dnsmasq: ")
            raise complain(bridge, why or "dnsmasq ended at its start")


def complain(bridge: str, why: str) -> DnsmasqError:
    """Note why a relay does not serve, and return that as an error."""
    # The relay may have been ended in the meantime, with its directory.
    with suppress(FileNotFoundError):
        paths(bridge).complaint.write_text(f"{why}\n")
    return DnsmasqError(f"the DNS relay on {bridge} does not serve", why)


# -- asking ------------------------------------------------------------------


def confirm(relay: Relay, namespace: str, limit: float = ANSWER_LIMIT) -> None:
    """Ask the relay from a namespace on its bridge, and note a complaint without an answer.

    ``relay`` has the address that the namespace asks first.  A relay that starts has ``limit``
    seconds.  A relay that has ended is found by others.
    Raises DnsmasqError with the complaint.
    """
    # The namespace may end at any time.
    with suppress(KernelError):
        if complaint(relay.bridge) or is_heard(relay, namespace, limit):
            return
        if running(relay.bridge) is not None:
            raise complain(relay.bridge, unheard(relay))


def is_heard(relay: Relay, namespace: str, limit: float) -> bool:
    """True if the relay answers a namespace within ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while (left := deadline - time.monotonic()) > 0:
        outcome = dns_probe.ask(relay.addresses[0], relay.port, OWN_NAME, left, namespace)
        if outcome == "answers":
            return True
        # A relay that starts does not listen yet.
        time.sleep(POLL)
    return False


def unheard(relay: Relay) -> str:
    """Return the complaint of a relay that namespaces cannot ask, with lines for each firewall."""
    asked = relay.addresses[0]
    iptables = "iptables" if asked.version == 4 else "ip6tables"
    return (
        f"{asked} does not answer networks: have the host's firewall let UDP and TCP"
        f" port {relay.port} in from {relay.bridge}"
        f' (nft: iifname "{relay.bridge}" th dport {relay.port} accept;'
        f" {iptables}: -I INPUT -i {relay.bridge} -p udp --dport {relay.port} -j ACCEPT,"
        " and the same with -p tcp;"
        f" ufw: allow in on {relay.bridge} to any port {relay.port};"
        f" firewalld: --add-port={relay.port}/udp --add-port={relay.port}/tcp in its zone)"
    )


def forgive(bridge: str) -> None:
    """Forget the complaint of a relay; missing is success."""
    paths(bridge).complaint.unlink(missing_ok=True)


# -- ending ------------------------------------------------------------------


def stop(bridge: str) -> None:
    """End the relay on a bridge and remove its files; missing is success.

    Raises DnsmasqError where the relay does not end.
    """
    _end(bridge)
    shutil.rmtree(names.relay_directory(bridge), ignore_errors=True)


def _end(bridge: str) -> None:
    files = paths(bridge)
    if files.configuration.exists():
        # A start that was killed leaves a process without a pid file.
        dnsmasq_process.end_all(running(bridge), files.configuration)
