# SPDX-License-Identifier: LGPL-2.1-or-later
"""Decisions on a forward that are made once and kept: the interface."""

from dataclasses import dataclass
from typing import Protocol

from libvirt_natns.addresses import Address, Family
from libvirt_natns.engine.publication.attachment import Attachment
from libvirt_natns.model.metadata import AddressRequest, PortForward
from libvirt_natns.model.network import Domain
from libvirt_natns.state.chosen_ports import PortKey


@dataclass(frozen=True, slots=True)
class Selector:
    """Attributes that tell one forward from another of the same owner, as in its metadata."""

    network: str | None
    mac: str | None
    address: str | None
    guest_address: str | None

    def __str__(self) -> str:
        given = (
            ("network", self.network),
            ("mac", self.mac),
            ("address", self.address),
            ("guestAddress", self.guest_address),
        )
        return " ".join(f"{name}={value}" for name, value in given if value is not None)


def selector(wanted: PortForward) -> Selector:
    """Return the selector of a forward."""
    address, guest = wanted.address, wanted.guest_address
    return Selector(
        wanted.network,
        wanted.mac,
        None if address is None else str(address),
        None if guest is None else str(guest),
    )


@dataclass(frozen=True, slots=True)
class AutoPortRequest:
    """A request for the port of a range with start="auto".

    ``listens`` are the addresses on which the forward listens, ``targets`` those to which
    it leads.  ``avoided`` are the owner's own fixed ports of that protocol.
    """

    key: PortKey
    owner_name: str
    attachment: Attachment
    listens: tuple[Address, ...]
    avoided: tuple[tuple[int, int], ...]
    targets: tuple[Address, ...] = ()


class Choices(Protocol):
    """Decisions that are made once and kept."""

    def knows(self, domain: Domain, attachment: Attachment, family: Family) -> bool:
        """True if the NIC's address of a family can be known."""

    def target(self, domain: Domain, attachment: Attachment, family: Family) -> Address:
        """Return the NIC's DHCP address; reserve an address for a NIC without one."""

    def port(self, request: AutoPortRequest) -> int:
        """Return a free port for start="auto", the same for one key unless others have it."""

    def address(
        self, request: AddressRequest, domain: Domain, attachment: Attachment, family: Family
    ) -> Address:
        """Return the upstream address of a guest's static NAT."""
