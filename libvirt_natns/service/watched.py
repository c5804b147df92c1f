# SPDX-License-Identifier: LGPL-2.1-or-later
"""The parts of a network that the kernel watch follows, read from its run-time files.

A daemon's pid file may be missing for a moment: the file comes only once the daemon
serves, and no verb waits for that.
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

from libvirt_natns import names
from libvirt_natns.daemons import dnsmasq, dnsmasq_files, ndppd, udhcpc
from libvirt_natns.documents import config
from libvirt_natns.errors import ConfigError
from libvirt_natns.model.upstream import BridgeUpstream
from libvirt_natns.state.networks import NetworkRecord

ENDED = 0
"""Stands for the pid of a process that has ended."""


@dataclass(frozen=True, slots=True)
class Watched:
    """The parts of a network that is up.

    ``ports`` are the host ends of its patches.  ``dnsmasq`` and ``client``, which asks for
    an upstream address, are process ids.  They are ENDED for a process that should run but
    does not, and None where the network needs none.  ``proxies`` are the processes that
    answer for guests (ndppd).  ``parent`` is the host's link that the upstream is; other
    networks may share it.
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
        """Return the processes that should run."""
        own = (pid for pid in (self.dnsmasq, self.client) if pid is not None)
        return (*own, *self.proxies)

    @classmethod
    def of(cls, record: NetworkRecord, parent: str = "") -> Self:
        """Return the parts that a recorded network, on that upstream, has now."""
        uuid, namespace = record.uuid, record.namespace
        daemon = None
        if dnsmasq_files.paths(uuid).configuration.exists():
            daemon = dnsmasq.running(uuid, namespace) or ENDED
        client = None
        if (directory := names.dhcp_directory(uuid)).exists():
            client = udhcpc.process(directory, namespace) or ENDED
        # The other end of a patch is in the host, or in a router's namespace.
        proxies = tuple(
            ndppd.running(uuid, place) or ENDED
            for place in (namespace, record.router)
            if ndppd.is_wanted(uuid, place)
        )
        return cls(
            uuid=uuid,
            namespace=namespace,
            bridge=record.bridge,
            ports=(names.private_patch(uuid), names.upstream_patch(uuid)),
            dnsmasq=daemon,
            firewall=_backend(uuid),
            parent=parent,
            client=client,
            proxies=proxies,
        )


def _backend(uuid: str) -> str:
    """Return the firewall backend that has loaded a network's rules."""
    try:
        text = (names.network_directory(uuid) / "firewall").read_text(errors="replace")
    except OSError:
        return ""
    return text.partition(" ")[0]


def parent_of(upstream: str) -> str:
    """Return the host's link that an upstream is; "" where the configuration names none."""
    with suppress(OSError):
        status = names.CONFIG_FILE.stat()
        return _parents(status.st_ino, status.st_mtime_ns, status.st_size).get(upstream, "")
    return ""


@lru_cache(maxsize=1)
def _parents(*version: int) -> dict[str, str]:
    """Return the links of all upstreams, for one version of the configuration file.

    The parsing takes longer than all else that the watch does for a network.
    """
    with suppress(ConfigError):
        return {
            upstream.name: upstream.bridge
            for upstream in config.load().upstreams.values()
            if isinstance(upstream, BridgeUpstream)
        }
    return {}
