# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verb refresh_forwards: a network that is up follows its claims and reservations.

A guest that opens or closes a port changes DHCP reservations, rules, addresses of guests,
and the host's part.  The rest of the network is not looked at: that is for ``check``.
"""

from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine import shared_host, upstream_leases
from libvirt_natns.engine.context import Context
from libvirt_natns.engine.network_run import NetworkRun
from libvirt_natns.engine.up import repair_unless_changed
from libvirt_natns.errors import KernelError
from libvirt_natns.model.segment import LeasedSegment
from libvirt_natns.operations.carry_out import carry_out
from libvirt_natns.operations.undo import Undo
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.values import quoted


class _IncompleteError(KernelError):
    """A network lacks more than claims decide."""


def refresh_forwards(context: Context, record: NetworkRecord) -> list[str]:
    """Bring a network to today's claims and reservations, and return what differed.

    A network that is not up any more is left alone: it has no claims in force.  Raises a
    NatnsError.
    """
    try:
        return _refresh(context, record)
    except KernelError:
        # A link, the namespace or a lease is missing: the network must be repaired whole.
        latest = context.store.networks.get(record.uuid) or record
        return repair_unless_changed(context.waiting(), latest)


def _refresh(context: Context, record: NetworkRecord) -> list[str]:
    with context.changing("up", record.uuid, record.name) as change, Undo() as undo:
        if change.record is None or change.state != "up":
            return []
        network = libvirt_xml.parse_network(change.record.document)
        run = context.planner.run(network, change.record.document, change.record)
        if context.kernel.namespace_owner(run.namespace) != run.uuid:
            raise _IncompleteError(f"namespace {run.namespace} is missing, or is not ours")
        if not _is_settled(run):
            raise _IncompleteError(f"network {quoted(network.name)} is not settled")
        # A guest has resolved its claims before this lock: the address may be another by now.
        upstream_leases.move_claims(context, run)
        shared_host.adjust(context, run.uuid)
        operations = context.planner.plan_claims(run)
        change.lines += carry_out(
            context.kernel, operations, undo, context.observer.step, later=context.later
        )
        undo.pop_all()
    return change.lines


def _is_settled(run: NetworkRun) -> bool:
    """True if a network has all its leases, and its DHCP client's address is recorded."""
    if run.lacks:
        return False
    return not isinstance(run.segment, LeasedSegment) or run.segment.leased == run.leased.address
