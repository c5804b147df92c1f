# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs of a start, until libvirt has the bridge: prepare, build, give up.

libvirt is never called: a hook that called it would deadlock.
"""

import time
from contextlib import suppress

from libvirt_natns.daemons import libvirt_dnsmasq
from libvirt_natns.engine import given_up, late_starts, shared_host, upstream_leases
from libvirt_natns.engine.context import Context, discard_directory, empty_directory
from libvirt_natns.engine.down import end, remove_orphan
from libvirt_natns.engine.network_record import is_start_of, new_record
from libvirt_natns.engine.network_run import NetworkRun
from libvirt_natns.engine.removal import remove
from libvirt_natns.engine.rivals import end_rivals
from libvirt_natns.engine.start_checks import check, check_room
from libvirt_natns.errors import ConflictError, NatnsError, UpstreamError
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.defer import at_once
from libvirt_natns.kernel.locks import LIMIT
from libvirt_natns.model.network import Network
from libvirt_natns.operations.carry_out import carry_out
from libvirt_natns.operations.namespaces import Namespace, namespace_owner
from libvirt_natns.operations.undo import Undo
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.values import quoted

POLL = 0.02
"""Seconds between two looks at whether another network's start is over."""


def prepare(context: Context, network: Network, xml: bytes) -> None:
    """Check all that can be refused, and reserve a network's addresses and claims.

    Runs in libvirt's `start` hook, before the bridge exists.  Raises a NatnsError, and
    leaves nothing, where the network cannot come up.  Waits while another network with
    an overlapping subnet is between its own `start` and `started`.
    """
    # A start that is refused for any other reason does not wait for the upstream.
    late_starts.forget(network.uuid)
    try:
        segment = context.planner.segment(network)
        check(context, network, segment)
    except UpstreamError:
        late_starts.note(network, xml)
        raise
    # Ahead of the lock: never two networks' locks are held at once.
    end_rivals(context, network, active=False)
    with context.changing("prepare", network.uuid, network.name) as change, Undo() as undo:
        run = NetworkRun(network, xml, change.record, segment)
        undo.add(discard_directory, network.uuid)
        check_room(network)
        _clear(context, run)
        run = upstream_leases.reserve(context, run, undo)
        context.observer.step("await its turn")
        while context.store.networks.enter_start(
            new_record(network, xml, segment.upstream, "starting")
        ):
            time.sleep(POLL)
        change.discards = False
        change.lines.append(f"reserved {upstream_leases.in_words(run.leased)}")
        undo.pop_all()


def build(context: Context, network: Network, xml: bytes) -> bool:
    """Make ahead all that needs nothing of libvirt's; ``up`` then joins it.

    For a thread of a resident process, right after ``prepare``, while libvirt makes its
    bridge.  Raises a NatnsError and takes back its own work; ``up`` does all of it
    then.  Return False if that start is over already.
    """
    with context.changing("build", network.uuid, network.name) as change, Undo() as undo:
        record = change.record
        if context.built is None or not record or not is_start_of(record, xml):
            return False
        run = context.planner.run(network, xml, record)
        undo.add(empty_directory, network.uuid)
        run = upstream_leases.renew(context, run)
        shared_host.adjust(context, network.uuid)
        operations = context.planner.plan_ahead(run)
        change.lines += carry_out(
            context.kernel, operations, undo, context.observer.step, later=context.later
        )
        context.built.keep(network.uuid, record.since, operations)
        undo.pop_all()
    return True


def give_up(
    context: Context, start: NetworkRecord, *, orphaned: bool = False, limit: float = LIMIT
) -> bool:
    """Take back a start that libvirt has given up, and return True.

    ``orphaned``: the network is surely inactive in libvirt, so a bridge of libvirt's
    goes as well.  Return False, and do nothing, if anything has happened to the network
    since the record was made.
    """
    with context.changing("give up", start.uuid, start.name, limit) as change:
        record = change.record
        if not record or (record.state, record.since) != (start.state, start.since):
            return False
        if orphaned:
            remove_orphan(context, record.document)
        end(context, change, start.uuid, start.namespace)
        change.lines.append("removed a start that libvirt gave up")
    return True


def end_given_up(context: Context, but: str = "", *, wait: bool = False) -> list[NetworkRecord]:
    """Take back the starts of other networks than ``but`` that libvirt has given up.

    Return the records of the networks that have ended so.  libvirt reports no such end.  The
    service finds it; without the service, the next event does.  Leftovers that cannot be
    removed wait for ``sync``.  With ``wait``, a start without a bridge gets as long as
    ``given_up.BRIDGE_LIMIT``.
    """
    ended = []
    for record in context.store.networks.all("preparing", "starting"):
        if record.uuid == but:
            continue
        while wait and context.later is at_once and given_up.may_be_given_up(record):
            time.sleep(POLL)
        if given_up.is_given_up(record):
            # The holder of its lock may have to wait for a DHCP server.
            with suppress(NatnsError):
                if give_up(context, record, limit=POLL):
                    ended.append(record)
    return ended


def _clear(context: Context, run: NetworkRun) -> None:
    """Remove leftovers of an earlier run of a network, and refuse a foreign namespace."""
    network = run.network
    namespace = Namespace(run.namespace, network.uuid)
    owner = namespace_owner(context.kernel, namespace)
    if owner not in (network.uuid, None):
        raise _clash(context, network, namespace.name, owner)
    # Ahead of the removal, which takes away the note of a start that was killed.
    former = _former_namespace(context, run)
    remove(context.kernel, network.uuid, namespace.name, context.observer.step)
    # A dnsmasq that came up just as libvirt was killed would keep the address.
    libvirt_dnsmasq.stop(network.name)
    if former:
        context.kernel.delete_namespace(former)
    if run.state != "down":
        remove_orphan(context, run.xml)
        context.observer.step("note that it is down")
        context.store.networks.set_state(network.uuid, "down")
        shared_host.adjust(context, network.uuid)


def _clash(context: Context, network: Network, namespace: str, owner: str) -> ConflictError:
    """Return the error for a namespace in the way.

    The namespace of a network of ours may be in use, so no command to delete it is named.
    """
    tagged = context.store.networks.get(owner) if owner else None
    names = [tagged.name] if tagged else [owner] if owner else []
    names += [record.name for record in context.store.networks.holders(namespace)]
    if names:
        return ConflictError(
            f"network {quoted(network.name)}: namespace {namespace} belongs to network"
            f" {quoted(names[0])}",
            "rename one of the two networks",
        )
    return ConflictError(
        f"network {quoted(network.name)}: namespace {namespace} exists and is not ours",
        f"rename the network, or delete it (ip netns delete {namespace})",
    )


def _former_namespace(context: Context, run: NetworkRun) -> str:
    """Return the namespace that a network had under another name; "" for none of its own."""
    former = run.record.namespace if run.record else ""
    if not former or former == run.namespace or not netns.exists(former):
        return ""
    owner = namespace_owner(context.kernel, Namespace(former, run.uuid))
    return former if owner == run.uuid else ""
