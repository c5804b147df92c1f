# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verb up: a network's namespace and all that is in it, as its XML says now.

The verb converges: it changes only what differs, and can be called again at any time.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from libvirt_natns import names
from libvirt_natns.daemons import dnsmasq
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine import relay_check, shared_host, upstream_leases
from libvirt_natns.engine.context import Change, Context, discard_directory
from libvirt_natns.engine.down import return_routes
from libvirt_natns.engine.network_record import is_moved, is_outdated, new_record, publishes_as
from libvirt_natns.engine.network_run import NetworkRun
from libvirt_natns.engine.plan.network_plan import withdrawals
from libvirt_natns.engine.publication.scopes import scopes_of
from libvirt_natns.engine.removal import end_client, remove
from libvirt_natns.engine.rivals import end_rivals
from libvirt_natns.engine.start_checks import check
from libvirt_natns.errors import NatnsError
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.locks import locked
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import DhcpSegment
from libvirt_natns.operations.carry_out import carry_out
from libvirt_natns.operations.operation import Plan
from libvirt_natns.operations.undo import Undo
from libvirt_natns.state.claims import Claims
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.upstream import dhcp
from libvirt_natns.values import quoted


class NotUpError(NatnsError):
    """A network went down before it could be repaired."""


class RecordChangedError(NatnsError):
    """A network's record was replaced before the network could be repaired: read it anew."""


class _UnannouncedError(Exception):
    """No hook has answered the network's `start`, so its start is not checked yet."""


def up(context: Context, network: Network, xml: bytes, *, configured: bool = False) -> list[str]:
    """Make the network's namespace and all that is in it, and return what differed.

    Runs in `started`, when the bridge is there, and whenever a network must be
    repaired.  With ``configured``, a network that runs moves to the upstream that today's
    configuration gives it.  Raises a NatnsError and takes back its own work.
    """
    with suppress(_UnannouncedError):
        return _up(context, network, xml, _check_announced, configured=configured)
    check(context, network, context.planner.segment(network))
    # Without the lock: never two networks' locks are held at once.
    end_rivals(context, network, active=True)
    return _up(context, network, xml)


def repair(context: Context, record: NetworkRecord) -> list[str]:
    """Bring a network to its record if it is still up, and return what differed.

    Waits for all of the work, so that a look after it sees the result.  Raises NotUpError
    or RecordChangedError, before anything is changed, and otherwise as ``up`` does.
    """
    return _repair(context.waiting(), record)


def repair_unless_changed(context: Context, record: NetworkRecord) -> list[str]:
    """Bring a network to its record; leave alone a network that is down or changed by now.

    The verb that changed it has made all of it.  Return what differed.  Raises as ``up`` does.
    """
    with suppress(NotUpError, RecordChangedError):
        return _repair(context, record)
    return []


def _repair(context: Context, record: NetworkRecord) -> list[str]:
    network = libvirt_xml.parse_network(record.document)
    return _up(context, network, record.document, partial(_check_same, record))


def refresh(context: Context, network: Network, xml: bytes) -> list[str]:
    """Apply a changed network XML (`net-update`) to a network that is up.

    libvirt has written its dnsmasq's files by now.  Connections live on.
    """
    record = context.store.networks.get(network.uuid)
    if record is None or record.state != "up":
        return []
    return up(context, network, xml)


def follow_lease(context: Context, uuid: str) -> list[str]:
    """Bring a network to its DHCP client's lease, or to the loss of it; return what differed."""
    if context.state(uuid) == "down":
        return []
    # A start looks at the lease itself, but may have done so a moment ago.
    with locked(names.network_directory(uuid)):
        context.discard_lock(uuid)
        record = context.store.networks.get(uuid)
    if record is None or record.state != "up" or not record.this_boot:
        return []
    if context.kernel.host.links.get(record.bridge) is None:
        # The network is stopping.
        return []
    return repair_unless_changed(context, record)


Accept = Callable[[Change], None]
"""Raises an error unless a network is as the caller has thought; called under the lock."""


def _up(
    context: Context,
    network: Network,
    xml: bytes,
    accept: Accept = lambda _: None,
    *,
    configured: bool = False,
) -> list[str]:
    with context.changing("up", network.uuid, network.name) as change, Undo() as undo:
        accept(change)
        run = context.planner.run(network, xml, change.record, configured=configured)
        made = _built_ahead(context, run)
        run = _admit(context, run, undo)
        if not isinstance(run.segment, DhcpSegment) and names.dhcp_directory(network.uuid).is_dir():
            run = _end_leasing(context, run, undo)
        if made:
            undo.add(remove, context.kernel, network.uuid, run.namespace)
        undo.add(return_routes, context, network)
        change.lines += _take_over(context, run, undo)
        change.lines += _apply(context, run, made, undo)
        if change.lines or run.state not in ("starting", "up"):
            context.observer.step("note that it is up")
            context.store.networks.set_state(network.uuid, "up")
        change.discards = False
        undo.pop_all()
    return change.lines


def _check_announced(change: Change) -> None:
    if change.state not in ("starting", "up"):
        raise _UnannouncedError


def _check_same(record: NetworkRecord, change: Change) -> None:
    """Raise NotUpError or RecordChangedError unless a network is up with a record's document."""
    if change.state != "up":
        raise NotUpError(f"network {quoted(record.name)} is not up")
    if change.record is None or change.record.document != record.document:
        raise RecordChangedError(f"network {quoted(record.name)} was changed")


def _built_ahead(context: Context, run: NetworkRun) -> Plan:
    """Return the operations that ``build`` has carried out for the start that goes on."""
    if context.built is None or run.record is None:
        return ()
    made = context.built.take(run.uuid, run.record.since)
    goes_on = run.state == "starting" and netns.exists(run.record.namespace)
    return made if goes_on else ()


def _admit(context: Context, run: NetworkRun, undo: Undo) -> NetworkRun:
    """Record a network, and return its run with its leases; ``undo`` forgets it if it was not up.

    The leases of a network that starts or runs are kept as they are.
    """
    if run.state != "up":
        # Last of all, when the network's state is set back and does not count.
        undo.add(shared_host.adjust, context, run.uuid)
        undo.add(discard_directory, run.uuid)
    if run.state not in ("starting", "up"):
        return upstream_leases.reserve(context, run, undo)
    if run.state == "starting":
        undo.add(context.store.networks.set_state, run.uuid, "down")
        if isinstance(run.segment, DhcpSegment):
            # `start` has made a part of the namespace, to be leased an address.
            undo.add(remove, context.kernel, run.uuid, run.namespace)
    record = run.record
    assert record is not None
    if record.upstream != run.segment.name:
        # The lease of another upstream's server is of no use here.
        end_client(context.kernel, run.uuid, record.namespace)
        run = replace(run, segment=context.planner.complete(run.network, run.segment.upstream))
    if run.state == "starting" or is_outdated(record, run.network, run.xml, run.segment):
        context.observer.step("record the network")
        context.store.networks.put(
            new_record(run.network, run.xml, run.segment.upstream, run.state)
        )
        if run.state == "up":
            run = _publish_anew(context, record, run, undo)
    return run


def _publish_anew(
    context: Context, earlier: NetworkRecord, run: NetworkRun, undo: Undo
) -> NetworkRun:
    """Claim a running network's own forwards as its metadata and upstream are now."""
    moved = is_moved(earlier, run.segment)
    if not moved and publishes_as(earlier, run.network):
        return run
    undo.add(context.store.networks.put, earlier)
    before = Claims(run.uuid, context.store.claims.forwards(owner=run.uuid))
    where = scopes_of([earlier])
    undo.add(context.store.claims.put, before, where, True)
    run = upstream_leases.renew(context, run)
    if moved:
        upstream_leases.release_claims(context, earlier, undo)
    # A forward in force elsewhere tells nothing of the ports of this upstream.
    upstream_leases.claim_own(context, run, () if moved else before.forwards)
    return run


def _end_leasing(context: Context, run: NetworkRun, undo: Undo) -> NetworkRun:
    """Release a DHCP server's lease: the network's upstream leased by DHCP before."""
    held = dhcp.held(run.uuid)
    end_client(context.kernel, run.uuid, run.namespace)
    if held is None or held.address.ip != run.leased.address:
        return run
    # From now on the server may lease the address to others.
    undo.add(context.store.leases.restore, context.store.leases.all_of(run.uuid))
    context.store.leases.release(run.segment.name, run.uuid, "ipv4")
    return replace(run, leased=replace(run.leased, address=None))


def _take_over(context: Context, run: NetworkRun, undo: Undo) -> list[str]:
    """Take libvirt's addresses off the bridge, ahead of all else.

    Starts of networks with an overlapping subnet wait for nothing more.
    """
    repaired = carry_out(context.kernel, withdrawals(run.network), undo, context.observer.step)
    if run.state == "starting":
        context.observer.step("let others start")
        context.store.networks.set_state(run.uuid, "up")
    return repaired


def _apply(context: Context, run: NetworkRun, made: Plan, undo: Undo) -> list[str]:
    """Renew a network's leases and carry out its plan; return what differed."""
    repaired: list[str] = []
    run = upstream_leases.renew(context, run)
    if isinstance(run.segment, DhcpSegment):
        repaired += dhcp.news(run.network, run.segment)
    upstream_leases.move_claims(context, run)
    shared_host.adjust(context, run.uuid)
    operations = context.planner.plan(run)
    repaired += carry_out(
        context.kernel, operations, undo, context.observer.step, later=context.later, done=made
    )
    repaired += ["joined the prebuilt namespace"] if made else []
    if run.network.needs_dnsmasq:
        dnsmasq.check_started(run.uuid, run.namespace)
    if relay_check.confirm(context, run):
        repaired += carry_out(
            context.kernel, context.planner.plan(run), undo, context.observer.step
        )
    return repaired
