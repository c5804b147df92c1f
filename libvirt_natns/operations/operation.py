# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations in general, and the plan that consists of operations."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from libvirt_natns.addresses import Address
from libvirt_natns.kernel.defer import Later, at_once
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations.undo import Undo


class Operation:
    """A thing that must exist, as data; ``carry_out`` compares it and makes it so.

    The traits are class attributes, not fields, so they do not count when operations are
    compared.  All methods converge: each can run again after a kill in its middle.
    """

    __slots__ = ()

    encloses = False
    """The operations that follow in a plan are inside of this one: a namespace."""

    always_recheck = False
    """The operation may have ended since it was carried out a moment ago: a daemon."""

    on_change_only = False
    """The operation follows other changes, and is no repair of its own: an announcement."""

    def describe(self) -> str:
        """Return the operation in words, one line or more; "" for nothing to say."""
        raise NotImplementedError

    def differs(self, kernel: Kernel) -> list[str]:
        """Return why the operation does not hold, in words; empty if it holds."""
        raise NotImplementedError

    def ensure(self, context: "ApplyContext") -> None:
        """Make the operation so, and tell the context how to undo that.  Raises a NatnsError."""
        raise NotImplementedError

    def take_back(self, kernel: Kernel) -> None:
        """Remove what the operation made; nothing where that goes with another operation."""


Plan = tuple[Operation, ...]

Step = Callable[[Operation | str], None]
"""Is called ahead of each change: with the operation, or with words for other changes."""


@dataclass(slots=True)
class ApplyContext:
    """State of one call of ``carry_out``, which the operations share.

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


def describe_plan(plan: Iterable[Operation]) -> str:
    """Return a plan in words, one line or more for an operation."""
    texts = (operation.describe() for operation in plan)
    return "".join(f"{text}\n" for text in texts if text)
