# SPDX-License-Identifier: LGPL-2.1-or-later
"""Interface through which the service learns of changes that the engine makes.

The service must tell its own changes from damage, and writes a log line for each.
A report after the work never fails the work: see ``tell`` and ``note``.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    # `uninstall` works without pyroute2, which this module would load.
    from libvirt_natns.operations.operation import Operation

HOST = ""
"""The part of the host that networks share, in place of a network's uuid."""


class Observer(Protocol):
    """Methods that the verbs call, from any thread."""

    def step(self, what: "Operation | str") -> None:
        """Hear of a change ahead of it; an error of this method stops the verb."""

    def changing(self, uuid: str) -> AbstractContextManager[None]:
        """Return a context in which we change a network, or ``HOST``."""

    def done(self, verb: str, name: str, changed: Sequence[str], seconds: float) -> None:
        """Hear that a verb has ended well: the network's name, the changes, the seconds taken."""

    def note(self, event: str, name: str, changed: Sequence[str]) -> None:
        """Hear of an event within a verb: a choice that users want to know of."""

    def failed(self, when: str, error: Exception) -> None:
        """Hear that work beside a verb has failed; the verb goes on."""


class Nobody:
    """An observer that ignores all reports."""

    def step(self, what: "Operation | str") -> None:
        pass

    def changing(self, uuid: str) -> AbstractContextManager[None]:
        return nullcontext()

    def done(self, verb: str, name: str, changed: Sequence[str], seconds: float) -> None:
        pass

    def note(self, event: str, name: str, changed: Sequence[str]) -> None:
        pass

    def failed(self, when: str, error: Exception) -> None:
        pass


NOBODY = Nobody()


# A caller that heard of an observer's error would take back, or do again, work that is done.


def tell(observer: Observer, verb: str, name: str, changed: Sequence[str], seconds: float) -> None:
    """Tell an observer that a verb has ended well; drop the observer's errors."""
    with suppress(Exception):
        observer.done(verb, name, changed, seconds)


def note(observer: Observer, event: str, name: str, changed: Sequence[str]) -> None:
    """Tell an observer of an event within a verb; drop the observer's errors."""
    with suppress(Exception):
        observer.note(event, name, changed)
