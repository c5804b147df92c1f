# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's own dnsmasq of a network: the files that it reads, its process, its lease helper.

libvirt's own dnsmasq serves no guest once ours runs.  It still holds the leases that it
read when it started.  When they expire there, its helper would delete the leases that our
dnsmasq has renewed.  So the helper process is ended, and dnsmasq goes on without it.
"""

import subprocess
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from libvirt_natns.addresses import Address
from libvirt_natns.daemons import dnsmasq_process
from libvirt_natns.daemons.dnsmasq_files import Files
from libvirt_natns.daemons.text_files import exact_text, text_if_any
from libvirt_natns.errors import DnsmasqError
from libvirt_natns.kernel import listening_ports, open_files, processes
from libvirt_natns.values import quoted

LIBVIRT_DIRECTORY = Path("/var/lib/libvirt/dnsmasq")
LIBVIRT_RUN_DIRECTORY = Path("/run/libvirt/network")

DNS = 53
CLOSING_LIMIT = 5.0
"""Seconds that dnsmasq may take to close the sockets of an address that is gone."""
CLOSING_POLL = 0.005


def path(network: str, suffix: str) -> Path:
    """Return the path of a file that libvirt writes for its own dnsmasq of a network."""
    return LIBVIRT_DIRECTORY / f"{network}.{suffix}"


def read(network: str) -> Files:
    """Return the files that libvirt has written for its own dnsmasq.

    Raises DnsmasqError without a readable configuration.
    """
    file = path(network, "conf")
    try:
        configuration = exact_text(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DnsmasqError(f"cannot read libvirt's dnsmasq configuration {file}", reason) from error
    # libvirt writes each of these files only for a network that has use for it.
    hosts, records = (text_if_any(path(network, name)) for name in ("hostsfile", "addnhosts"))
    return Files(configuration, hosts, records)


def stop(network: str, *, search: bool = False) -> None:
    """End libvirt's own dnsmasq of a network that is not active in libvirt.

    With ``search``, also end a process without a pid file.  dnsmasq writes the pid file
    after libvirt has started it.
    """
    configuration = path(network, "conf")
    pid = processes.read_pid(_pid_file(network))
    pids = set() if pid is None else {pid, *processes.children(pid)}
    if search:
        others = processes.with_word(dnsmasq_process.option(configuration))
        pids.update(other for other in others if _is_here(other))
    if pids:
        dnsmasq_process.end(pids, configuration)


def _is_here(pid: int) -> bool:
    """True if a process is the host's own: a container's libvirt may have such a network."""
    with suppress(OSError):
        return all(
            Path(f"/proc/{pid}/ns/{kind}").samefile(f"/proc/self/ns/{kind}")
            for kind in ("net", "pid")
        )
    return False


def idle_differences(network: str) -> list[str]:
    """Return, in words, whether libvirt's own dnsmasq of a network could still delete leases."""
    if _helpers(network):
        return [f"libvirt's own dnsmasq of network {quoted(network)} still writes leases"]
    return []


def idle(network: str) -> None:
    """End the lease helper of libvirt's own dnsmasq, which goes on without it."""
    # The helper ignores SIGTERM, so that it can report what dnsmasq does at its end.
    dnsmasq_process.end(_helpers(network), path(network, "conf"), processes.AT_ONCE)


def bound_differences(network: str) -> list[str]:
    """Return, in words, whether libvirt's own dnsmasq of a network could open another socket."""
    pid = _running(network)
    limits = None if pid is None else _limits(pid)
    limit = None if pid is None else _closing_limit(pid)
    if limits is None or limit is None or limits[0] <= limit:
        return []
    return [f"libvirt's own dnsmasq of network {quoted(network)} still listens on new addresses"]


def bind(network: str, addresses: Collection[Address]) -> None:
    """Keep libvirt's own dnsmasq of a network from opening sockets.

    By ``listen-address``, that dnsmasq listens on an address as soon as any bridge has it.
    libvirt could then start no other dnsmasq there.  libvirt signals the process by its
    number, so the process must not end.  First it must close its sockets at ``addresses``,
    for which it needs another socket for a moment.  A dnsmasq that serves clients elsewhere
    is left alone.  Raises DnsmasqError.
    """
    if _running(network) is None:
        return
    deadline = time.monotonic() + CLOSING_LIMIT
    while _listens(addresses) and time.monotonic() < deadline:
        time.sleep(CLOSING_POLL)
    pid = _running(network)
    limit = None if pid is None else _closing_limit(pid)
    if pid is not None and limit is not None:
        _set_descriptors(network, pid, limit)


def unbind(network: str) -> None:
    """Let libvirt's own dnsmasq of a network open sockets again.  Raises DnsmasqError."""
    pid = _running(network)
    limits = None if pid is None else _limits(pid)
    if pid is not None and limits and limits[0] <= max(processes.descriptors(pid), default=0) + 1:
        _set_descriptors(network, pid, limits[1])


def _closing_limit(pid: int) -> int | None:
    """Return the limit by which a dnsmasq opens no other file; None if it needs more files.

    It serves clients elsewhere, or waits for more files than the limit.  The bridge's link-local
    address stays, and leads to no client by now.
    """
    tcp = listening_ports.of_process(pid, "tcp")
    if any(not address.is_link_local for address, _ in tcp):
        return None
    return open_files.closing_limit(pid)


def _listens(addresses: Collection[Address]) -> bool:
    """True if a program of the host listens for DNS at an address."""
    found = (address for address, port in listening_ports.listeners("tcp") if port == DNS)
    return any(address in addresses for address in found)


def _set_descriptors(network: str, pid: int, limit: int) -> None:
    """Limit the files that dnsmasq may open."""
    limits = _limits(pid)
    if limits is None:
        return
    most = limits[1]
    try:
        # As dnsmasq's own user: CAP_SYS_RESOURCE would be needed otherwise.
        user, group = (_ids(pid, name) for name in ("Uid", "Gid"))
        done = subprocess.run(
            ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--",
             "prlimit", f"--pid={pid}", f"--nofile={limit}:{most}"],
            env={"PATH": processes.PATH}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, timeout=CLOSING_LIMIT, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise _unlimited(network, str(error)) from error
    if done.returncode and _running(network) == pid:
        raise _unlimited(network, done.stderr.decode(errors="replace").strip())


def _unlimited(network: str, why: str) -> DnsmasqError:
    return DnsmasqError(f"cannot limit libvirt's own dnsmasq of network {quoted(network)}", why)


def _ids(pid: int, name: str) -> str:
    """Return the real id of a process's user or group.  Raises OSError."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:"))


def _limits(pid: int) -> tuple[int, int] | None:
    """Return how many files a process may open, and may let itself open; None if it has ended."""
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
            if line.startswith("Max open files"):
                soft, most, *_ = map(int, line.removeprefix("Max open files").split()[:2])
                return soft, most
    return None


def _running(network: str) -> int | None:
    word = dnsmasq_process.option(path(network, "conf"))
    return processes.from_pid_file(_pid_file(network), word)


def _helpers(network: str) -> list[int]:
    """Return the lease helper of libvirt's own dnsmasq, if that dnsmasq runs with one."""
    pid = _running(network)
    return [] if pid is None else processes.children(pid)


def _pid_file(network: str) -> Path:
    return LIBVIRT_RUN_DIRECTORY / f"{network}.pid"
