# SPDX-License-Identifier: LGPL-2.1-or-later
"""Carries out a plan, of a network's, the host's or a router's operations.

``carry_out`` changes only what differs.  Each operation registers how to undo its change, so
a call that fails leaves the machine as it was.  ``plan_differences`` changes nothing.
"""

from collections.abc import Collection, Iterable

from libvirt_natns.errors import KernelError
from libvirt_natns.kernel.defer import Later, at_once
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations.operation import ApplyContext, Operation, Step
from libvirt_natns.operations.undo import Undo


def plan_differences(kernel: Kernel, plan: Iterable[Operation]) -> list[str]:
    """Return the operations that do not hold, in words and in the plan's order.

    Operations inside of a missing namespace are not looked at.
    """
    with kernel.work(), kernel.looking():
        return _differences(kernel, plan)


def _differences(kernel: Kernel, plan: Iterable[Operation]) -> list[str]:
    lines: list[str] = []
    for operation in plan:
        try:
            different = operation.differs(kernel)
        except KernelError as error:
            # Most often the missing link that an earlier difference named already.
            different = [error.fact]
        lines += different
        if different and operation.encloses:
            break
    return lines


def carry_out(
    kernel: Kernel,
    plan: Iterable[Operation],
    undo: Undo,
    before: Step | None = None,
    *,
    later: Later = at_once,
    done: Collection[Operation] = (),
) -> list[str]:
    """Make a plan hold, and return what differed before.

    ``undo`` receives a step for each thing that this call creates.  ``before`` observes: it
    is called ahead of each change, and its error stops the change.  Operations in ``done`` were
    carried out a moment ago and are not looked at, except those to recheck always.
    Raises a NatnsError.
    """
    whole = any(operation.encloses for operation in done)
    context = ApplyContext(kernel, undo, later, starting=whole, done=done)
    repaired: list[str] = []
    with kernel.work():
        for operation in plan:
            if operation in done and not operation.always_recheck:
                continue
            different = _why(context, operation, repaired)
            if not different:
                continue
            if before is not None:
                before(operation)
            operation.ensure(context)
            kernel.forget()
            # A new namespace lacks everything, so no line says that.
            if not whole and not operation.on_change_only:
                repaired += different
            whole = whole or operation.encloses
    return repaired


def _why(context: ApplyContext, operation: Operation, repaired: list[str]) -> list[str]:
    """Return why an operation must be carried out, in words; empty if it need not be."""
    if context.is_fresh(operation):
        return ["it is new"]
    if operation.on_change_only:
        return ["it is new"] if context.has_added(operation) else repaired
    with context.kernel.looking():
        return operation.differs(context.kernel)
