# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way back of a router, by its journal."""

from collections.abc import Callable
from contextlib import suppress

from libvirt_natns.errors import NatnsError, RouterError
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.upstream.router import journal, nic_checks, router_plan
from libvirt_natns.upstream.router.journal import RouterRecord


def take_back(kernel: Kernel, record: RouterRecord, announce: Callable[[str], None]) -> list[str]:
    """Take all operations of a router back; returns in words how the NIC still differs.

    ``announce`` is called ahead of each step.  The first error is raised after the last
    operation.
    """
    with suppress(OSError):
        # A full disk must not keep the NIC away.
        record = journal.advance(record, state="going down")
    errors: list[Exception] = []
    for step in reversed(router_plan.make(record, None)):
        announce(f"take back: {step.what}")
        try:
            step.operation.take_back(kernel)
        except (NatnsError, OSError) as error:
            errors.append(error)
    if errors:
        raise errors[0]
    announce("forget the router")
    journal.discard(record.target.name)
    return nic_checks.differences(None, record.before)


def failure(record: RouterRecord, error: NatnsError | OSError) -> RouterError:
    """Return the error for a router that was taken back because its last step failed."""
    fact = error.fact if isinstance(error, NatnsError) else str(error)
    remedy = error.remedy if isinstance(error, NatnsError) else ""
    # The rollback timer starts ahead of the first step, and its error says so itself.
    step = f"cannot {record.step}: " if record.step else ""
    text = f"{step}{fact}" + (f": {remedy}" if remedy else "")
    return RouterError(f"router {record.target.name}: {text}", "everything is as it was")
