# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tells which networks something happened to that was not us.

The kernel tells of what changes; this module decides whose it is, and whether
we have done it ourselves.  What is wrong, if anything, is not its business: a
false alarm costs a look, and no more.

Our own changes are known by ``changing``.  The kernel puts a message into our
sockets before the call that caused it returns, so when a change is over, all
that it caused is waiting there.  Its end is therefore handed to the thread that
reads the sockets: that one takes the ends first, then reads all that waits, still
looking away from the networks concerned, and attends to them again only then.
A message does not tell who caused it.  So a network that was heard of during a change
of ours, and one that was not yet watched, is looked at once more after the change.

Between events nothing is polled, with two exceptions: legacy iptables, which
tells nothing, is asked every second or more often, where it is in use; and an audit now and
then finds what no event tells, one network at a time.

Known limits: rules of the host that somebody else changes while we change them are
taken for ours, until the audit.  Taken for ours are also settings of which the kernel tells
nothing (arp_ignore and the like) and rules of legacy iptables that are replaced
by as many others of the same size.
"""

import os
import select
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from threading import Condition, Thread
from typing import Self

from libvirt_natns import names
from libvirt_natns.daemons import dnsmasq, dnsmasq_config, ndppd, udhcpc
from libvirt_natns.engine.observer import HOST
from libvirt_natns.errors import NatnsError
from libvirt_natns.firewall import iptables
from libvirt_natns.kernel import outward_links
from libvirt_natns.records import dataclass, field
from libvirt_natns.service import netlink_monitor as n
from libvirt_natns.state.networks import NetworkRecord

ONCE_MORE = 1.0
"""Seconds from the end of a change of ours to the look at what happened meanwhile."""

AUDIT = 1800.0
"""Seconds in which each network is looked at once ..."""

AUDIT_PAUSE = 5.0
"""... but not more than one in that many seconds: looking costs CPU time."""

TICK = 1.0
"""Seconds between two looks at what tells nothing by itself, at most ..."""

TICK_LEAST = 0.25
TICK_EACH = 0.005
"""... and at least; the more networks with legacy iptables, the longer."""

NAMESPACE_PREFIX = "nat-"
TRANSIT_PREFIX = "natns-"

ENDED = 0
"""Stands for the pid of a process that has ended."""


@dataclass(frozen=True, slots=True)
class Watched:
    """What there is to watch of a network that is up.

    ``ports`` are its patches' host ends.  ``dnsmasq`` and ``client``, which asks for an
    upstream address, are process ids, ENDED for one that should run but does not, None
    where there is none.  ``parent`` is the host's link that its upstream is, which
    others may share.  ``proxies`` are those
    that answer for guests (ndppd).
    """

    uuid: str
    namespace: str
    bridge: str
    ports: tuple[str, ...]
    dnsmasq: int | None = None
    firewall: str = ""
    parent: str = ""
    client: int | None = None
    proxies: tuple[int, ...] = ()

    @property
    def processes(self) -> tuple[int, ...]:
        """Those that should run."""
        own = (pid for pid in (self.dnsmasq, self.client) if pid is not None)
        return (*own, *self.proxies)

    @classmethod
    def of(cls, record: NetworkRecord, parent: str = "") -> Self:
        """What a recorded network, on that upstream, looks like now."""
        uuid, namespace = record.uuid, record.namespace
        daemon = None
        # Its pid file comes only once it serves, which nobody has waited for.
        if dnsmasq_config.paths(uuid).configuration.exists():
            daemon = dnsmasq.running(uuid, namespace) or ENDED
        ports = (names.private_patch(uuid), names.upstream_patch(uuid))
        client = None
        if (directory := names.dhcp_directory(uuid)).exists():
            client = udhcpc.process(directory, namespace) or ENDED
        proxies = tuple(
            ndppd.running(uuid, where) or ENDED
            for where in (namespace, _beyond(record))
            if ndppd.is_wanted(uuid, where)
        )
        return cls(
            uuid, namespace, record.bridge, ports, daemon, _backend(uuid), parent, client, proxies
        )


def _beyond(record: NetworkRecord) -> str | None:
    """The namespace behind a network's upstream: a router's, or the host with None."""
    return names.router_namespace(record.upstream) if record.kind == "router" else None


def _backend(uuid: str) -> str:
    """The firewall backend whose rules a network has."""
    try:
        return (names.network_directory(uuid) / "firewall").read_text().partition(" ")[0]
    except OSError:
        return ""


Describe = Callable[[str], Watched | None]
Suspect = Callable[[str], None]


@dataclass(slots=True)
class _Followed:
    """A network and what was opened to watch it; -1 is no descriptor."""

    watched: Watched
    nsid: int | None
    processes: list[int]
    tables: int
    size: int
    whole: bool


@dataclass(slots=True)
class _Own:
    """Our own changes: how many go on by network, and which ended since the last look.

    ``overheard`` are those that something happened to meanwhile, caused by us or not; for
    HOST, rules do not count.
    """

    going_on: Counter[str] = field(default_factory=Counter)
    overheard: set[str] = field(default_factory=set)
    ended: list[str] = field(default_factory=list)
    all_ended: int = 0
    attended: int = 0


class Watch:
    """Watches networks that are up, in a thread of its own.

    ``describe`` reads what there is to watch of a network now, None where it is
    not up; ``suspect`` is told of each network, or HOST, that something happened
    to; ``appeared`` of a namespace that looks like ours but is not watched: some
    other process has made it.  All three are called from the thread.
    """

    def __init__(
        self, describe: Describe, suspect: Suspect, appeared: Suspect = lambda namespace: None
    ) -> None:
        self._describe = describe
        self._tell = suspect
        self._appeared = appeared
        self._own = _Own()
        self._changed = Condition()
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: Thread | None = None
        # All below is the thread's alone.
        self._followed: dict[str, _Followed] = {}
        self._by_nsid: dict[int, str] = {}
        self._by_name: dict[str, str] = {}
        self._by_process: dict[int, str] = {}
        self._by_parent: defaultdict[str, set[str]] = defaultdict(set)
        self._links: dict[int, n.Link] = {}
        self._host_tables = -1
        self._host_size = 0
        self._unread: set[str] = set()
        self._newcomers: dict[str, float] = {}
        self._once_more: dict[str, float] = {}
        self._audits: Iterator[str] = iter(())
        self._next_audit = 0.0
        self._next_tick = 0.0

    # -- for all threads ---------------------------------------------------

    def start(self) -> None:
        """Begin to watch.  Raises KernelError or OSError."""
        self._inside = n.Inside()
        self._outside = n.Outside()
        self._names = n.Directory(names.NETNS_DIRECTORY)
        self._epoll = select.epoll()
        for descriptor in (*(each.fileno() for each in self._channels), self._names.fileno()):
            self._epoll.register(descriptor, select.EPOLLIN)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._outside.list_links()
        self._thread = Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    @property
    def _channels(self) -> tuple[n.Channel, ...]:
        return (
            self._inside.routing,
            self._inside.rules,
            self._outside.routing,
            self._outside.rules,
        )

    def stop(self) -> None:
        """End the thread and close everything."""
        self._stopping = True
        self._poke()
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        for uuid in list(self._followed):
            self._unfollow(uuid)
        self._stop_host_tables()
        self._epoll.close()
        for source in (self._inside, self._outside, self._names):
            source.close()

    def follow(self, uuids: Iterable[str]) -> None:
        """Watch these networks from now on; those that come up by ``changing`` are anyway."""
        for uuid in uuids:
            with self.changing(uuid):
                pass

    @contextmanager
    def changing(self, uuid: str) -> Iterator[None]:
        """A network (or HOST) is being changed by us: what happens to it is no news."""
        with self._changed:
            self._own.going_on[uuid] += 1
        try:
            yield
        finally:
            with self._changed:
                self._own.ended.append(uuid)
                self._own.all_ended += 1
            self._poke()

    def settled(self, limit: float) -> bool:
        """Wait until changes that have ended by now are attended to; whether they are."""
        with self._changed:
            aim = self._own.all_ended
            return self._changed.wait_for(lambda: self._own.attended >= aim, limit)

    def _poke(self) -> None:
        os.eventfd_write(self._wake, 1)

    # -- the thread --------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            ready = self._epoll.poll(self._pause())
            ended = self._take_ended()
            self._read_all()
            for descriptor, _ in ready:
                self._on_process(descriptor)
            for uuid in ended:
                self._attend(uuid)
            self._on_time(time.monotonic())

    def _take_ended(self) -> list[str]:
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        with self._changed:
            ended, self._own.ended = self._own.ended, []
        return ended

    def _suspect(self, uuid: str | None) -> None:
        if uuid is None:
            return
        if not self._own.going_on[uuid]:
            self._tell(uuid)
        elif uuid != HOST:
            self._own.overheard.add(uuid)

    def _suspect_host(self) -> None:
        """Something happened to what is the host's besides rules: we change that seldom."""
        if self._own.going_on[HOST]:
            self._own.overheard.add(HOST)
        else:
            self._tell(HOST)

    def _suspect_all(self) -> None:
        for uuid in (HOST, *self._followed):
            self._suspect(uuid)

    # -- events ------------------------------------------------------------

    def _read_all(self) -> None:
        """Read all that waits."""
        readers = (self._read_inside, self._read_inside, self._read_links, self._read_rules)
        for channel, reader in zip(self._channels, readers, strict=True):
            try:
                reader(channel)
            except n.Overflow:
                # What was lost may be anything.
                self._links.clear()
                self._outside.list_links()
                self._suspect_all()
        for name, come in self._names.changes():
            self._on_name(name, come)

    def _read_inside(self, channel: n.Channel) -> None:
        heard = {
            nsid
            for nsid, datagram in channel.received()
            if not all(n.kernels_own(*message) for message in n.messages(datagram))
        }
        for nsid in heard:
            self._suspect(self._by_nsid.get(nsid) if nsid is not None else None)

    def _read_links(self, channel: n.Channel) -> None:
        for _, datagram in channel.received():
            for kind, body in n.messages(datagram):
                if kind in (n.RTM_NEWLINK, n.RTM_DELLINK):
                    self._on_link(kind, body)
                elif kind in (n.RTM_NEWADDR, n.RTM_DELADDR):
                    if not n.kernels_own(kind, body):
                        self._on_address(kind, body)
                elif n.alters_routing(kind, body):
                    self._suspect_host()

    def _read_rules(self, channel: n.Channel) -> None:
        for _, datagram in channel.received():
            if any(n.alters_rules(kind, body) for kind, body in n.messages(datagram)):
                self._suspect(HOST)

    def _on_link(self, kind: int, body: memoryview) -> None:
        index = n.link_index(body)
        before = self._links.get(index)
        after = n.link(kind, body, before)
        if after is None:
            self._links.pop(index, None)
        else:
            self._links[index] = after
        if before != after:
            for link in {link.name for link in (before, after) if link}:
                self._on_change_of(link)
            self._on_port(before, after)
            self._on_way(before, after)

    def _on_port(self, before: n.Link | None, after: n.Link | None) -> None:
        """A port to somewhere else may take less than the bridge says, if somebody set that.

        Never our own doing, so it is told even while we change something.
        """
        for port in (before, after):
            if port is None or port.name.startswith(outward_links.INWARD):
                continue
            bridge = self._links.get(port.master)
            uuid = self._by_name.get(bridge.name) if bridge else None
            if uuid is not None:
                self._tell(uuid)

    def _on_way(self, before: n.Link | None, after: n.Link | None) -> None:
        """The host's rules in legacy iptables name each link that leads out.

        Never our own doing either, and the rules may have been computed a moment ago.
        """
        if self._host_tables < 0 or _way(before) == _way(after):
            return
        names_of = {link.name for link in (before, after) if link}
        if not all(self._is_inward(name) for name in names_of):
            self._tell(HOST)

    def _is_inward(self, link: str) -> bool:
        """True for a network's own bridge and ports, guests' ports, and for new bridges."""
        known = link in self._by_name or link.startswith(outward_links.INWARD)
        return known or outward_links.is_bridge(link)

    def _on_change_of(self, link: str) -> None:
        if link.startswith(TRANSIT_PREFIX):
            self._suspect_host()
        self._suspect(self._by_name.get(link))
        for uuid in self._by_parent.get(link, ()):
            self._suspect(uuid)

    def _on_address(self, kind: int, body: memoryview) -> None:
        link = self._links.get(n.address_index(body))
        if link is None:
            return
        if link.name.startswith(TRANSIT_PREFIX):
            self._suspect_host()
        elif kind == n.RTM_NEWADDR:
            self._suspect(self._by_name.get(link.name))

    def _on_name(self, namespace: str, come: bool) -> None:
        """A namespace's file has come or gone; the namespace itself may live on."""
        uuid = self._by_name.get(_key(namespace))
        if uuid is not None:
            self._suspect(uuid)
        elif come and namespace.startswith(NAMESPACE_PREFIX):
            self._newcomers[namespace] = time.monotonic()

    def _on_process(self, descriptor: int) -> None:
        uuid = self._by_process.pop(descriptor, None)
        if uuid is None:
            return
        self._followed[uuid].processes.remove(descriptor)
        self._close(descriptor)
        if not self._own.going_on[uuid]:
            # The process that has started a daemon ends as well: look for that one.
            self._refresh(uuid)

    def _close(self, descriptor: int) -> None:
        with suppress(OSError):
            self._epoll.unregister(descriptor)
        os.close(descriptor)

    # -- following ---------------------------------------------------------

    def _attend(self, uuid: str) -> None:
        """One of our changes has ended, and its events were read."""
        with self._changed:
            self._own.going_on[uuid] -= 1
            busy = self._own.going_on[uuid] > 0
            if not busy:
                del self._own.going_on[uuid]
        if not busy:
            heard = uuid in self._own.overheard
            self._own.overheard.discard(uuid)
            new = uuid not in self._followed
            self._refresh(uuid)
            if uuid == HOST:
                if heard:
                    self._tell(HOST)
            elif uuid in self._followed and (heard or new):
                self._once_more.setdefault(uuid, time.monotonic() + ONCE_MORE)
        with self._changed:
            self._own.attended += 1
            self._changed.notify_all()

    def _refresh(self, uuid: str) -> None:
        if uuid == HOST:
            self._refresh_host_tables()
            return
        try:
            watched = self._describe(uuid)
            earlier = self._unfollow(uuid)
            if watched is not None:
                self._follow(watched, earlier)
        except (NatnsError, OSError):
            # The state database's, or too many files: later, perhaps.
            self._unread.add(uuid)

    def _follow(self, watched: Watched, earlier: _Followed | None) -> None:
        nsid = self._inside.nsid(names.namespace_path(watched.namespace))
        opened = [self._open_process(pid) for pid in watched.processes]
        processes = [process for process in opened if process >= 0]
        whole = nsid is not None and processes == opened
        one = _Followed(watched, nsid, processes, -1, 0, whole)
        self._followed[watched.uuid] = one
        if nsid is not None:
            self._by_nsid[nsid] = watched.uuid
            self._open_tables(one)
        for process in processes:
            self._by_process[process] = watched.uuid
            self._epoll.register(process, select.EPOLLIN)
        for name in (*watched.ports, watched.bridge, _key(watched.namespace)):
            self._by_name[name] = watched.uuid
        if watched.parent:
            self._by_parent[watched.parent].add(watched.uuid)
        if not whole and (earlier is None or earlier.whole):
            self._suspect(watched.uuid)

    @staticmethod
    def _open_process(pid: int) -> int:
        if pid == ENDED:
            return -1
        try:
            return os.pidfd_open(pid)
        except ProcessLookupError:
            return -1

    def _open_tables(self, one: _Followed) -> None:
        if one.watched.firewall == iptables.name:
            one.tables = n.tables_socket(one.watched.namespace)
            one.size = n.tables_size(one.tables)
            if self._host_tables < 0:
                self._refresh_host_tables()

    def _unfollow(self, uuid: str) -> _Followed | None:
        one = self._followed.pop(uuid, None)
        if one is None:
            return None
        if one.nsid is not None and self._by_nsid.get(one.nsid) == uuid:
            del self._by_nsid[one.nsid]
        for process in one.processes:
            self._by_process.pop(process, None)
            self._close(process)
        if one.tables >= 0:
            os.close(one.tables)
        watched = one.watched
        for name in (*watched.ports, watched.bridge, _key(watched.namespace)):
            # Another network may have that bridge by now.
            if self._by_name.get(name) == uuid:
                del self._by_name[name]
        self._by_parent[watched.parent].discard(uuid)
        return one

    # -- time --------------------------------------------------------------

    def _pause(self) -> float | None:
        """Seconds to wait at most; None without end."""
        due = [self._next_audit] if self._followed else []
        due += [self._next_tick] if self._ticks else []
        due += self._once_more.values()
        return max(0.0, min(due) - time.monotonic()) if due else None

    @property
    def _ticks(self) -> bool:
        return bool(self._unread or self._newcomers or self._host_tables >= 0)

    def _on_time(self, now: float) -> None:
        for uuid in [each for each, due in self._once_more.items() if now >= due]:
            del self._once_more[uuid]
            self._suspect(uuid)
        if self._ticks and now >= self._next_tick:
            asked = sum(one.tables >= 0 for one in self._followed.values())
            self._next_tick = now + min(TICK, max(TICK_LEAST, TICK_EACH * asked))
            self._on_tick(now)
        if not self._followed:
            self._next_audit = 0.0
        elif now >= self._next_audit:
            if self._next_audit:
                self._audit()
            self._next_audit = now + max(AUDIT_PAUSE, AUDIT / (len(self._followed) + 1))

    def _on_tick(self, now: float) -> None:
        unread, self._unread = self._unread, set()
        for uuid in unread:
            if not self._own.going_on[uuid]:
                self._refresh(uuid)
        for namespace, since in list(self._newcomers.items()):
            if now - since >= TICK:
                del self._newcomers[namespace]
                if _key(namespace) not in self._by_name:
                    self._appeared(namespace)
        self._ask_tables()

    def _audit(self) -> None:
        """Have one network looked at."""
        uuid = next(self._audits, None)
        if uuid is None:
            self._audits = iter([HOST, *self._followed])
            uuid = next(self._audits)
        if uuid == HOST or uuid in self._followed:
            self._suspect(uuid)

    # -- legacy iptables ---------------------------------------------------

    def _ask_tables(self) -> None:
        for one in self._followed.values():
            if one.tables >= 0:
                before, one.size = one.size, n.tables_size(one.tables)
                if one.size != before:
                    self._suspect(one.watched.uuid)
        if self._host_tables < 0:
            return
        if not any(one.tables >= 0 for one in self._followed.values()):
            self._stop_host_tables()
            return
        before, self._host_size = self._host_size, self._size_in_host()
        if self._host_size != before:
            self._suspect(HOST)

    def _refresh_host_tables(self) -> None:
        """Watch the host's tables as long as a network's backend is iptables."""
        if self._host_tables < 0:
            if not any(one.tables >= 0 for one in self._followed.values()):
                return
            self._host_tables = n.tables_socket(None)
        self._host_size = self._size_in_host()

    def _size_in_host(self) -> int:
        return n.tables_size(self._host_tables, tuple(sorted(iptables.in_use(None))))

    def _stop_host_tables(self) -> None:
        if self._host_tables >= 0:
            os.close(self._host_tables)
            self._host_tables = -1


def _way(link: n.Link | None) -> tuple[str, bool] | None:
    """What tells whether a link may lead out: its name, and whether it is a port."""
    return (link.name, bool(link.master)) if link else None


def _key(namespace: str) -> str:
    """A namespace among links: no link's name has a slash."""
    return f"/{namespace}"
