# SPDX-License-Identifier: LGPL-2.1-or-later
"""Listening to libvirt: the event loop, and connections that tell of events.

With ``connection`` the only user of libvirt-python.  A callback runs in the
loop's thread (that of the connection's end in any), where a question to libvirt
would wait for its own answer: it only passes on what concerns whom.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from threading import Thread
from typing import Any, Literal

import libvirt

from libvirt_natns import names
from libvirt_natns.daemons.libvirt import quiet
from libvirt_natns.errors import LibvirtError
from libvirt_natns.records import dataclass

KEEPALIVE = 5, 3
"""Seconds of silence before libvirt is asked for a sign of life, and how many such
questions may stay unanswered: after 20 s, a daemon that is stuck counts as gone."""

END_LIMIT = 1.0
"""Seconds that the loop gets to end."""

Kind = Literal["guest", "network"]
What = Literal["changed", "life"]
"""``life``: it started or stopped, of which hooks tell, too."""


@dataclass(frozen=True, slots=True)
class Happened:
    """An event: to whom, and of what sort; what it changed is to be asked."""

    kind: Kind
    uuid: str
    name: str
    what: What


Tell = Callable[[Happened], None]

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
    """Have libvirt use its own loop, which it wants to hear once, before any connection."""
    libvirt.registerErrorHandler(quiet, None)
    libvirt.virEventRegisterDefaultImpl()


class Loop:
    """libvirt's event loop, in a thread that sleeps until something happens."""

    def __init__(self) -> None:
        self._over = False
        self._thread = Thread(target=self._run, name="libvirt-events", daemon=True)

    def start(self) -> None:
        """Begin; no connection that is to tell of events may be opened before."""
        _register()
        self._thread.start()

    def _run(self) -> None:
        while not self._over:
            libvirt.virEventRunDefaultImpl()

    def stop(self) -> None:
        """End, once the callback that runs has ended."""
        self._over = True
        # The loop wakes for a timer alone, which is the last it sees.
        libvirt.virEventAddTimeout(0, _remove_timer, None)
        self._thread.join(END_LIMIT)


def _remove_timer(timer: int, _: object) -> None:
    libvirt.virEventRemoveTimeout(timer)


# -- connections -------------------------------------------------------------


class Link:
    """An open read-only connection, which tells of events until it is closed.

    ``ended`` is called once it is broken, from any thread.
    """

    def __init__(self, uri: str, tell: Tell, ended: Callable[[], None]) -> None:
        """Raises LibvirtError where libvirt does not answer, or has no such driver."""
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
            raise LibvirtError(f"libvirt refuses to tell of events at {uri}", str(error)) from error

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
        """Listen no more.  Blocks for as long as a daemon that is stuck counts as alive."""
        # The callbacks would hold the connection; one that is broken refuses all of it.
        for step in (*reversed(self._undo), self._connection.close):
            with suppress(libvirt.libvirtError):
                step()

    # -- events, from the loop ----------------------------------------------

    def _domain_lives(self, _: object, domain: Any, event: int, *more: object) -> None:  # noqa: ANN401
        if event in GUEST_LIFE:
            self._tell(_happened("guest", domain, "life"))

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
        if event in NETWORK_LIFE:
            self._tell(_happened("network", network, "life"))

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
        """The XML of a guest or a network; None for one that is not active.

        Waits while libvirt runs a hook for it.  Raises LibvirtError.
        """
        connection = self._connection
        lookup = connection.lookupByUUIDString
        if kind == "network":
            lookup = connection.networkLookupByUUIDString
        try:
            found = lookup(uuid)
            return bytes(found.XMLDesc(0).encode()) if found.isActive() else None
        except libvirt.libvirtError as error:
            if error.get_error_code() in ABSENT:
                return None
            raise LibvirtError(f"libvirt does not tell of {kind} {uuid}", str(error)) from error

    @property
    def alive(self) -> bool:
        """Whether libvirt still answers; false also for a connection that was closed."""
        try:
            return bool(self._connection.isAlive())
        except libvirt.libvirtError:
            return False


def _happened(kind: Kind, subject: Any, what: What) -> Happened:  # noqa: ANN401
    return Happened(kind, subject.UUIDString(), subject.name(), what)


def _is_ours(kind: int, namespace: str | None) -> bool:
    """Whether metadata that was changed may be ours; titles and descriptions are not."""
    # The same numbers for domains and networks.
    element = kind == libvirt.VIR_DOMAIN_METADATA_ELEMENT
    return element and namespace in (names.XML_NAMESPACE, None, "")
