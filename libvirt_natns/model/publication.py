# SPDX-License-Identifier: LGPL-2.1-or-later
"""Published ports and static NAT, with all addresses and ports resolved."""

from dataclasses import dataclass
from typing import Literal

from libvirt_natns.addresses import Address, IPNetwork

PortProtocol = Literal["tcp", "udp", "sctp"]


@dataclass(frozen=True, slots=True)
class PortSet:
    """Ports of one protocol, ``first`` to ``last``, both included."""

    proto: PortProtocol
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Forward:
    """A published range of ports, with nothing left to look up.

    The namespace of ``network``, a uuid, translates.  Ports ``first`` to ``last`` of
    ``address`` go to ports ``to`` to ``to_last`` of ``target``.  They go one by one, or
    all of them onto the single port ``to``.
    ``owner`` is the uuid of the guest, or of the network itself.  ``address``
    equals ``target`` for a guest's own address, in a public subnet.
    """

    owner: str
    owner_name: str
    network: str
    proto: PortProtocol
    address: Address
    first: int
    last: int
    target: Address
    to: int
    to_last: int
    sources: tuple[IPNetwork, ...] = ()

    @property
    def own(self) -> bool:
        """True if the forward lets packets to the guest's own address in, untranslated."""
        return self.address == self.target


@dataclass(frozen=True, slots=True)
class StaticNat:
    """An upstream address that belongs to one guest, in both directions.

    ``ports`` limits the inward connections; empty means all of them.
    """

    owner: str
    owner_name: str
    network: str
    address: Address
    target: Address
    ports: tuple[PortSet, ...] = ()
