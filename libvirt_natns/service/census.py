# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counting what there is now: networks, leases, forwards, connections.

From the state database and the kernel, without a look at any XML, so that a
thousand networks take a fraction of a second.
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import get_args

from libvirt_natns.addresses import Family
from libvirt_natns.daemons import dnsmasq, dnsmasq_config, lease_file
from libvirt_natns.engine.engine import Engine
from libvirt_natns.errors import KernelError, NatnsError
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.boot import boot_id
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.upstream import Upstream
from libvirt_natns.records import dataclass
from libvirt_natns.state.applicants import reserved_addresses
from libvirt_natns.state.leases import GUESTS, RUNNING, LeaseKind
from libvirt_natns.state.networks import NetworkRecord, State
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import routers, transit

CONNTRACK = Path("/proc/sys/net/netfilter")
STATES: tuple[State, ...] = get_args(State)


PoolKey = tuple[str, LeaseKind]
"""An upstream's name, and what is leased there."""


@dataclass(frozen=True, slots=True)
class Pool:
    """An upstream's addresses of a family, or prefixes.

    All that may be leased, leased, and of these in use now.

    ``size`` is None where the configuration does not have the upstream any more,
    or its subnet has not been chosen yet.
    """

    size: int | None
    leased: int
    in_use: int


@dataclass(frozen=True, slots=True)
class Router:
    """One network that is up.

    ``dnsmasq`` tells whether the one that it needs runs, and is None where it
    needs none; ``connections`` is None where the namespace, or connection
    tracking in it, is missing.
    """

    name: str
    connections: int | None
    limit: int | None
    dnsmasq: bool | None
    forwards: int
    dhcp_leases: int


@dataclass(frozen=True, slots=True)
class Census:
    """All of it; ``guests`` are those that run and whose metadata is looked after."""

    networks: Mapping[State, int]
    guests: int
    pools: Mapping[PoolKey, Pool]
    routers: tuple[Router, ...]


def take(engine: Engine) -> Census:
    """Count.  Raises StoreError."""
    records = engine.store.networks.all()
    boot = boot_id()
    up = [record for record in records if record.state == "up" and record.boot == boot]
    forwards = _forwards(engine.store)
    return Census(
        networks=_states(records, len(up)),
        guests=_guests(engine.store),
        pools=_pools(engine.config, engine.store),
        routers=tuple(_router(record, forwards.get(record.uuid, 0)) for record in up),
    )


def _states(records: list[NetworkRecord], up: int) -> dict[State, int]:
    # Most are up or down: what else is to be known of a record takes longer.
    started = [r.state for r in records if r.state in ("preparing", "starting") and r.runs]
    found: Counter[State] = Counter(started)
    found["up"] = up
    found["down"] = len(records) - found.total()
    return {state: found[state] for state in STATES}


def _forwards(store: Store) -> dict[str, int]:
    """How many forwards are in force, by the network's uuid."""
    rows = store.select(
        "SELECT network, count(*) AS number FROM forward WHERE published AND boot = ?"
        " GROUP BY network",
        boot_id(),
    )
    return {row["network"]: row["number"] for row in rows}


def _guests(store: Store) -> int:
    rows = store.select("SELECT count(*) FROM guest WHERE published AND boot = ?", boot_id())
    return int(rows[0][0])


# -- pools -------------------------------------------------------------------


def _pools(config: Config, store: Store) -> dict[PoolKey, Pool]:
    rows = store.select(
        "SELECT lease.upstream, lease.kind, count(*) AS leased,"
        f" sum(coalesce({RUNNING}, FALSE) OR {GUESTS}) AS in_use"
        " FROM lease LEFT JOIN network ON network.uuid = lease.network"
        " GROUP BY lease.upstream, lease.kind",
        boot_id(),
        boot_id(),
    )
    leases = {(row["upstream"], row["kind"]): (row["leased"], row["in_use"]) for row in rows}
    sizes: dict[PoolKey, int | None] = {}
    for name, upstream in config.upstreams.items():
        sizes |= {(name, kind): size for kind, size in _sizes(store, upstream).items()}
    return {
        key: Pool(sizes.get(key), *leases.get(key, (0, 0))) for key in sorted({*leases, *sizes})
    }


def _sizes(store: Store, upstream: Upstream) -> dict[LeaseKind, int | None]:
    """How much of each kind a pool can lease; those that it has not are left out.

    IPv4 is always told, with None where it is not known.
    """
    if upstream.kind == "host":
        subnet = upstream.subnet or store.transit.subnet(upstream.name)
        if subnet is None:
            return {"ipv4": None}
        upstream = transit.complete(upstream, subnet, store.transit.prefix(upstream.name))
    if upstream.kind == "router":
        with suppress(NatnsError):
            upstream = routers.complete(upstream)
    found: dict[LeaseKind, int | None] = {"ipv4": _size(upstream, 4)}
    if upstream.pool6:
        found["ipv6"] = _size(upstream, 6)
    if upstream.prefixes6:
        found["prefix"] = sum(1 << 64 - each.prefixlen for each in upstream.prefixes6)
    return found


def _size(upstream: Upstream, family: Family) -> int | None:
    """How many addresses of a family a pool can lease."""
    side = upstream.side(family)
    if side.subnet is None or not side.ranges:
        return None
    unusable = [
        address
        for address in reserved_addresses(upstream, family)
        if any(address in span for span in side.ranges)
    ]
    return sum(span.size for span in side.ranges) - len(unusable)


# -- networks ----------------------------------------------------------------


def _router(record: NetworkRecord, forwards: int) -> Router:
    connections, limit = _connections(record.namespace)
    return Router(
        name=record.name,
        connections=connections,
        limit=limit,
        dnsmasq=_dnsmasq(record),
        forwards=forwards,
        dhcp_leases=len(lease_file.current(record.bridge)),
    )


def _connections(namespace: str) -> tuple[int | None, int | None]:
    """How many connections are tracked in a namespace, and how many can be."""
    with suppress(KernelError), netns.entered(namespace):
        return _number("nf_conntrack_count"), _number("nf_conntrack_max")
    return None, None


def _number(key: str) -> int | None:
    try:
        return int((CONNTRACK / key).read_text())
    except (OSError, ValueError):
        return None


def _dnsmasq(record: NetworkRecord) -> bool | None:
    if not dnsmasq_config.paths(record.uuid).configuration.exists():
        return None
    return dnsmasq.running(record.uuid, record.namespace) is not None
