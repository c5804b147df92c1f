# SPDX-License-Identifier: LGPL-2.1-or-later
"""Upstream addresses that another station has as well: move away, defend, or do not answer."""

from collections.abc import Collection

from libvirt_natns import names
from libvirt_natns.addresses import Address
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine import proxied_addresses, shared_host, upstream_leases
from libvirt_natns.engine.context import Context
from libvirt_natns.engine.network_record import state_of
from libvirt_natns.engine.up import repair_unless_changed
from libvirt_natns.kernel import address_probe, netns
from libvirt_natns.kernel.locks import locked
from libvirt_natns.operations.undo import Undo
from libvirt_natns.state import applicants, pool
from libvirt_natns.state.leases import StoredLease
from libvirt_natns.state.networks import NetworkRecord


def relocate(
    context: Context, uuid: str, taken: Address, avoided: Collection[Address] = ()
) -> list[str]:
    """Give a network another address than ``taken``, which another station has.

    ``avoided`` are addresses that other stations answered for lately.  The caller limits
    how often a network moves.  No hook waits: the new address is probed for in full, and
    announced without another probe.  So one move leads to no other.  Return what was
    changed, which is nothing if the network has another address by now.  Raises LeaseError
    if there is no other, or the network's metadata asks for this one.
    """
    waiting = context.waiting()
    with Undo() as undo:
        with context.changing("relocate", uuid) as change:
            if change.record is None or not change.record.runs:
                return []
            network = libvirt_xml.parse_network(change.record.document)
            segment = context.planner.run(network, change.record.document, change.record).segment
            if segment.side_of(taken).by_dhcp:
                # The client asks the neighbours, and declines an address that a neighbour has.
                return []
            if taken not in context.store.leases.of(segment.name, uuid).addresses:
                return []
            earlier = context.store.leases.all_of(uuid)

            def probe(addresses: Collection[Address]) -> set[Address]:
                in_use = {taken, *avoided}.intersection(addresses)
                others = [address for address in addresses if address not in in_use]
                return in_use | upstream_leases.probe(waiting, segment, others)

            own = context.kernel.host.addresses.beyond_link()
            applicant = applicants.applicant(network, 4 if taken.version == 4 else 6)
            address = pool.reserve(context.store, applicant, segment, probe, own)
            undo.add(_give_back, waiting, uuid, segment.name, earlier)
            change.lines.append(f"moved from {taken} to {address}")
        # A start that goes on takes the new address by itself.
        latest = context.store.networks.get(uuid)
        again = repair_unless_changed(waiting, latest) if latest else []
        undo.pop_all()
    return [*change.lines, *again]


def _give_back(
    context: Context, uuid: str, upstream: str, earlier: Collection[StoredLease]
) -> None:
    """Give a network that could not move its earlier addresses back."""
    with context.changing("relocate", uuid):
        context.store.leases.restore(earlier)
        for address in context.store.leases.of(upstream, uuid).addresses:
            context.store.claims.move(uuid, address)
        shared_host.adjust(context, uuid)


def defend(_: Context, record: NetworkRecord, address: Address) -> None:
    """Announce an address that a network has and another station answers for.

    Raises UpstreamError or KernelError.
    """
    mac = names.mac(record.uuid, names.UPSTREAM_LINK)
    with netns.entered(record.namespace):
        address_probe.announce(names.UPSTREAM_LINK, address, mac)


def look_elsewhere(context: Context, uuid: str, asked: proxied_addresses.Asked) -> list[str]:
    """Cut addresses that stations outside have out of the prefixes that ndppd answers for.

    Return what differed.  Takes the upstream's ``probe`` where a guest has an address in
    the provider's own prefix.  Raises a NatnsError.
    """
    record = context.store.networks.get(uuid)
    if record is None or record.state != "up" or not record.this_boot:
        return []
    if context.kernel.at(record.namespace).links.get(record.bridge) is None:
        # The network is stopping, or is to be repaired.
        return []
    due = asked.due(context.kernel.at(record.namespace).neighbours6.stations(record.bridge))
    due = due[: proxied_addresses.MOST]
    if not due:
        return []
    asked.note(due)
    network = libvirt_xml.parse_network(record.document)
    run = context.planner.run(network, record.document, record)
    proxy = proxied_addresses.outermost(context.planner.plan(run))
    if proxy is None:
        return []
    outside = proxied_addresses.look(proxy, due, run.segment.probe)
    if outside is None:
        return []
    with locked(names.network_directory(uuid)):
        context.discard_lock(uuid)
        latest = context.store.networks.get(uuid)
        if latest is None or state_of(latest) != "up":
            return []
        proxied_addresses.note(uuid, outside)
    listed = ", ".join(map(str, outside)) or "none"
    return [
        f"guest addresses in use by other machines: {listed}",
        *repair_unless_changed(context, latest),
    ]
