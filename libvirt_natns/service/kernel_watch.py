# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel watch: tells which networks something happened to that was not us.

The watch finds the network of an event, and decides whether we have caused the event.
The healer decides whether anything is wrong.

Between events the watch polls two things only.  It asks legacy iptables, which sends no
messages, every second or more often, where it is in use.  And an audit now and then
finds damage without an event, one network at a time.

No error ends the thread: without the watch no damage would be healed, and the service
would seem well.  After an error all networks that are followed are looked at.

Known limits: only the audit finds three kinds of damage.  The first is a rule of the host that
another program changes during a change of ours.  The second is a setting without a message of the
kernel (arp_ignore and the like).  The third is rules of legacy iptables that are replaced by as
many others of the same size.
"""

import os
import select
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from threading import Event, Lock, Thread

from libvirt_natns.engine.observer import HOST
from libvirt_natns.errors import NatnsError
from libvirt_natns.service.audit import Audit
from libvirt_natns.service.complaints import Complaints
from libvirt_natns.service.followed_networks import FollowedNetworks
from libvirt_natns.service.kernel_events import KernelEvents
from libvirt_natns.service.netlink_monitor import NamespaceMonitor
from libvirt_natns.service.own_changes import OwnChanges
from libvirt_natns.service.watched import Watched

ONCE_MORE = 1.0
"""Seconds from the end of a change of ours to the look at events during the change."""

TICK = 1.0
"""Seconds between two looks at things without events, at most ..."""

TICK_LEAST = 0.25
TICK_EACH = 0.005
"""... and at least; the more networks with legacy iptables, the longer."""

FAULT_PAUSE = 5.0
"""Seconds of rest after an error of the thread, which may come again at once."""

Describe = Callable[[str], Watched | None]
Suspect = Callable[[str], None]
Report = Callable[[Exception], None]


class Bell:
    """A descriptor that any thread makes readable, and that the watching thread waits for."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._descriptor: int | None = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return -1 if self._descriptor is None else self._descriptor

    def ring(self) -> None:
        """Wake the thread; a change of ours may end after the thread has."""
        with self._lock:
            if self._descriptor is not None:
                os.eventfd_write(self._descriptor, 1)

    def clear(self) -> None:
        """Wait for the next ring; the thread's alone."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.fileno())

    def close(self) -> None:
        """Close the descriptor."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = None


class KernelWatch:
    """Watches networks that are up, in a thread of its own.

    ``describe`` returns the parts of a network now, None where it is not up.  ``suspect``
    is called with each network, or HOST, that something happened to.  ``appeared`` is
    called with a namespace that looks like ours but is not watched: another process has
    made it.  ``report`` is called with an error that the thread did not expect.  All four
    are called from the thread.
    """

    def __init__(
        self,
        describe: Describe,
        suspect: Suspect,
        appeared: Suspect = lambda namespace: None,
        report: Report = lambda error: None,
    ) -> None:
        self._describe = describe
        self._suspect = suspect
        self._appeared = appeared
        self._report = report
        self._bell = Bell()
        self._own = OwnChanges(suspect, self._bell.ring)
        self._stopping = Event()
        self._thread: Thread | None = None
        # All below is the thread's alone.
        self._followed: FollowedNetworks
        self._events: KernelEvents
        self._complaints = Complaints()
        self._ended: list[str] = []
        self._unread: set[str] = set()
        self._newcomers: dict[str, float] = {}
        self._once_more: dict[str, float] = {}
        self._audit = Audit()
        self._next_tick = 0.0

    # -- for all threads ---------------------------------------------------

    def start(self) -> None:
        """Begin to watch.  Raises KernelError or OSError."""
        monitor = NamespaceMonitor()
        self._epoll = select.epoll()
        self._followed = FollowedNetworks(monitor, self._epoll)
        self._events = KernelEvents(monitor, self._followed, self._own, self._note_newcomer)
        for descriptor in (*self._events.descriptors(), self._bell.fileno()):
            self._epoll.register(descriptor, select.EPOLLIN)
        self._thread = Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close everything."""
        self._stopping.set()
        self._bell.ring()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._followed.close()
            self._epoll.close()
            self._events.close()
        self._bell.close()

    def follow(self, uuids: Iterable[str]) -> None:
        """Watch these networks from now on; ``changing`` does that for networks that come up."""
        for uuid in uuids:
            with self.changing(uuid):
                pass

    def follows(self, uuid: str) -> bool:
        """True if a network is watched now."""
        return uuid in self._followed

    def changing(self, uuid: str) -> AbstractContextManager[None]:
        """Take events of a network, or of HOST, for our own while the body runs."""
        return self._own.changing(uuid)

    def settled(self, limit: float) -> bool:
        """Wait until changes that have ended by now are attended to; false after the limit.

        ``limit`` is in seconds.
        """
        return self._own.settled(limit)

    # -- the thread --------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._round()
            except Exception as error:  # the thread must go on after any error
                self._on_fault(error)

    def _round(self) -> None:
        """Wait for events, and attend to all of them."""
        ready = self._epoll.poll(self._pause())
        self._bell.clear()
        # In this order: see OwnChanges.
        self._ended += self._own.take_ended()
        self._events.read_all()
        for descriptor, _ in ready:
            self._on_process(descriptor)
        while self._ended:
            self._attend(self._ended.pop(0))
        self._on_time(time.monotonic())

    def _on_fault(self, error: Exception) -> None:
        """Begin anew after an error: the events of its round may be lost."""
        self._complain("round", error)
        for uuid in (HOST, *self._followed):
            self._unread.add(uuid)
            self._own.heard(uuid)
        self._stopping.wait(FAULT_PAUSE)

    def _complain(self, subject: str, error: Exception) -> None:
        if self._complaints.is_news(subject, error):
            self._report(error)

    def _on_process(self, descriptor: int) -> None:
        uuid = self._followed.end_process(descriptor)
        if uuid is not None and not self._own.is_going_on(uuid):
            # A process that starts a daemon ends as well: look for the daemon.
            self._refresh(uuid)

    def _note_newcomer(self, namespace: str) -> None:
        self._newcomers[namespace] = time.monotonic()

    def _attend(self, uuid: str) -> None:
        """Attend to the end of a change of ours, after its events."""
        try:
            if self._own.finish(uuid):
                overheard = self._own.was_overheard(uuid)
                is_new = uuid not in self._followed
                self._refresh(uuid)
                if uuid == HOST:
                    if overheard:
                        self._suspect(HOST)
                elif uuid in self._followed and (overheard or is_new):
                    self._once_more.setdefault(uuid, time.monotonic() + ONCE_MORE)
        finally:
            self._own.note_attended()

    def _refresh(self, uuid: str) -> None:
        """Follow the parts that a network has now; the next tick tries again after an error."""
        try:
            if uuid == HOST:
                self._followed.tables.accept_host()
            else:
                self._follow_parts(uuid)
        except (NatnsError, OSError):
            # The state database cannot be read, or too many files are open.
            self._unread.add(uuid)
        except Exception as error:  # the other networks must stay watched
            self._unread.add(uuid)
            self._complain(uuid, error)
        else:
            self._complaints.end(uuid)

    def _follow_parts(self, uuid: str) -> None:
        watched = self._describe(uuid)
        was_whole = self._followed.unfollow(uuid)
        if watched is not None and not self._followed.follow(watched) and was_whole:
            self._own.heard(uuid)

    # -- time --------------------------------------------------------------

    def _pause(self) -> float | None:
        """Return the seconds to wait at most; None without end."""
        due = [self._audit.due] if self._followed else []
        due += [self._next_tick] if self._ticks else []
        due += self._once_more.values()
        return max(0.0, min(due) - time.monotonic()) if due else None

    @property
    def _ticks(self) -> bool:
        return bool(self._unread or self._newcomers or self._followed.tables.has_host)

    def _on_time(self, now: float) -> None:
        for uuid in [uuid for uuid, due in self._once_more.items() if now >= due]:
            del self._once_more[uuid]
            self._own.heard(uuid)
        if self._ticks and now >= self._next_tick:
            polled = len(self._followed.tables)
            self._next_tick = now + min(TICK, max(TICK_LEAST, TICK_EACH * polled))
            self._on_tick(now)
        self._own.heard(self._audit.take(now, self._followed))

    def _on_tick(self, now: float) -> None:
        unread, self._unread = self._unread, set()
        for uuid in unread:
            if not self._own.is_going_on(uuid):
                self._refresh(uuid)
        if HOST in unread:
            # The host's tables may have been altered before they could be read.
            self._own.heard(HOST)
        for namespace, since in list(self._newcomers.items()):
            if now - since >= TICK:
                del self._newcomers[namespace]
                if self._followed.by_namespace(namespace) is None:
                    self._appeared(namespace)
        # The tables of the host cannot be listed while too many files are open.
        with suppress(NatnsError, OSError):
            for uuid in self._followed.tables.altered():
                self._own.heard(uuid)
