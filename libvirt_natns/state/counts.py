# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counts of forwards, guests and leases in the state database, for metrics."""

from libvirt_natns.kernel.boot_clock import boot_id
from libvirt_natns.state.leases import GUESTS, RUNNING, LeaseKind
from libvirt_natns.state.store import Store

PoolKey = tuple[str, LeaseKind]
"""An upstream's name, and the kind of its leases."""


def forwards(store: Store) -> dict[str, int]:
    """Return how many forwards are in force, by the network's uuid."""
    rows = store.select(
        "SELECT network, count(*) AS number FROM forward WHERE published AND boot = ?"
        " GROUP BY network",
        boot_id(),
    )
    return {row["network"]: row["number"] for row in rows}


def guests(store: Store) -> int:
    """Return how many running guests publish something."""
    rows = store.select(
        "SELECT count(*) FROM guest WHERE published AND boot = ? AND (uuid IN"
        " (SELECT owner FROM forward) OR uuid IN (SELECT owner FROM static_nat))",
        boot_id(),
    )
    return int(rows[0][0])


def leases(store: Store) -> dict[PoolKey, tuple[int, int]]:
    """Return how many leases there are, and how many of these are in use now, by pool."""
    rows = store.select(
        "SELECT lease.upstream, lease.kind, count(*) AS leased,"
        f" sum(coalesce({RUNNING}, FALSE) OR {GUESTS}) AS in_use"
        " FROM lease LEFT JOIN network ON network.uuid = lease.network"
        " GROUP BY lease.upstream, lease.kind",
        boot_id(),
        boot_id(),
    )
    return {(row["upstream"], row["kind"]): (row["leased"], row["in_use"]) for row in rows}
