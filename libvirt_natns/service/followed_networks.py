# SPDX-License-Identifier: LGPL-2.1-or-later
"""The networks that the kernel watch follows, with the descriptors opened for each.

Events name a namespace's id, a link, a namespace or a process.  ``FollowedNetworks``
finds the network by each of these.  All of this belongs to the watch's thread.
"""

import os
import select
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from libvirt_natns import names
from libvirt_natns.firewall import iptables
from libvirt_natns.service.legacy_tables import LegacyTables
from libvirt_natns.service.netlink_monitor import NamespaceMonitor
from libvirt_natns.service.watched import ENDED, Watched


@dataclass(slots=True)
class _Followed:
    """A network, its namespace's id, and a descriptor for each of its processes.

    ``whole`` is false where the namespace or a process was missing.
    """

    watched: Watched
    nsid: int | None = None
    processes: list[int] = field(default_factory=list)
    whole: bool = True

    @property
    def own_names(self) -> tuple[str, ...]:
        """Return the links of the host, and the namespace, that belong to the network alone."""
        watched = self.watched
        return (*watched.ports, watched.bridge, _namespace_key(watched.namespace))


class FollowedNetworks:
    """Networks that are up, by uuid, and by all that an event may name.

    A process that ends makes its descriptor readable in ``epoll``.
    """

    def __init__(self, monitor: NamespaceMonitor, epoll: select.epoll) -> None:
        self._monitor = monitor
        self._epoll = epoll
        self.tables = LegacyTables()
        self._networks: dict[str, _Followed] = {}
        self._by_nsid: dict[int, str] = {}
        self._by_name: dict[str, str] = {}
        self._by_process: dict[int, str] = {}
        self._by_parent: defaultdict[str, set[str]] = defaultdict(set)

    def __contains__(self, uuid: object) -> bool:
        return uuid in self._networks

    def __iter__(self) -> Iterator[str]:
        return iter(self._networks)

    def __len__(self) -> int:
        return len(self._networks)

    # -- finding -----------------------------------------------------------

    def by_nsid(self, nsid: int | None) -> str | None:
        """Return the network of the namespace with that id."""
        return self._by_nsid.get(nsid) if nsid is not None else None

    def by_namespace(self, namespace: str) -> str | None:
        """Return the network of the namespace with that name."""
        return self._by_name.get(_namespace_key(namespace))

    def by_link(self, link: str) -> str | None:
        """Return the network that a bridge or port of the host belongs to."""
        return self._by_name.get(link)

    def by_parent(self, link: str) -> Collection[str]:
        """Return the networks that have that link of the host as their upstream."""
        return self._by_parent.get(link, ())

    # -- following ---------------------------------------------------------

    def follow(self, watched: Watched) -> bool:
        """Follow a network; false if its namespace or a process is missing.

        Raises KernelError or OSError.  The network is followed in part then.
        """
        network = _Followed(watched)
        self._networks[watched.uuid] = network
        network.nsid = self._monitor.nsid(names.namespace_path(watched.namespace))
        if network.nsid is not None:
            self._by_nsid[network.nsid] = watched.uuid
        for name in network.own_names:
            self._by_name[name] = watched.uuid
        if watched.parent:
            self._by_parent[watched.parent].add(watched.uuid)
        for pid in watched.processes:
            self._add_process(network, pid)
        if network.nsid is not None and watched.firewall == iptables.name:
            self.tables.open(watched.uuid, watched.namespace)
        network.whole = network.nsid is not None and (
            len(network.processes) == len(watched.processes)
        )
        return network.whole

    def _add_process(self, network: _Followed, pid: int) -> None:
        if pid == ENDED:
            return
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        network.processes.append(descriptor)
        self._by_process[descriptor] = network.watched.uuid
        self._epoll.register(descriptor, select.EPOLLIN)

    def unfollow(self, uuid: str) -> bool:
        """Follow a network no longer; false if it was followed and not whole."""
        network = self._networks.pop(uuid, None)
        if network is None:
            return True
        if network.nsid is not None and self._by_nsid.get(network.nsid) == uuid:
            del self._by_nsid[network.nsid]
        for descriptor in network.processes:
            self._close_process(descriptor)
        self.tables.close(uuid)
        for name in network.own_names:
            # Another network may have that bridge by now.
            if self._by_name.get(name) == uuid:
                del self._by_name[name]
        self._by_parent[network.watched.parent].discard(uuid)
        return network.whole

    def end_process(self, descriptor: int) -> str | None:
        """Close a process that has ended, and return its network; None for others."""
        uuid = self._by_process.get(descriptor)
        if uuid is not None:
            self._networks[uuid].processes.remove(descriptor)
            self._close_process(descriptor)
        return uuid

    def _close_process(self, descriptor: int) -> None:
        self._by_process.pop(descriptor, None)
        with suppress(OSError):
            self._epoll.unregister(descriptor)
        os.close(descriptor)

    def close(self) -> None:
        """Follow no network."""
        for uuid in list(self._networks):
            self.unfollow(uuid)
        self.tables.close_host()


def _namespace_key(namespace: str) -> str:
    """Return a namespace's key among names of links, which have no slash."""
    return f"/{namespace}"
