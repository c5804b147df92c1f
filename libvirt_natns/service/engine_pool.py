# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the resident service keeps between two events, for all its threads.

State databases and kernel sessions, as many as have been in use at once; spare
namespaces; what was built ahead of libvirt.
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
from libvirt_natns.kernel.netns import Spares
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.service.background import Background
from libvirt_natns.state.schema import VERSION
from libvirt_natns.state.store import Store

IDLE = 4
"""How many sessions are kept for later."""


class _Session:
    """One state database and one kernel session, for one thread at a time."""

    def __init__(self, spares: Spares) -> None:
        self.store = Store()
        self.kernel = Kernel(spares)
        self._inode = _inode(self.store.path)

    @property
    def current(self) -> bool:
        """Return whether the state database is still the one on disk, and of this version."""
        if _inode(self.store.path) != self._inode:
            return False
        # One of another version may have brought it to its own format.
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


class Kept:
    """Keeps sessions open, and what else only a process that stays can have.

    Spare namespaces, threads for what nobody waits for, and what was built ahead.
    Without a ``background``, everything is waited for.  ``expect`` is called with
    the uuid of each network whose start goes on.  Safe for threads.
    """

    def __init__(self, observer: Observer = NOBODY, background: Background | None = None) -> None:
        self.observer = observer
        self.expect: Callable[[str], None] = lambda uuid: None
        self._background = background
        self._built = Built()
        self._spares = Spares()
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
        return _Session(self._spares)

    def _give_back(self, session: _Session) -> None:
        with self._lock:
            if len(self._idle) < IDLE:
                self._idle.append(session)
                return
        session.close()

    def close(self) -> None:
        """Close what is not in use."""
        self._spares.close()
        with self._lock:
            while self._idle:
                self._idle.pop().close()
