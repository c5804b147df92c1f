# SPDX-License-Identifier: LGPL-2.1-or-later
"""Choices for guests and networks that publish something: made once, and kept.

The choices are DHCP addresses, free ports, and upstream addresses of guests.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import chain

from libvirt_natns import names
from libvirt_natns.addresses import Address, Family
from libvirt_natns.engine.observer import NOBODY, Observer, note
from libvirt_natns.engine.publication.attachment import Attachment
from libvirt_natns.engine.publication.choices import AutoPortRequest
from libvirt_natns.engine.publication.dhcp_hosts import fixed_address, ranges_of
from libvirt_natns.engine.publication.reserved_address import is_tenable, reserve_address
from libvirt_natns.errors import ConflictError, LeaseError
from libvirt_natns.firewall.foreign_translations import ForeignTranslations
from libvirt_natns.kernel import address_probe, listening_ports
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.metadata import AddressRequest
from libvirt_natns.model.network import Domain
from libvirt_natns.state import pool
from libvirt_natns.state.applicants import Applicant
from libvirt_natns.state.claim_scope import ClaimScope
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import routers
from libvirt_natns.values import quoted


@dataclass(frozen=True, slots=True)
class Allocation:
    """Choices for guests, kept in the tables.

    Without ``asks``, no neighbour is asked whether an address is free: inside a
    transaction, all other writers would wait for the answer.
    """

    config: Config
    store: Store
    kernel: Kernel
    observer: Observer = NOBODY
    asks: bool = True

    def knows(self, domain: Domain, attachment: Attachment, family: Family) -> bool:
        network, mac = attachment.network, attachment.nic.mac
        fixed = fixed_address(network, mac, family, domain.name)
        return fixed is not None or bool(ranges_of(network, family))

    def target(self, domain: Domain, attachment: Attachment, family: Family) -> Address:
        network, mac = attachment.network, attachment.nic.mac
        fixed = fixed_address(network, mac, family, domain.name)
        kept = self.store.reservations.get(network.uuid, mac, family)
        if fixed is not None or kept is None or not is_tenable(attachment, kept):
            self.store.reservations.drop(network.uuid, mac, family)
        return fixed or reserve_address(self.store, domain.uuid, attachment, family)

    def port(self, request: AutoPortRequest) -> int:
        kept = self.store.chosen_ports.get(request.key)
        # In two transactions, two starts at once would choose the same port.
        with self.store.transaction():
            fits = kept is not None and self._is_free_still(request, kept)
            port = kept if fits else self._free_port(request)
            if port is not None:
                self.store.chosen_ports.put(request.key, port)
        if port is None:
            first, last = self.config.auto_ports
            raise ConflictError(
                f"no {request.key.proto} port from {first} to {last} is free for start='auto'",
                f"enlarge auto_ports in {names.CONFIG_FILE}",
            )
        if kept not in (None, port):
            line = f"{request.owner_name}: {request.key.proto} port {kept} is taken, {port} instead"
            note(self.observer, "choose a port", request.attachment.network.name, [line])
        return port

    def _is_free_still(self, request: AutoPortRequest, port: int) -> bool:
        """True if a chosen port is still free: its owner may not have used it for a while."""
        segment = request.attachment.segment
        scope = ClaimScope.of(segment.name, segment.kind)
        if _lies_in(port, request.avoided):
            return False
        if any(
            self.store.claims.is_claimed(request.key, scope, each, port) for each in request.listens
        ):
            return False
        if not scope.in_host or any(
            each.proto == request.key.proto and each.first == port
            for each in self.store.claims.forwards(owner=request.key.owner)
        ):
            # A port in force stays so, even if a program of the host listens on it by now.
            return True
        found = listening_ports.listeners(request.key.proto)
        if any(port in listening_ports.taken(found, each) for each in request.listens):
            return False
        return not _lead_elsewhere(self._translations(), request, port)

    def _translations(self) -> ForeignTranslations:
        return ForeignTranslations(lambda: self.kernel.host.addresses.beyond_link())

    def _free_port(self, request: AutoPortRequest) -> int | None:
        """Return the first port for start="auto" that is neither used nor kept for an owner.

        Without such a port, return a port that was kept for an owner that has gone.
        """
        proto = request.key.proto
        kept = {port for kind, port in self.store.chosen_ports.all() if kind == proto}
        used = listening_ports.listening(proto) | self.store.claims.ports(proto)
        used |= routers.ports_of_host(request.attachment.segment, proto)
        first, last = self.config.auto_ports
        segment = request.attachment.segment
        in_host = ClaimScope.of(segment.name, segment.kind).in_host
        translations = self._translations()

        def usable(port: int) -> bool:
            return (
                first <= port <= last
                and port not in used
                and not _lies_in(port, request.avoided)
                and not (in_host and _lead_elsewhere(translations, request, port))
            )

        fresh = (port for port in range(first, last + 1) if port not in kept)
        return next(filter(usable, chain(fresh, self.store.chosen_ports.reclaimable(proto))), None)

    def address(
        self, request: AddressRequest, domain: Domain, attachment: Attachment, family: Family
    ) -> Address:
        segment = attachment.segment
        if segment.side(family).by_dhcp:
            raise LeaseError(
                f"guest {quoted(domain.name)}: upstream {segment.name} has no address for"
                " <natns:address>, as its DHCP server leases one to each network",
                "publish ports with <natns:portForward>, or use an upstream with a pool",
            )
        if request.address is not None:
            who = f"guest {quoted(domain.name)}"
            self.store.claims.check_address(segment.name, request.address, domain.uuid, who)
        key = f"{domain.uuid}/{attachment.nic.mac}"
        mine = self.store.claims.static_nats(attachment.network.uuid, domain.uuid)
        present = {static.address for static in mine}

        def probe(addresses: Collection[Address]) -> set[Address]:
            # The namespace itself answers for addresses in force.
            asked = [address for address in addresses if address not in present]
            if not asked or not segment.probe or not self.asks:
                return set()
            return address_probe.probe(segment.bridge, asked, segment.probe)

        guest = Applicant(
            key, f"guest {quoted(domain.name)}", request.address, "natns:address", family=family
        )
        return pool.reserve(
            self.store, guest, segment, probe, self.kernel.host.addresses.beyond_link()
        )


def _lies_in(port: int, spans: Iterable[tuple[int, int]]) -> bool:
    return any(first <= port <= last for first, last in spans)


def _lead_elsewhere(translations: ForeignTranslations, request: AutoPortRequest, port: int) -> bool:
    """True if rules of other programs lead a port of the host elsewhere."""
    proto = request.key.proto
    return any(translations.taken(proto, each, port, port) for each in request.listens)
