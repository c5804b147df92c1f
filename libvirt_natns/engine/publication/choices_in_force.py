# SPDX-License-Identifier: LGPL-2.1-or-later
"""Choices read back from a namespace's rules, for a network or guest without a record."""

from libvirt_natns.addresses import Address, Family
from libvirt_natns.engine.publication.allocation import Allocation
from libvirt_natns.engine.publication.attachment import Attachment
from libvirt_natns.engine.publication.choices import AutoPortRequest
from libvirt_natns.errors import ConflictError
from libvirt_natns.firewall.translations import Translations
from libvirt_natns.model.metadata import AddressRequest
from libvirt_natns.model.network import Domain
from libvirt_natns.values import quoted


class ChoicesInForce:
    """Choices that are in force already; others are chosen anew."""

    def __init__(self, choices: Allocation, *rules: Translations) -> None:
        self._choices = choices
        self._ports = [port for each in rules for port in each.ports]
        self._own = {target: own for each in rules for target, own in each.own.items()}

    def knows(self, domain: Domain, attachment: Attachment, family: Family) -> bool:
        return self._choices.knows(domain, attachment, family)

    def target(self, domain: Domain, attachment: Attachment, family: Family) -> Address:
        return self._choices.target(domain, attachment, family)

    def port(self, request: AutoPortRequest) -> int:
        """Return the port that leads to the request's target, unless another range has it."""
        key, store = request.key, self._choices.store
        kept = {port for proto, port in store.chosen_ports.all() if proto == key.proto}
        for each in self._ports:
            meant = (each.proto, each.to) == (key.proto, key.target_port)
            fixed = any(first <= each.port <= last for first, last in request.avoided)
            if meant and each.target in request.targets and not fixed and each.port not in kept:
                store.chosen_ports.put(key, each.port)
                return each.port
        return self._choices.port(request)

    def address(
        self, request: AddressRequest, domain: Domain, attachment: Attachment, family: Family
    ) -> Address:
        """Return the guest's own address without a probe: its namespace answers for it."""
        own = self._own.get(self.target(domain, attachment, family))
        if own is None or request.address not in (None, own):
            return self._choices.address(request, domain, attachment, family)
        who = f"guest {quoted(domain.name)}"
        key = f"{domain.uuid}/{attachment.nic.mac}"
        store, segment = self._choices.store, attachment.segment
        if not store.leases.reserve(segment.name, segment.bridge, key, own):
            raise ConflictError(
                f"{who}: {own} of upstream {segment.name} is leased to another network or guest"
            )
        return own
