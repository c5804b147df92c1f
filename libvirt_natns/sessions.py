# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the verbs work with: configuration, state database, kernel session.

A hook, or a command, opens them for one piece of work (``Once``); the resident
service keeps them open in between, as many as have been in use at once
(``Kept``).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Lock
from typing import Protocol

from libvirt_natns import config
from libvirt_natns.engine import Engine
from libvirt_natns.kernel import Kernel
from libvirt_natns.model import Config
from libvirt_natns.observer import NOBODY, Observer
from libvirt_natns.store import Store

IDLE = 4
"""How many sessions are kept for later."""


class Sessions(Protocol):
    """Where verbs get an engine from."""

    def engine(self, settings: Config | None = None) -> AbstractContextManager[Engine]:
        """An engine for the body; ``settings`` default to the configuration.

        Raises ConfigError or StoreError.
        """


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


class _Session:
    """One state database and one kernel session, for one thread at a time."""

    def __init__(self) -> None:
        self.store = Store()
        self.kernel = Kernel()
        self._inode = _inode(self.store.path)

    @property
    def current(self) -> bool:
        """Whether the state database is still the one on disk."""
        return _inode(self.store.path) == self._inode

    def close(self) -> None:
        self.kernel.close()
        self.store.close()


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


class Kept:
    """Keeps sessions open; safe for threads."""

    def __init__(self, observer: Observer = NOBODY) -> None:
        self.observer = observer
        self._idle: list[_Session] = []
        self._lock = Lock()

    @contextmanager
    def engine(self, settings: Config | None = None) -> Iterator[Engine]:
        """See ``Sessions``.  The configuration is read anew: it may have changed."""
        settings = settings or config.load()
        session = self._take()
        try:
            with session.kernel.work():
                yield Engine(settings, session.store, session.kernel, observer=self.observer)
        except BaseException:
            # The fault may be its own.
            session.close()
            raise
        self._give_back(session)

    def _take(self) -> _Session:
        while True:
            with self._lock:
                if not self._idle:
                    break
                session = self._idle.pop()
            if session.current:
                return session
            session.close()
        return _Session()

    def _give_back(self, session: _Session) -> None:
        with self._lock:
            if len(self._idle) < IDLE:
                self._idle.append(session)
                return
        session.close()

    def close(self) -> None:
        """Close what is not in use."""
        with self._lock:
            while self._idle:
                self._idle.pop().close()
