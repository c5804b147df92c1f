# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dnsmasq inside a namespace: when it runs, and with which files.

``dnsmasq_config`` makes the text of its configuration.  libvirt's hosts files are copied.
So the files show what our dnsmasq has read, and a missed update shows as a difference.

A dnsmasq takes 20 ms and more until it serves, most of it in libvirt's lease helper.
A caller that does not wait for it leaves a note with the id of the starting process.
Until the start is over, the starting process counts as the network's dnsmasq.
"""

import os
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from libvirt_natns import names
from libvirt_natns.daemons import dnsmasq_files, dnsmasq_process
from libvirt_natns.daemons.dnsmasq_files import Files
from libvirt_natns.daemons.dnsmasq_process import START_LIMIT, STOP_LIMIT
from libvirt_natns.daemons.libvirt_dnsmasq import LIBVIRT_DIRECTORY
from libvirt_natns.errors import DnsmasqError
from libvirt_natns.kernel import netns, processes
from libvirt_natns.kernel.defer import Later, at_once
from libvirt_natns.kernel.locks import OURS, make_directory

POLL = 0.001
"""Seconds between two looks at a dnsmasq that starts."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """A dnsmasq: its namespace and its files; with ``files`` None, it must not run.

    ``bridge`` is the name of the interface that it serves.  libvirt's lease helper names
    its own file after this interface.
    """

    uuid: str
    namespace: str
    bridge: str
    files: Files | None


def differences(daemon: Daemon) -> list[str]:
    """Return, in words, each difference of a dnsmasq; none where all is well."""
    alive = running(daemon.uuid, daemon.namespace) is not None
    if daemon.files is None:
        return [f"dnsmasq of {daemon.namespace} should not run"] if alive else []
    if not alive:
        return [f"dnsmasq of {daemon.namespace} is not running"]
    present = dnsmasq_files.present(daemon.uuid)
    if present.configuration != daemon.files.configuration:
        return [f"dnsmasq of {daemon.namespace} runs with an outdated configuration"]
    if present != daemon.files:
        return [f"dnsmasq of {daemon.namespace} runs with outdated hosts"]
    return []


def ensure(daemon: Daemon, later: Later = at_once) -> None:
    """Run dnsmasq with the wanted configuration: start, restart, reload, or leave alone.

    ``later`` waits for a dnsmasq that is started.  Raises DnsmasqError with dnsmasq's own
    complaint.
    """
    if not differences(daemon):
        return
    # A dnsmasq that starts would be ended by the signal to read its hosts again.
    _settle(daemon.uuid, START_LIMIT)
    files = daemon.files
    pid = running(daemon.uuid, daemon.namespace)
    configuration = dnsmasq_files.paths(daemon.uuid).configuration
    if files and pid and dnsmasq_files.present(daemon.uuid).configuration == files.configuration:
        # The configuration file returns only after the reload: a kill in between must show.
        configuration.unlink()
        _write_hosts(daemon.uuid, files)
        reload_hosts(pid)
        configuration.write_bytes(files.configuration.encode())
        return
    stop(daemon.uuid)
    if files:
        _write_hosts(daemon.uuid, files)
        configuration.write_bytes(files.configuration.encode())
        start_process(daemon, later)


def _write_hosts(uuid: str, files: Files) -> None:
    to = dnsmasq_files.paths(uuid)
    make_directory(to.pid.parent)
    # dnsmasq reads the hosts again after it has dropped its privileges.
    for directory in (to.pid.parent, *to.pid.parent.parents[:2]):
        directory.chmod(OURS)
    for path, text in ((to.hosts, files.hosts), (to.records, files.records)):
        path.write_bytes(text.encode())
        path.chmod(0o644)


def reload_hosts(pid: int) -> None:
    """Have dnsmasq read its hosts files again; it keeps its leases and its sockets."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGHUP)


# -- starting ----------------------------------------------------------------


def start_process(daemon: Daemon, later: Later) -> None:
    """Start dnsmasq, and note its process.  Raises DnsmasqError."""
    # A daemon would keep the other end of a pipe open, and the read would never end.
    complaint = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 _await_daemon closes it
    command = [
        *dnsmasq_process.confined_program(),
        dnsmasq_process.option(dnsmasq_files.paths(daemon.uuid).configuration),
        *_leases(daemon),
    ]
    try:
        with netns.entered(daemon.namespace):
            process = subprocess.Popen(
                command,
                env={"PATH": processes.PATH, "VIR_BRIDGE_NAME": daemon.bridge},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaint,
                cwd="/",
                # Until dnsmasq is a daemon, a signal to our session must not end it.
                start_new_session=True,
            )
    except OSError as error:
        complaint.close()
        raise DnsmasqError(f"cannot start dnsmasq in {daemon.namespace}", str(error)) from error
    start_note(daemon.uuid).write_text(str(process.pid))
    later(partial(_await_daemon, daemon.namespace, process, complaint))


def _leases(daemon: Daemon) -> list[str]:
    options = dnsmasq_process.lease_options()
    if options:
        # libvirt makes the directory of the helper's files only with its first dnsmasq.
        LIBVIRT_DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
        return options
    # Without libvirt's helper, virsh does not see the leases; guests notice no difference.
    file = lease_file(daemon.uuid)
    file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    return [f"--dhcp-leasefile={file}"]


def lease_file(uuid: str) -> Path:
    """Return the file of the guests' leases on a host without libvirt's lease helper."""
    return names.STATE_DIRECTORY / "leases" / uuid


def forget_leases(uuid: str) -> None:
    """Remove the file of the leases of a network that has ended; missing is success."""
    file = lease_file(uuid)
    with suppress(OSError):
        file.unlink()
        file.parent.rmdir()


def _await_daemon(namespace: str, process: subprocess.Popen[bytes], complaint: IO[str]) -> None:
    """Wait until dnsmasq serves.  Raises DnsmasqError with its complaint if it will not."""
    with complaint:
        descriptor = os.pidfd_open(process.pid)
        try:
            # Popen.wait would sleep for up to 50 ms at a time.
            if not processes.has_ended(descriptor, time.monotonic() + START_LIMIT):
                process.kill()
        finally:
            os.close(descriptor)
        status = process.wait()
        if status != 0:
            complaint.seek(0)
            said = complaint.read().strip() or f"exit status {status}"
            raise DnsmasqError(f"dnsmasq refuses to start in {namespace}", said.split("\n")[-1])


def check_started(uuid: str, namespace: str) -> None:
    """Wait until a network's dnsmasq has read its configuration and opened its sockets.

    It then runs libvirt's lease helper, or is a daemon already.  Raises DnsmasqError
    where it has ended instead; returns at once where it is missing altogether.
    """
    deadline = time.monotonic() + START_LIMIT
    while (pid := _starting(uuid)) is not None and not processes.children(pid):
        if time.monotonic() >= deadline:
            break
        time.sleep(POLL)
    if running(uuid, namespace) is None and start_note(uuid).exists():
        raise DnsmasqError(
            f"dnsmasq of {namespace} ended at its start", "see the system log for the reason"
        )


def start_note(uuid: str) -> Path:
    """Return the file with the id of the process that becomes, or became, a network's dnsmasq."""
    return dnsmasq_files.paths(uuid).pid.with_suffix(".starting")


def _settle(uuid: str, limit: float) -> None:
    """Wait at most ``limit`` seconds until a start is over; another process may have begun it."""
    pid = _starting(uuid)
    word = dnsmasq_process.option(dnsmasq_files.paths(uuid).configuration)
    descriptor = processes.opened(pid, word) if pid else None
    if descriptor is not None:
        try:
            processes.has_ended(descriptor, time.monotonic() + limit)
        finally:
            os.close(descriptor)


# -- running and ending ------------------------------------------------------


def running(uuid: str, namespace: str) -> int | None:
    """Return the process id of a network's dnsmasq that runs in that namespace, or is about to."""
    # In this order: when the starting process has ended, the daemon is there.
    for find in (_starting, _pid):
        pid = find(uuid)
        if pid is not None and processes.lives_in(pid, namespace):
            return pid
    return None


def _starting(uuid: str) -> int | None:
    """Return the process that is about to become a network's dnsmasq."""
    word = dnsmasq_process.option(dnsmasq_files.paths(uuid).configuration)
    return processes.from_pid_file(start_note(uuid), word)


def _pid(uuid: str) -> int | None:
    """Return the process id in the pid file, if that process is this network's dnsmasq."""
    files = dnsmasq_files.paths(uuid)
    return processes.from_pid_file(files.pid, dnsmasq_process.option(files.configuration))


def stop(uuid: str, *, search: bool = True) -> None:
    """End a network's dnsmasq and its lease helper; missing is success.

    Without ``search``, do not search all processes where no file of the dnsmasq is left.
    """
    files = dnsmasq_files.paths(uuid)
    _settle(uuid, STOP_LIMIT)
    pid = _pid(uuid)
    if pid is not None:
        dnsmasq_process.end([pid, *processes.children(pid)], files.configuration)
    elif search or files.configuration.exists():
        # A start that was killed leaves processes without a pid file.
        dnsmasq_process.end_all(None, files.configuration)
    for path in (files.pid, start_note(uuid), files.configuration, files.hosts, files.records):
        path.unlink(missing_ok=True)
