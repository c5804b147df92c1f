# SPDX-License-Identifier: LGPL-2.1-or-later
"""The NIC in the router namespace: its move and its configuration there, and the way back.

The state of the NIC in the host is captured before the move, and written into the journal.
The way back gives the NIC this state again, octet by octet (``nic_restore``).
"""

import time
from contextlib import suppress
from dataclasses import dataclass

from libvirt_natns.daemons import ndppd
from libvirt_natns.errors import ProxyError
from libvirt_natns.kernel import boot_clock
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations.operation import ApplyContext, Operation
from libvirt_natns.upstream.router import (
    downstream,
    link_config,
    nic_checks,
    nic_inside,
    nic_link,
    nic_restore,
)
from libvirt_natns.upstream.router.nic_snapshot import Capture
from libvirt_natns.upstream.router.target import Target

RETURN_LIMIT = 2.0
"""Seconds in which the kernel ends a namespace, and moves a NIC out of it."""

POLL = 0.02


@dataclass(frozen=True, slots=True)
class MovedNic(Operation):
    """A NIC of the host in the router namespace; ``before`` is its state in the host."""

    namespace: str
    nic: str
    before: Capture

    def describe(self) -> str:
        return f"NIC {self.nic} in {self.namespace}"

    def differs(self, kernel: Kernel) -> list[str]:
        if nic_link.exists(self.namespace, self.nic):
            return []
        return [f"{self.nic} is not in {self.namespace}"]

    def ensure(self, context: ApplyContext) -> None:
        if not nic_link.exists(self.namespace, self.nic):
            self._is_back()
            nic_link.move(self.nic, None, self.namespace)

    def take_back(self, kernel: Kernel) -> None:
        with suppress(ProxyError):
            ndppd.stop_in(self.namespace)
        if nic_link.exists(self.namespace, self.nic):
            nic_link.move(self.nic, self.namespace, None, self.before.index)
        # A NIC that was unplugged must not keep all else from going back.
        if self._is_back():
            nic_restore.put(None, self.before)

    def _is_back(self) -> bool:
        """True if the host has the NIC; the kernel moves it there when its namespace ends."""
        deadline = boot_clock.now() + RETURN_LIMIT
        while not nic_link.exists(None, self.nic):
            if boot_clock.now() >= deadline:
                return False
            time.sleep(POLL)
        return True


@dataclass(frozen=True, slots=True)
class InnerNic(Operation):
    """The addresses, routes and settings of the NIC in the router namespace.

    ``in_force``: the router is up, so the NIC has routes of later advertisements.
    """

    target: Target
    before: Capture
    in_force: bool

    @property
    def namespace(self) -> str:
        return self.target.namespace

    def describe(self) -> str:
        return f"addresses and routes of NIC {self.target.nic} in {self.namespace}"

    def differs(self, kernel: Kernel) -> list[str]:
        if not nic_link.exists(self.namespace, self.target.nic):
            return []
        gateways = downstream.gateways(self.target, self.before)
        wanted = nic_checks.without_expiring(nic_inside.inside(self.target, self.before))
        return [
            *nic_checks.differences(self.namespace, wanted),
            *(link_config.differences(gateways) if gateways else ()),
        ]

    def ensure(self, context: ApplyContext) -> None:
        self.complete()

    def complete(self) -> None:
        """Give the NIC all that it lacks.  Raises KernelError."""
        wanted = nic_inside.inside(self.target, self.before)
        if self.in_force and nic_link.is_up(self.namespace, self.target.nic):
            # The NIC has newer routes, unless it was set down and lost them.
            wanted = nic_checks.without_expiring(wanted)
        nic_restore.put(self.namespace, wanted, alone=not self.target.leased)
        gateways = downstream.gateways(self.target, self.before)
        if gateways:
            link_config.configure(gateways)
