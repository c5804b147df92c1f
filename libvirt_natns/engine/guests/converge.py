# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that libvirt has active: compared with their claims, and brought to them."""

from collections.abc import Callable
from contextlib import suppress

from libvirt_natns import names
from libvirt_natns.documents import libvirt_xml, xml_sniff
from libvirt_natns.documents.libvirt_xml import DomainDocument
from libvirt_natns.documents.xml_sniff import Glance
from libvirt_natns.engine.guests.guest_claims import in_force, of_what_runs, only_in, resolve_claims
from libvirt_natns.engine.guests.guest_context import GuestContext, discard_guest_directory
from libvirt_natns.engine.guests.guest_run import GuestRun, read, with_metadata
from libvirt_natns.engine.guests.nics import is_same_nic
from libvirt_natns.engine.guests.verbs import (
    Publication,
    forget,
    put_into_force,
    unplug,
    withdraw,
)
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
    return _trial(guests, read(guests, domain, b""))


def _trial(guests: GuestContext, run: GuestRun) -> Claims:
    outcome: list[Claims] = []
    with suppress(_TrialOver), guests.engine.store.transaction():
        claims = resolve_claims(guests, of_what_runs(guests, run), run, trial=True)
        guests.store.claims.put(claims, run.scopes, published=True)
        outcome.append(claims)
        # The transaction is rolled back, with the ports and addresses that it has chosen.
        raise _TrialOver
    return outcome[0]


def differences(guests: GuestContext, xml: bytes) -> list[str]:
    """Return how a running guest's metadata differs from its claims in force, in words."""
    seen = xml_sniff.at_domain(xml)
    if not _may_be_recorded(seen) and guests.store.guests.get(seen.uuid) is None:
        return []
    try:
        document = libvirt_xml.read_domain(xml)
        run = read(guests, document.plain, xml)
        if not run.is_concerned:
            return []
        run = with_metadata(guests, run, document.domain)
        wanted = _trial(guests, run)
    except NatnsError as error:
        return [str(error)]
    held = in_force(guests, guests.held(run.uuid))
    return [
        *(["has other NICs than DHCP knows"] if _has_other_nics(run) else []),
        *(f"is not published: {what}" for what in only_in(wanted, held)),
        *(f"is published still: {what}" for what in only_in(held, wanted)),
    ]


def _may_be_recorded(seen: Glance) -> bool:
    """True if a guest has metadata, or a choice among NICs."""
    return seen.annotated or seen.nics > 1


def _has_other_nics(run: GuestRun) -> bool:
    """True if a guest that chooses among its NICs has other NICs than recorded."""
    if not (run.is_recorded and run.domain.has_choice):
        return False
    if run.record is None:
        return run.domain.nat is None
    earlier = libvirt_xml.parse_domain_nics(run.record.document)
    return _places(earlier) != _places(run.domain)


def _places(domain: Domain) -> set[tuple[str, str | None]]:
    """Return where a guest's NICs are; libvirt names a network's bridge once the guest runs."""
    return {(nic.mac, nic.network or nic.bridge) for nic in domain.nics}


def converge(guests: GuestContext, xml: bytes, record: GuestRecord | None) -> list[str]:
    """Publish a running guest's metadata, and return what was wrong.

    ``record`` is the guest's row from before libvirt was asked for ``xml``.  If the row is
    another one by now, an event has brought newer XML, or the guest has stopped since.
    """
    document = libvirt_xml.read_domain(xml)
    run = read(guests, document.plain, xml)
    if not run.is_concerned or run.record != record:
        return []
    known = with_metadata(guests, run, document.domain)
    return _words(put_into_force(guests, known, unless_changed=True))


def _converge(guests: GuestContext, document: DomainDocument, xml: bytes, known: bool) -> list[str]:
    run = read(guests, document.plain, xml)
    if not run.is_concerned or (known and run.record is None):
        return []
    return _words(put_into_force(guests, with_metadata(guests, run, document.domain)))


def _words(done: Publication) -> list[str]:
    """Return what was wrong before a guest's metadata was put into force."""
    lines = [f"{what}: published" for what in only_in(done.after, done.before)]
    lines += [f"{what}: not published any more" for what in only_in(done.before, done.after)]
    return lines or done.changed


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
        return converge(guests, xml, None) if _may_be_recorded(xml_sniff.at_domain(xml)) else []
    earlier, document = libvirt_xml.read_domain(record.document), libvirt_xml.read_domain(xml)
    if record.published and record.this_boot and _says_the_same(earlier, document):
        return []
    for nic in earlier.plain.nics:
        # No hook tells of the end of a bridge's NIC.
        if not any(is_same_nic(nic, present) for present in document.plain.nics):
            unplug(guests, uuid, nic)
    return _converge(guests, document, xml, True)


def _says_the_same(earlier: DomainDocument, document: DomainDocument) -> bool:
    with suppress(DocumentError):
        return earlier.domain == document.domain
    return False
