# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dnsmasq inside a namespace: its configuration and its process.

libvirt has already translated the whole network XML for its own dnsmasq into
/var/lib/libvirt/dnsmasq/NAME.conf.  That file is taken as it is, minus what
libvirt adds because the network is isolated, plus what a router needs.  Only
for a network addressed by ``<natns:ip>``, which libvirt runs no dnsmasq for,
is the configuration written here.

Leases go to libvirt's own helper, so ``virsh net-dhcp-leases`` shows them.
IPv6 ranges stay with libvirt's dnsmasq: a namespace has no IPv6 yet.
"""

import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv6Address
from pathlib import Path

from libvirt_natns import names, netns
from libvirt_natns.errors import DnsmasqError
from libvirt_natns.model import Network, Subnet
from libvirt_natns.resolvers import Resolvers

LIBVIRT_DIRECTORY = Path("/var/lib/libvirt/dnsmasq")
LIBVIRT_RUN_DIRECTORY = Path("/run/libvirt/network")
HELPERS = tuple(
    Path(directory, "libvirt_leaseshelper")
    for directory in ("/usr/lib/libvirt", "/usr/libexec", "/usr/lib64/libvirt")
)
BARE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
START_LIMIT = 20.0
STOP_LIMIT = 3.0

# What libvirt writes for an isolated network only, once each, before the
# user's own dnsmasq:options.
ISOLATED = ("dhcp-option=3", "no-resolv")


@dataclass(frozen=True, slots=True)
class Daemon:
    """One dnsmasq: where it runs and what it is told.

    ``bridge`` is the name of the interface that it serves, which libvirt's
    lease helper takes for the name of its own file.  ``hosts`` is our own
    ``dhcp-hostsfile``, empty where libvirt keeps one.
    """

    uuid: str
    namespace: str
    bridge: str
    configuration: str
    hosts: str = ""

    @property
    def configuration_file(self) -> Path:
        return names.network_directory(self.uuid) / "dnsmasq.conf"

    @property
    def hosts_file(self) -> Path:
        return names.network_directory(self.uuid) / "dnsmasq.hosts"


# -- configuration, pure -----------------------------------------------------


def libvirt_configuration(network: str) -> Path:
    """The file that libvirt writes for its own dnsmasq of a network."""
    return LIBVIRT_DIRECTORY / f"{network}.conf"


def read_libvirts(network: str) -> str:
    """That file's text.  Raises DnsmasqError where libvirt has not written it."""
    path = libvirt_configuration(network)
    try:
        return path.read_text()
    except OSError as error:
        raise DnsmasqError(
            f"cannot read libvirt's dnsmasq configuration {path}", os.strerror(error.errno or 0)
        ) from error


def make(network: Network, translated: str | None, resolvers: Resolvers, mtu: int | None) -> str:
    """The configuration of a network's dnsmasq.

    ``translated`` is libvirt's own file, None for ``<natns:ip>``; ``mtu``, in
    octets, is announced by DHCP where the path outside is narrower than the
    private bridge.
    """
    lines = _derive(translated) if translated is not None else _write(network)
    lines += _resolution(lines, resolvers)
    lines.append(f"pid-file={names.network_directory(network.uuid) / 'dnsmasq.pid'}")
    return "\n".join(_with_mtu(lines, network, mtu)) + "\n"


def hosts_file(network: Network) -> str:
    """The ``dhcp-hostsfile`` of a network addressed by ``<natns:ip>``."""
    return "".join(
        ",".join(filter(None, (host.mac, str(host.ip), host.name))) + "\n"
        for subnet in network.subnets
        for host in subnet.hosts
    )


def _derive(translated: str) -> list[str]:
    lines = [
        line
        for line in translated.splitlines()
        if line and not line.startswith(("#", "pid-file=")) and not _concerns_ipv6(line)
    ]
    for unwanted in ISOLATED:
        if unwanted in lines:
            lines.remove(unwanted)
    return [line for line in lines if line != "no-resolv"]


def _concerns_ipv6(line: str) -> bool:
    key, _, value = line.partition("=")
    if key in ("enable-ra", "ra-param"):
        return True
    return key == "dhcp-range" and any(map(_is_ipv6, value.split(",")))


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except AddressValueError:
        return False
    return True


def _write(network: Network) -> list[str]:
    """What libvirt would write, had the network an ``<ip>`` instead of ``<natns:ip>``."""
    lines = ["strict-order", "domain-needed", "expand-hosts", "except-interface=lo"]
    lines += ["bind-dynamic", f"interface={network.bridge}"]
    lines.append(f"local=/{network.domain or ''}/")
    if network.domain:
        lines.append(f"domain={network.domain}")
    for subnet in network.subnets:
        lines += _ranges(subnet)
    hosts = names.network_directory(network.uuid) / "dnsmasq.hosts"
    return [*lines, "dhcp-no-override", "dhcp-authoritative", f"dhcp-hostsfile={hosts}"]


def _ranges(subnet: Subnet) -> Iterable[str]:
    netmask = subnet.network.netmask
    for span in subnet.ranges:
        yield f"dhcp-range={span.first},{span.last},{netmask}"
    if subnet.hosts and not subnet.ranges:
        yield f"dhcp-range={subnet.network.network_address},static,{netmask}"


def _resolution(lines: list[str], resolvers: Resolvers) -> list[str]:
    """Whom to ask; forwarders that the network's own XML names come first."""
    own = any(line.startswith("server=") and not line.startswith("server=/") for line in lines)
    if any(line.startswith("resolv-file=") for line in lines):
        return []
    if own:
        return ["no-resolv"]
    if resolvers.file is not None:
        return [f"resolv-file={resolvers.file}"]
    return ["no-resolv", *(f"server={server}" for server in resolvers.servers)]


def _with_mtu(lines: list[str], network: Network, mtu: int | None) -> list[str]:
    if mtu is None:
        return lines
    libvirts = f"dhcp-option=option:mtu,{network.mtu}"
    rest = list(lines)
    if libvirts in rest:
        rest.remove(libvirts)
    users = ("dhcp-option=option:mtu,", "dhcp-option=26,", "dhcp-option-force=26,")
    if any(line.startswith(users) for line in rest):
        return lines
    return [*rest, f"dhcp-option=option:mtu,{mtu}"]


# -- process -----------------------------------------------------------------


def program() -> str:
    """Where dnsmasq is.  Raises DnsmasqError where it is not installed."""
    found = shutil.which("dnsmasq", path=os.environ.get("PATH", "") + ":" + BARE_PATH)
    if not found:
        raise DnsmasqError("dnsmasq is not installed", "install the package dnsmasq-base")
    return found


def differences(daemon: Daemon) -> list[str]:
    """What is wrong with a dnsmasq, in words; nothing where all is well."""
    if running(daemon.uuid, daemon.namespace) is None:
        return [f"dnsmasq of {daemon.namespace} is not running"]
    if _read(daemon.configuration_file) != daemon.configuration:
        return [f"dnsmasq of {daemon.namespace} runs with an outdated configuration"]
    if (_read(daemon.hosts_file) or "") != daemon.hosts:
        return [f"dnsmasq of {daemon.namespace} runs with outdated DHCP hosts"]
    return []


def ensure(daemon: Daemon) -> None:
    """Run dnsmasq with the wanted configuration: start, restart, or leave alone.

    Raises DnsmasqError with dnsmasq's own complaint.
    """
    if not differences(daemon):
        return
    daemon.configuration_file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if daemon.hosts:
        # dnsmasq reads this file again on SIGHUP, after it has dropped its privileges.
        daemon.hosts_file.write_text(daemon.hosts)
        daemon.hosts_file.chmod(0o644)
    if (
        running(daemon.uuid, daemon.namespace)
        and _read(daemon.configuration_file) == daemon.configuration
    ):
        reload(daemon.uuid, daemon.namespace)
        return
    stop(daemon.uuid)
    daemon.configuration_file.write_text(daemon.configuration)
    _start(daemon)


def _start(daemon: Daemon) -> None:
    environment = {"PATH": BARE_PATH, "VIR_BRIDGE_NAME": daemon.bridge}
    # A file, not a pipe: a daemon that kept the pipe open would never end us.
    with tempfile.TemporaryFile("w+") as complaint, netns.entered(daemon.namespace):
        try:
            done = subprocess.run(
                [program(), f"--conf-file={daemon.configuration_file}", *_leases(daemon)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaint,
                timeout=START_LIMIT,
                check=False,
                cwd="/",
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DnsmasqError(f"cannot start dnsmasq in {daemon.namespace}", str(error)) from error
        if done.returncode != 0:
            complaint.seek(0)
            said = complaint.read().strip() or f"exit status {done.returncode}"
            raise DnsmasqError(
                f"dnsmasq refuses to start in {daemon.namespace}", said.splitlines()[-1]
            )


def _leases(daemon: Daemon) -> list[str]:
    for helper in HELPERS:
        if os.access(helper, os.X_OK):
            return ["--leasefile-ro", f"--dhcp-script={helper}"]
    # Without libvirt's helper, virsh does not see the leases; guests do not care.
    directory = names.STATE_DIRECTORY / "leases"
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    return [f"--dhcp-leasefile={directory / daemon.uuid}"]


def reload(uuid: str, namespace: str) -> None:
    """Have dnsmasq read its hosts files again (SIGHUP); it keeps its leases."""
    pid = running(uuid, namespace)
    if pid is not None:
        os.kill(pid, signal.SIGHUP)


def running(uuid: str, namespace: str) -> int | None:
    """The process id of a network's dnsmasq, if it runs in that namespace."""
    pid = _pid(uuid)
    if pid is None:
        return None
    try:
        lives_in = Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:
        return None
    return pid if lives_in == netns.inode(namespace) else None


def stop(uuid: str) -> None:
    """End a network's dnsmasq and its lease helper; missing is success."""
    pid = _pid(uuid)
    found = [pid, *_children(pid)] if pid is not None else _strays(uuid)
    _end(found)
    directory = names.network_directory(uuid)
    for name in ("dnsmasq.pid", "dnsmasq.conf"):
        (directory / name).unlink(missing_ok=True)


def stop_libvirts(network: str) -> None:
    """End libvirt's own dnsmasq of a network whose start has failed."""
    pid = _read_pid(LIBVIRT_RUN_DIRECTORY / f"{network}.pid")
    if pid is not None and str(libvirt_configuration(network)) in _command(pid):
        _end([pid, *_children(pid)])


def _pid(uuid: str) -> int | None:
    """The pid that the pid file names, if that process is this network's dnsmasq."""
    directory = names.network_directory(uuid)
    pid = _read_pid(directory / "dnsmasq.pid")
    ours = pid is not None and str(directory / "dnsmasq.conf") in _command(pid)
    return pid if ours else None


def _strays(uuid: str) -> list[int]:
    """dnsmasq processes of a network that no pid file names (a killed start)."""
    option = str(names.network_directory(uuid) / "dnsmasq.conf")
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if option in _command(pid)]


def _end(pids: list[int]) -> None:
    descriptors = []
    for pid in pids:
        try:
            descriptors.append(os.pidfd_open(pid))
        except OSError:
            continue
    try:
        for number, limit in ((signal.SIGTERM, STOP_LIMIT), (signal.SIGKILL, STOP_LIMIT)):
            if _signal_and_wait(descriptors, number, limit):
                return
        raise DnsmasqError(f"dnsmasq (process {pids[0]}) does not end", "end it by hand")
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


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
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _read_pid(path: Path) -> int | None:
    text = (_read(path) or "").strip()
    return int(text) if text.isdigit() and int(text) > 1 else None


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _children(pid: int) -> list[int]:
    text = _read(Path(f"/proc/{pid}/task/{pid}/children")) or ""
    return [int(word) for word in text.split()]
