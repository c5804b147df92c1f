# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on addresses, routes and neighbours."""

from libvirt_natns.addresses import Address, Interface, IPNetwork
from libvirt_natns.engine.operations.traits import Traits
from libvirt_natns.model.subnet import StaticRoute
from libvirt_natns.records import dataclass


@dataclass(frozen=True, slots=True)
class Withdrawal(Traits):
    """An address of the namespace that must not be on libvirt's bridge in the host."""

    bridge: str
    address: Interface

    def describe(self) -> str:
        return f"no address {self.address} on {self.bridge} in the host"


@dataclass(frozen=True, slots=True)
class Addresses(Traits):
    """All addresses of a link; other ones are removed, except those that the kernel makes."""

    namespace: str | None
    link: str
    addresses: tuple[Interface, ...]

    def describe(self) -> str:
        listed = ", ".join(map(str, self.addresses)) or "none"
        return f"address {listed} on {self.link} in {self.namespace or 'the host'}"


@dataclass(frozen=True, slots=True)
class Route(Traits):
    """A route through a gateway, or straight over a link; ``namespace`` None is the host."""

    namespace: str | None
    destination: IPNetwork
    gateway: Address | None
    link: str

    def describe(self) -> str:
        default = self.destination.prefixlen == 0
        single = self.destination.prefixlen == self.destination.max_prefixlen
        destination = self.destination.network_address if single else self.destination
        via = f" via {self.gateway}" if self.gateway else ""
        where = self.namespace or "the host"
        return f"route {'default' if default else destination}{via} on {self.link} in {where}"


@dataclass(frozen=True, slots=True)
class Gateways(Traits):
    """All routes of a namespace through gateways on a link; any other there is removed.

    A gateway need not be in the link's subnet: some providers lease an address alone.
    """

    namespace: str
    link: str
    routes: tuple[tuple[IPNetwork, Address], ...]

    def describe(self) -> str:
        each = (Route(self.namespace, to, by, self.link).describe() for to, by in self.routes)
        return "\n".join(each) or f"no route through {self.link} in {self.namespace}"


@dataclass(frozen=True, slots=True)
class SendLimit(Traits):
    """The size limit of packets from the namespace to the private side.

    ``mtu``, in octets, is less than the MTU of ``link``, or None for no smaller limit.
    Packets from the private side may be larger, so a guest that does not know the limit
    goes on.  A smaller MTU of the link would drop its packets: a veth link takes none
    from its other end that is larger than its own MTU.
    """

    namespace: str
    link: str
    subnets: tuple[Interface, ...]
    routes: tuple[StaticRoute, ...]
    mtu: int | None

    @property
    def destinations(self) -> tuple[IPNetwork, ...]:
        """The destinations on the private side."""
        direct = (subnet.network for subnet in self.subnets)
        return (*direct, *(route.destination for route in self.routes))

    def describe(self) -> str:
        if self.mtu is None:
            return ""
        listed = ", ".join(map(str, self.destinations))
        return f"packets to {listed} limited to {self.mtu} octets in {self.namespace}"


@dataclass(frozen=True, slots=True)
class ProxiedNeighbours(Traits):
    """IPv6 addresses that the kernel answers for on a link, in place of their stations."""

    namespace: str | None
    link: str
    addresses: tuple[Address, ...]

    def describe(self) -> str:
        where = f"on {self.link} in {self.namespace or 'the host'}"
        if not self.addresses:
            return f"no proxy entry {where}"
        return f"proxy entries for {', '.join(map(str, self.addresses))} {where}"


@dataclass(frozen=True, slots=True)
class Announcement(Traits):
    """An announcement of a link's address to the neighbours, after each change of the link.

    ``probing``: seconds for which the neighbours are asked first, if no caller has asked.
    """

    on_change_only = True

    namespace: str
    link: str
    address: Address
    mac: str
    probing: float = 0.0

    def describe(self) -> str:
        return f"announce {self.address} to the neighbours on {self.link}"
