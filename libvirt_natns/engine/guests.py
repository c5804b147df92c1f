# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs for guests: claim, publish, withdraw, plug, unplug.

A guest is recorded when its metadata has anything to say and one of its NICs is
in a network of ours.  What it publishes is part of the plan of the network
concerned, so ``check`` and ``sync`` know it without being told.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from libvirt_natns import names
from libvirt_natns.addresses import FAMILIES
from libvirt_natns.documents import domain_edit, libvirt_xml, xml_sniff
from libvirt_natns.engine import forwards
from libvirt_natns.engine.allocation import Choices, check_host, known_addresses, scopes
from libvirt_natns.engine.apply import Undo
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.forwards import ANY, ANY6, Attachment
from libvirt_natns.engine.observer import NOBODY
from libvirt_natns.errors import ConflictError, DocumentError, NatnsError
from libvirt_natns.kernel import conntrack
from libvirt_natns.kernel.locks import locked
from libvirt_natns.model.metadata import AddressRequest, PortForward
from libvirt_natns.model.network import Domain, Network, Nic
from libvirt_natns.model.publication import Forward, StaticNat
from libvirt_natns.records import dataclass, replace
from libvirt_natns.state.claims import Claims, ClaimScope
from libvirt_natns.state.guests import GuestRecord
from libvirt_natns.state.leases import StoredLease
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store


@dataclass(frozen=True, slots=True)
class Guests:
    """Guests' verbs over an engine and the guests' tables."""

    engine: Engine

    @property
    def store(self) -> Store:
        return self.engine.store

    # -- verbs -------------------------------------------------------------

    def claim(self, domain: Domain, xml: bytes) -> None:
        """Check and take all that a starting guest wants; nothing is in force yet.

        Raises DocumentError, ConflictError or LeaseError to refuse the start.
        """
        attachments = self.attachments(domain)
        if domain.nat is None or not attachments:
            self.forget(domain.uuid)
            return
        # It does not run: what is still in force is of an end that nobody noticed.
        self.withdraw(domain.uuid)
        with self._locked(domain.uuid), Undo() as undo:
            # Also where the state database is what fails.
            undo.add(_discard_directory, domain.uuid)
            undo.add(self._forget, domain.uuid)
            self._undo_reservations(attachments, undo)
            claims = self._resolve(domain, attachments)
            self.store.guests.put(domain.uuid, domain.name, xml, published=False)
            self.store.claims.put(claims, self._scopes(claims), published=False)
            undo.pop_all()

    def publish(self, domain: Domain, xml: bytes) -> list[str]:
        """Put into force what a guest's metadata says now, in place of what it said.

        Flows of what is no longer published are cut.  Returns what was changed,
        in words.  Raises what ``claim`` does, and keeps the earlier state then.
        """
        attachments = self.attachments(domain)
        if (domain.nat is None or not attachments) and not self.store.guests.get(domain.uuid):
            return []
        with self._locked(domain.uuid):
            before = self.held(domain.uuid)
            with Undo() as undo:
                undo.add(self._restore, before, self.engine.store.leases.all_of(domain.uuid))
                self._undo_reservations(attachments, undo)
                claims = self._resolve(self._of_what_runs(domain, attachments), attachments)
                self.store.claims.put(claims, self._scopes(claims), published=True)
                changed = self._apply(self._networks(before) | self._networks(claims))
                undo.pop_all()
            self.store.guests.put(domain.uuid, domain.name, xml, published=True)
            self._cut(before, claims)
            if domain.nat is None:
                self._forget(domain.uuid)
        return changed

    def withdraw(self, uuid: str) -> None:
        """Take out of force all that a guest publishes, and cut its flows.

        A guest whose start has failed published nothing, but DHCP is to know the
        addresses that were reserved for it, and stay so.
        """
        record = self.store.guests.get(uuid)
        if record is None:
            return
        with self._locked(uuid):
            before = self.held(uuid)
            networks = self._networks(self.held(uuid, published=record.published))
            self.store.claims.set_published(uuid, False)
            try:
                self._apply(networks)
            finally:
                self._cut(before, Claims(uuid))

    def forget(self, uuid: str) -> None:
        """Withdraw a guest and give its claims back; reservations stay."""
        record = self.store.guests.get(uuid)
        if record is None:
            return
        try:
            if record.published:
                self.withdraw(uuid)
        finally:
            with self._locked(uuid):
                self._forget(uuid)

    def plug(self, owner: str, nic: Nic) -> None:
        """Publish what a recorded, running guest says about a NIC that it just got."""
        record = self.store.guests.get(owner)
        if record is None or not record.published:
            return
        known = libvirt_xml.parse_domain_nics(record.document).nics
        if any(_same(each, nic) for each in known):
            return
        xml = domain_edit.with_nic(record.document, nic)
        self.publish(libvirt_xml.parse_domain(xml), xml)

    def unplug(self, owner: str, nic: Nic) -> None:
        """Withdraw what a running guest published through a NIC that was taken out."""
        record = self.store.guests.get(owner)
        if record is None or not record.published:
            return
        xml = domain_edit.without_nic(record.document, nic)
        try:
            self.publish(libvirt_xml.parse_domain(xml), xml)
        except (DocumentError, ConflictError):
            # Most often something in the metadata names that very NIC.
            self._drop(record, nic, xml)

    def _drop(self, record: GuestRecord, nic: Nic, xml: bytes) -> None:
        """Withdraw what leads to a NIC, and leave the rest as it is."""
        owner = record.uuid
        attachments = self.attachments(libvirt_xml.parse_domain_nics(record.document))
        with self._locked(owner):
            before = self.held(owner)
            rest = self._without(before, nic, record.name, attachments)
            self.store.claims.put(rest, self._scopes(rest), published=True)
            self.store.guests.put(owner, record.name, xml, published=True)
            try:
                self._apply(self._networks(before))
            finally:
                self._cut(before, rest)

    def _without(self, held: Claims, nic: Nic, name: str, attachments: list[Attachment]) -> Claims:
        """What is left of a guest's claims without one of its NICs."""
        mine = [each for each in attachments if _same(each.nic, nic)]
        others = {each.network.uuid for each in attachments if not _same(each.nic, nic)}

        def stays(claim: Forward | StaticNat) -> bool:
            for network in (each.network for each in mine):
                if claim.network == network.uuid:
                    # Another NIC in that network keeps what leads to itself.
                    known = known_addresses(self.store, network, nic.mac, name)
                    return network.uuid in others and claim.target not in known
            return True

        return Claims(
            held.owner, tuple(filter(stays, held.forwards)), tuple(filter(stays, held.addresses))
        )

    def refresh(self, network: str) -> None:
        """Resolve again the guests of a network whose DHCP hosts may have changed."""
        with ExitStack() as everybody:
            for record in self.store.guests.in_network(network):
                if record.published:
                    # One that cannot be resolved any more must not keep the others back.
                    everybody.callback(self._publish_again, record)

    def rejoin(self, network: Network) -> None:
        """Publish again what running guests publish in a network that was down meanwhile.

        The network may have another name by now, and the guest a NIC in it no more.
        A guest that cannot be published again keeps nobody from starting a network:
        ``check`` tells of it.
        """
        claiming = {record.uuid for record in self.store.guests.in_network(network.uuid)}
        for record in self.store.guests.all():
            if not record.published or not record.this_boot:
                continue
            if record.uuid not in claiming and not _may_name(record.document, network):
                continue
            # One guest that cannot be published again must not keep the others back.
            with suppress(NatnsError, OSError):
                if (record.uuid in claiming) != _has_nic(record, network):
                    self._publish_again(record)

    def _publish_again(self, record: GuestRecord) -> None:
        self.publish(libvirt_xml.parse_domain(record.document), record.document)

    def trial(self, domain: Domain) -> Claims:
        """What ``publish`` would put into force; nothing is taken, kept or asked for.

        Raises what ``claim`` does.
        """
        found: list[Claims] = []
        with suppress(_TrialOver), self.engine.store.transaction():
            attachments = self.attachments(domain)
            wanted = self._of_what_runs(domain, attachments)
            claims = self._resolve(wanted, attachments, trial=True)
            self.store.claims.put(claims, self._scopes(claims), published=True)
            found.append(claims)
            # Takes all of it back, the ports and addresses chosen by the way included.
            raise _TrialOver
        return found[0]

    def differences(self, xml: bytes) -> list[str]:
        """What a running guest's metadata says and what is in force, where they differ."""
        plain = libvirt_xml.parse_domain_nics(xml)
        if not self._concerned(plain):
            return []
        try:
            wanted = self.trial(libvirt_xml.parse_domain(xml))
        except NatnsError as error:
            return [str(error)]
        held = self._in_force(self.held(plain.uuid))
        return [
            *(f"is not published: {what}" for what in _only(wanted, held)),
            *(f"is published still: {what}" for what in _only(held, wanted)),
        ]

    def converge(self, xml: bytes, known: bool) -> list[str]:
        """Publish what a running guest's metadata says; returns what was wrong.

        ``known``: it was recorded before libvirt said that it runs.  Where it
        is not any more, it has stopped since.
        """
        plain = libvirt_xml.parse_domain_nics(xml)
        if not self._concerned(plain) or (known and self.store.guests.get(plain.uuid) is None):
            return []
        before = self.held(plain.uuid)
        changed = self.publish(libvirt_xml.parse_domain(xml), xml)
        after = self.held(plain.uuid)
        told = [f"{what}: published" for what in _only(after, before)]
        told += [f"{what}: not published any more" for what in _only(before, after)]
        return told or changed

    def end(self, record: GuestRecord) -> list[str]:
        """Forget a guest that has stopped, unless it was started again since."""
        if self.store.guests.get(record.uuid) != record:
            return []
        self.withdraw(record.uuid)
        self.forget(record.uuid)
        return ["is not active in libvirt any more: removed"] if record.this_boot else []

    def tidy(self) -> None:
        """Remove the run-time marks of guests that are not recorded any more."""
        marks = names.guest_directory("").glob("*")
        for uuid in {mark.name for mark in marks} - {g.uuid for g in self.store.guests.all()}:
            with self._locked(uuid):
                # It may have begun to start.
                if self.store.guests.get(uuid) is None:
                    _discard_directory(uuid)

    def follow(self, uuid: str, ask: Callable[[], bytes | None]) -> list[str]:
        """Bring one guest to what libvirt says of it; returns what was wrong.

        ``ask`` gets its XML from libvirt, None where it does not run.  It is asked
        after the record was read, see ``converge``.  What is recorded in the
        meantime makes libvirt tell of the guest again.
        """
        record = self.store.guests.get(uuid)
        xml = ask()
        if xml is None:
            return self.end(record) if record else []
        if record is None:
            return self.converge(xml, False) if xml_sniff.at_domain(xml).annotated else []
        if _says_the_same(record, xml):
            return []
        self._unplug_missing(record, libvirt_xml.parse_domain_nics(xml))
        return self.converge(xml, True)

    def _unplug_missing(self, record: GuestRecord, plain: Domain) -> None:
        """Withdraw what leads to NICs that have gone, of which a bridge's tell no hook."""
        for nic in libvirt_xml.parse_domain_nics(record.document).nics:
            if not any(_same(nic, each) for each in plain.nics):
                self.unplug(record.uuid, nic)

    def _concerned(self, plain: Domain) -> bool:
        return bool(self.attachments(plain)) or self.store.guests.get(plain.uuid) is not None

    # -- attachments -------------------------------------------------------

    def attachments(self, domain: Domain) -> list[Attachment]:
        """A guest's NICs in networks of ours that run or start, in the domain's order."""
        return [self._attachment(nic, record) for nic, record in in_ours(self.engine.store, domain)]

    def _attachment(self, nic: Nic, record: NetworkRecord) -> Attachment:
        planner = self.engine.planner
        network = libvirt_xml.parse_network(record.document)
        upstream = planner.upstream(network)
        if planner.lacks(network, upstream):
            raise ConflictError(
                f"network {network.name} has no upstream address", "run virt-natns sync"
            )
        outside = planner.outside(network, upstream)
        return Attachment(nic, planner.completed(network, upstream), upstream, outside)

    def _scopes(self, claims: Claims) -> dict[str, ClaimScope]:
        return scopes(self.engine.store, self._networks(claims))

    # -- resolving ---------------------------------------------------------

    def _resolve(
        self, domain: Domain, attachments: list[Attachment], *, trial: bool = False
    ) -> Claims:
        engine = self.engine
        told = NOBODY if trial else engine.observer
        choices = Choices(engine.config, engine.store, engine.kernel, told, not trial)
        claims = forwards.resolve(domain, attachments, choices)
        # What is in force already stays so, whatever has come up in the host since.
        held = set(self.store.claims.forwards(owner=domain.uuid))
        fresh = Claims(domain.uuid, tuple(f for f in claims.forwards if f not in held))
        check_host(fresh, self._scopes(fresh), self.engine.kernel.host_addresses())
        return claims

    def _of_what_runs(self, domain: Domain, attachments: list[Attachment]) -> Domain:
        """A running guest without what it says of networks of ours that are down.

        It is published again once they run.
        """
        absent = [nic for nic in domain.nics if not any(_same(nic, at.nic) for at in attachments)]
        if domain.nat is None or not absent:
            return domain
        down = [each for each in self.engine.store.networks.all() if not each.runs]
        stopped = [(nic, each) for nic in absent for each in down if _is_in(nic, each)]

        def stays(wish: PortForward | AddressRequest) -> bool:
            if wish.network is None and wish.mac is None:
                return True
            return not any(
                wish.network in (None, record.name) and wish.mac in (None, nic.mac)
                for nic, record in stopped
            )

        nat = replace(
            domain.nat,
            forwards=tuple(filter(stays, domain.nat.forwards)),
            addresses=tuple(filter(stays, domain.nat.addresses)),
        )
        return replace(domain, nat=nat)

    def _undo_reservations(self, attachments: list[Attachment], undo: Undo) -> None:
        """Have ``undo`` give up the DHCP addresses that are reserved from here on."""
        for attachment in attachments:
            network, mac = attachment.network.uuid, attachment.nic.mac
            for family in FAMILIES:
                if self.store.reservations.get(network, mac, family) is None:
                    undo.add(self.store.reservations.drop, network, mac, family)

    # -- applying ----------------------------------------------------------

    def held(self, owner: str, *, published: bool = True) -> Claims:
        """What a guest, or a network itself, has published; else also what it has taken."""
        return Claims(
            owner,
            self.store.claims.forwards(owner=owner, published=published),
            self.store.claims.static_nats(owner=owner, published=published),
        )

    def _in_force(self, claims: Claims) -> Claims:
        """Claims in networks that run: a network that is down publishes nothing."""
        found = {uuid: self.engine.store.networks.get(uuid) for uuid in self._networks(claims)}
        run = {uuid for uuid, record in found.items() if record and record.runs}
        return Claims(
            claims.owner,
            tuple(each for each in claims.forwards if each.network in run),
            tuple(each for each in claims.addresses if each.network in run),
        )

    @staticmethod
    def _networks(claims: Claims) -> set[str]:
        used = {forward.network for forward in claims.forwards}
        return used | {static.network for static in claims.addresses}

    def _apply(self, networks: set[str]) -> list[str]:
        """Bring the namespaces of these networks to what the tables say now."""
        changed = []
        for uuid in sorted(networks):
            record = self.engine.store.networks.get(uuid)
            if record is not None and record.state == "up" and record.this_boot:
                network = libvirt_xml.parse_network(record.document)
                changed += self.engine.up(network, record.document)
        return changed

    def _restore(self, claims: Claims, leases: list[StoredLease]) -> None:
        self.engine.store.leases.restore(leases)
        self.store.claims.put(claims, self._scopes(claims), published=True)
        self._apply(self._networks(claims))

    def cut_since(self, before: Claims) -> None:
        """End the flows of what its owner held and does not any more."""
        self._cut(before, self.held(before.owner))

    def _cut(self, before: Claims, after: Claims) -> None:
        """End the flows of what is published no more, and of nothing else."""
        gone: list[Forward | StaticNat] = [*(set(before.forwards) - set(after.forwards))]
        gone += set(before.addresses) - set(after.addresses)
        for uuid in {claim.network for claim in gone}:
            record = self.engine.store.networks.get(uuid)
            if record is None or record.state != "up":
                continue
            leased = self.engine.store.leases.of(record.upstream, uuid)
            here = [claim for claim in gone if claim.network == uuid]
            for family, address, any_address in (
                (4, leased.address, ANY),
                (6, leased.address6, ANY6),
            ):
                mine = [claim for claim in here if claim.target.version == family]
                if not mine:
                    continue
                conntrack.cut(record.namespace, mine, address or any_address)
                if record.kind in ("host", "router") and address is not None:
                    translated = [each for each in mine if each.address != each.target]
                    conntrack.cut_on_host(translated, address, router=_router(record))

    def _forget(self, uuid: str) -> None:
        try:
            self.store.guests.forget(uuid)
        finally:
            _discard_directory(uuid)

    @contextmanager
    def _locked(self, uuid: str) -> Iterator[None]:
        with locked(names.guest_directory(uuid)):
            yield


def _router(record: NetworkRecord) -> str | None:
    """The router namespace that leads to a network; None for the host."""
    return names.router_namespace(record.upstream) if record.kind == "router" else None


class _TrialOver(Exception):
    """Ends a transaction that is to leave nothing."""


def _only(these: Claims, those: Claims) -> list[str]:
    """What stands in ``these`` alone, in words."""
    forwarded = set(those.forwards)
    addresses = set(those.addresses)
    found = [forwards.said(each) for each in these.forwards if each not in forwarded]
    return found + [forwards.said(each) for each in these.addresses if each not in addresses]


def in_ours(store: Store, domain: Domain) -> list[tuple[Nic, NetworkRecord]]:
    """A guest's NICs in networks of ours that run or start, by recorded state alone."""
    return [
        (nic, record)
        for nic in domain.nics
        for record in _of_nic(store, nic)
        if record.state in ("starting", "up") and record.this_boot
    ]


def _of_nic(store: Store, nic: Nic) -> list[NetworkRecord]:
    if nic.network:
        found = store.networks.holders(namespace=names.namespace(nic.network))
        return [record for record in found if record.name == nic.network]
    return store.networks.holders(bridge=nic.bridge) if nic.bridge else []


def _may_name(xml: bytes, network: Network) -> bool:
    """False if a guest's XML surely has no NIC in a network: parsing takes far longer."""
    # libvirt writes UTF-8, and these characters of a name as entities.
    if any(letter in network.name for letter in "&<>'\""):
        return True
    return any(name.encode() in xml for name in (network.name, network.bridge) if name)


def _has_nic(record: GuestRecord, network: Network) -> bool:
    """True if one of a guest's NICs is in a network, by name or by bridge."""
    return any(_is_in(nic, network) for nic in libvirt_xml.parse_domain_nics(record.document).nics)


def _is_in(nic: Nic, network: Network | NetworkRecord) -> bool:
    return nic.network == network.name if nic.network else nic.bridge == network.bridge


def _same(one: Nic, other: Nic) -> bool:
    return (one.mac, one.network) == (other.mac, other.network)


def _says_the_same(record: GuestRecord, xml: bytes) -> bool:
    """Whether a guest's XML says no more or less than what is published."""
    if not (record.published and record.this_boot):
        return False
    with suppress(DocumentError):
        return libvirt_xml.parse_domain(record.document) == libvirt_xml.parse_domain(xml)
    return False


def _discard_directory(uuid: str) -> None:
    directory = names.guest_directory(uuid)
    for each in (directory, directory.parent):
        with suppress(OSError):
            each.rmdir()
