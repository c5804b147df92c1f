# SPDX-License-Identifier: LGPL-2.1-or-later
"""The steps of ``router up``, in order; the way back undoes them in reverse.

Each step tells how it differs.  The state of the host before the first step stands in the
journal; the kernel is never asked for it again.
"""

from libvirt_natns.upstream.router import steps_host, steps_namespace, steps_nic

STEPS = (
    *steps_namespace.STEPS,
    *steps_nic.STEPS,
    *steps_host.STEPS,
    steps_nic.LEASE,
)
