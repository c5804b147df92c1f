# SPDX-License-Identifier: LGPL-2.1-or-later
"""Carrying out a plan, by a table: how each kind of operation differs, and how it is made so.

``carry_out`` changes only what differs.  It registers how to undo each change, so a
call that fails leaves the machine as it was.  ``plan_differences`` changes nothing.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from libvirt_natns.engine.apply import (
    address_handlers,
    daemon_handlers,
    firewall_handlers,
    link_handlers,
)
from libvirt_natns.engine.apply.apply_context import ApplyContext
from libvirt_natns.engine.operations.addressing import (
    Addresses,
    Announcement,
    Gateways,
    ProxiedNeighbours,
    Route,
    SendLimit,
    Withdrawal,
)
from libvirt_natns.engine.operations.daemons import (
    Dnsmasq,
    Firewall,
    IdleDnsmasq,
    Leasing,
    NeighbourProxy,
)
from libvirt_natns.engine.operations.links import (
    AllMulticast,
    LinkUp,
    Macvlan,
    Namespace,
    Patch,
    Port,
    Settings,
    Sysctl,
    TransitBridge,
)
from libvirt_natns.engine.operations.operation import Operation, Step
from libvirt_natns.engine.undo import Undo
from libvirt_natns.errors import KernelError
from libvirt_natns.kernel.defer import Later, at_once
from libvirt_natns.kernel.session import Kernel


def plan_differences(kernel: Kernel, plan: Iterable[Operation]) -> list[str]:
    """Return the operations that do not hold, in words and in the plan's order.

    Operations inside of a missing namespace are not looked at.
    """
    with kernel.work(), kernel.looking():
        return _differences(kernel, plan)


def _differences(kernel: Kernel, plan: Iterable[Operation]) -> list[str]:
    lines: list[str] = []
    for operation in plan:
        try:
            different = differs(kernel, operation)
        except KernelError as error:
            # Most often the missing link that an earlier difference named already.
            different = [error.fact]
        lines += different
        if different and operation.encloses:
            break
    return lines


def carry_out(
    kernel: Kernel,
    plan: Iterable[Operation],
    undo: Undo,
    before: Step | None = None,
    *,
    later: Later = at_once,
    done: Collection[Operation] = (),
) -> list[str]:
    """Make a plan hold, and return what differed before.

    ``undo`` receives a step for each thing that this call creates.  ``before``, for
    tests and for logs, is called ahead of each change.  Operations in ``done`` were
    carried out a moment ago and are not looked at, except those to recheck always.
    Raises a NatnsError.
    """
    whole = any(operation.encloses for operation in done)
    context = ApplyContext(kernel, undo, later, starting=whole, done=done)
    repaired: list[str] = []
    with kernel.work():
        for operation in plan:
            if operation in done and not operation.always_recheck:
                continue
            different = _why(context, operation, repaired)
            if not different:
                continue
            if before is not None:
                before(operation)
            HANDLERS[type(operation)][1](context, operation)
            kernel.forget()
            # A new namespace lacks everything, so no line says that.
            if not whole and not operation.on_change_only:
                repaired += different
            whole = whole or operation.encloses
    return repaired


def _why(context: ApplyContext, operation: Operation, repaired: list[str]) -> list[str]:
    """Return why an operation must be carried out, in words; empty if it need not be."""
    if context.is_fresh(operation):
        return ["it is new"]
    if operation.on_change_only:
        return ["it is new"] if context.has_added(operation) else repaired
    with context.kernel.looking():
        return differs(context.kernel, operation)


def differs(kernel: Kernel, operation: Operation) -> list[str]:
    """Return why one operation does not hold, in words; empty if it holds."""
    return HANDLERS[type(operation)][0](kernel, operation)


HANDLERS: dict[type[Any], tuple[Callable[..., list[str]], Callable[..., None]]] = {
    Namespace: (link_handlers.namespace_differs, link_handlers.ensure_namespace),
    Sysctl: (link_handlers.sysctl_differs, link_handlers.ensure_sysctl),
    Settings: (link_handlers.settings_differ, link_handlers.ensure_settings),
    Patch: (link_handlers.patch_differs, link_handlers.ensure_patch),
    Macvlan: (link_handlers.macvlan_differs, link_handlers.ensure_macvlan),
    Port: (link_handlers.port_differs, link_handlers.ensure_port),
    AllMulticast: (link_handlers.multicast_differs, link_handlers.ensure_multicast),
    Firewall: (firewall_handlers.firewall_differs, firewall_handlers.ensure_firewall),
    Withdrawal: (address_handlers.withdrawal_differs, address_handlers.ensure_withdrawal),
    Addresses: (address_handlers.addresses_differ, address_handlers.ensure_addresses),
    LinkUp: (link_handlers.link_differs, link_handlers.ensure_link),
    Route: (address_handlers.route_differs, address_handlers.ensure_route),
    SendLimit: (address_handlers.limit_differs, address_handlers.ensure_limit),
    Gateways: (address_handlers.gateways_differ, address_handlers.ensure_gateways),
    Leasing: (daemon_handlers.leasing_differs, daemon_handlers.ensure_leasing),
    ProxiedNeighbours: (address_handlers.proxied_differ, address_handlers.ensure_proxied),
    NeighbourProxy: (daemon_handlers.proxy_differs, daemon_handlers.ensure_proxy),
    Announcement: (lambda *_: [], address_handlers.announce_address),
    Dnsmasq: (daemon_handlers.dnsmasq_differs, daemon_handlers.ensure_dnsmasq),
    IdleDnsmasq: (daemon_handlers.idle_differs, daemon_handlers.ensure_idle),
    TransitBridge: (link_handlers.transit_differs, link_handlers.ensure_transit),
}
"""For each kind of operation: how it differs from the kernel, in words, and how it is made so."""
