# SPDX-License-Identifier: LGPL-2.1-or-later
"""A step of a router, and the values that each step works with.

``do`` and ``undo`` of a step converge: each can run again after a kill in its middle, and
changes nothing where all is as it should be.
"""

from collections.abc import Callable

from libvirt_natns.kernel.session import Kernel
from libvirt_natns.records import dataclass
from libvirt_natns.upstream.router import nic_inside
from libvirt_natns.upstream.router.downstream import RouterNeeds
from libvirt_natns.upstream.router.journal import RouterRecord
from libvirt_natns.upstream.router.nic_snapshot import Capture
from libvirt_natns.upstream.router.target import Target


@dataclass(frozen=True, slots=True)
class StepContext:
    """The values that all steps work with; ``needs`` is what the router's networks need."""

    kernel: Kernel
    record: RouterRecord
    needs: Callable[[], RouterNeeds] = RouterNeeds

    @property
    def target(self) -> Target:
        return self.record.target

    @property
    def before(self) -> Capture:
        """The NIC before the router, from the journal; the kernel is not asked again."""
        return self.record.before

    @property
    def inside(self) -> Capture:
        """The NIC as it must be in the namespace."""
        return nic_inside.inside(self.target, self.before)


@dataclass(frozen=True, slots=True)
class Step:
    """A step; ``what`` is its name for people."""

    what: str
    differs: Callable[[StepContext], list[str]]
    do: Callable[[StepContext], None]
    undo: Callable[[StepContext], None]


def keep(context: StepContext) -> None:
    """Undo nothing: another step's undo removes all that this step made."""
