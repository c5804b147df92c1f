# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events of libvirt: the event loop, and connections that report events.

A callback runs in the loop's thread; the callback for the end of a connection may run in
any thread.  A question to libvirt would wait there for its own answer.  So a callback only
passes on the network or guest of the event.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from threading import Thread
from typing import Any, Literal

import libvirt

from libvirt_natns import names
from libvirt_natns.daemons.libvirt import quiet
from libvirt_natns.errors import LibvirtError

KEEPALIVE = 5, 3
"""Seconds of silence before libvirt is asked for a sign of life, and the number of questions
that may stay unanswered.  A daemon that is stuck counts as ended after 20 s.
"""

END_LIMIT = 1.0
"""Seconds that the loop gets to end."""

FAULT_PAUSE = 0.5
"""Seconds of rest after an error of the loop, which may come again at once."""

Kind = Literal["guest", "network"]
What = Literal["changed", "life", "definition"]
"""``life``: the guest or network started or stopped, which hooks report, too.

``definition``: it was defined, paused or the like, which changes nothing of ours."""


@dataclass(frozen=True, slots=True)
class LibvirtEvent:
    """An event: its guest or network, and its sort; the change itself must be asked for."""

    kind: Kind
    uuid: str
    name: str
    what: What


Tell = Callable[[LibvirtEvent], None]

GUEST_LIFE = frozenset(
    (
        libvirt.VIR_DOMAIN_EVENT_STARTED,
        # A guest that migrates in runs from here on.
        libvirt.VIR_DOMAIN_EVENT_RESUMED,
        libvirt.VIR_DOMAIN_EVENT_STOPPED,
        libvirt.VIR_DOMAIN_EVENT_CRASHED,
    )
)
NETWORK_LIFE = frozenset((libvirt.VIR_NETWORK_EVENT_STARTED, libvirt.VIR_NETWORK_EVENT_STOPPED))

NETWORK_METADATA = getattr(libvirt, "VIR_NETWORK_EVENT_ID_METADATA_CHANGE", None)
"""Since libvirt 9.8."""

ABSENT = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_NO_NETWORK)


# -- the loop ----------------------------------------------------------------


@cache
def _register() -> None:
    """Have libvirt use its own event loop; libvirt wants this once, before any connection."""
    libvirt.registerErrorHandler(quiet, None)
    libvirt.virEventRegisterDefaultImpl()


class Loop:
    """libvirt's event loop, in a thread that sleeps until an event arrives."""

    def __init__(self) -> None:
        self._over = False
        self._thread = Thread(target=self._run, name="libvirt-events", daemon=True)

    def start(self) -> None:
        """Start the loop; connections that report events may be opened only then."""
        _register()
        self._thread.start()

    def _run(self) -> None:
        while not self._over:
            try:
                libvirt.virEventRunDefaultImpl()
            except libvirt.libvirtError:
                # The poll has failed, for want of memory perhaps: events still wait.
                time.sleep(FAULT_PAUSE)

    def stop(self) -> None:
        """End the loop after the callback that runs now."""
        self._over = True
        # The loop wakes only for an event, so a timer makes the last event.
        libvirt.virEventAddTimeout(0, _remove_timer, None)
        self._thread.join(END_LIMIT)


def _remove_timer(timer: int, _: object) -> None:
    libvirt.virEventRemoveTimeout(timer)


# -- connections -------------------------------------------------------------


class EventConnection:
    """An open read-only connection, which reports events until it is closed.

    ``ended`` is called when the connection breaks, from any thread.
    """

    def __init__(self, uri: str, tell: Tell, ended: Callable[[], None]) -> None:
        """Open the connection.  Raises LibvirtError without an answer, or without such a driver."""
        self._tell = tell
        self._undo: list[Callable[[], object]] = []
        try:
            self._connection = libvirt.openReadOnly(uri)
        except libvirt.libvirtError as error:
            raise LibvirtError(f"libvirt does not answer at {uri}", str(error)) from error
        try:
            self._connection.registerCloseCallback(lambda *_: ended(), None)
            self._undo.append(self._connection.unregisterCloseCallback)
            self._connection.setKeepAlive(*KEEPALIVE)
            self._listen(uri.partition(":")[0])
        except libvirt.libvirtError as error:
            self.close()
            raise LibvirtError(f"libvirt refuses to report events at {uri}", str(error)) from error

    def _listen(self, scheme: str) -> None:
        if scheme == "network":
            self._on_network(libvirt.VIR_NETWORK_EVENT_ID_LIFECYCLE, self._network_lives)
            if NETWORK_METADATA is not None:
                self._on_network(NETWORK_METADATA, self._network_metadata)
            return
        self._on_domain(libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._domain_lives)
        for event in (
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED,
        ):
            self._on_domain(event, self._domain_device)
        self._on_domain(libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, self._domain_metadata)

    def _on_domain(self, event: int, callback: Callable[..., None]) -> None:
        number = self._connection.domainEventRegisterAny(None, event, callback, None)
        self._undo.append(partial(self._connection.domainEventDeregisterAny, number))

    def _on_network(self, event: int, callback: Callable[..., None]) -> None:
        number = self._connection.networkEventRegisterAny(None, event, callback, None)
        self._undo.append(partial(self._connection.networkEventDeregisterAny, number))

    def close(self) -> None:
        """Close the connection.  Blocks as long as a daemon that is stuck counts as alive."""
        # Callbacks keep the connection open.  A broken connection refuses each step.
        for step in (*reversed(self._undo), self._connection.close):
            with suppress(libvirt.libvirtError):
                step()

    # -- events, from the loop ----------------------------------------------

    def _domain_lives(self, _: object, domain: Any, event: int, *more: object) -> None:  # noqa: ANN401
        what: What = "life" if event in GUEST_LIFE else "definition"
        self._tell(_happened("guest", domain, what))

    def _domain_device(self, _: object, domain: Any, *more: object) -> None:  # noqa: ANN401
        self._tell(_happened("guest", domain, "changed"))

    def _domain_metadata(
        self,
        _: object,
        domain: Any,  # noqa: ANN401
        kind: int,
        namespace: str | None,
        *more: object,
    ) -> None:
        if _is_ours(kind, namespace):
            self._tell(_happened("guest", domain, "changed"))

    def _network_lives(self, _: object, network: Any, event: int, *more: object) -> None:  # noqa: ANN401
        what: What = "life" if event in NETWORK_LIFE else "definition"
        self._tell(_happened("network", network, what))

    def _network_metadata(
        self,
        _: object,
        network: Any,  # noqa: ANN401
        kind: int,
        namespace: str | None,
        *more: object,
    ) -> None:
        if _is_ours(kind, namespace):
            self._tell(_happened("network", network, "changed"))

    # -- asking, from elsewhere ---------------------------------------------

    def xml(self, kind: Kind, uuid: str) -> bytes | None:
        """Return the XML of a guest or a network; None for one that is not active.

        Waits while libvirt runs a hook for it.  Raises LibvirtError.
        """
        connection = self._connection
        lookup = connection.lookupByUUIDString
        if kind == "network":
            lookup = connection.networkLookupByUUIDString
        try:
            subject = lookup(uuid)
            return bytes(subject.XMLDesc(0).encode()) if subject.isActive() else None
        except libvirt.libvirtError as error:
            if error.get_error_code() in ABSENT:
                return None
            raise LibvirtError(
                f"libvirt does not return the XML of {kind} {uuid}", str(error)
            ) from error

    @property
    def alive(self) -> bool:
        """True if libvirt still answers; False also for a closed connection."""
        try:
            return bool(self._connection.isAlive())
        except libvirt.libvirtError:
            return False


def _happened(kind: Kind, subject: Any, what: What) -> LibvirtEvent:  # noqa: ANN401
    return LibvirtEvent(kind, subject.UUIDString(), subject.name(), what)


def _is_ours(kind: int, namespace: str | None) -> bool:
    """True if changed metadata may be ours; titles and descriptions are not."""
    # libvirt uses the same numbers for domains and networks.
    element = kind == libvirt.VIR_DOMAIN_METADATA_ELEMENT
    return element and namespace in (names.XML_NAMESPACE, None, "")
