# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ``<natns:nat>`` metadata of networks and guests, as the user wrote it.

Names are not looked up yet: ``publication`` has forwards with addresses and ports resolved.
"""

from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Literal

from libvirt_natns.addresses import Address, Family, IPNetwork
from libvirt_natns.model.publication import PortProtocol, PortSet
from libvirt_natns.model.subnet import Subnet
from libvirt_natns.model.upstream import Helper

DefaultRoute = Literal["auto", "yes", "no"]
"""Does DHCP give a NIC its default route, and DNS servers?

"auto": yes, unless another NIC of the guest is in a network that leads outside."""


@dataclass(frozen=True, slots=True)
class PortRange:
    """libvirt's ``<range>``: ports ``start`` to ``end``, onto ``to`` upwards.

    With ``onto_one`` (``toEnd`` equals ``to``) all ports lead to the port ``to``.
    With ``auto`` (``start="auto"``) a free port is chosen for ``to``; ``start`` and
    ``end`` are 0 until then.
    """

    start: int
    end: int
    to: int
    exclude: bool = False
    auto: bool = False
    onto_one: bool = False


@dataclass(frozen=True, slots=True)
class PortForward:
    """libvirt's ``<portForward>``, in our XML namespace."""

    proto: PortProtocol
    ranges: tuple[PortRange, ...]
    address: Address | None = None
    network: str | None = None
    mac: str | None = None
    guest_address: Address | None = None
    sources: tuple[IPNetwork, ...] = ()

    @property
    def family(self) -> Family | None:
        """Return the single family of all its addresses; None for a forward without addresses."""
        named = (self.address, self.guest_address, *self.sources)
        return next((each.version for each in named if each is not None), None)


@dataclass(frozen=True, slots=True)
class AddressRequest:
    """``<natns:address>``: an upstream address of a guest's own.

    ``address`` None is "auto": an address from the upstream's pool.  ``ports`` limits
    the inward connections; empty means all of them.
    """

    address: Address | None = None
    network: str | None = None
    mac: str | None = None
    ports: tuple[PortSet, ...] = ()


@dataclass(frozen=True, slots=True)
class InterfaceRequest:
    """``<natns:interface>``: the default route of a single NIC, by ``network`` or by ``mac``."""

    default_route: DefaultRoute
    network: str | None = None
    mac: str | None = None


@dataclass(frozen=True, slots=True)
class NatMetadata:
    """The ``<natns:nat>`` element of a network or a domain.

    ``subnets`` are its ``<natns:ip>`` elements, at most one of each family.
    ``default_route`` None is as the network, or the configuration, says.  ``helpers`` None is
    as the upstream says.
    """

    enabled: bool = True
    upstream: str | None = None
    address: Address | None = None
    address6: IPv6Address | None = None
    subnets: tuple[Subnet, ...] = ()
    forwards: tuple[PortForward, ...] = ()
    addresses: tuple[AddressRequest, ...] = ()
    default_route: DefaultRoute | None = None
    interfaces: tuple[InterfaceRequest, ...] = ()
    helpers: tuple[Helper, ...] | None = None
