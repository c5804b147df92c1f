# SPDX-License-Identifier: LGPL-2.1-or-later
"""Upstream addresses of a network: leased at its start, kept or renewed while it runs.

The network's lock is held by the caller.
"""

from collections.abc import Collection
from functools import partial
from typing import get_args

from libvirt_natns import names
from libvirt_natns.addresses import FAMILIES, Address, Family
from libvirt_natns.daemons import udhcpc
from libvirt_natns.engine import shared_host
from libvirt_natns.engine.apply.carry_out import carry_out
from libvirt_natns.engine.context import Context
from libvirt_natns.engine.network_record import new_record
from libvirt_natns.engine.publication.scopes import claim_for_network
from libvirt_natns.engine.undo import Undo
from libvirt_natns.kernel import address_probe
from libvirt_natns.kernel.defer import at_once
from libvirt_natns.model.network import Network
from libvirt_natns.model.publication import Forward
from libvirt_natns.model.upstream import Upstream
from libvirt_natns.state import applicants, pool
from libvirt_natns.state.leases import LeaseKind
from libvirt_natns.upstream import dhcp, selection

FIRST_LOOK = 0.006
"""Seconds in which nearly every station of a local network has answered."""


def reserve(context: Context, network: Network, xml: bytes, upstream: Upstream, undo: Undo) -> None:
    """Record a network and lease its addresses; ``undo`` takes back both.

    Raises LeaseError, DhcpError, DocumentError or ConflictError.
    """
    earlier = context.store.leases.all_of(network.uuid)
    kinds = {lease.kind for lease in earlier if lease.upstream == upstream.name}
    context.step("record the network")
    if upstream.by_dhcp:
        undo.add(shared_host.adjust, context, network.uuid)
    undo.add(context.store.networks.set_state, network.uuid, "down")
    context.store.networks.put(new_record(network, xml, upstream, "preparing"))
    for kind in set(get_args(LeaseKind)) - kinds:
        undo.add(context.store.leases.release, upstream.name, network.uuid, kind)
    undo.add(context.store.leases.restore, earlier)

    context.step("lease an address")
    if upstream.by_dhcp:
        upstream = _await_lease(context, network, upstream, undo)
    for family in FAMILIES:
        if selection.leases_address(network, upstream, family):
            _lease(context, network, upstream, family)
    if selection.leases_prefix(network, upstream):
        _lease_prefix(context, network, upstream)
    if network.nat and network.nat.forwards:
        undo.add(context.store.claims.drop, network.uuid)
        claim_own(context, network, upstream)


def renew(context: Context, network: Network, upstream: Upstream) -> None:
    """Keep a network's leases; lease anew where the configuration has moved on.

    Raises LeaseError.
    """
    leased = context.store.leases.of(upstream.name, network.uuid)
    if upstream.by_dhcp:
        dhcp.settle(context.store, network, upstream)
    for family in FAMILIES:
        address = leased.of(family)
        keeps = address is not None and applicants.can_keep(address, upstream)
        if not keeps and selection.leases_address(network, upstream, family):
            _lease(context, network, upstream, family)
    if selection.leases_prefix(network, upstream):
        prefix = leased.prefix
        if prefix is None or not selection.can_keep_prefix(prefix, network, upstream):
            _lease_prefix(context, network, upstream)


def claim_own(
    context: Context, network: Network, upstream: Upstream, held: Collection[Forward] = ()
) -> None:
    """Claim the forwards of a network's own metadata; ``held`` are in force already.

    Raises DocumentError or ConflictError.
    """
    planner = context.planner
    outside, whole = planner.outside(network, upstream), planner.completed(network, upstream)
    claim_for_network(context.choices, whole, upstream, outside, held)


def _await_lease(context: Context, network: Network, upstream: Upstream, undo: Undo) -> Upstream:
    """Ask a DHCP server for an address, and return the upstream as its lease completes it."""
    # A host that filters bridged frames would drop the server's answer.
    shared_host.adjust(context, network.uuid)
    operations = context.planner.plan_ahead_of_lease(network, upstream)
    with udhcpc.awaiting(names.dhcp_directory(network.uuid)):
        carry_out(context.kernel, operations, undo, context.before)
        context.step("await a DHCP lease")
        dhcp.await_lease(network, upstream)
    upstream = context.planner.upstream(network)
    dhcp.settle_first(context.store, network, upstream)
    return upstream


def _lease(context: Context, network: Network, upstream: Upstream, family: Family) -> None:
    if upstream.by_dhcp and family == 4:
        return
    pool.reserve(
        context.store,
        applicants.applicant(network, family),
        upstream,
        partial(probe, context, upstream),
        context.kernel.host.addresses.beyond_link(),
    )


def _lease_prefix(context: Context, network: Network, upstream: Upstream) -> None:
    pool.reserve_prefix(
        context.store,
        applicants.applicant(network),
        upstream,
        selection.wanted_prefix(network, upstream),
        context.kernel.host.addresses.beyond_link(),
    )


def probe(context: Context, upstream: Upstream, addresses: Collection[Address]) -> set[Address]:
    """Return the addresses that other stations answer for.

    A resident process takes a short look here.  It probes in full when it announces
    the address.
    """
    if upstream.probe == 0:
        return set()
    resident = context.later is not at_once
    seconds = min(upstream.probe, FIRST_LOOK) if resident else upstream.probe
    return address_probe.probe(upstream.bridge or "", addresses, seconds, context.later)


def in_words(context: Context, network: Network, upstream: Upstream) -> str:
    """Return a network's leases, in words."""
    leased = context.store.leases.of(upstream.name, network.uuid)
    parts = [*leased.addresses, *([leased.prefix] if leased.prefix else [])]
    return " and ".join(map(str, parts)) or "nothing outside"
