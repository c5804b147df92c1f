# SPDX-License-Identifier: LGPL-2.1-or-later
"""Context that all verbs of guests share: an engine, and the guests' tables."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from libvirt_natns import names
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.guests.nics import in_ours
from libvirt_natns.engine.publication.attachment import Attachment
from libvirt_natns.engine.publication.scopes import scopes
from libvirt_natns.errors import ConflictError
from libvirt_natns.kernel.locks import locked
from libvirt_natns.model.network import Domain, Nic
from libvirt_natns.state.claim_scope import ClaimScope
from libvirt_natns.state.claims import Claims
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store
from libvirt_natns.values import quoted


@dataclass(frozen=True, slots=True)
class GuestContext:
    """An engine, and the guests' tables."""

    engine: Engine

    @property
    def store(self) -> Store:
        return self.engine.store

    def attachments(self, domain: Domain) -> list[Attachment]:
        """Return a guest's NICs in networks of ours that run or start, in the domain's order.

        Raises ConflictError for a network without an upstream address.
        """
        return self.attached(in_ours(self.engine.store, domain))

    def attached(self, placed: Iterable[tuple[Nic, NetworkRecord]]) -> list[Attachment]:
        """Return NICs in networks of ours with these networks' upstream addresses.

        Raises ConflictError for a network without an upstream address.
        """
        return [self._attachment(nic, record) for nic, record in placed]

    def _attachment(self, nic: Nic, record: NetworkRecord) -> Attachment:
        network = libvirt_xml.parse_network(record.document)
        run = self.engine.planner.run(network, record.document, record)
        if run.lacks:
            raise ConflictError(
                f"network {quoted(network.name)} has no upstream address", "run virt-natns sync"
            )
        return Attachment(nic, run.whole, run.segment, run.outside)

    def held(self, owner: str, *, published: bool = True) -> Claims:
        """Return the published claims of a guest or network; without ``published``, all claims."""
        return Claims(
            owner,
            self.store.claims.forwards(owner=owner, published=published),
            self.store.claims.static_nats(owner=owner, published=published),
        )

    def scopes(self, claims: Claims) -> dict[str, ClaimScope]:
        """Return where claims must be unique, by network."""
        return scopes(self.engine.store, networks_of(claims))

    @contextmanager
    def locked(self, uuid: str) -> Iterator[None]:
        """Hold a guest's lock for the body."""
        with locked(names.guest_directory(uuid)):
            yield

    def drop_record(self, uuid: str) -> None:
        """Forget a guest and its claims; the caller holds the guest's lock."""
        try:
            self.store.guests.forget(uuid)
        finally:
            discard_guest_directory(uuid)


def networks_of(claims: Claims) -> set[str]:
    """Return the networks in which claims are, by uuid."""
    used = {forward.network for forward in claims.forwards}
    return used | {static.network for static in claims.addresses}


def discard_guest_directory(uuid: str) -> None:
    """Remove a guest's run-time mark, and the parent after the last guest's."""
    directory = names.guest_directory(uuid)
    for each in (directory, directory.parent):
        with suppress(OSError):
            each.rmdir()
