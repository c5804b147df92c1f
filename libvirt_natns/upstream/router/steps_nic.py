# SPDX-License-Identifier: LGPL-2.1-or-later
"""Steps for the NIC: its move into the namespace and back, its configuration, its lease."""

import time
from contextlib import suppress

from libvirt_natns.daemons import ndppd
from libvirt_natns.errors import ProxyError
from libvirt_natns.kernel import boot_clock
from libvirt_natns.upstream.router import (
    downstream,
    link_config,
    nic_checks,
    nic_lease,
    nic_link,
    nic_restore,
)
from libvirt_natns.upstream.router.step_context import Step, StepContext, keep
from libvirt_natns.upstream.router.target import Target

RETURN_LIMIT = 2.0
"""Seconds in which the kernel ends a namespace, and moves a NIC out of it."""

POLL = 0.02


def _nic_away(context: StepContext) -> list[str]:
    target = context.target
    if nic_link.exists(target.namespace, target.nic):
        return []
    return [f"{target.nic} is not in {target.namespace}"]


def _take_nic(context: StepContext) -> None:
    target = context.target
    if not nic_link.exists(target.namespace, target.nic):
        _await_nic(target)
        nic_link.move(target.nic, None, target.namespace)


def _return_nic(context: StepContext) -> None:
    target = context.target
    with suppress(ProxyError):
        ndppd.stop_in(target.namespace)
    if nic_link.exists(target.namespace, target.nic):
        nic_link.move(target.nic, target.namespace, None, context.before.index)
    # A NIC that was unplugged must not keep all else from going back.
    if _await_nic(target):
        nic_restore.put(None, context.before)


def _await_nic(target: Target) -> bool:
    """True if the NIC is in the host, where the kernel puts it when its namespace has ended."""
    deadline = boot_clock.now() + RETURN_LIMIT
    while not nic_link.exists(None, target.nic):
        if boot_clock.now() >= deadline:
            return False
        time.sleep(POLL)
    return True


def _nic_differs(context: StepContext) -> list[str]:
    target = context.target
    if not nic_link.exists(target.namespace, target.nic):
        return []
    ways = downstream.gateways(target, context.before)
    missing_ways = link_config.differences(ways) if ways else []
    wanted = nic_checks.lasting(context.inside)
    return nic_checks.differences(target.namespace, wanted) + missing_ways


def _set_nic(context: StepContext) -> None:
    target, wanted = context.target, context.inside
    if context.record.is_whole and nic_link.is_up(target.namespace, target.nic):
        # The NIC has newer routes from advertisements, unless it was set down and lost them.
        wanted = nic_checks.lasting(wanted)
    nic_restore.put(target.namespace, wanted, alone=not target.leased)
    ways = downstream.gateways(target, context.before)
    if ways:
        link_config.ensure(ways)


STEPS = (
    Step("move the NIC", _nic_away, _take_nic, _return_nic),
    Step("give the NIC its addresses and routes", _nic_differs, _set_nic, keep),
)

LEASE = Step(
    "keep the DHCP lease",
    lambda context: nic_lease.differences(context.target, context.before),
    lambda context: nic_lease.ensure(context.target, context.before),
    lambda context: nic_lease.end(context.target),
)
