# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's own dnsmasq of a network: the files that it reads, its process, its lease helper.

libvirt's own dnsmasq serves no guest once ours runs.  It still holds the leases that it
read when it started.  When they expire there, its helper would delete the leases that our
dnsmasq has renewed.  So the helper process is ended, and dnsmasq goes on without it.
"""

from contextlib import suppress
from pathlib import Path

from libvirt_natns.daemons import dnsmasq_process
from libvirt_natns.daemons.dnsmasq_files import Files
from libvirt_natns.daemons.text_files import exact_text, text_if_any
from libvirt_natns.errors import DnsmasqError
from libvirt_natns.kernel import processes

LIBVIRT_DIRECTORY = Path("/var/lib/libvirt/dnsmasq")
LIBVIRT_RUN_DIRECTORY = Path("/run/libvirt/network")


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
        return [f"libvirt's own dnsmasq of network {network} still writes leases"]
    return []


def idle(network: str) -> None:
    """End the lease helper of libvirt's own dnsmasq, which goes on without it."""
    # The helper ignores SIGTERM, so that it can report what dnsmasq does at its end.
    dnsmasq_process.end(_helpers(network), path(network, "conf"), processes.AT_ONCE)


def _helpers(network: str) -> list[int]:
    """Return the lease helper of libvirt's own dnsmasq, if that dnsmasq runs with one."""
    word = dnsmasq_process.option(path(network, "conf"))
    pid = processes.from_pid_file(_pid_file(network), word)
    return [] if pid is None else processes.children(pid)


def _pid_file(network: str) -> Path:
    return LIBVIRT_RUN_DIRECTORY / f"{network}.pid"
