# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs for guests: claim, publish, withdraw, plug, unplug.

A guest is recorded when its metadata has anything to say and one of its NICs is
in a network of ours.  What it publishes is part of the plan of the network
concerned, so ``check`` and ``sync`` know it without being told.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from libvirt_natns import conntrack, document, forwards, names
from libvirt_natns.engine import Engine
from libvirt_natns.errors import ConflictError, NatnsError
from libvirt_natns.executor import Undo
from libvirt_natns.forwards import Attachment
from libvirt_natns.locks import locked
from libvirt_natns.model import Domain, Forward, Nic, StaticNat
from libvirt_natns.publication import Choices, check_host_ports, scopes
from libvirt_natns.registry import Claims, Registry, Scope
from libvirt_natns.store import Record


@dataclass(frozen=True, slots=True)
class Guests:
    """Guests' verbs over an engine and the guests' tables."""

    engine: Engine

    @property
    def registry(self) -> Registry:
        return self.engine.registry

    # -- verbs -------------------------------------------------------------

    def claim(self, domain: Domain, xml: bytes) -> None:
        """Check and take all that a starting guest wants; nothing is in force yet.

        Raises DocumentError, ConflictError or LeaseError to refuse the start.
        """
        attachments = self.attachments(domain)
        if domain.nat is None or not attachments:
            self.forget(domain.uuid)
            return
        with self._locked(domain.uuid), Undo() as undo:
            undo.add(self._forget, domain.uuid)
            self._undo_reservations(attachments, undo)
            claims = self._resolve(domain, attachments)
            self.registry.put_guest(domain.uuid, domain.name, xml, published=False)
            self.registry.claim(claims, self._scopes(), published=False)
            undo.pop_all()

    def publish(self, domain: Domain, xml: bytes) -> list[str]:
        """Put into force what a guest's metadata says now, in place of what it said.

        Flows of what is no longer published are cut.  Returns what was changed,
        in words.  Raises what ``claim`` does, and keeps the earlier state then.
        """
        attachments = self.attachments(domain)
        if (domain.nat is None or not attachments) and not self.registry.guest(domain.uuid):
            return []
        with self._locked(domain.uuid):
            before = self._held(domain.uuid)
            with Undo() as undo:
                undo.add(self._restore, before)
                self._undo_reservations(attachments, undo)
                claims = self._resolve(domain, attachments)
                self.registry.claim(claims, self._scopes(), published=True)
                changed = self._apply(self._networks(before) | self._networks(claims))
                undo.pop_all()
            self.registry.put_guest(domain.uuid, domain.name, xml, published=True)
            self._cut(before, claims)
        return changed

    def withdraw(self, uuid: str) -> None:
        """Take out of force all that a guest publishes, and cut its flows."""
        if self.registry.guest(uuid) is None:
            return
        with self._locked(uuid):
            before = self._held(uuid)
            self.registry.set_published(uuid, False)
            self._apply(self._networks(before))
            self._cut(before, Claims(uuid))

    def forget(self, uuid: str) -> None:
        """Withdraw a guest and give its claims back; reservations stay."""
        if self.registry.guest(uuid) is None:
            return
        self.withdraw(uuid)
        with self._locked(uuid):
            self._forget(uuid)

    def plug(self, owner: str, nic: Nic) -> None:
        """Publish what a recorded, running guest says about a NIC that it just got."""
        record = self.registry.guest(owner)
        if record is None or not record.published:
            return
        domain = document.parse_domain(record.document)
        if any(known.mac == nic.mac for known in domain.nics):
            return
        self.publish(replace(domain, nics=(*domain.nics, nic)), record.document)

    def unplug(self, owner: str, mac: str) -> None:
        """Withdraw what a running guest published through a NIC that was taken out."""
        record = self.registry.guest(owner)
        if record is None or not record.published:
            return
        domain = document.parse_domain_nics(record.document)
        before = self._held(owner)
        gone = {
            attachment.network.uuid
            for attachment in self.attachments(domain)
            if attachment.nic.mac == mac
        }
        rest = Claims(
            owner,
            tuple(f for f in before.forwards if f.network not in gone),
            tuple(s for s in before.addresses if s.network not in gone),
        )
        with self._locked(owner):
            self.registry.claim(rest, self._scopes(), published=True)
            self._apply(gone)
            self._cut(before, rest)

    def refresh(self, network: str) -> None:
        """Resolve again the guests of a network whose DHCP hosts may have changed."""
        for record in self.registry.guests():
            held = self._networks(self._held(record.uuid))
            if network in held and record.published:
                self.publish(document.parse_domain(record.document), record.document)

    def sync(self, active: dict[str, bytes]) -> list[tuple[str, str]]:
        """Bring all guests to what libvirt's active domains say; returns what was wrong.

        ``active`` holds the domains' XML by uuid.
        """
        found: list[tuple[str, str]] = []
        errors: list[str] = []
        for record in self.registry.guests():
            if record.uuid not in active:
                self.forget(record.uuid)
                found.append((record.name, "was not active any more: forwards removed"))
        for xml in active.values():
            try:
                found += self._sync_one(xml)
            except NatnsError as error:
                errors.append(str(error))
        if errors:
            raise NatnsError("; ".join(errors))
        return found

    def _sync_one(self, xml: bytes) -> list[tuple[str, str]]:
        plain = document.parse_domain_nics(xml)
        if not self.attachments(plain) and self.registry.guest(plain.uuid) is None:
            return []
        domain = document.parse_domain(xml)
        return [(domain.name, what) for what in self.publish(domain, xml)]

    # -- attachments -------------------------------------------------------

    def attachments(self, domain: Domain) -> list[Attachment]:
        """A guest's NICs in networks of ours that run or start, in the domain's order."""
        records = self.engine.store.networks("starting", "up")
        found = []
        for nic in domain.nics:
            for record in records:
                here = nic.network == record.name if nic.network else nic.bridge == record.bridge
                if here and record.this_boot:
                    found.append(self._attachment(nic, record))
        return found

    def _attachment(self, nic: Nic, record: Record) -> Attachment:
        network = document.parse_network(record.document)
        upstream = self.engine.planner.upstream(network)
        address = self.engine.store.lease(upstream.name, record.uuid)
        if address is None:
            raise ConflictError(
                f"network {network.name} has no upstream address", "run virt-natns sync"
            )
        return Attachment(nic, network, upstream, address)

    def _scopes(self) -> dict[str, Scope]:
        return scopes(self.engine.store)

    # -- resolving ---------------------------------------------------------

    def _resolve(self, domain: Domain, attachments: list[Attachment]) -> Claims:
        choices = Choices(self.engine.config, self.engine.store, self.engine.kernel)
        claims = forwards.resolve(domain, attachments, choices)
        check_host_ports(claims, self._scopes())
        return claims

    def _undo_reservations(self, attachments: list[Attachment], undo: Undo) -> None:
        """Have ``undo`` give up the DHCP addresses that are reserved from here on."""
        for attachment in attachments:
            network, mac = attachment.network.uuid, attachment.nic.mac
            if self.registry.reservation(network, mac) is None:
                undo.add(self.registry.drop_reservation, network, mac)

    # -- applying ----------------------------------------------------------

    def _held(self, owner: str) -> Claims:
        return Claims(
            owner,
            self.registry.forwards(owner=owner),
            self.registry.static_nats(owner=owner),
        )

    @staticmethod
    def _networks(claims: Claims) -> set[str]:
        used = {forward.network for forward in claims.forwards}
        return used | {static.network for static in claims.addresses}

    def _apply(self, networks: set[str]) -> list[str]:
        """Bring the namespaces of these networks to what the tables say now."""
        changed = []
        for uuid in sorted(networks):
            record = self.engine.store.network(uuid)
            if record is not None and record.state == "up" and record.this_boot:
                network = document.parse_network(record.document)
                changed += self.engine.up(network, record.document)
        return changed

    def _restore(self, claims: Claims) -> None:
        self.registry.claim(claims, self._scopes(), published=True)
        self._apply(self._networks(claims))

    def _cut(self, before: Claims, after: Claims) -> None:
        """End the flows of what is published no more, and of nothing else."""
        gone: list[Forward | StaticNat] = [*(set(before.forwards) - set(after.forwards))]
        gone += set(before.addresses) - set(after.addresses)
        for uuid in {claim.network for claim in gone}:
            record = self.engine.store.network(uuid)
            if record is None or record.state != "up":
                continue
            address = self.engine.store.lease(record.upstream, uuid)
            here = [claim for claim in gone if claim.network == uuid]
            conntrack.cut(record.namespace, here, address)
            if record.kind == "host":
                conntrack.cut(None, here, None)

    def _forget(self, uuid: str) -> None:
        self.registry.forget_guest(uuid)
        _discard_directory(uuid)

    @contextmanager
    def _locked(self, uuid: str) -> Iterator[None]:
        with locked(names.guest_directory(uuid)):
            yield


def _discard_directory(uuid: str) -> None:
    directory = names.guest_directory(uuid)
    for each in (directory, directory.parent):
        with suppress(OSError):
            each.rmdir()
