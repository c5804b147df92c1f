# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab: what system tests, the demo and the benchmarks build their worlds with.

    from lab import FastGuest, Provider, isolated, start_network, virsh

Everything here works inside contrib/sandbox only (``require_sandbox``).
"""

from lab_base import (
    CACHE,
    CHECKOUT,
    PYTHON,
    CommandError,
    LabError,
    Result,
    install_natns,
    natns,
    natns_anew,
    remove_config,
    require_sandbox,
    run,
    spawn,
    uninstall_natns,
    virsh,
    wait_for,
    write_config,
)
from lab_base import end as end_process
from lab_guest import RealGuest
from lab_libvirt import (
    Host,
    Libvirtd,
    Objects,
    clear,
    define_network,
    isolated,
    objects,
    start_network,
)
from lab_nodes import INTERNET, Capture, FastGuest, Node, Provider, forward_at_once
from lab_servers import ECHO_PORT, WEB_PORT, Contact, Server
from lab_service import Service
from lab_snapshot import Snapshot, remaining, snapshot

__all__ = [
    "CACHE",
    "CHECKOUT",
    "ECHO_PORT",
    "INTERNET",
    "PYTHON",
    "WEB_PORT",
    "Capture",
    "CommandError",
    "Contact",
    "FastGuest",
    "Host",
    "LabError",
    "Libvirtd",
    "Node",
    "Objects",
    "Provider",
    "RealGuest",
    "Result",
    "Server",
    "Service",
    "Snapshot",
    "clear",
    "define_network",
    "end_process",
    "forward_at_once",
    "install_natns",
    "isolated",
    "natns",
    "natns_anew",
    "objects",
    "remaining",
    "remove_config",
    "require_sandbox",
    "run",
    "snapshot",
    "spawn",
    "start_network",
    "uninstall_natns",
    "virsh",
    "wait_for",
    "write_config",
]
