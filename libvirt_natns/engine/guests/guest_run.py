# SPDX-License-Identifier: LGPL-2.1-or-later
"""Facts of one guest for one verb: read once, and passed from step to step."""

from dataclasses import dataclass, replace

from libvirt_natns.engine.guests.guest_context import GuestContext
from libvirt_natns.engine.guests.nics import in_ours
from libvirt_natns.engine.publication.attachment import Attachment
from libvirt_natns.engine.publication.scopes import scopes_of
from libvirt_natns.model.network import Domain, Nic
from libvirt_natns.state.claim_scope import ClaimScope
from libvirt_natns.state.guests import GuestRecord
from libvirt_natns.state.networks import NetworkRecord


@dataclass(frozen=True, slots=True)
class GuestRun:
    """A guest with all that a verb decides by.

    ``record`` is the guest's row, None for a guest without one.  ``placed`` are its NICs in
    networks of ours that run or start, with these networks' rows.  ``attachments`` are the
    same NICs, for a guest with metadata.
    """

    domain: Domain
    xml: bytes
    record: GuestRecord | None
    placed: list[tuple[Nic, NetworkRecord]]
    attachments: list[Attachment]

    @property
    def uuid(self) -> str:
        return self.domain.uuid

    @property
    def is_concerned(self) -> bool:
        """True if the guest is recorded, or has a NIC in a network of ours."""
        return bool(self.placed) or self.record is not None

    @property
    def is_recorded(self) -> bool:
        """True if the guest is to be recorded while it runs.

        A guest that chooses among its NICs stays recorded while its network is down.
        """
        if self.domain.has_choice and self.record is not None:
            return True
        return bool(self.placed) and (self.domain.nat is not None or self.domain.has_choice)

    @property
    def scopes(self) -> dict[str, ClaimScope]:
        """The scope in which claims must be unique, by network."""
        return scopes_of({record.uuid: record for _, record in self.placed}.values())


def read(guests: GuestContext, domain: Domain, xml: bytes) -> GuestRun:
    """Return the facts for a verb on a guest.

    Raises ConflictError for a guest with metadata in a network without an upstream address.
    """
    placed = in_ours(guests.engine.store, domain)
    run = GuestRun(domain, xml, guests.store.guests.get(domain.uuid), placed, [])
    return with_metadata(guests, run, domain)


def with_metadata(guests: GuestContext, run: GuestRun, domain: Domain) -> GuestRun:
    """Return the facts of the same guest, now with the metadata in ``domain``.

    Raises as ``read`` does.
    """
    attachments = [] if domain.nat is None else guests.attached(run.placed)
    return replace(run, domain=domain, attachments=attachments)
