# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs of guests: claim, publish, withdraw, plug, unplug.

A guest is recorded if it has a NIC in a network of ours, and metadata or another NIC.  Its
claims, and the way out that it has, are part of the networks' plans.  So ``check`` and
``sync`` include them.
"""

from contextlib import ExitStack, suppress
from dataclasses import dataclass

from libvirt_natns.documents import domain_edit, libvirt_xml
from libvirt_natns.engine.guests.default_routes import apply_routes, reroute
from libvirt_natns.engine.guests.effects import apply_to, cut, restore
from libvirt_natns.engine.guests.guest_claims import of_what_runs, resolve_claims, undo_reservations
from libvirt_natns.engine.guests.guest_context import (
    GuestContext,
    discard_guest_directory,
    networks_of,
)
from libvirt_natns.engine.guests.guest_run import GuestRun, read
from libvirt_natns.engine.guests.nics import has_nic, in_ours, is_same_nic, may_name
from libvirt_natns.engine.publication.dhcp_hosts import known_addresses
from libvirt_natns.errors import NatnsError
from libvirt_natns.model.network import Domain, Network, Nic
from libvirt_natns.model.publication import Forward, StaticNat
from libvirt_natns.operations.undo import Undo
from libvirt_natns.state.claims import Claims
from libvirt_natns.state.guests import GuestRecord
from libvirt_natns.state.networks import NetworkRecord


def claim(guests: GuestContext, domain: Domain, xml: bytes) -> None:
    """Check and record the claims of a starting guest; they are not in force yet.

    Raises DocumentError, ConflictError or LeaseError to refuse the start.
    """
    run = read(guests, domain, xml)
    if domain.nat is None and run.placed and run.is_recorded:
        # There is nothing to refuse, and DHCP must know the NICs before the guest boots.
        put_into_force(guests, run)
        return
    if not run.attachments:
        forget(guests, domain.uuid)
        return
    # The guest does not run: claims in force are from an end without an event.
    withdraw(guests, domain.uuid)
    with guests.locked(domain.uuid), Undo() as undo:
        # The directory goes also where the state database fails.
        undo.add(discard_guest_directory, domain.uuid)
        undo.add(guests.drop_record, domain.uuid)
        undo_reservations(guests, run.attachments, undo)
        claims = resolve_claims(guests, domain, run)
        with guests.store.transaction():
            guests.store.guests.put(domain.uuid, domain.name, xml, published=False)
            guests.store.claims.put(claims, run.scopes, published=False)
        undo.pop_all()


def publish(guests: GuestContext, domain: Domain, xml: bytes) -> list[str]:
    """Put a guest's metadata into force, in place of its earlier claims.

    Connections of withdrawn claims end.  Return what was changed, in words.  Raises the
    errors of ``claim``, and keeps the earlier state then.
    """
    return put_into_force(guests, read(guests, domain, xml)).changed


@dataclass(frozen=True, slots=True)
class Publication:
    """Claims of a guest before and after it was published, and the changes in words."""

    before: Claims
    after: Claims
    changed: list[str]


def put_into_force(
    guests: GuestContext, run: GuestRun, *, unless_changed: bool = False
) -> Publication:
    """Put a guest's metadata into force; see ``publish``.

    With ``unless_changed``, change nothing if the guest's row is not ``run.record`` any more.
    """
    domain, uuid = run.domain, run.uuid
    if not run.is_recorded and run.record is None:
        return Publication(Claims(uuid), Claims(uuid), [])
    with guests.locked(uuid):
        present = guests.store.guests.get(uuid)
        if run.record is not None and present is None:
            # The guest has stopped since, and another process has given its claims back.
            discard_guest_directory(uuid)
            return Publication(Claims(uuid), Claims(uuid), [])
        if unless_changed and present != run.record:
            # The XML may be older than the event that has changed the row.
            return Publication(Claims(uuid), Claims(uuid), [])
        before = guests.held(uuid)
        with Undo() as undo:
            undo.add(restore, guests, before, guests.engine.store.leases.all_of(uuid))
            undo_reservations(guests, run.attachments, undo)
            claims = resolve_claims(guests, of_what_runs(guests, run), run)
            undo.add(_record_again, guests, uuid, present)
            with guests.store.transaction():
                # Claims of a guest without a record would stay for good.
                guests.store.guests.put(uuid, domain.name, run.xml, published=True)
                guests.store.claims.put(claims, run.scopes, published=True)
            networks = networks_of(before) | networks_of(claims)
            changed = apply_to(guests, networks)
            undo.pop_all()
        documents = [run.xml, *([present.document] if present else [])]
        changed += apply_routes(guests, documents, networks)
        cut(guests, before, claims)
        if domain.nat is None and not run.is_recorded:
            guests.drop_record(uuid)
    return Publication(before, claims, changed)


def _record_again(guests: GuestContext, uuid: str, earlier: GuestRecord | None) -> None:
    """Put a guest's earlier record back; forget a guest that had none."""
    if earlier is None:
        guests.drop_record(uuid)
    else:
        guests.store.guests.put(uuid, earlier.name, earlier.document, earlier.published)


def withdraw(guests: GuestContext, uuid: str) -> None:
    """Take a guest's claims out of force, and end their connections.

    A guest has published no port if its start has failed.  Its reservations stay, and DHCP must
    know them.
    """
    record = guests.store.guests.get(uuid)
    if record is None:
        return
    with guests.locked(uuid):
        before = guests.held(uuid)
        networks = networks_of(guests.held(uuid, published=record.published))
        guests.store.claims.set_published(uuid, False)
        try:
            apply_to(guests, networks)
        finally:
            cut(guests, before, Claims(uuid))
            apply_routes(guests, [record.document], networks)


def forget(guests: GuestContext, uuid: str) -> None:
    """Withdraw a guest and give its claims back; reservations stay."""
    record = guests.store.guests.get(uuid)
    if record is None:
        return
    try:
        # Also a guest that has published nothing: its start has failed, and no other event
        # tells DHCP of its reservation.
        withdraw(guests, uuid)
    finally:
        with guests.locked(uuid):
            guests.drop_record(uuid)


def plug(guests: GuestContext, owner: str, nic: Nic) -> None:
    """Publish a running guest's metadata about a NIC that was just added."""
    record = guests.store.guests.get(owner)
    if record is None or not record.published:
        return
    nics = libvirt_xml.parse_domain_nics(record.document).nics
    if any(is_same_nic(each, nic) for each in nics):
        return
    xml = domain_edit.with_nic(record.document, nic)
    publish(guests, libvirt_xml.parse_domain(xml), xml)


def unplug(guests: GuestContext, owner: str, nic: Nic) -> None:
    """Withdraw a running guest's claims through a NIC that was taken out."""
    record = guests.store.guests.get(owner)
    if record is None or not record.published:
        return
    xml = domain_edit.without_nic(record.document, nic)
    try:
        publish(guests, libvirt_xml.parse_domain(xml), xml)
    except NatnsError:
        # Most often an element of the metadata names that NIC.  Or another NIC's network is in
        # trouble: its router is down, or its lease is gone.
        _drop(guests, record, nic, xml)


def _drop(guests: GuestContext, record: GuestRecord, nic: Nic, xml: bytes) -> None:
    """Withdraw claims that lead to a NIC, and keep the others.

    No trouble of another network of the guest stops that.
    """
    owner = record.uuid
    placed = in_ours(guests.store, libvirt_xml.parse_domain_nics(record.document))
    with guests.locked(owner):
        before = guests.held(owner)
        rest = _without(guests, before, nic, record.name, placed)
        with guests.store.transaction():
            guests.store.claims.put(rest, guests.scopes(rest), published=True)
            guests.store.guests.put(owner, record.name, xml, published=True)
        networks = {network.uuid for each, network in placed if is_same_nic(each, nic)}
        try:
            apply_to(guests, networks)
        finally:
            cut(guests, before, rest)
            apply_routes(guests, [record.document], networks)


def _without(
    guests: GuestContext, held: Claims, nic: Nic, name: str, placed: list[tuple[Nic, NetworkRecord]]
) -> Claims:
    """Return a guest's claims without those that lead to one of its NICs."""
    records = [record for each, record in placed if is_same_nic(each, nic)]
    mine = [libvirt_xml.parse_network(record.document) for record in records]
    others = {record.uuid for each, record in placed if not is_same_nic(each, nic)}

    def stays(claim: Forward | StaticNat) -> bool:
        for network in mine:
            if claim.network == network.uuid:
                # Another NIC in that network keeps its own claims.
                addresses = known_addresses(guests.store, network, nic.mac, name)
                return network.uuid in others and claim.target not in addresses
        return True

    return Claims(
        held.owner, tuple(filter(stays, held.forwards)), tuple(filter(stays, held.addresses))
    )


def refresh(guests: GuestContext, network: str) -> None:
    """Resolve the guests of a network again after a change of its DHCP hosts."""
    with ExitStack() as guests_in_turn:
        for record in guests.store.guests.in_network(network):
            if record.published:
                # A guest that cannot be resolved any more must not hold the others back.
                guests_in_turn.callback(_publish_again, guests, record)


def rejoin(guests: GuestContext, network: Network) -> None:
    """Publish running guests again in a network that was down since.

    The network may have another name now, and a guest may have lost its NIC in the
    network.  A guest that cannot be published again does not stop the network's start:
    ``check`` reports the guest.
    """
    claiming = {record.uuid for record in guests.store.guests.in_network(network.uuid)}
    for record in guests.store.guests.all():
        if not record.published or not record.this_boot:
            continue
        if record.uuid not in claiming and not may_name(record.document, network):
            continue
        # A guest that cannot be published again must not hold the others back.
        with suppress(NatnsError, OSError):
            if (record.uuid in claiming) != has_nic(record, network):
                _publish_again(guests, record)
    reroute(guests, network)


def follow_move(guests: GuestContext, earlier: NetworkRecord, network: Network) -> None:
    """Publish guests again if their network has another upstream than in its earlier record."""
    latest = guests.engine.store.networks.get(network.uuid)
    if latest and (latest.upstream, latest.kind) != (earlier.upstream, earlier.kind):
        rejoin(guests, network)


def _publish_again(guests: GuestContext, record: GuestRecord) -> None:
    publish(guests, libvirt_xml.parse_domain(record.document), record.document)
