# SPDX-License-Identifier: LGPL-2.1-or-later
"""The helper process of a router, for which no other process waits.

``expire NAME DEADLINE`` takes a router back unless it is confirmed.  ``lease NAME`` follows its
DHCP lease.  The helper reads no configuration: the journal has all of the router.
"""

import signal
import sys

from libvirt_natns.errors import NatnsError
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.upstream.router import confirm_timer, journal, recover
from libvirt_natns.upstream.router.journal import RouterRecord
from libvirt_natns.upstream.router.lifecycle import RouterLifecycle


def main(arguments: list[str]) -> int:
    """Run a verb of the helper; returns the exit status."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    verb, name, *rest = arguments
    with Kernel() as kernel:
        machine = RouterLifecycle(Config(), kernel)
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

    Its last record is remembered, for a journal that is lost or damaged later.
    """

    def __init__(self, machine: RouterLifecycle, name: str, deadline: float) -> None:
        self._machine, self._name, self._deadline = machine, name, deadline
        self._remembered: RouterRecord | None = None

    def is_pending(self) -> bool:
        """True if the router has not been confirmed.  Raises StoreError where that is unknown."""
        record = journal.load(self._name)
        if record is None:
            # A journal that is missing while the NIC is away was lost.
            return recover.is_lost(self._name)
        if record.deadline == self._deadline:
            self._remembered = record
            return True
        return False

    def take_back(self) -> None:
        self._machine.expire(self._name, self._deadline, self._remembered)
