# SPDX-License-Identifier: LGPL-2.1-or-later
"""Steps that take a verb's work back, should the verb fail."""

from collections.abc import Callable
from contextlib import ExitStack, suppress

from libvirt_natns.errors import NatnsError


class Undo(ExitStack):
    """Steps that run in reverse at the end of the body, unless ``pop_all`` keeps the work.

    An error of a step is dropped: it must not hide the error for which the steps run.
    """

    def add(self, step: Callable[..., object], *arguments: object) -> None:
        """Take one thing back with ``step(*arguments)``."""
        self.callback(_quietly, step, *arguments)


def _quietly(step: Callable[..., object], *arguments: object) -> None:
    with suppress(NatnsError, OSError):
        step(*arguments)
