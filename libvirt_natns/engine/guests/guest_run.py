# SPDX-License-Identifier: LGPL-2.1-or-later
"""Facts of one guest for one verb: read once, and passed from step to step."""

from dataclasses import dataclass

from libvirt_natns.engine.guests.guest_context import GuestContext
from libvirt_natns.engine.guests.nics import in_ours
from libvirt_natns.engine.publication.attachment import Attachment
from libvirt_natns.engine.publication.scopes import scopes_of
from libvirt_natns.model.network import Domain
from libvirt_natns.state.claim_scope import ClaimScope
from libvirt_natns.state.guests import GuestRecord
from libvirt_natns.state.networks import NetworkRecord


@dataclass(frozen=True, slots=True)
class GuestRun:
    """A guest with all that a verb decides by.

    ``record`` is the guest's row, None for a guest without one.  ``attachments`` are its
    NICs in networks of ours that run or start, and ``networks`` these networks' rows.
    """

    domain: Domain
    xml: bytes
    record: GuestRecord | None
    attachments: list[Attachment]
    networks: tuple[NetworkRecord, ...]

    @property
    def uuid(self) -> str:
        return self.domain.uuid

    @property
    def is_concerned(self) -> bool:
        """True if the guest is recorded, or has a NIC in a network of ours."""
        return bool(self.attachments) or self.record is not None

    @property
    def scopes(self) -> dict[str, ClaimScope]:
        """The scope in which claims must be unique, by network."""
        return scopes_of(self.networks)


def read(guests: GuestContext, domain: Domain, xml: bytes) -> GuestRun:
    """Return the facts for a verb on a guest.

    Raises ConflictError for a network without an upstream address.
    """
    placed = in_ours(guests.engine.store, domain)
    return GuestRun(
        domain,
        xml,
        guests.store.guests.get(domain.uuid),
        guests.attached(placed),
        tuple({record.uuid: record for _, record in placed}.values()),
    )
