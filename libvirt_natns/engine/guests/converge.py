# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that libvirt has active: compared with their claims, and brought to them."""

from collections.abc import Callable
from contextlib import suppress

from libvirt_natns import names
from libvirt_natns.documents import libvirt_xml, xml_sniff
from libvirt_natns.engine.guests.guest_claims import in_force, of_what_runs, only_in, resolve_claims
from libvirt_natns.engine.guests.guest_context import GuestContext, discard_guest_directory
from libvirt_natns.engine.guests.nics import is_same_nic
from libvirt_natns.engine.guests.verbs import forget, publish, unplug, withdraw
from libvirt_natns.errors import DocumentError, NatnsError
from libvirt_natns.model.network import Domain
from libvirt_natns.state.claims import Claims
from libvirt_natns.state.guests import GuestRecord


class _TrialOver(Exception):
    """The end of a transaction that must leave nothing."""


def trial(guests: GuestContext, domain: Domain) -> Claims:
    """Return the claims that ``publish`` would put into force; record and probe nothing.

    Raises the errors of ``claim``.
    """
    outcome: list[Claims] = []
    with suppress(_TrialOver), guests.engine.store.transaction():
        attachments = guests.attachments(domain)
        wanted = of_what_runs(guests, domain, attachments)
        claims = resolve_claims(guests, wanted, attachments, trial=True)
        guests.store.claims.put(claims, guests.scopes(claims), published=True)
        outcome.append(claims)
        # The transaction is rolled back, with the ports and addresses that it has chosen.
        raise _TrialOver
    return outcome[0]


def differences(guests: GuestContext, xml: bytes) -> list[str]:
    """Return how a running guest's metadata differs from its claims in force, in words."""
    plain = libvirt_xml.parse_domain_nics(xml)
    if not _is_concerned(guests, plain):
        return []
    try:
        wanted = trial(guests, libvirt_xml.parse_domain(xml))
    except NatnsError as error:
        return [str(error)]
    held = in_force(guests, guests.held(plain.uuid))
    return [
        *(f"is not published: {what}" for what in only_in(wanted, held)),
        *(f"is published still: {what}" for what in only_in(held, wanted)),
    ]


def converge(guests: GuestContext, xml: bytes, known: bool) -> list[str]:
    """Publish a running guest's metadata, and return what was wrong.

    ``known``: the guest was recorded before libvirt listed it.  If its record has gone,
    the guest has stopped since.
    """
    plain = libvirt_xml.parse_domain_nics(xml)
    if not _is_concerned(guests, plain) or (known and guests.store.guests.get(plain.uuid) is None):
        return []
    before = guests.held(plain.uuid)
    changed = publish(guests, libvirt_xml.parse_domain(xml), xml)
    after = guests.held(plain.uuid)
    lines = [f"{what}: published" for what in only_in(after, before)]
    lines += [f"{what}: not published any more" for what in only_in(before, after)]
    return lines or changed


def end(guests: GuestContext, record: GuestRecord) -> list[str]:
    """Forget a guest that has stopped, unless it was started again since."""
    if guests.store.guests.get(record.uuid) != record:
        return []
    withdraw(guests, record.uuid)
    forget(guests, record.uuid)
    return ["is not active in libvirt any more: removed"] if record.this_boot else []


def tidy(guests: GuestContext) -> None:
    """Remove the run-time marks of guests that are not recorded any more."""
    marks = names.guest_directory("").glob("*")
    for uuid in {mark.name for mark in marks} - {g.uuid for g in guests.store.guests.all()}:
        with guests.locked(uuid):
            # The guest may have begun to start.
            if guests.store.guests.get(uuid) is None:
                discard_guest_directory(uuid)


def follow(guests: GuestContext, uuid: str, ask: Callable[[], bytes | None]) -> list[str]:
    """Bring one guest to its XML in libvirt, and return what was wrong.

    ``ask`` gets the XML from libvirt, or None if the guest does not run.  libvirt is asked
    after the record was read, see ``converge``.  A record that is made in between comes
    with another event of libvirt.
    """
    record = guests.store.guests.get(uuid)
    xml = ask()
    if xml is None:
        return end(guests, record) if record else []
    if record is None:
        return converge(guests, xml, False) if xml_sniff.at_domain(xml).annotated else []
    if _says_the_same(record, xml):
        return []
    _unplug_missing(guests, record, libvirt_xml.parse_domain_nics(xml))
    return converge(guests, xml, True)


def _unplug_missing(guests: GuestContext, record: GuestRecord, plain: Domain) -> None:
    """Withdraw claims to NICs that have gone; no hook tells of a bridge's NIC."""
    for nic in libvirt_xml.parse_domain_nics(record.document).nics:
        if not any(is_same_nic(nic, each) for each in plain.nics):
            unplug(guests, record.uuid, nic)


def _is_concerned(guests: GuestContext, plain: Domain) -> bool:
    return bool(guests.attachments(plain)) or guests.store.guests.get(plain.uuid) is not None


def _says_the_same(record: GuestRecord, xml: bytes) -> bool:
    """True if a guest's XML is the same as its published record."""
    if not (record.published and record.this_boot):
        return False
    with suppress(DocumentError):
        return libvirt_xml.parse_domain(record.document) == libvirt_xml.parse_domain(xml)
    return False
