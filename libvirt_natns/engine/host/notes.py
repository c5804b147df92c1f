# SPDX-License-Identifier: LGPL-2.1-or-later
"""Notes of changes of the host, written before the changes are made.

A process that is killed in between leaves a note by which the next one cleans up.
"""

from collections.abc import Iterable

from libvirt_natns.engine.apply.carry_out import differs
from libvirt_natns.engine.host.record import HostRecord, save, words
from libvirt_natns.engine.operations.addresses import Route
from libvirt_natns.engine.operations.links import Sysctl, TransitBridge
from libvirt_natns.engine.operations.operation import Operation
from libvirt_natns.kernel.session import Kernel


def note_transit(kernel: Kernel, operations: Iterable[Operation], record: HostRecord) -> None:
    """Note the transit bridges and the forwarding that are about to be changed."""
    bridges, forwarding = set(record.bridges), set(record.forwarding)
    for operation in operations:
        if isinstance(operation, TransitBridge):
            bridges.add(operation.name)
        elif isinstance(operation, Sysctl) and differs(kernel, operation):
            link = operation.key.split("/")[3]
            if link not in bridges:
                forwarding.add(link)
    if (bridges, forwarding) != (set(record.bridges), set(record.forwarding)):
        record.bridges, record.forwarding = sorted(bridges), sorted(forwarding)
        record.seen = ""
        save(record)


def note_ipv6(kernel: Kernel, operations: Iterable[Operation], record: HostRecord) -> None:
    """Note the routes and the IPv6 sysctls that are about to be changed."""
    routes, settings = list(record.routes), dict(record.settings)
    for operation in operations:
        if isinstance(operation, Route):
            routes += [words(operation)] if words(operation) not in routes else []
        elif isinstance(operation, Sysctl) and differs(kernel, operation):
            former = kernel.host.sysctls.get(operation.key) or ""
            settings.setdefault(operation.key, former)
    if (routes, settings) != (record.routes, record.settings):
        record.routes, record.settings, record.seen = routes, settings, ""
        save(record)
