# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel tells of changes: netlink and inotify, read as little as possible.

One pair of sockets hears all namespaces of ours.  It lives in an empty namespace
of its own, in which just those have an id (an *nsid*) that are to be heard, and
each message comes with its sender's.  A socket in each namespace would do, too,
but would keep a deleted one alive; and since the kernel goes through all sockets
for each message, a thousand of them would slow down every change on the machine.

Legacy iptables tells nothing.  ``tables_size`` asks instead: a few microseconds.
"""

import ctypes
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netns

SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_LISTEN_ALL_NSID = 8
NETLINK_NETFILTER = 12
SO_RCVBUFFORCE = 33

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300

RTM_NEWLINK = 16
RTM_DELLINK = 17
RTM_GETLINK = 18
RTM_NEWADDR = 20
RTM_DELADDR = 21
RTM_NEWROUTE = 24
RTM_DELROUTE = 25
RTM_NEWNETCONF = 80
RTM_NEWNSID = 88
RTM_GETNSID = 90

RTNLGRP_LINK = 1
RTNLGRP_IPV4_IFADDR = 5
RTNLGRP_IPV4_ROUTE = 7
RTNLGRP_IPV6_IFADDR = 9
RTNLGRP_IPV6_ROUTE = 11
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
"""What is heard of a namespace: all of it is ours."""

OUTSIDE = (
    RTNLGRP_LINK,
    RTNLGRP_IPV4_IFADDR,
    RTNLGRP_IPV6_IFADDR,
    RTNLGRP_IPV6_ROUTE,
    RTNLGRP_IPV4_NETCONF,
    RTNLGRP_IPV6_NETCONF,
)
"""What is heard of the host."""

NETNSA_NSID = 1
NETNSA_FD = 3
ANY_NSID = -1

IFLA_IFNAME = 3
IFLA_MTU = 4
IFLA_MASTER = 10
IFLA_PROTINFO = 12
IFLA_BRPORT_MODE = 4
IFF_UP = 1
IFA_ADDRESS = 1
RTA_DST = 1
RTPROT_STATIC = 4
RTPROT_RA = 9
NETCONFA_IFINDEX = 1
NETCONFA_FORWARDING = 2
NETCONFA_IFINDEX_ALL = -1
NLA_TYPE_MASK = 0x3FFF

ELEMENTS_AND_GENERATIONS = (12, 14, 15)
"""Kinds of messages of nftables: NFT_MSG_NEWSETELEM, _DELSETELEM, _NEWGEN."""

LIBVIRTS = (b"libvirt_network\0", b"LIBVIRT_")
"""libvirt's table of nftables, and how its chains in others' tables are called."""

HEADER = struct.Struct("=IHHII")
IFINFO = struct.Struct("=BxHiII")
IFADDR = struct.Struct("=BBBBI")
RTMSG = struct.Struct("=BBBBBBBBI")
ATTRIBUTE = struct.Struct("=HH")
NUMBER = struct.Struct("=i")

DATAGRAM = 65536
"""Octets; the kernel's own messages are at most half as long."""

BACKLOG = 8 << 20
"""Octets of messages that may wait: a thousand networks that start or end at once."""


class Overflow(Exception):
    """Messages were lost."""


class Channel:
    """A netlink socket that listens; belongs to the namespace that it is opened in.

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
        """Send a request; the answers come among the messages."""
        length = HEADER.size + len(body)
        self._socket.send(HEADER.pack(length, kind, NLM_F_REQUEST | flags, 1, 0) + body)

    def received(self) -> Iterator[tuple[int | None, memoryview]]:
        """All datagrams that wait: the sender's nsid, if it has one, and the messages.

        Raises Overflow where some were lost; the rest can be had by another call.
        """
        while True:
            try:
                datagram, ancillary, _, _ = self._socket.recvmsg(DATAGRAM, 64)
            except BlockingIOError:
                return
            except OSError as error:
                raise Overflow from error
            yield _nsid(ancillary), memoryview(datagram)

    def answer(self, limit: float) -> memoryview:
        """The next datagram, waited for; empty after ``limit`` seconds."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(limit * 1000):
            return memoryview(b"")
        return memoryview(self._socket.recv(DATAGRAM))


def _nsid(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    for level, kind, data in ancillary:
        if (level, kind) == (SOL_NETLINK, NETLINK_LISTEN_ALL_NSID):
            return int(NUMBER.unpack_from(data)[0])
    return None


class Inside:
    """Hears the namespaces that ``nsid`` was called for.

    ``routing`` and ``rules`` are its channels.
    """

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
            self.routing = Channel(socket.NETLINK_ROUTE, INSIDE, everywhere=True)
            self.rules = Channel(NETLINK_NETFILTER, (NFNLGRP_NFTABLES,), everywhere=True)
            self._requests = Channel(socket.NETLINK_ROUTE, ())
        except (KernelError, OSError) as error:
            failed.append(error)

    def nsid(self, path: str) -> int | None:
        """Listen to a namespace; its nsid, None where there is no namespace.

        The kernel takes the id back when the namespace ends, and may give it to
        the next one.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            wanted = _attribute(NETNSA_FD, descriptor)
            # One that has an id already keeps it.
            self._ask(RTM_NEWNSID, bytes(4) + wanted + _attribute(NETNSA_NSID, ANY_NSID))
            for kind, body in messages(self._ask(RTM_GETNSID, bytes(4) + wanted)):
                found = attributes(body, 4).get(NETNSA_NSID)
                if kind == RTM_NEWNSID and found is not None:
                    nsid = int(NUMBER.unpack_from(found)[0])
                    return nsid if nsid >= 0 else None
        finally:
            os.close(descriptor)
        return None

    def _ask(self, kind: int, body: bytes) -> memoryview:
        self._requests.ask(kind, NLM_F_ACK if kind == RTM_NEWNSID else 0, body)
        return self._requests.answer(1.0)

    def close(self) -> None:
        for channel in (self.routing, self.rules, self._requests):
            channel.close()


def _attribute(kind: int, value: int) -> bytes:
    return ATTRIBUTE.pack(ATTRIBUTE.size + NUMBER.size, kind) + NUMBER.pack(value)


class Outside:
    """Hears the namespace that it is made in: the host's."""

    def __init__(self) -> None:
        self.routing = Channel(socket.NETLINK_ROUTE, OUTSIDE)
        self.rules = Channel(NETLINK_NETFILTER, (NFNLGRP_NFTABLES,))

    def list_links(self) -> None:
        """Have all links told once, as if each of them had just changed."""
        with suppress(OSError):
            self.routing.ask(RTM_GETLINK, NLM_F_DUMP, IFINFO.pack(0, 0, 0, 0, 0))

    def close(self) -> None:
        self.routing.close()
        self.rules.close()


# -- messages ----------------------------------------------------------------


def messages(datagram: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Kind and body of each message."""
    while len(datagram) >= HEADER.size:
        length, kind, _, _, _ = HEADER.unpack_from(datagram)
        if length < HEADER.size:
            return
        yield kind, datagram[HEADER.size : length]
        datagram = datagram[_aligned(length) :]


def attributes(body: memoryview, start: int) -> dict[int, memoryview]:
    """The attributes of a message behind its fixed part, by their kind."""
    found = {}
    rest = body[start:]
    while len(rest) >= ATTRIBUTE.size:
        length, kind = ATTRIBUTE.unpack_from(rest)
        if length < ATTRIBUTE.size:
            break
        found[kind & NLA_TYPE_MASK] = rest[ATTRIBUTE.size : length]
        rest = rest[_aligned(length) :]
    return found


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _number(value: memoryview | None) -> int:
    return int(NUMBER.unpack_from(value)[0]) if value is not None else 0


class Link(NamedTuple):
    """What of a link, if it changes, might be damage: not its carrier or counters."""

    name: str
    up: bool
    master: int
    mtu: int
    hairpin: bool = False


def link_index(body: memoryview) -> int:
    """The index of the link that a message is about."""
    return int(IFINFO.unpack_from(body)[2])


def link(kind: int, body: memoryview, known: Link | None) -> Link | None:
    """What a link is after a message, None if it is gone; ``known``: what it was before."""
    family, _, _, flags, _ = IFINFO.unpack_from(body)
    found = attributes(body, IFINFO.size)
    if family != socket.AF_UNSPEC:
        # A bridge tells of its port; that one leaves it is told by the link, too.
        settings = found.get(IFLA_PROTINFO)
        if known is None or kind != RTM_NEWLINK or settings is None:
            return known
        mode = attributes(settings, 0).get(IFLA_BRPORT_MODE)
        return known._replace(hairpin=bool(mode and mode[0]))
    if kind != RTM_NEWLINK or IFLA_IFNAME not in found:
        return None
    name = bytes(found[IFLA_IFNAME]).rstrip(b"\0").decode(errors="replace")
    master = _number(found.get(IFLA_MASTER))
    hairpin = known.hairpin if known and master else False
    return Link(name, bool(flags & IFF_UP), master, _number(found.get(IFLA_MTU)), hairpin)


def address_index(body: memoryview) -> int:
    """The index of the link that an address came to or went from."""
    return int(IFADDR.unpack_from(body)[4])


def kernels_own(kind: int, body: memoryview) -> bool:
    """Whether a message tells of what the kernel does in IPv6 by itself.

    Link-local addresses and multicast come and go with a link's carrier, and a
    default route as its router advertises it.
    """
    if kind in (RTM_NEWADDR, RTM_DELADDR):
        return body[0] == socket.AF_INET6 and _within_link(body, IFADDR.size, IFA_ADDRESS)
    if kind in (RTM_NEWROUTE, RTM_DELROUTE):
        advertised = RTMSG.unpack_from(body)[5] == RTPROT_RA
        return body[0] == socket.AF_INET6 and (
            advertised or _within_link(body, RTMSG.size, RTA_DST)
        )
    return False


def _within_link(body: memoryview, start: int, kind: int) -> bool:
    """Whether an address in a message is in fe80::/10 or ff00::/8."""
    address = bytes(attributes(body, start).get(kind, b""))[:2]
    return address[:1] == b"\xff" or (
        len(address) == 2 and address[0] == 0xFE and address[1] & 0xC0 == 0x80
    )


def alters_forwarding(body: memoryview) -> bool:
    """Tell whether a change of settings switches forwarding off somewhere, or on for all links.

    A single link that begins to forward takes nothing away, and frees no other link.
    """
    found = attributes(body, 4)
    # A new link comes with all of its settings.
    if found.keys() != {NETCONFA_IFINDEX, NETCONFA_FORWARDING}:
        return False
    on = _number(found[NETCONFA_FORWARDING]) != 0
    return not on or _number(found[NETCONFA_IFINDEX]) == NETCONFA_IFINDEX_ALL


def alters_routing(kind: int, body: memoryview) -> bool:
    """Tell whether the host may lead less to networks than before, or more to others."""
    if kind == RTM_NEWNETCONF:
        return alters_forwarding(body)
    return kind == RTM_DELROUTE and loses_prefix(body)


def loses_prefix(body: memoryview) -> bool:
    """Whether a route that has gone may have been one of ours to a network's prefix.

    A router's may come and go all day long; they are neither static nor that long.
    """
    fields = RTMSG.unpack_from(body)
    return bool(fields[0] == socket.AF_INET6 and fields[1] >= 64 and fields[5] == RTPROT_STATIC)


def alters_rules(kind: int, body: memoryview) -> bool:
    """Whether a change of nftables in the host may concern the rules that we need there.

    Elements of sets come and go all day long where something bans attackers; and
    libvirt's own chains say nothing about what is ours.
    """
    if kind & 0xFF in ELEMENTS_AND_GENERATIONS:
        return False
    told = bytes(body)
    return not any(mark in told for mark in LIBVIRTS)


# -- legacy iptables ---------------------------------------------------------

IPT_SO_GET_INFO = 64
TABLE_NAMES = ("raw", "mangle", "nat", "filter")
TABLE_NAME = 32
GETINFO = 84
"""Octets of struct ipt_getinfo: name, hooks, where their rules are, number and size."""

_libc = ctypes.CDLL(None, use_errno=True)


def tables_socket(namespace: str | None) -> int:
    """A descriptor to ask a namespace for its tables' size; keeps it alive.

    Raises KernelError where the namespace is missing, or OSError.
    """
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with netns.entered(namespace):
        return socket.socket(socket.AF_INET, kind, socket.IPPROTO_RAW).detach()


def tables_size(descriptor: int, tables: tuple[str, ...] = TABLE_NAMES) -> int:
    """A number that changes with how many rules the tables have, of what size and where.

    Of tables that exist: asking for another one would make it.
    """
    found = []
    for table in tables:
        buffer = ctypes.create_string_buffer(table.encode().ljust(TABLE_NAME, b"\0"), GETINFO)
        length = ctypes.c_uint32(GETINFO)
        failed = _libc.getsockopt(
            descriptor, socket.IPPROTO_IP, IPT_SO_GET_INFO, buffer, ctypes.byref(length)
        )
        found.append(b"" if failed else buffer.raw)
    return hash(tuple(found))


# -- directories -------------------------------------------------------------

IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_IGNORED = 0x8000
IN_ONLYDIR = 0x1000000
APPEARED = IN_CREATE | IN_MOVED_TO
NAMES = APPEARED | IN_DELETE | IN_MOVED_FROM
EVENT = struct.Struct("=iIII")


class Directory:
    """Hears of names that come to, or go from, a directory, which may come later itself."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "cannot watch directories")
        self._parent = -1
        self._own = -1
        self._look()

    def fileno(self) -> int:
        return int(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def _look(self) -> None:
        """Watch the directory; until it is there, the one above it."""
        self._own = self._add(self._path, NAMES)
        if self._own < 0 and self._parent < 0:
            self._parent = self._add(self._path.parent, APPEARED)
            # It may have come in between.
            self._own = self._add(self._path, NAMES)
        if self._own >= 0 and self._parent >= 0:
            _libc.inotify_rm_watch(self._descriptor, self._parent)
            self._parent = -1

    def _add(self, path: Path, mask: int) -> int:
        encoded = os.fsencode(path)
        return int(_libc.inotify_add_watch(self._descriptor, encoded, mask | IN_ONLYDIR))

    def changes(self) -> Iterator[tuple[str, bool]]:
        """All that happened: a name, and whether it has come rather than gone."""
        while True:
            try:
                events = os.read(self._descriptor, DATAGRAM)
            except BlockingIOError:
                return
            yield from self._parse(events)

    def _parse(self, events: bytes) -> Iterator[tuple[str, bool]]:
        while events:
            watch, mask, _, length = EVENT.unpack_from(events)
            end = EVENT.size + length
            name = os.fsdecode(events[EVENT.size : end].rstrip(b"\0"))
            events = events[end:]
            if watch == self._own and mask & NAMES:
                yield name, bool(mask & APPEARED)
            elif (watch == self._own and mask & IN_IGNORED) or (
                watch == self._parent and name == self._path.name
            ):
                self._look()
                # What was put there before it was watched.
                yield from ((entry.name, True) for entry in self._entries())

    def _entries(self) -> Iterator[Path]:
        with suppress(OSError):
            yield from self._path.iterdir()
