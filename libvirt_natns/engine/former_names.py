# SPDX-License-Identifier: LGPL-2.1-or-later
"""Namespaces of networks that an earlier version has started, under names of its own.

Earlier versions gave the network ``job 1`` the namespace that the network ``job-1-5ba23c87``
has as well.  A running network keeps its namespace, which gets today's name.
"""

from dataclasses import replace

from libvirt_natns import names
from libvirt_natns.engine.network_record import state_of
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store


def has_former_name(record: NetworkRecord) -> bool:
    """True if a network that runs or starts has a namespace under an earlier version's name."""
    former, today = names.former_namespace(record.name), names.namespace(record.name)
    return record.namespace == former != today and state_of(record) != "down"


def renamed(kernel: Kernel, store: Store, record: NetworkRecord) -> NetworkRecord:
    """Return a network's record after its namespace has got today's name, if it had another.

    The caller holds the network's lock.  Raises KernelError, OSError or ConflictError.
    """
    if not has_former_name(record):
        return record
    today = replace(record, namespace=names.namespace(record.name))
    if kernel.namespace_owner(record.namespace) == record.uuid:
        netns.rename(record.namespace, today.namespace)
    store.networks.put(today)
    return today
