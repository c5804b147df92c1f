# SPDX-License-Identifier: LGPL-2.1-or-later
"""Comparing and setting addresses, routes and neighbours.

For each kind, ``..._differs`` returns the differences in words.  ``ensure_...`` makes the
operation so, and tells the context how to undo that.
"""

from collections.abc import Iterable

from libvirt_natns.addresses import Interface, by_family
from libvirt_natns.engine.apply.context import ApplyContext
from libvirt_natns.engine.operations.addresses import (
    Addresses,
    Announcement,
    Gateways,
    ProxiedNeighbours,
    Route,
    SendLimit,
    Withdrawal,
)
from libvirt_natns.errors import AddressTakenError
from libvirt_natns.kernel import address_probe, netns
from libvirt_natns.kernel.defer import at_once
from libvirt_natns.kernel.session import Kernel


def withdrawal_differs(kernel: Kernel, operation: Withdrawal) -> list[str]:
    if operation.address in kernel.host.addresses.of(operation.bridge):
        return [f"bridge {operation.bridge} still has {operation.address} in the host"]
    return []


def ensure_withdrawal(context: ApplyContext, operation: Withdrawal) -> None:
    kernel, undo = context.kernel, context.undo
    undo.add(kernel.host.addresses.add, operation.bridge, operation.address)
    kernel.host.addresses.remove(operation.bridge, operation.address)


def addresses_differ(kernel: Kernel, operation: Addresses) -> list[str]:
    where = f"{operation.link} in {operation.namespace or 'the host'}"
    present = kernel.at(operation.namespace).addresses.of(operation.link)
    foreign = kernel.at(operation.namespace).addresses.foreign(operation.link, operation.addresses)
    lacking = set(operation.addresses) - present
    return [
        *(f"{where} lacks the address {address}" for address in _sorted(lacking)),
        *(f"{where} has the foreign address {address}" for address in _sorted(foreign)),
    ]


def _sorted(addresses: Iterable[Interface]) -> list[Interface]:
    return sorted(addresses, key=lambda each: (by_family(each.ip), each.network.prefixlen))


def ensure_addresses(context: ApplyContext, operation: Addresses) -> None:
    if context.is_fresh(operation):
        for address in operation.addresses:
            context.kernel.at(operation.namespace).addresses.add(operation.link, address)
        return
    present = context.kernel.at(operation.namespace).addresses.of(operation.link)
    context.kernel.at(operation.namespace).addresses.replace(operation.link, operation.addresses)
    lacking = set(operation.addresses) - present
    context.added.update((operation.namespace, address.ip) for address in lacking)


def route_differs(kernel: Kernel, operation: Route) -> list[str]:
    if kernel.at(operation.namespace).routes.has(
        operation.destination, operation.gateway, operation.link
    ):
        return []
    return [f"{operation.describe()} is missing or not the only one"]


def ensure_route(context: ApplyContext, operation: Route) -> None:
    if operation.namespace is None:
        context.undo.add(context.kernel.host.routes.remove, operation.destination, operation.link)
    context.kernel.at(operation.namespace).routes.replace(
        operation.destination,
        operation.gateway,
        operation.link,
        alone=context.is_fresh(operation),
    )


def limit_differs(kernel: Kernel, operation: SendLimit) -> list[str]:
    routes = kernel.at(operation.namespace).route_limits.differing(
        operation.destinations, operation.link, operation.mtu
    )
    wanted = f"of at most {operation.mtu} octets" if operation.mtu else "as large as the link's"
    return [f"packets to {each} in {operation.namespace} are not {wanted}" for each in routes]


def ensure_limit(context: ApplyContext, operation: SendLimit) -> None:
    namespace, link, mtu = operation.namespace, operation.link, operation.mtu
    if context.is_fresh(operation) and mtu is None:
        return
    for subnet in operation.subnets:
        context.kernel.at(namespace).route_limits.set_subnet(subnet, link, mtu)
    for route in operation.routes:
        context.kernel.at(namespace).route_limits.set_route(
            route.destination, route.gateway, link, mtu
        )


def gateways_differ(kernel: Kernel, operation: Gateways) -> list[str]:
    present = kernel.at(operation.namespace).routes.gateways(operation.link)
    where = f"on {operation.link} in {operation.namespace}"
    return [
        *(f"route {to} via {by} {where} is missing" for to, by in operation.routes
          if (to, by) not in present),
        *(f"route {to} via {by} {where} is foreign" for to, by in present
          if (to, by) not in operation.routes),
    ]  # fmt: skip


def ensure_gateways(context: ApplyContext, operation: Gateways) -> None:
    context.kernel.at(operation.namespace).routes.replace_gateways(operation.link, operation.routes)


def proxied_differ(kernel: Kernel, operation: ProxiedNeighbours) -> list[str]:
    if kernel.at(operation.namespace).neighbours6.proxied(operation.link) == set(
        operation.addresses
    ):
        return []
    return [f"{operation.describe()}: not so, or more than that"]


def ensure_proxied(context: ApplyContext, operation: ProxiedNeighbours) -> None:
    if context.is_fresh(operation) and not operation.addresses:
        return
    context.kernel.at(operation.namespace).neighbours6.replace_proxied(
        operation.link, operation.addresses
    )


def announce_address(context: ApplyContext, operation: Announcement) -> None:
    # A caller without a background has probed in full before.  An address in force is
    # not given up because a neighbour answers for it (RFC 5227, 2.4).
    waits = context.later is at_once or not context.has_added(operation)
    probing = 0.0 if waits else operation.probing

    def announce() -> None:
        with netns.entered(operation.namespace):
            announced = address_probe.announce(
                operation.link, operation.address, operation.mac, probing
            )
        if not announced:
            raise AddressTakenError(operation.namespace, str(operation.address))

    # The announcement waits up to 20 ms for the kernel to see the link's carrier.
    context.later(announce)
