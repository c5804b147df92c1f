# SPDX-License-Identifier: LGPL-2.1-or-later
"""Claims of guests, resolved from their metadata and compared."""

from dataclasses import replace

from libvirt_natns.addresses import FAMILIES
from libvirt_natns.engine.guests.guest_context import GuestContext, networks_of
from libvirt_natns.engine.guests.guest_run import GuestRun
from libvirt_natns.engine.guests.nics import is_in, is_same_nic
from libvirt_natns.engine.observer import NOBODY
from libvirt_natns.engine.publication.allocation import Allocation
from libvirt_natns.engine.publication.attachment import Attachment
from libvirt_natns.engine.publication.resolve import resolve
from libvirt_natns.engine.publication.scopes import check_host
from libvirt_natns.engine.publication.words import in_words
from libvirt_natns.model.metadata import AddressRequest, PortForward
from libvirt_natns.model.network import Domain
from libvirt_natns.operations.undo import Undo
from libvirt_natns.state.claims import Claims


def resolve_claims(
    guests: GuestContext, domain: Domain, run: GuestRun, *, trial: bool = False
) -> Claims:
    """Return all claims of a domain's metadata, with ports and addresses chosen.

    A ``trial`` reports no choice and probes no address.  Raises DocumentError,
    ConflictError or LeaseError.
    """
    engine = guests.engine
    observer = NOBODY if trial else engine.observer
    choices = Allocation(engine.config, engine.store, engine.kernel, observer, not trial)
    claims = resolve(domain, run.attachments, choices)
    # Forwards in force stay so, even if a program of the host listens on their port by now.
    held = set(guests.store.claims.forwards(owner=domain.uuid))
    fresh = Claims(domain.uuid, tuple(f for f in claims.forwards if f not in held))
    check_host(fresh, run.scopes, engine.kernel.host.addresses.beyond_link)
    return claims


def of_what_runs(guests: GuestContext, run: GuestRun) -> Domain:
    """Return a running guest without its metadata for networks of ours that are down.

    That part is published once those networks run.
    """
    domain = run.domain
    here = [attachment.nic for attachment in run.attachments]
    absent = [nic for nic in domain.nics if not any(is_same_nic(nic, other) for other in here)]
    if domain.nat is None or not absent:
        return domain
    down = [each for each in guests.engine.store.networks.all() if not each.runs]
    stopped = [(nic, each) for nic in absent for each in down if is_in(nic, each)]

    def stays(wanted: PortForward | AddressRequest) -> bool:
        if wanted.network is None and wanted.mac is None:
            return True
        return not any(
            wanted.network in (None, record.name) and wanted.mac in (None, nic.mac)
            for nic, record in stopped
        )

    nat = replace(
        domain.nat,
        forwards=tuple(filter(stays, domain.nat.forwards)),
        addresses=tuple(filter(stays, domain.nat.addresses)),
    )
    return replace(domain, nat=nat)


def undo_reservations(guests: GuestContext, attachments: list[Attachment], undo: Undo) -> None:
    """Have ``undo`` give up the DHCP addresses that are reserved from here on."""
    for attachment in attachments:
        network, mac = attachment.network.uuid, attachment.nic.mac
        for family in FAMILIES:
            if guests.store.reservations.get(network, mac, family) is None:
                undo.add(guests.store.reservations.drop, network, mac, family)


def in_force(guests: GuestContext, claims: Claims) -> Claims:
    """Return the claims in networks that run: a network that is down publishes nothing."""
    records = {uuid: guests.engine.store.networks.get(uuid) for uuid in networks_of(claims)}
    run = {uuid for uuid, record in records.items() if record and record.runs}
    return Claims(
        claims.owner,
        tuple(each for each in claims.forwards if each.network in run),
        tuple(each for each in claims.addresses if each.network in run),
    )


def only_in(these: Claims, those: Claims) -> list[str]:
    """Return the claims in ``these`` alone, in words."""
    forwarded = set(those.forwards)
    addresses = set(those.addresses)
    lines = [in_words(each) for each in these.forwards if each not in forwarded]
    return lines + [in_words(each) for each in these.addresses if each not in addresses]
