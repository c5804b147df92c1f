# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that libvirt has active, compared with their claims."""

from collections.abc import Callable
from contextlib import suppress

from libvirt_natns import names
from libvirt_natns.documents import libvirt_xml, xml_sniff
from libvirt_natns.engine.guests.claims import in_force, of_what_runs, only_in, resolve_claims
from libvirt_natns.engine.guests.context import GuestContext, discard_guest_directory
from libvirt_natns.engine.guests.nics import is_same_nic
from libvirt_natns.engine.guests.verbs import forget, publish, unplug, withdraw
from libvirt_natns.errors import DocumentError, NatnsError
from libvirt_natns.model import Domain
from libvirt_natns.state.guests import Claims, GuestRecord


class _TrialOver(Exception):
    """Ends a transaction that is to leave nothing."""


def trial(guests: GuestContext, domain: Domain) -> Claims:
    """What ``publish`` would put into force; nothing is taken, kept or asked for.

    Raises what ``claim`` does.
    """
    found: list[Claims] = []
    with suppress(_TrialOver), guests.engine.store.transaction():
        attachments = guests.attachments(domain)
        wanted = of_what_runs(guests, domain, attachments)
        claims = resolve_claims(guests, wanted, attachments, trial=True)
        guests.registry.claim(claims, guests.scopes(claims), published=True)
        found.append(claims)
        # Takes all of it back, the ports and addresses chosen by the way included.
        raise _TrialOver
    return found[0]


def differences(guests: GuestContext, xml: bytes) -> list[str]:
    """What a running guest's metadata says and what is in force, where they differ."""
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
    """Publish what a running guest's metadata says; returns what was wrong.

    ``known``: it was recorded before libvirt said that it runs.  Where it
    is not any more, it has stopped since.
    """
    plain = libvirt_xml.parse_domain_nics(xml)
    if not _is_concerned(guests, plain) or (known and guests.registry.guest(plain.uuid) is None):
        return []
    before = guests.held(plain.uuid)
    changed = publish(guests, libvirt_xml.parse_domain(xml), xml)
    after = guests.held(plain.uuid)
    told = [f"{what}: published" for what in only_in(after, before)]
    told += [f"{what}: not published any more" for what in only_in(before, after)]
    return told or changed


def end(guests: GuestContext, record: GuestRecord) -> list[str]:
    """Forget a guest that has stopped, unless it was started again since."""
    if guests.registry.guest(record.uuid) != record:
        return []
    withdraw(guests, record.uuid)
    forget(guests, record.uuid)
    return ["is not active in libvirt any more: removed"] if record.this_boot else []


def tidy(guests: GuestContext) -> None:
    """Remove the run-time marks of guests that are not recorded any more."""
    marks = names.guest_directory("").glob("*")
    for uuid in {mark.name for mark in marks} - {g.uuid for g in guests.registry.guests()}:
        with guests.locked(uuid):
            # It may have begun to start.
            if guests.registry.guest(uuid) is None:
                discard_guest_directory(uuid)


def follow(guests: GuestContext, uuid: str, ask: Callable[[], bytes | None]) -> list[str]:
    """Bring one guest to what libvirt says of it; returns what was wrong.

    ``ask`` gets its XML from libvirt, None where it does not run.  It is asked
    after the record was read, see ``converge``.  What is recorded in the
    meantime makes libvirt tell of the guest again.
    """
    record = guests.registry.guest(uuid)
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
    """Withdraw what leads to NICs that have gone, of which a bridge's tell no hook."""
    for nic in libvirt_xml.parse_domain_nics(record.document).nics:
        if not any(is_same_nic(nic, each) for each in plain.nics):
            unplug(guests, record.uuid, nic)


def _is_concerned(guests: GuestContext, plain: Domain) -> bool:
    return bool(guests.attachments(plain)) or guests.registry.guest(plain.uuid) is not None


def _says_the_same(record: GuestRecord, xml: bytes) -> bool:
    """Whether a guest's XML says no more or less than what is published."""
    if not (record.published and record.this_boot):
        return False
    with suppress(DocumentError):
        return libvirt_xml.parse_domain(record.document) == libvirt_xml.parse_domain(xml)
    return False
