# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records of networks: their names in the kernel, and whether they start, run or are down.

Hooks of several networks run at once, in several processes.  Unique indexes of the
database keep two running networks from one namespace or one bridge, not a check made before.

Times are seconds of CLOCK_BOOTTIME next to the boot's id.  A clock that is set, or a
reboot, never makes a dead start look alive.

Limit: a network is forgotten once it is down and its lease was given away.  So the
database grows with the pools, not with the networks that ever ran.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from libvirt_natns import names
from libvirt_natns.addresses import IPNetwork, network_of
from libvirt_natns.errors import ConflictError
from libvirt_natns.kernel import boot_clock
from libvirt_natns.state.database import Database, Row
from libvirt_natns.values import quoted

NetworkState = Literal["preparing", "starting", "up", "down"]
"""``preparing``: inside our `start` hook; ``starting``: from its end to `started`."""

START_LIMIT = 10.0
"""How long, in seconds, a network may take from libvirt's `start` to `started`
before others stop waiting for it: no hook tells that a start has failed."""

STALLED = 30.0
"""Seconds after which a start that came to no end counts as dead."""

COLUMNS = (
    "uuid, name, namespace, bridge, upstream, kind, subnets, taken_over,"
    " state, boot, since, document"
)
# Not OR REPLACE, which would delete the row that a unique index protects.
PUT = (
    f"INSERT INTO network ({COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (uuid)"
    f" DO UPDATE SET ({COLUMNS}) = (excluded.{COLUMNS.replace(', ', ', excluded.')})"
)


@dataclass(frozen=True, slots=True)
class NetworkRecord:
    """A network as it was last seen; enough to tear it down without its XML."""

    uuid: str
    name: str
    namespace: str
    bridge: str
    upstream: str
    kind: str
    subnets: tuple[IPNetwork, ...]
    taken_over: bool
    state: NetworkState
    boot: str
    since: float
    document: bytes

    @property
    def shares_addresses(self) -> bool:
        """True if the network publishes on the addresses of the host or a router."""
        return self.kind in ("host", "router")

    @property
    def router(self) -> str | None:
        """Return the router namespace that the network is behind; None without a router."""
        return names.router_namespace(self.upstream) if self.kind == "router" else None

    @property
    def this_boot(self) -> bool:
        """True if the record was written since the machine was started."""
        return self.boot == boot_clock.boot_id()

    @property
    def unfinished(self) -> bool:
        """True if its start goes on: in our `start` hook, or from there to `started`."""
        fresh = self.this_boot and boot_clock.now() - self.since < STALLED
        return self.state in ("preparing", "starting") and fresh

    @property
    def runs(self) -> bool:
        """True if the network is up, or on its way, since this boot."""
        return self.unfinished or (self.state == "up" and self.this_boot)


class NetworkTable:
    """Records of networks in the state database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def _records(self, rows: Iterable[Row]) -> list[NetworkRecord]:
        return self._database.made(record_of, rows)

    def get(self, uuid: str) -> NetworkRecord | None:
        """Return the record of one network."""
        rows = self._database.select("SELECT * FROM network WHERE uuid = ?", uuid)
        return self._database.first(record_of, rows)

    def all(self, *states: NetworkState) -> list[NetworkRecord]:
        """Return the records in these states (all, where no state is named), by name."""
        marks = ", ".join("?" * len(states))
        where = f"WHERE state IN ({marks})" if states else ""
        query = f"SELECT * FROM network {where} ORDER BY name, uuid"
        return self._records(self._database.select(query, *states))

    def rivals(self, record: NetworkRecord) -> list[NetworkRecord]:
        """Return other networks of this boot, not down, with the record's namespace or bridge."""
        holders = self.holders(record.namespace, record.bridge)
        return [other for other in holders if other.this_boot and other.uuid != record.uuid]

    def holders(self, namespace: str = "", bridge: str = "") -> list[NetworkRecord]:
        """Return networks that are not down, of any boot, with this namespace or bridge."""
        # SQLite uses a partial index for either half, but none for both at once.
        rows = self._database.select(
            "SELECT * FROM network WHERE state != 'down' AND namespace = ?"
            " UNION SELECT * FROM network WHERE state != 'down' AND bridge = ?",
            namespace,
            bridge,
        )
        return self._records(rows)

    def in_use(self, upstream: str) -> bool:
        """True if a network runs on an upstream, or is about to."""
        return bool(
            self._database.select(
                "SELECT 1 FROM network WHERE upstream = ? AND state != 'down' AND boot = ? LIMIT 1",
                upstream,
                boot_clock.boot_id(),
            )
        )

    def put(self, record: NetworkRecord) -> None:
        """Write a record whole.

        Raises ConflictError where another network that is not down holds the
        namespace or the bridge.  A holder of an earlier boot holds it no more.
        """
        with self._database.transaction() as db:
            rivals = self.rivals(record) if record.state != "down" else []
            if rivals:
                holders = ", ".join(quoted(rival.name) for rival in rivals)
                raise ConflictError(
                    f"network {quoted(record.name)}: namespace {record.namespace} or bridge"
                    f" {record.bridge} belongs to {holders}",
                    "stop that network first, or run virt-natns sync if libvirt has stopped it",
                )
            for column, value in (("namespace", record.namespace), ("bridge", record.bridge)):
                db.execute(
                    "UPDATE network SET state = 'down' WHERE state != 'down' AND boot != ?"
                    f" AND uuid != ? AND {column} = ?",
                    (boot_clock.boot_id(), record.uuid, value),
                )
            db.execute(PUT, _row(record))

    def set_state(self, uuid: str, state: NetworkState) -> None:
        """Record that a network is up or down from now on, and that it used its leases."""
        with self._database.transaction() as db:
            db.execute(
                "UPDATE network SET state = ?, boot = ?, since = ? WHERE uuid = ?",
                (state, boot_clock.boot_id(), boot_clock.now(), uuid),
            )
            db.execute(
                "UPDATE lease SET used = (SELECT coalesce(max(used), 0) + 1 FROM lease)"
                " WHERE network = ? AND upstream ="
                " (SELECT upstream FROM network WHERE uuid = lease.network)",
                (uuid,),
            )

    def enter_start(self, record: NetworkRecord) -> NetworkRecord | None:
        """Record a start; returns the network to wait for instead, if there is one.

        libvirt sets the address on the bridge, and its `started` hook lets us move the
        address.  In between, libvirt refuses any other network with that subnet.  So starts
        of overlapping subnets go one by one.
        """
        # A start that waits looks often; the lock is taken only where the way is free.
        blocker = self._blocker(record)
        if blocker is None:
            with self._database.transaction():
                blocker = self._blocker(record)
                if blocker is None:
                    self.put(record)
        return blocker

    def _blocker(self, record: NetworkRecord) -> NetworkRecord | None:
        # A literal, for SQLite matches no parameter with the condition of a partial index.
        rows = self._database.select(
            "SELECT * FROM network WHERE state = 'starting' ORDER BY name, uuid"
        )
        for other in self._records(rows):
            if other.uuid != record.uuid and _blocks(other, record):
                return other
        return None


def _blocks(other: NetworkRecord, mine: NetworkRecord) -> bool:
    """True if ``other`` is between libvirt's `start` and `started` on my subnet."""
    waiting = other.taken_over and mine.taken_over and other.this_boot
    alive = boot_clock.now() - other.since < START_LIMIT
    # In IPv6 libvirt refuses nothing.
    ours = [subnet for subnet in mine.subnets if subnet.version == 4]
    overlap = any(a.overlaps(b) for a in other.subnets for b in ours)
    return waiting and alive and overlap


def _row(record: NetworkRecord) -> tuple[object, ...]:
    return (
        record.uuid,
        record.name,
        record.namespace,
        record.bridge,
        record.upstream,
        record.kind,
        " ".join(map(str, record.subnets)),
        int(record.taken_over),
        record.state,
        record.boot,
        record.since,
        record.document,
    )


def record_of(row: Row) -> NetworkRecord:
    """Return the record in a row of the table."""
    values = dict(row)
    values["subnets"] = subnets_of(values["subnets"])
    values["taken_over"] = bool(values["taken_over"])
    values["since"] = float(values["since"])
    return NetworkRecord(**values)


@lru_cache(maxsize=256)
def subnets_of(text: str) -> tuple[IPNetwork, ...]:
    """Return a record's subnets; most networks of a host have the same few."""
    return tuple(map(network_of, text.split()))
