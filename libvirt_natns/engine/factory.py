# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where callers get an engine: configuration, state database and kernel session.

A hook, or a command, opens them for one piece of work (``Once``).  The resident service
keeps them open in ``service/engine_pool``, which a hook need not load.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from libvirt_natns.documents import config
from libvirt_natns.engine.engine import Engine
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.state.store import Store


class Sessions(Protocol):
    """Source of engines."""

    def engine(self, settings: Config | None = None) -> AbstractContextManager[Engine]:
        """Return an engine for the body; ``settings`` default to the configuration.

        Raises ConfigError or StoreError.
        """


class Resident(Sessions, Protocol):
    """Source of engines in a resident process."""

    def expect(self, uuid: str) -> None:
        """Look at a network's start until it is over: libvirt may give it up."""


class Once:
    """Opens everything anew."""

    @contextmanager
    def engine(self, settings: Config | None = None) -> Iterator[Engine]:
        """See ``Sessions``."""
        settings = settings or config.load()
        store = Store()
        try:
            with Kernel() as kernel:
                yield Engine(settings, store, kernel)
        finally:
            store.close()
