# SPDX-License-Identifier: LGPL-2.1-or-later
"""Our own changes of networks, which tell events that we have caused from damage.

The kernel puts a message into our sockets before the call that caused it returns.  So
when a change is over, all of its messages wait there.  The thread that reads the sockets
takes the ends of changes first.  Then it reads all messages, and looks away from the
networks concerned.  Only after that does it attend to the ends.

Known limit: a message does not tell which process caused it.  A network that was heard
of during a change of ours is therefore looked at once more after the change.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition

from libvirt_natns.engine.observer import HOST


class OwnChanges:
    """The changes that go on, and events during them.

    ``suspect`` is called with each network, or HOST, to which something happened that
    was not a change of ours.  ``wake`` is called at the end of each change.
    """

    def __init__(self, suspect: Callable[[str], None], wake: Callable[[], None]) -> None:
        self.suspect = suspect
        self._wake = wake
        self._condition = Condition()
        self._going_on: Counter[str] = Counter()
        self._ended: list[str] = []
        self._count_ended = 0
        self._count_attended = 0
        # Of the reading thread alone.
        self._overheard: set[str] = set()

    # -- for all threads ---------------------------------------------------

    @contextmanager
    def changing(self, uuid: str) -> Iterator[None]:
        """Take events of a network, or of HOST, for our own while the body runs."""
        with self._condition:
            self._going_on[uuid] += 1
        try:
            yield
        finally:
            with self._condition:
                self._ended.append(uuid)
                self._count_ended += 1
            self._wake()

    def settled(self, limit: float) -> bool:
        """Wait until changes that have ended by now are attended to; false after the limit.

        ``limit`` is in seconds.
        """
        with self._condition:
            aim = self._count_ended
            return self._condition.wait_for(lambda: self._count_attended >= aim, limit)

    # -- for the reading thread --------------------------------------------

    def take_ended(self) -> list[str]:
        """Return the networks of changes that have ended since the last call."""
        with self._condition:
            ended, self._ended = self._ended, []
        return ended

    def finish(self, uuid: str) -> bool:
        """Look away no longer for one change; true if it was the network's only one."""
        with self._condition:
            self._going_on[uuid] -= 1
            only = self._going_on[uuid] <= 0
            if only:
                del self._going_on[uuid]
        return only

    def was_overheard(self, uuid: str) -> bool:
        """True if something happened during changes of a network; forgets it.

        Rules of HOST do not count.
        """
        overheard = uuid in self._overheard
        self._overheard.discard(uuid)
        return overheard

    def note_attended(self) -> None:
        """Note that the end of one change is attended to."""
        with self._condition:
            self._count_attended += 1
            self._condition.notify_all()

    def is_going_on(self, uuid: str) -> bool:
        """True if a network is being changed by us."""
        return bool(self._going_on[uuid])

    # -- events ------------------------------------------------------------

    def heard(self, uuid: str | None) -> None:
        """Suspect a network that something happened to, or HOST for a change of rules."""
        if uuid is None:
            return
        if not self._going_on[uuid]:
            self.suspect(uuid)
        elif uuid != HOST:
            self._overheard.add(uuid)

    def heard_of_host(self) -> None:
        """Suspect HOST for other things than rules, which we change seldom."""
        if self._going_on[HOST]:
            self._overheard.add(HOST)
        else:
            self.suspect(HOST)
