# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dnsmasq inside a namespace: its process and the files that it reads.

What is in the files is ``dnsmasq_config``'s.  libvirt's hosts files are copied,
so what our dnsmasq has read is known, and a missed update shows.

Leases go to libvirt's own helper, so ``virsh net-dhcp-leases`` shows them.
libvirt's own dnsmasq serves nobody any more, but it has read the leases there
were when it started, and would have the helper delete each of them at the time
it then was to end, renewed or not.  So its helper process is ended; it does
without.

A dnsmasq takes 20 ms and more until it serves, most of it in libvirt's helper.
Whoever does not wait for that leaves a note of the process that is starting:
until it is over, that one counts as the network's dnsmasq.
"""

import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import IO

from libvirt_natns import names
from libvirt_natns.daemons import dnsmasq_config
from libvirt_natns.daemons.dnsmasq_config import Files
from libvirt_natns.errors import DnsmasqError
from libvirt_natns.kernel import netns, processes
from libvirt_natns.kernel.defer import Later, at_once
from libvirt_natns.kernel.locks import OURS, make_directory
from libvirt_natns.records import dataclass

LIBVIRT_DIRECTORY = Path("/var/lib/libvirt/dnsmasq")
LIBVIRT_RUN_DIRECTORY = Path("/run/libvirt/network")
HELPERS = tuple(
    Path(directory, "libvirt_leaseshelper")
    for directory in ("/usr/lib/libvirt", "/usr/libexec", "/usr/lib64/libvirt")
)
CAPABILITIES = (
    "net_admin", "net_raw", "net_bind_service", "setuid", "setgid", "setpcap", "chown",
    "dac_override",
)  # fmt: skip
"""What dnsmasq needs until it is another user, and libvirt's lease helper, which stays root.

The process that reads packets has the first three.
"""

START_LIMIT = 20.0
STOP_LIMIT = 3.0
POLL = 0.001
"""Seconds between two looks at a dnsmasq that starts."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """One dnsmasq: where it runs and what it reads; with ``files`` None, none must run.

    ``bridge`` is the name of the interface that it serves, which libvirt's
    lease helper takes for the name of its own file.
    """

    uuid: str
    namespace: str
    bridge: str
    files: Files | None


def libvirt_file(network: str, suffix: str) -> Path:
    """A file that libvirt writes for its own dnsmasq of a network."""
    return LIBVIRT_DIRECTORY / f"{network}.{suffix}"


def read_libvirts(network: str) -> Files:
    """What libvirt has written for its own dnsmasq.

    Raises DnsmasqError where it has not.
    """
    path = libvirt_file(network, "conf")
    try:
        configuration = _exactly(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DnsmasqError(
            f"cannot read libvirt's dnsmasq configuration {path}", _reason(error)
        ) from error
    # Neither of them is there where the network has no use for it.
    hosts, records = (_read(libvirt_file(network, name)) for name in ("hostsfile", "addnhosts"))
    return Files(configuration, hosts or "", records or "")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


# -- process -----------------------------------------------------------------


def program() -> str:
    """Where dnsmasq is.  Raises DnsmasqError where it is not installed."""
    found = processes.program("dnsmasq")
    if not found:
        raise DnsmasqError("dnsmasq is not installed", "install the package dnsmasq-base")
    return found


def confined_program() -> list[str]:
    """Return dnsmasq as every start runs it, without options.  Raises DnsmasqError."""
    # AppArmor's usr.sbin.dnsmasq runs libvirt's lease helper in a child profile (Cx).  The
    # kernel allows a process with no_new_privs no transition to a profile that is not a
    # subset of its own, so dnsmasq would give no lease.
    return [*processes.confined(*CAPABILITIES, no_new_privs=False), program()]


def differences(daemon: Daemon) -> list[str]:
    """What is wrong with a dnsmasq, in words; nothing where all is well."""
    alive = running(daemon.uuid, daemon.namespace) is not None
    if daemon.files is None:
        return [f"dnsmasq of {daemon.namespace} runs for no reason"] if alive else []
    if not alive:
        return [f"dnsmasq of {daemon.namespace} is not running"]
    present = _present(daemon.uuid)
    if present.configuration != daemon.files.configuration:
        return [f"dnsmasq of {daemon.namespace} runs with an outdated configuration"]
    if present != daemon.files:
        return [f"dnsmasq of {daemon.namespace} runs with outdated hosts"]
    return []


def _present(uuid: str) -> Files:
    """What a network's dnsmasq has been given to read."""
    files = dnsmasq_config.paths(uuid)
    return Files(*(_read(path) or "" for path in (files.configuration, files.hosts, files.records)))


def ensure(daemon: Daemon, later: Later = at_once) -> None:
    """Run dnsmasq with the wanted configuration: start, restart, reload, or leave alone.

    Raises DnsmasqError with dnsmasq's own complaint.  One that is started is
    waited for by ``later``.
    """
    if not differences(daemon):
        return
    # It would take a signal to read its hosts again for its end.
    _settle(daemon.uuid, START_LIMIT)
    files = daemon.files
    pid = running(daemon.uuid, daemon.namespace)
    if files and pid and _present(daemon.uuid).configuration == files.configuration:
        # Back only once dnsmasq was told: a kill in between must show.
        dnsmasq_config.paths(daemon.uuid).configuration.unlink()
        _write_hosts(daemon.uuid, files)
        _reload(pid)
        _write_configuration(daemon.uuid, files)
        return
    stop(daemon.uuid)
    if files:
        _write_hosts(daemon.uuid, files)
        _write_configuration(daemon.uuid, files)
        _start(daemon, later)


def _write_hosts(uuid: str, files: Files) -> None:
    to = dnsmasq_config.paths(uuid)
    make_directory(to.pid.parent)
    # dnsmasq reads the hosts again after it has dropped its privileges.
    for directory in (to.pid.parent, *to.pid.parent.parents[:2]):
        directory.chmod(OURS)
    for path, text in ((to.hosts, files.hosts), (to.records, files.records)):
        path.write_bytes(text.encode())
        path.chmod(0o644)


def _write_configuration(uuid: str, files: Files) -> None:
    dnsmasq_config.paths(uuid).configuration.write_bytes(files.configuration.encode())


def _start(daemon: Daemon, later: Later) -> None:
    # A file, not a pipe: a daemon that kept the pipe open would never end us.
    complaint = tempfile.TemporaryFile("w+")  # noqa: SIM115 it goes with who waits
    command = [
        *confined_program(),
        f"--conf-file={dnsmasq_config.paths(daemon.uuid).configuration}",
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
                # Until it is a daemon, what ends us must not end it.
                start_new_session=True,
            )
    except OSError as error:
        complaint.close()
        raise DnsmasqError(f"cannot start dnsmasq in {daemon.namespace}", str(error)) from error
    _note(daemon.uuid).write_text(str(process.pid))
    later(partial(_await_daemon, daemon.namespace, process, complaint))


def _await_daemon(namespace: str, process: subprocess.Popen[bytes], complaint: IO[str]) -> None:
    """Wait until dnsmasq serves.  Raises DnsmasqError with its complaint if it will not."""
    with complaint:
        descriptor = os.pidfd_open(process.pid)
        try:
            # Popen.wait would sleep for up to 50 ms at a time.
            if not _ended(descriptor, time.monotonic() + START_LIMIT):
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
    while (pid := _starting(uuid)) is not None and not _children(pid):
        if time.monotonic() >= deadline:
            break
        time.sleep(POLL)
    if running(uuid, namespace) is None and _note(uuid).exists():
        raise DnsmasqError(
            f"dnsmasq of {namespace} has ended as it started", "see the system log for the reason"
        )


def _note(uuid: str) -> Path:
    """Where the process is noted that becomes, or became, a network's dnsmasq."""
    return dnsmasq_config.paths(uuid).pid.with_suffix(".starting")


def _starting(uuid: str) -> int | None:
    """The process that is about to become a network's dnsmasq."""
    pid = _read_pid(_note(uuid))
    return pid if pid and _has_read(pid, dnsmasq_config.paths(uuid).configuration) else None


def _settle(uuid: str, limit: float) -> None:
    """Wait, for at most ``limit`` seconds, until a start is over, whoever began it."""
    pid = _starting(uuid)
    descriptor = _opened(pid, dnsmasq_config.paths(uuid).configuration) if pid else None
    if descriptor is not None:
        try:
            _ended(descriptor, time.monotonic() + limit)
        finally:
            os.close(descriptor)


def lease_options() -> list[str]:
    """The options that leave leases to libvirt's helper; none where it is missing."""
    helper = next((each for each in HELPERS if os.access(each, os.X_OK)), None)
    return [] if helper is None else ["--leasefile-ro", f"--dhcp-script={helper}"]


def _leases(daemon: Daemon) -> list[str]:
    options = lease_options()
    if options:
        # The helper's files go there.  libvirt itself makes it with its first dnsmasq.
        LIBVIRT_DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
        return options
    # Without libvirt's helper, virsh does not see the leases; guests do not care.
    directory = names.STATE_DIRECTORY / "leases"
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    return [f"--dhcp-leasefile={directory / daemon.uuid}"]


def _reload(pid: int) -> None:
    """Have dnsmasq read its hosts files again; it keeps its leases and its sockets."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGHUP)


def running(uuid: str, namespace: str) -> int | None:
    """The process id of a network's dnsmasq, if it runs in that namespace, or is about to."""
    # In this order: when the one that starts has gone, the other is there.
    for found in (_starting, _pid):
        pid = found(uuid)
        if pid is not None and _lives_in(pid, namespace):
            return pid
    return None


def _lives_in(pid: int, namespace: str) -> bool:
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino == netns.inode(namespace)
    except OSError:
        return False


def stop(uuid: str, *, search: bool = True) -> None:
    """End a network's dnsmasq and its lease helper; missing is success.

    Without ``search``, one of which not even a file is left is not looked for
    among all processes.
    """
    files = dnsmasq_config.paths(uuid)
    _settle(uuid, STOP_LIMIT)
    pid = _pid(uuid)
    if pid is not None:
        end([pid, *_children(pid)], files.configuration)
    elif search or files.configuration.exists():
        # The strays of a start that was killed.
        end(_processes(), files.configuration)
    for path in (files.pid, _note(uuid), files.configuration, files.hosts, files.records):
        path.unlink(missing_ok=True)


def end_all(pid: int | None, configuration: Path) -> None:
    """End a dnsmasq with that configuration, and its lease helper.

    It is looked for among all processes where ``pid`` is not its process id.
    """
    if pid is not None and _has_read(pid, configuration):
        end([pid, *_children(pid)], configuration)
    else:
        end(_processes(), configuration)


def stop_libvirts(network: str, *, search: bool = False) -> None:
    """End libvirt's own dnsmasq of a network that is not active in libvirt.

    ``search``: also one without a pid file, which it writes after libvirt has run it.
    """
    configuration = libvirt_file(network, "conf")
    pid = _read_pid(LIBVIRT_RUN_DIRECTORY / f"{network}.pid")
    found = [] if pid is None else [pid, *_children(pid)]
    if search:
        found += [pid for pid in _processes() if _has_read(pid, configuration) and _is_here(pid)]
    if found:
        end(set(found), configuration)


def _is_here(pid: int) -> bool:
    """Whether a process is the host's own: a container's libvirt may have such a network."""
    with suppress(OSError):
        return all(
            Path(f"/proc/{pid}/ns/{kind}").samefile(f"/proc/self/ns/{kind}")
            for kind in ("net", "pid")
        )
    return False


def idle_differences(network: str) -> list[str]:
    """Whether libvirt's own dnsmasq of a network could still delete leases, in words."""
    if _libvirts_helpers(network):
        return [f"libvirt's own dnsmasq of network {network} still writes leases"]
    return []


def idle_libvirts(network: str) -> None:
    """End the lease helper of libvirt's own dnsmasq, which goes on without it."""
    # The helper ignores SIGTERM, so as to report what dnsmasq does on its own.
    end(_libvirts_helpers(network), libvirt_file(network, "conf"), (signal.SIGKILL,))


def _libvirts_helpers(network: str) -> list[int]:
    pid = _read_pid(LIBVIRT_RUN_DIRECTORY / f"{network}.pid")
    if pid is None or not _has_read(pid, libvirt_file(network, "conf")):
        return []
    return _children(pid)


def _pid(uuid: str) -> int | None:
    """The pid that the pid file names, if that process is this network's dnsmasq."""
    files = dnsmasq_config.paths(uuid)
    pid = _read_pid(files.pid)
    return pid if pid is not None and _has_read(pid, files.configuration) else None


def _has_read(pid: int, configuration: Path) -> bool:
    """Whether a process is a dnsmasq with that configuration, or its lease helper."""
    return f"--conf-file={configuration}" in processes.command(pid)


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def end(
    pids: Iterable[int],
    configuration: Path,
    signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGKILL),
) -> None:
    """End those of the processes that are a dnsmasq with that configuration."""
    with ExitStack() as stack:
        ending = []
        for pid in pids:
            descriptor = _opened(pid, configuration)
            if descriptor is not None:
                stack.callback(os.close, descriptor)
                ending.append(descriptor)
        for number in signals:
            if _signal_and_wait(ending, number, STOP_LIMIT):
                return
    raise DnsmasqError(f"dnsmasq with {configuration} does not end", "end it by hand")


def _opened(pid: int, configuration: Path) -> int | None:
    """A descriptor of that dnsmasq: from here on, its pid cannot be another's."""
    if not _has_read(pid, configuration):
        return None
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if _has_read(pid, configuration):
        return descriptor
    os.close(descriptor)
    return None


def _signal_and_wait(descriptors: list[int], number: signal.Signals, limit: float) -> bool:
    for descriptor in descriptors:
        try:
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + limit
    return all(_ended(descriptor, deadline) for descriptor in descriptors)


def _ended(descriptor: int, deadline: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _read(path: Path) -> str | None:
    try:
        return _exactly(path)
    except (OSError, UnicodeDecodeError):
        return None


def _exactly(path: Path) -> str:
    """Return a file's text with each of its characters.

    Reading as text would turn CR into a line's end, which it is not to dnsmasq.
    """
    return path.read_bytes().decode()


def _read_pid(path: Path) -> int | None:
    text = (_read(path) or "").strip()
    return int(text) if text.isdigit() and int(text) > 1 else None


def _children(pid: int) -> list[int]:
    text = _read(Path(f"/proc/{pid}/task/{pid}/children")) or ""
    return [int(word) for word in text.split()]
