# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state of one call of ``carry_out``."""

from collections.abc import Collection

from libvirt_natns.addresses import Address
from libvirt_natns.engine.operations.operation import Operation
from libvirt_natns.engine.undo import Undo
from libvirt_natns.kernel.defer import Later, at_once
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.records import dataclass, field


@dataclass(slots=True)
class ApplyContext:
    """State of one call, which the functions that carry operations out share.

    ``later`` takes work that the call need not wait for.  ``starting`` is true while
    no guest can be waiting yet.  The operations in ``done`` were carried out a moment
    ago.  ``fresh`` are the namespaces that the call has made; ``added`` are the
    addresses that the call has set, each with its namespace.
    """

    kernel: Kernel
    undo: Undo
    later: Later = at_once
    starting: bool = False
    done: Collection[Operation] = ()
    fresh: set[str] = field(default_factory=set)
    added: set[tuple[str | None, Address]] = field(default_factory=set)

    def is_fresh(self, operation: Operation) -> bool:
        """True if the operation is about a namespace that is new, and so holds nothing yet."""
        return getattr(operation, "namespace", None) in self.fresh

    def has_added(self, operation: Operation) -> bool:
        """True if this call set the operation's address.

        A neighbour may have had the address until a moment ago.
        """
        namespace, address = (getattr(operation, name, None) for name in ("namespace", "address"))
        return (namespace, address) in self.added or self.is_fresh(operation)
