# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program dnsmasq: how each dnsmasq is started, found by its configuration, and ended.

Our dnsmasq, libvirt's own dnsmasq and a trial differ in their configuration file.  A
process is found by the option that names this file.  libvirt's lease helper is a child
of dnsmasq with the same command line until it runs its own program.

Leases go to libvirt's helper, so that ``virsh net-dhcp-leases`` shows them.
"""

import os
import signal
from collections.abc import Iterable
from pathlib import Path

from libvirt_natns.errors import DnsmasqError
from libvirt_natns.kernel import processes

HELPERS = tuple(
    Path(directory, "libvirt_leaseshelper")
    for directory in ("/usr/lib/libvirt", "/usr/libexec", "/usr/lib64/libvirt")
)
CAPABILITIES = (
    "net_admin", "net_raw", "net_bind_service", "setuid", "setgid", "setpcap", "chown",
    "dac_override",
)  # fmt: skip
"""The needs of dnsmasq until it changes its user, and of libvirt's lease helper, which stays root.

The process that reads packets keeps the first three.
"""

START_LIMIT = 20.0
STOP_LIMIT = 3.0


def program() -> str:
    """Return the path of dnsmasq.  Raises DnsmasqError where it is not installed."""
    missing = DnsmasqError("dnsmasq is not installed", "install the package dnsmasq-base")
    return processes.required("dnsmasq", missing)


def is_installed() -> bool:
    """True if dnsmasq is installed."""
    return processes.program("dnsmasq") is not None


def confined_program() -> list[str]:
    """Return dnsmasq as every start runs it, without options.  Raises DnsmasqError."""
    # AppArmor's usr.sbin.dnsmasq runs libvirt's lease helper in a child profile (Cx), which is
    # no subset of dnsmasq's profile.  The kernel refuses this transition to a process with
    # no_new_privs.  dnsmasq would then give no lease.
    return [*processes.confined(*CAPABILITIES, no_new_privs=False), program()]


def lease_options() -> list[str]:
    """Return the options that leave leases to libvirt's helper; none where it is missing."""
    helper = lease_helper()
    return [] if helper is None else ["--leasefile-ro", f"--dhcp-script={helper}"]


def lease_helper() -> Path | None:
    """Return libvirt's lease helper; None where it is missing."""
    return next((path for path in HELPERS if os.access(path, os.X_OK)), None)


def option(configuration: Path) -> str:
    """Return the word of a command line that a dnsmasq with this configuration has."""
    return f"--conf-file={configuration}"


def has_read(pid: int, configuration: Path) -> bool:
    """True if a process is a dnsmasq with that configuration, or its lease helper."""
    return option(configuration) in processes.command(pid)


def end(
    pids: Iterable[int],
    configuration: Path,
    signals: tuple[signal.Signals, ...] = processes.POLITELY,
) -> None:
    """End the processes among ``pids`` that are a dnsmasq with that configuration.

    Raises DnsmasqError for a process that does not end.
    """
    if not processes.end(pids, option(configuration), STOP_LIMIT, signals):
        raise DnsmasqError(f"dnsmasq with {configuration} does not end", "end it by hand")


def end_all(pid: int | None, configuration: Path) -> None:
    """End a dnsmasq with that configuration, and its lease helper.

    Search all processes for it where ``pid`` is not its process id.
    """
    if pid is not None and has_read(pid, configuration):
        end([pid, *processes.children(pid)], configuration)
    else:
        end(processes.with_word(option(configuration)), configuration)
