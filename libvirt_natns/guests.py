# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs for guests: claim, publish, withdraw, plug, unplug.

A guest is recorded when its metadata has anything to say and one of its NICs is
in a network of ours.  What it publishes is part of the plan of the network
concerned, so ``check`` and ``sync`` know it without being told.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path

from libvirt_natns import conntrack, document, forwards, model, names, pool, sockets
from libvirt_natns.dnsmasq import LIBVIRT_DIRECTORY
from libvirt_natns.engine import Engine
from libvirt_natns.errors import ConflictError, NatnsError
from libvirt_natns.executor import Undo
from libvirt_natns.forwards import Attachment
from libvirt_natns.locks import locked
from libvirt_natns.model import AddressRequest, Domain, Forward, Nic, StaticNat
from libvirt_natns.registry import Claims, GuestRecord, Registry
from libvirt_natns.store import Record

__all__ = ["Guests"]


@dataclass(frozen=True, slots=True)
class Guests:
    """Guests' verbs over an engine and the guests' tables."""

    engine: Engine
    registry: Registry

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
            claims = self._resolve(domain, attachments)
            before = self._held(domain.uuid)
            with Undo() as undo:
                undo.add(self._restore, before)
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

    def _scopes(self) -> dict[str, str]:
        return {record.uuid: record.upstream for record in self.engine.store.networks()}

    # -- resolving ---------------------------------------------------------

    def _resolve(self, domain: Domain, attachments: list[Attachment]) -> Claims:
        claims = forwards.resolve(domain, attachments, _Choices(self.engine, self.registry))
        for forward in claims.forwards:
            if self._scopes()[forward.network] in self._host_upstreams():
                sockets.check_free(forward)
        return claims

    def _host_upstreams(self) -> set[str]:
        upstreams = self.engine.config.upstreams.values()
        return {upstream.name for upstream in upstreams if upstream.kind == "host"}

    # -- applying ----------------------------------------------------------

    def _held(self, owner: str) -> Claims:
        return Claims(
            owner,
            self.registry.forwards(owner=owner),
            self.registry.static_nats(owner=owner),
        )

    @staticmethod
    def _networks(claims: Claims) -> set[str]:
        return {claim.network for claim in (*claims.forwards, *claims.addresses)}

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
        gone: list[Forward | StaticNat] = [
            claim
            for claim in (*before.forwards, *before.addresses)
            if claim not in (*after.forwards, *after.addresses)
        ]
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
        names.remove_directory(names.guest_directory(uuid))

    @contextmanager
    def _locked(self, uuid: str) -> Iterator[None]:
        with locked(names.guest_directory(uuid)):
            yield


@dataclass(frozen=True, slots=True)
class _Choices:
    """What is chosen for guests, and kept in the tables."""

    engine: Engine
    registry: Registry

    def target(self, attachment: Attachment) -> IPv4Address:
        network, mac = attachment.network, attachment.nic.mac
        fixed = {
            host.mac: host.ip for subnet in network.subnets for host in subnet.hosts if host.mac
        }
        if mac in fixed:
            self.registry.drop_reservation(network.uuid, mac)
            return fixed[mac]
        kept = self.registry.reservation(network.uuid, mac)
        if kept is not None and kept not in fixed.values():
            return kept
        self.registry.drop_reservation(network.uuid, mac)
        return self._reserve(attachment)

    def _reserve(self, attachment: Attachment) -> IPv4Address:
        network, mac = attachment.network, attachment.nic.mac
        if not any(subnet.ranges for subnet in network.subnets):
            raise ConflictError(
                f"network {network.name} has no DHCP range to reserve an address from",
                "give guestAddress in <natns:portForward>, or a <range> in the network's <dhcp>",
            )
        try:
            return self.registry.reserve(network.uuid, mac, _free_addresses(attachment))
        except ConflictError as error:
            raise ConflictError(f"network {network.name}: {error.fact}", error.remedy) from error

    def port(
        self, owner: str, attachment: Attachment, proto: model.Protocol, target_port: int
    ) -> int:
        network = attachment.network.uuid
        kept = self.registry.chosen_port(owner, network, proto, target_port)
        if kept is not None:
            return kept
        taken = {port for kind, port in self.registry.chosen_ports() if kind == proto}
        for forward in self.registry.forwards(published=False):
            if forward.proto == proto:
                taken |= set(range(forward.first, forward.last + 1))
        first, last = self.engine.config.auto_ports
        for port in range(first, last + 1):
            if port not in taken and sockets.is_free(proto, port):
                self.registry.choose_port(owner, network, proto, target_port, port)
                return port
        raise ConflictError(
            f"no {proto} port from {first} to {last} is free for start='auto'",
            f"enlarge auto_ports in {names.CONFIG_FILE}",
        )

    def address(
        self, request: AddressRequest, domain: Domain, attachment: Attachment
    ) -> IPv4Address:
        key = f"{domain.uuid}/{attachment.nic.mac}"
        return pool.reserve_for_guest(self.engine, domain.name, key, attachment, request.address)


def _free_addresses(attachment: Attachment) -> Iterator[IPv4Address]:
    """Where a NIC's reservation may be: its present lease first, then what nobody holds."""
    network, mac = attachment.network, attachment.nic.mac
    fixed = {host.ip for subnet in network.subnets for host in subnet.hosts}
    fixed |= {subnet.gateway for subnet in network.subnets}
    leased = _leases(network.bridge or "")
    for address, holder in leased.items():
        inside = any(address in span for subnet in network.subnets for span in subnet.ranges)
        if holder == mac and inside and address not in fixed:
            yield address
    for subnet in network.subnets:
        for span in subnet.ranges:
            for number in range(int(span.first), int(span.last) + 1):
                address = IPv4Address(number)
                if address not in fixed and address not in leased:
                    yield address


def _leases(bridge: str) -> dict[IPv4Address, str]:
    """Present DHCP leases by address, as libvirt's helper has them on file."""
    try:
        entries = json.loads(Path(LIBVIRT_DIRECTORY, f"{bridge}.status").read_text() or "[]")
    except (OSError, ValueError):
        return {}
    found = {}
    for entry in entries:
        expiry = entry.get("expiry-time", 0)
        if expiry == 0 or expiry > time.time():
            found[IPv4Address(entry["ip-address"])] = str(entry.get("mac-address", "")).lower()
    return found


def is_stale(record: GuestRecord) -> bool:
    """Whether a guest was recorded before the machine was started anew."""
    return not record.this_boot
