# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a router has done by processes that nobody waits for.

``expire NAME DEADLINE`` takes a router back unless it is confirmed, ``lease NAME`` follows
its DHCP lease.  No configuration is read: what the router is stands in its journal.
"""

import signal
import sys

from libvirt_natns.errors import NatnsError
from libvirt_natns.kernel import Kernel
from libvirt_natns.model import Config
from libvirt_natns.router import timer
from libvirt_natns.router.machine import Machine


def main(arguments: list[str]) -> int:
    """Run one of the two; returns the exit status."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    verb, name, *rest = arguments
    with Kernel() as kernel:
        machine = Machine(Config(), kernel)
        try:
            if verb == "expire":
                deadline = float(rest[0])
                timer.wait(name, deadline, lambda: machine.expire(name, deadline))
            else:
                machine.follow_lease(name)
        except NatnsError as error:
            print(f"virt-natns: {error}", file=sys.stderr)
            return 1
    return 0
