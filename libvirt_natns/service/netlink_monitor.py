# SPDX-License-Identifier: LGPL-2.1-or-later
"""Netlink sockets that hear of the kernel's changes, in our namespaces and in the host.

Our namespaces share a pair of sockets.  The pair lives in an empty namespace of its own,
and only our namespaces have an id (an *nsid*) there.  Each message comes with its
sender's id.  A socket in each namespace would keep a deleted namespace alive.  And the
kernel goes through all sockets for each message: a thousand sockets would slow down
every change on the machine.
"""

import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from threading import Thread

from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.netlink import (
    HEADER,
    LARGEST,
    LINK_HEADER,
    NETLINK_NETFILTER,
    NETLINK_ROUTE,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    RTM_GETLINK,
    RTM_GETNSID,
    RTM_NEWNSID,
    Attrs,
    messages,
    pack,
    u32,
)

SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_LISTEN_ALL_NSID = 8
SO_RCVBUFFORCE = 33

RTNLGRP_LINK = 1
RTNLGRP_IPV4_IFADDR = 5
RTNLGRP_IPV4_ROUTE = 7
RTNLGRP_IPV4_RULE = 8
RTNLGRP_IPV6_IFADDR = 9
RTNLGRP_IPV6_ROUTE = 11
RTNLGRP_IPV6_RULE = 19
RTNLGRP_IPV4_NETCONF = 24
RTNLGRP_IPV6_NETCONF = 25
NFNLGRP_NFTABLES = 7

INSIDE = (
    RTNLGRP_LINK,
    RTNLGRP_IPV4_IFADDR,
    RTNLGRP_IPV4_ROUTE,
    RTNLGRP_IPV6_IFADDR,
    RTNLGRP_IPV6_ROUTE,
    RTNLGRP_IPV4_NETCONF,
    RTNLGRP_IPV6_NETCONF,
)
"""Groups of a namespace of ours: all that is in it is ours."""

OUTSIDE = (
    RTNLGRP_LINK,
    RTNLGRP_IPV4_IFADDR,
    RTNLGRP_IPV4_ROUTE,
    RTNLGRP_IPV4_RULE,
    RTNLGRP_IPV6_IFADDR,
    RTNLGRP_IPV6_ROUTE,
    RTNLGRP_IPV6_RULE,
    RTNLGRP_IPV4_NETCONF,
    RTNLGRP_IPV6_NETCONF,
)
"""Groups of the host."""

NETNSA_NSID = 1
NETNSA_FD = 3
ANY_NSID = 0xFFFFFFFF
"""-1, as an unsigned number."""

BACKLOG = 8 << 20
"""Octets of messages that may wait: a thousand networks that start or end at once."""


class Overflow(Exception):
    """Messages were lost."""


class Channel:
    """A netlink socket that listens; it belongs to the namespace that it is opened in.

    ``everywhere``: it hears all namespaces that have an id there.
    """

    def __init__(self, protocol: int, groups: tuple[int, ...], *, everywhere: bool = False) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, kind, protocol)
        with suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BACKLOG)
        self._socket.bind((0, 0))
        if everywhere:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_LISTEN_ALL_NSID, 1)
        for group in groups:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def ask(self, kind: int, flags: int, body: bytes) -> None:
        """Send a request; its answers come among the messages."""
        length = HEADER.size + len(body)
        self._socket.send(HEADER.pack(length, kind, NLM_F_REQUEST | flags, 1, 0) + body)

    def received(self) -> Iterator[tuple[int | None, bytes]]:
        """Yield each datagram that waits, with its sender's nsid, if the sender has one.

        Raises Overflow where messages were lost; another call yields the rest.
        """
        while True:
            try:
                datagram, ancillary, _, _ = self._socket.recvmsg(LARGEST, 64)
            except BlockingIOError:
                return
            except OSError as error:
                raise Overflow from error
            yield _nsid(ancillary), datagram

    def answer(self, limit: float) -> bytes:
        """Wait for the next datagram and return it; empty after ``limit`` seconds."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(limit * 1000):
            return b""
        return self._socket.recv(LARGEST)


def _nsid(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    for level, kind, data in ancillary:
        if (level, kind) == (SOL_NETLINK, NETLINK_LISTEN_ALL_NSID):
            return int(struct.unpack_from("=i", data)[0])
    return None


class NamespaceMonitor:
    """Hears the namespaces that ``nsid`` was called for, by ``routing`` and ``rules``."""

    def __init__(self) -> None:
        self.routing: Channel
        self.rules: Channel
        self._requests: Channel
        failed: list[Exception] = []
        # Only a thread can leave its namespace, and it does not come back.
        thread = Thread(target=self._open, args=(failed,))
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    def _open(self, failed: list[Exception]) -> None:
        try:
            netns.leave()
            self.routing = Channel(NETLINK_ROUTE, INSIDE, everywhere=True)
            self.rules = Channel(NETLINK_NETFILTER, (NFNLGRP_NFTABLES,), everywhere=True)
            self._requests = Channel(NETLINK_ROUTE, ())
        except (KernelError, OSError) as error:
            failed.append(error)

    def nsid(self, path: str) -> int | None:
        """Listen to a namespace, and return its nsid; None where there is no namespace.

        The kernel takes the id back when the namespace ends, and may give it to
        the next namespace.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            namespace = u32(NETNSA_FD, descriptor)
            # A namespace that has an id already keeps it.
            self._ask(RTM_NEWNSID, bytes(4) + pack([namespace, u32(NETNSA_NSID, ANY_NSID)]))
            for kind, _, _, body in messages(self._ask(RTM_GETNSID, bytes(4) + pack([namespace]))):
                nsid = Attrs.parse(body, 4).number(NETNSA_NSID)
                if kind == RTM_NEWNSID and nsid is not None:
                    return nsid if nsid != ANY_NSID else None
        finally:
            os.close(descriptor)
        return None

    def _ask(self, kind: int, body: bytes) -> bytes:
        self._requests.ask(kind, NLM_F_ACK if kind == RTM_NEWNSID else 0, body)
        return self._requests.answer(1.0)

    def close(self) -> None:
        for channel in (self.routing, self.rules, self._requests):
            channel.close()


class HostMonitor:
    """Hears the namespace that it is made in, which is the host's."""

    def __init__(self) -> None:
        self.routing = Channel(NETLINK_ROUTE, OUTSIDE)
        self.rules = Channel(NETLINK_NETFILTER, (NFNLGRP_NFTABLES,))

    def list_links(self) -> None:
        """Have the kernel send a message of each link, as if the link had just changed."""
        with suppress(OSError):
            self.routing.ask(RTM_GETLINK, NLM_F_DUMP, LINK_HEADER.pack(0, 0, 0, 0, 0))

    def close(self) -> None:
        self.routing.close()
        self.rules.close()
