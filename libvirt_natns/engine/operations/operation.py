# SPDX-License-Identifier: LGPL-2.1-or-later
"""All kinds of operations, and the plan that consists of them."""

from collections.abc import Callable, Iterable

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

Operation = (
    Namespace
    | Sysctl
    | Settings
    | Patch
    | Macvlan
    | Port
    | AllMulticast
    | Firewall
    | Withdrawal
    | Addresses
    | LinkUp
    | Route
    | SendLimit
    | Gateways
    | Leasing
    | ProxiedNeighbours
    | NeighbourProxy
    | Announcement
    | Dnsmasq
    | IdleDnsmasq
    | TransitBridge
)
Plan = tuple[Operation, ...]

Step = Callable[[Operation | str], None]
"""Is called ahead of each change: with the operation, or with words for other changes."""


def describe_plan(plan: Iterable[Operation]) -> str:
    """Return a plan in words, one line or more for an operation."""
    texts = (operation.describe() for operation in plan)
    return "".join(f"{text}\n" for text in texts if text)
