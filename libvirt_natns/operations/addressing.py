# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on addresses and routes."""

from collections.abc import Iterable
from dataclasses import dataclass

from libvirt_natns.addresses import Address, Interface, IPNetwork, by_family
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.subnet import StaticRoute
from libvirt_natns.operations.operation import ApplyContext, Operation


@dataclass(frozen=True, slots=True)
class Withdrawal(Operation):
    """An address of the namespace that must not be on libvirt's bridge in the host."""

    bridge: str
    address: Interface

    def describe(self) -> str:
        return f"no address {self.address} on {self.bridge} in the host"

    def differs(self, kernel: Kernel) -> list[str]:
        if self.address in kernel.host.addresses.of(self.bridge):
            return [f"bridge {self.bridge} still has {self.address} in the host"]
        return []

    def ensure(self, context: ApplyContext) -> None:
        kernel, undo = context.kernel, context.undo
        undo.add(self.take_back, kernel)
        kernel.host.addresses.remove(self.bridge, self.address)

    def take_back(self, kernel: Kernel) -> None:
        kernel.host.addresses.add(self.bridge, self.address)


@dataclass(frozen=True, slots=True)
class Addresses(Operation):
    """All addresses of a link; other ones are removed, except those that the kernel makes."""

    namespace: str | None
    link: str
    addresses: tuple[Interface, ...]

    def describe(self) -> str:
        listed = ", ".join(map(str, self.addresses)) or "none"
        return f"address {listed} on {self.link} in {self.namespace or 'the host'}"

    def differs(self, kernel: Kernel) -> list[str]:
        where = f"{self.link} in {self.namespace or 'the host'}"
        present = kernel.at(self.namespace).addresses.of(self.link)
        foreign = kernel.at(self.namespace).addresses.foreign(self.link, self.addresses)
        lacking = set(self.addresses) - present
        return [
            *(f"{where} lacks the address {address}" for address in _sorted(lacking)),
            *(f"{where} has the foreign address {address}" for address in _sorted(foreign)),
        ]

    def ensure(self, context: ApplyContext) -> None:
        if context.is_fresh(self):
            for address in self.addresses:
                context.kernel.at(self.namespace).addresses.add(self.link, address)
            return
        present = context.kernel.at(self.namespace).addresses.of(self.link)
        context.kernel.at(self.namespace).addresses.replace(self.link, self.addresses)
        lacking = set(self.addresses) - present
        context.added.update((self.namespace, address.ip) for address in lacking)


@dataclass(frozen=True, slots=True)
class Route(Operation):
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

    def differs(self, kernel: Kernel) -> list[str]:
        if kernel.at(self.namespace).routes.has(self.destination, self.gateway, self.link):
            return []
        return [f"{self.describe()} is missing or not the only route"]

    def ensure(self, context: ApplyContext) -> None:
        context.kernel.at(self.namespace).routes.replace(
            self.destination,
            self.gateway,
            self.link,
            alone=context.is_fresh(self),
        )


@dataclass(frozen=True, slots=True)
class Gateways(Operation):
    """All routes of a namespace through gateways on a link; any other there is removed.

    A gateway need not be in the link's subnet: some providers lease an address alone.
    """

    namespace: str
    link: str
    routes: tuple[tuple[IPNetwork, Address], ...]

    def describe(self) -> str:
        each = (Route(self.namespace, to, by, self.link).describe() for to, by in self.routes)
        return "\n".join(each) or f"no route through {self.link} in {self.namespace}"

    def differs(self, kernel: Kernel) -> list[str]:
        present = kernel.at(self.namespace).routes.gateways(self.link)
        where = f"on {self.link} in {self.namespace}"
        return [
            *(f"route {to} via {by} {where} is missing" for to, by in self.routes
              if (to, by) not in present),
            *(f"route {to} via {by} {where} is foreign" for to, by in present
              if (to, by) not in self.routes),
        ]  # fmt: skip

    def ensure(self, context: ApplyContext) -> None:
        context.kernel.at(self.namespace).routes.replace_gateways(self.link, self.routes)


@dataclass(frozen=True, slots=True)
class SendLimit(Operation):
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

    def differs(self, kernel: Kernel) -> list[str]:
        routes = kernel.at(self.namespace).route_limits.differing(
            self.destinations, self.link, self.mtu
        )
        if self.mtu:
            fault = f"are not limited to {self.mtu} octets"
        else:
            fault = f"are limited below the MTU of {self.link}"
        return [f"packets to {each} in {self.namespace} {fault}" for each in routes]

    def ensure(self, context: ApplyContext) -> None:
        namespace, link, mtu = self.namespace, self.link, self.mtu
        if context.is_fresh(self) and mtu is None:
            return
        for subnet in self.subnets:
            context.kernel.at(namespace).route_limits.set_subnet(subnet, link, mtu)
        for route in self.routes:
            context.kernel.at(namespace).route_limits.set_route(
                route.destination, route.gateway, link, mtu
            )


def _sorted(addresses: Iterable[Interface]) -> list[Interface]:
    return sorted(addresses, key=lambda each: (by_family(each.ip), each.network.prefixlen))
