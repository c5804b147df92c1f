# SPDX-License-Identifier: LGPL-2.1-or-later
"""Netlink sockets of the host and of namespaces, and what was read through them.

pyroute2 makes the changes (``route_socket``); ``rtnetlink`` reads.  A socket is opened
inside its namespace and used from outside, so no thread jumps between namespaces to make a
change.  An open socket keeps its namespace alive after the namespace's name was deleted.
"""

import errno
import os
import socket
from collections.abc import Callable, Collection
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, TypeVar

from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netns, rtnetlink
from libvirt_natns.kernel.netlink import InterruptedDumpError
from libvirt_natns.kernel.rtnetlink import Link

DUMP_TRIES = 100
"""A listing is invalid if the kernel's tables change on the way; it is read again so often."""

S = TypeVar("S")
T = TypeVar("T")

if find_spec("pyroute2") is None:
    # A process without the library fails before it has changed anything.
    raise ModuleNotFoundError("No module named 'pyroute2'", name="pyroute2")


def load_writer() -> None:
    """Load pyroute2 ahead of the process's first change, which would wait for it."""
    from libvirt_natns.kernel import route_socket  # noqa: F401


class Sockets:
    """The open sockets of one session, by namespace, and the session's memory of readings.

    While ``remembers`` is set, each reading is made once and then kept in ``readings``.
    """

    def __init__(self) -> None:
        self._writers: dict[str | None, Any] = {}
        self._readers: dict[str | None, rtnetlink.Session] = {}
        self._inodes: dict[str | None, int | None] = {}
        self._doubted: set[str | None] = set()
        self.remembers = False
        self.readings: dict[tuple[str, str | None, str], Any] = {}

    def writer(self, namespace: str | None) -> Any:  # noqa: ANN401
        """Return pyroute2's route socket in a namespace; None is the host."""
        from libvirt_natns.kernel.route_socket import IPRoute

        return self._opened(self._writers, namespace, IPRoute)

    def reader(self, namespace: str | None) -> rtnetlink.Session:
        """Return a socket for reading in a namespace; None is the host."""
        return self._opened(self._readers, namespace, rtnetlink.Session)

    def _opened(
        self, sockets: dict[str | None, S], namespace: str | None, make: Callable[[], S]
    ) -> S:
        """Return the socket in a namespace, opened where there is none that leads there."""
        if namespace in self._doubted:
            self._doubted.discard(namespace)
            if netns.inode(namespace) != self._inodes.get(namespace):
                self.close(namespace)
        if namespace not in sockets:
            try:
                with netns.entered(namespace):
                    inode, opened = netns.inode(None), make()
            except OSError as error:
                where = namespace or "the host"
                raise KernelError(f"cannot open a socket in {where}", str(error)) from error
            if self._inodes.get(namespace, inode) != inode:
                # The other socket leads to a namespace that had this name before.
                self.close(namespace)
            self._inodes[namespace] = inode
            sockets[namespace] = opened
        return sockets[namespace]

    def doubt(self) -> None:
        """Check, before a namespace's sockets serve again, that its name still leads there.

        A namespace may be replaced by another one of its name.  An open socket keeps the
        former namespace, and so its inode's number.
        """
        self._doubted = self.namespaces() - {None}

    def namespaces(self) -> set[str | None]:
        """Return the namespaces with an open socket; None is the host."""
        return {*self._writers, *self._readers}

    def close(self, *namespaces: str | None) -> None:
        """Close the sockets of these namespaces."""
        for namespace in namespaces:
            self._inodes.pop(namespace, None)
            for sockets in (self._writers, self._readers):
                opened = sockets.pop(namespace, None)
                if opened is not None:
                    opened.close()


class NetlinkChannel:
    """Requests to the kernel in one namespace, by the session's sockets.

    ``namespace`` None is the host.
    """

    __slots__ = ("namespace", "sockets")

    def __init__(self, sockets: Sockets, namespace: str | None) -> None:
        self.sockets = sockets
        self.namespace = namespace

    @property
    def writer(self) -> Any:  # noqa: ANN401
        """Return pyroute2's route socket."""
        return self.sockets.writer(self.namespace)

    @property
    def reader(self) -> rtnetlink.Session:
        """Return the socket for reading."""
        return self.sockets.reader(self.namespace)

    @property
    def place(self) -> str:
        """Return the namespace in words, for messages."""
        return self.namespace or "the host"

    def remembered(self, what: str, name: str, read: Callable[[], T]) -> T:
        """Return a reading, kept from before while the session remembers."""
        if not self.sockets.remembers:
            return read()
        key = (what, self.namespace, name)
        if key not in self.sockets.readings:
            self.sockets.readings[key] = read()
        reading: T = self.sockets.readings[key]
        return reading

    def listed(self, what: str, listing: Callable[[], list[T]]) -> list[T]:
        """Return a whole listing, such as that of links, although others make changes.

        Raises KernelError.
        """

        def whole() -> list[T]:
            for _ in range(DUMP_TRIES):
                with suppress(InterruptedDumpError):
                    return listing()
            raise KernelError("the kernel's network settings keep changing", "try again")

        try:
            return self.remembered(what, "", whole)
        except OSError as error:
            raise KernelError(f"cannot list the {what}", error.strerror or str(error)) from error

    def links(self) -> list[Link]:
        """Return all links."""
        return self.listed("links", lambda: self.reader.links())

    def index(self, link: str) -> int:
        """Return the index of a link.  Raises KernelError if there is no such link."""
        # A netlink request for all attributes of the link takes ten times as long.
        try:
            with netns.entered(self.namespace):
                return socket.if_nametoindex(link)
        except OSError:
            raise KernelError(f"there is no link {link} in {self.place}") from None

    def attempt(self, request: Callable[[], object]) -> int:
        """Make a change, and return 0 or the error number (errno) of the kernel's refusal."""
        from libvirt_natns.kernel.route_socket import NetlinkError

        try:
            request()
        except NetlinkError as error:
            return int(error.code)
        except OSError as error:
            # The socket has failed, and not the change.
            return error.errno or errno.EIO
        return 0

    def change(
        self, what: str, request: Callable[[], object], harmless: Collection[int] = ()
    ) -> None:
        """Make a change.  Raises KernelError, which says that the kernel refuses ``what``.

        An error number among ``harmless`` counts as success.
        """
        code = self.attempt(request)
        if code and code not in harmless:
            raise KernelError(f"the kernel refuses {what}", os.strerror(code))
