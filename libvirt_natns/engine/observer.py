# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who looks on while the verbs change things: nobody, or the resident service.

The service must tell its own changes from damage, and tells of each in its log.
Telling comes after the work and never fails the work: see ``tell``.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Protocol

HOST = ""
"""Stands for what the networks share in the host, where a network's uuid is expected."""


class Observer(Protocol):
    """Is called by the verbs, from any thread."""

    def changing(self, uuid: str) -> AbstractContextManager[None]:
        """A network (or ``HOST``) is being changed by us for as long as this lasts."""

    def done(self, verb: str, name: str, changed: Sequence[str], seconds: float) -> None:
        """A verb has ended well: the network's name, what it changed, and how long it took."""

    def failed(self, when: str, error: Exception) -> None:
        """Work beside a verb has failed, and the verb goes on."""


class Nobody:
    """Looks away."""

    def changing(self, uuid: str) -> AbstractContextManager[None]:
        return nullcontext()

    def done(self, verb: str, name: str, changed: Sequence[str], seconds: float) -> None:
        pass

    def failed(self, when: str, error: Exception) -> None:
        pass


NOBODY = Nobody()


def tell(
    observer: Observer, verb: str, name: str, changed: Sequence[str], seconds: float = 0.0
) -> None:
    """Tell an observer that a verb has ended well, whatever becomes of that."""
    # The caller would take back, or do again, work that is done.
    with suppress(Exception):
        observer.done(verb, name, changed, seconds)
