# SPDX-License-Identifier: LGPL-2.1-or-later
"""Upstream addresses of a network: leased at its start, kept or renewed while it runs.

The network's lock is held by the caller.
"""

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import get_args

from libvirt_natns import names
from libvirt_natns.addresses import FAMILIES, Address, Family
from libvirt_natns.daemons import udhcpc
from libvirt_natns.engine import shared_host
from libvirt_natns.engine.context import Context
from libvirt_natns.engine.network_record import new_record
from libvirt_natns.engine.network_run import NetworkRun
from libvirt_natns.engine.publication.scopes import claim_for_network, scopes, scopes_of
from libvirt_natns.kernel import address_probe
from libvirt_natns.kernel.defer import at_once
from libvirt_natns.model.publication import Forward
from libvirt_natns.model.segment import DhcpSegment, Segment
from libvirt_natns.operations.carry_out import carry_out
from libvirt_natns.operations.undo import Undo
from libvirt_natns.state import applicants, pool
from libvirt_natns.state.claims import Claims
from libvirt_natns.state.leases import Leased, LeaseKind
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.upstream import dhcp, selection

FIRST_LOOK = 0.006
"""Seconds in which nearly every station of a local network has answered."""


def reserve(context: Context, run: NetworkRun, undo: Undo) -> NetworkRun:
    """Record a network and lease its addresses; ``undo`` takes back both.

    Return the run with the leases.  Raises LeaseError, DhcpError, DocumentError or
    ConflictError.
    """
    network, segment = run.network, run.segment
    earlier = context.store.leases.all_of(network.uuid)
    kinds = {lease.kind for lease in earlier if lease.upstream == segment.name}
    context.observer.step("record the network")
    if isinstance(segment, DhcpSegment):
        undo.add(shared_host.adjust, context, network.uuid)
    undo.add(context.store.networks.set_state, network.uuid, "down")
    context.store.networks.put(new_record(network, run.xml, segment.upstream, "preparing"))
    for kind in set(get_args(LeaseKind)) - kinds:
        undo.add(context.store.leases.release, segment.name, network.uuid, kind)
    undo.add(context.store.leases.restore, earlier)

    context.observer.step("lease an address")
    # A lease of a network that is down may be another network's by now.
    run = replace(run, leased=Leased())
    if isinstance(segment, DhcpSegment):
        run = _await_lease(context, run, segment, undo)
    for family in FAMILIES:
        if selection.leases_address(network, run.segment, family):
            run = _lease(context, run, family)
    if selection.leases_prefix(network, run.segment):
        run = _lease_prefix(context, run)
    if network.nat and network.nat.forwards:
        undo.add(context.store.claims.drop, network.uuid)
        claim_own(context, run)
    return run


def renew(context: Context, run: NetworkRun) -> NetworkRun:
    """Keep a network's leases; lease anew where the configuration has moved on.

    Return the run with the leases.  Raises LeaseError.
    """
    network, segment, leased = run.network, run.segment, run.leased
    if isinstance(segment, DhcpSegment):
        run = run.with_lease(dhcp.settle(context.store, network, segment))
    for family in FAMILIES:
        address = leased.of(family)
        keeps = address is not None and applicants.can_keep(address, segment)
        if not keeps and selection.leases_address(network, segment, family):
            run = _lease(context, run, family)
    if selection.leases_prefix(network, segment):
        prefix = leased.prefix
        if prefix is None or not selection.can_keep_prefix(prefix, network, segment):
            run = _lease_prefix(context, run)
    return run


def move_claims(context: Context, run: NetworkRun) -> None:
    """Move the claims in a network to its present upstream addresses."""
    for address in run.outside.addresses:
        context.store.claims.move(run.uuid, address)


def claim_own(context: Context, run: NetworkRun, held: Collection[Forward] = ()) -> None:
    """Claim the forwards of a network's own metadata; ``held`` are in force already.

    Raises DocumentError or ConflictError.
    """
    claim_for_network(context.choices, run.whole, run.segment, run.outside, held)


def release_claims(context: Context, record: NetworkRecord, undo: Undo) -> None:
    """Give up the claims of guests on a network's former upstream; ``undo`` claims them again.

    No rule of another upstream can serve them.  ``rejoin`` publishes the guests again.
    """
    table, uuid = context.store.claims, record.uuid
    owners = {forward.owner for forward in table.forwards(uuid)}
    owners |= {static.owner for static in table.static_nats(uuid)}
    for owner in owners - {uuid}:
        held = Claims(owner, table.forwards(owner=owner), table.static_nats(owner=owner))
        networks = {forward.network for forward in held.forwards}
        networks |= {static.network for static in held.addresses}
        where = scopes(context.store, networks) | scopes_of([record])
        rest = Claims(
            owner,
            tuple(each for each in held.forwards if each.network != uuid),
            tuple(each for each in held.addresses if each.network != uuid),
        )
        undo.add(table.put, held, where, True)
        table.put(rest, where, published=True)


def _await_lease(context: Context, run: NetworkRun, segment: DhcpSegment, undo: Undo) -> NetworkRun:
    """Ask a DHCP server for an address, and return the run as the lease completes it."""
    network = run.network
    # A host that filters bridged frames would drop the server's answer.
    shared_host.adjust(context, network.uuid)
    operations = context.planner.plan_ahead_of_lease(network, segment)
    with udhcpc.awaiting(names.dhcp_directory(network.uuid)):
        carry_out(context.kernel, operations, undo, context.observer.step)
        context.observer.step("await a DHCP lease")
        dhcp.await_lease(network, segment)
    leased = dhcp.complete(network, segment.upstream)
    run = replace(run, segment=leased)
    return run.with_lease(dhcp.settle_first(context.store, network, leased))


def _lease(context: Context, run: NetworkRun, family: Family) -> NetworkRun:
    if run.segment.side(family).by_dhcp:
        return run
    address = pool.reserve(
        context.store,
        applicants.applicant(run.network, family),
        run.segment,
        partial(probe, context, run.segment),
        context.kernel.host.addresses.beyond_link(),
    )
    return run.with_lease(address)


def _lease_prefix(context: Context, run: NetworkRun) -> NetworkRun:
    prefix = pool.reserve_prefix(
        context.store,
        applicants.applicant(run.network),
        run.segment,
        selection.wanted_prefix(run.network, run.segment),
        context.kernel.host.addresses.beyond_link(),
    )
    return run.with_lease(prefix)


def probe(context: Context, segment: Segment, addresses: Collection[Address]) -> set[Address]:
    """Return the addresses that other stations answer for.

    A resident process takes a short look here.  It probes in full when it announces
    the address.
    """
    if segment.probe == 0:
        return set()
    resident = context.later is not at_once
    seconds = min(segment.probe, FIRST_LOOK) if resident else segment.probe
    return address_probe.probe(segment.bridge, addresses, seconds, context.later)


def in_words(leased: Leased) -> str:
    """Return a network's leases, in words."""
    parts = [*leased.addresses, *([leased.prefix] if leased.prefix else [])]
    return " and ".join(map(str, parts)) or "no upstream address"
