# SPDX-License-Identifier: LGPL-2.1-or-later
"""Engines for all threads of the service, with the parts that are kept between two events.

These are state databases and kernel sessions, as many as were in use at once, and networks
that were built ahead of libvirt.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from libvirt_natns.documents import config
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.observer import NOBODY, Observer
from libvirt_natns.engine.prebuilt import Built
from libvirt_natns.errors import StoreError
from libvirt_natns.kernel.defer import at_once
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.service.workqueue import Background
from libvirt_natns.state.schema import VERSION
from libvirt_natns.state.store import Store

IDLE = 4
"""The most sessions that are kept for later."""


class _Session:
    """A state database and a kernel session, for one thread at a time."""

    def __init__(self) -> None:
        self.store = Store()
        self.kernel = Kernel()
        self._inode = _inode(self.store.path)

    @property
    def current(self) -> bool:
        """True if the state database is still the file on disk, and of this version."""
        if _inode(self.store.path) != self._inode:
            return False
        # A process of another version may have changed the format.
        with suppress(StoreError):
            return bool(self.store.select("PRAGMA user_version")[0][0] == VERSION)
        return False

    def close(self) -> None:
        self.kernel.close()
        self.store.close()


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


class EnginePool:
    """Makes engines, and keeps their sessions open; safe for threads.

    Without a ``background``, engines wait for all of their work.  ``expect`` is called
    with the uuid of each network that is being started.
    """

    def __init__(self, observer: Observer = NOBODY, background: Background | None = None) -> None:
        self.observer = observer
        self.expect: Callable[[str], None] = lambda uuid: None
        self._background = background
        self._built = Built()
        self._idle: list[_Session] = []
        self._lock = Lock()

    @contextmanager
    def engine(self, settings: Config | None = None) -> Iterator[Engine]:
        """See ``Sessions``.  The configuration is read anew: it may have changed."""
        settings = settings or config.load()
        session = self._take()
        try:
            with session.kernel.work():
                yield Engine(
                    settings,
                    session.store,
                    session.kernel,
                    observer=self.observer,
                    later=self._background.soon if self._background else at_once,
                    built=self._built,
                )
        except BaseException:
            # The error may come from the session.
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
        """Close the sessions that are not in use."""
        with self._lock:
            while self._idle:
                self._idle.pop().close()
