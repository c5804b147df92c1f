# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a router has done by processes that nobody waits for.

``expire NAME DEADLINE`` takes a router back unless it is confirmed, ``lease NAME`` follows
its DHCP lease.  No configuration is read: what the router is stands in its journal.
"""

import signal
import sys

from libvirt_natns.errors import NatnsError
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.upstream.router import confirm_timer, journal, recover
from libvirt_natns.upstream.router.journal import Record
from libvirt_natns.upstream.router.lifecycle import Machine


def main(arguments: list[str]) -> int:
    """Run one of the two; returns the exit status."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    verb, name, *rest = arguments
    with Kernel() as kernel:
        machine = Machine(Config(), kernel)
        try:
            if verb == "expire":
                waiting = _Waiting(machine, name, float(rest[0]))
                confirm_timer.wait(float(rest[0]), waiting.is_pending, waiting.take_back)
            else:
                machine.follow_lease(name)
        except NatnsError as error:
            print(f"virt-natns: {error}", file=sys.stderr)
            return 1
    return 0


class _Waiting:
    """A router that waits for its deadline.

    Its record is remembered, should the journal be lost or damaged meanwhile.
    """

    def __init__(self, machine: Machine, name: str, deadline: float) -> None:
        self._machine, self._name, self._deadline = machine, name, deadline
        self._remembered: Record | None = None

    def is_pending(self) -> bool:
        """True if the router has not been confirmed.  Raises StoreError where that is unknown."""
        record = journal.load(self._name)
        if record is None:
            # One that is missing while the NIC is away was lost.
            return recover.is_lost(self._name)
        if record.deadline == self._deadline:
            self._remembered = record
            return True
        return False

    def take_back(self) -> None:
        self._machine.expire(self._name, self._deadline, self._remembered)
