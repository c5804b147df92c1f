# SPDX-License-Identifier: LGPL-2.1-or-later
"""The counts of this moment: networks, leases, forwards, connections.

The counts come from the state database and the kernel, without any XML.  So the counts
of a thousand networks take a fraction of a second.
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from libvirt_natns.addresses import Family
from libvirt_natns.daemons import dnsmasq, dnsmasq_files, lease_file
from libvirt_natns.engine.engine import Engine
from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.boot_clock import boot_id
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.segment import Segment
from libvirt_natns.model.upstream import RouterUpstream, Upstream
from libvirt_natns.state import counts
from libvirt_natns.state.applicants import reserved_addresses
from libvirt_natns.state.counts import PoolKey
from libvirt_natns.state.leases import LeaseKind
from libvirt_natns.state.networks import NetworkRecord, NetworkState
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import segments

CONNTRACK = Path("/proc/sys/net/netfilter")
STATES: tuple[NetworkState, ...] = get_args(NetworkState)


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """Addresses of a family, or prefixes, of an upstream's pool.

    ``size`` counts all that may be leased.  It is None where the configuration has lost
    the upstream, or its subnet has not been chosen yet.  ``in_use`` counts
    leases of networks and guests that run now.
    """

    size: int | None
    leased: int
    in_use: int


@dataclass(frozen=True, slots=True)
class NetworkCounts:
    """The counts of one network that is up.

    ``dnsmasq`` is true if the network's dnsmasq runs, and None where it needs none.
    ``names`` is false where guests have no names.
    ``connections`` is None where the namespace, or connection tracking in it, is missing.
    """

    name: str
    connections: int | None
    limit: int | None
    dnsmasq: bool | None
    forwards: int
    dhcp_leases: int


@dataclass(frozen=True, slots=True)
class Census:
    """All counts; ``guests`` counts running guests that publish something."""

    networks: Mapping[NetworkState, int]
    guests: int
    pools: Mapping[PoolKey, PoolCounts]
    running: tuple[NetworkCounts, ...]


def take(engine: Engine) -> Census:
    """Count.  Raises StoreError."""
    records = engine.store.networks.all()
    boot = boot_id()
    up = [record for record in records if record.state == "up" and record.boot == boot]
    forwards = counts.forwards(engine.store)
    return Census(
        networks=_states(records, len(up)),
        guests=counts.guests(engine.store),
        pools=pools(engine.config, engine.store),
        running=tuple(_count(record, forwards.get(record.uuid, 0)) for record in up),
    )


def _states(records: list[NetworkRecord], up: int) -> dict[NetworkState, int]:
    # Most networks are up or down, and to ask a record whether it runs takes longer.
    starting = [record for record in records if record.state in ("preparing", "starting")]
    numbers: Counter[NetworkState] = Counter(record.state for record in starting if record.runs)
    numbers["up"] = up
    numbers["down"] = len(records) - numbers.total()
    return {state: numbers[state] for state in STATES}


# -- pools -------------------------------------------------------------------


def pools(config: Config, store: Store) -> dict[PoolKey, PoolCounts]:
    """Return the counts of each pool, by its upstream and the kind of its leases."""
    leases = counts.leases(store)
    sizes: dict[PoolKey, int | None] = {}
    for name, upstream in config.upstreams.items():
        sizes |= {(name, kind): size for kind, size in _sizes(store, upstream).items()}
    return {
        key: PoolCounts(sizes.get(key), *leases.get(key, (0, 0)))
        for key in sorted({*leases, *sizes})
    }


def _sizes(store: Store, upstream: Upstream) -> dict[LeaseKind, int | None]:
    """Return how much of each kind a pool can lease.  Kinds without a pool are left out.

    IPv4 is always there, with None where the number is unknown.
    """
    segment = segments.of_upstream(store, upstream)
    sizes: dict[LeaseKind, int | None] = {"ipv4": None}
    prefixes = upstream.prefixes6 if isinstance(upstream, RouterUpstream) else ()
    if segment is not None:
        sizes["ipv4"], prefixes = _size(segment, 4), segment.prefixes6
        if segment.pool6:
            sizes["ipv6"] = _size(segment, 6)
    if prefixes:
        sizes["prefix"] = sum(1 << 64 - prefix.prefixlen for prefix in prefixes)
    return sizes


def _size(segment: Segment, family: Family) -> int | None:
    """Return how many addresses of a family a pool can lease."""
    side = segment.side(family)
    if not side.ranges:
        return None
    unusable = [
        address
        for address in reserved_addresses(segment, family)
        if any(address in span for span in side.ranges)
    ]
    return sum(span.size for span in side.ranges) - len(unusable)


# -- networks ----------------------------------------------------------------


def _count(record: NetworkRecord, forwards: int) -> NetworkCounts:
    connections, limit = _connections(record.namespace)
    return NetworkCounts(
        name=record.name,
        connections=connections,
        limit=limit,
        dnsmasq=_dnsmasq(record),
        forwards=forwards,
        dhcp_leases=len(lease_file.current(record.bridge)),
    )


def _connections(namespace: str) -> tuple[int | None, int | None]:
    """Return how many connections are tracked in a namespace, and how many can be."""
    with suppress(KernelError), netns.entered(namespace):
        return _number("nf_conntrack_count"), _number("nf_conntrack_max")
    return None, None


def _number(key: str) -> int | None:
    try:
        return int((CONNTRACK / key).read_text())
    except (OSError, ValueError):
        return None


def _dnsmasq(record: NetworkRecord) -> bool | None:
    if not dnsmasq_files.paths(record.uuid).configuration.exists():
        return None
    return dnsmasq.running(record.uuid, record.namespace) is not None
