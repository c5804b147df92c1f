# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lasting state: which networks were seen, and which upstream address each leases.

One SQLite database under /var/lib/libvirt-natns.  Hooks of several networks
run at once, in several processes: that no two hold one address, or one
namespace, is the database's own doing (primary keys and unique indexes), not
that of a check made before.

Times are seconds of CLOCK_BOOTTIME next to the boot's id, so a clock that is
set, or a reboot, never makes a dead start look alive.
"""

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Literal

from libvirt_natns import names
from libvirt_natns.errors import ConflictError, StoreError

State = Literal["preparing", "starting", "up", "down"]
"""``preparing``: inside our `start` hook; ``starting``: from its end to `started`."""

BUSY_TIMEOUT = 30.0
"""How long, in seconds, a process waits for another one's transaction."""

START_LIMIT = 10.0
"""How long, in seconds, a network may take from libvirt's `start` to `started`
before others stop waiting for it: no hook tells that a start has failed."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS network (
    uuid TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    namespace TEXT NOT NULL,
    bridge TEXT NOT NULL,
    upstream TEXT NOT NULL,
    kind TEXT NOT NULL,
    subnets TEXT NOT NULL,
    taken_over INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('preparing', 'starting', 'up', 'down')),
    boot TEXT NOT NULL,
    since REAL NOT NULL,
    document BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS one_namespace ON network (namespace) WHERE state != 'down';
CREATE UNIQUE INDEX IF NOT EXISTS one_bridge ON network (bridge) WHERE state != 'down';
CREATE TABLE IF NOT EXISTS lease (
    upstream TEXT NOT NULL,
    address INTEGER NOT NULL,
    network TEXT NOT NULL,
    used REAL NOT NULL,
    PRIMARY KEY (upstream, address),
    UNIQUE (upstream, network)
) STRICT;
CREATE TABLE IF NOT EXISTS transit (
    upstream TEXT PRIMARY KEY,
    subnet TEXT NOT NULL
) STRICT;
PRAGMA user_version = 1;
"""


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
class Record:
    """A network as it was last seen; enough to tear it down without its XML."""

    uuid: str
    name: str
    namespace: str
    bridge: str
    upstream: str
    kind: str
    subnets: tuple[IPv4Network, ...]
    taken_over: bool
    state: State
    boot: str
    since: float
    document: bytes

    @property
    def this_boot(self) -> bool:
        """Whether the record was written since the machine was started."""
        return self.boot == boot_id()


def boot_id() -> str:
    """The kernel's id of the running boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def now() -> float:
    """Seconds since boot, suspended time included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _record(row: sqlite3.Row) -> Record:
    values = dict(row)
    values["subnets"] = tuple(IPv4Network(text) for text in values["subnets"].split())
    values["taken_over"] = bool(values["taken_over"])
    return Record(**values)


class Store:
    """The state database.  Every method is one transaction unless inside one."""

    def __init__(self, directory: Path = names.STATE_DIRECTORY) -> None:
        self.path = directory / "state.db"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._create()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"cannot open the state database {self.path}", f"{error}; repair or move it away"
            ) from error

    def _create(self) -> None:
        if self._db.execute("PRAGMA user_version").fetchone()[0] == 0:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(f"BEGIN IMMEDIATE;{SCHEMA}COMMIT;")
        self._db.execute("PRAGMA synchronous = NORMAL")

    def close(self) -> None:
        self._db.close()

    def extend(self, schema: str) -> None:
        """Create further tables, where they are missing."""
        try:
            self._db.executescript(f"BEGIN IMMEDIATE;{schema}COMMIT;")
        except sqlite3.Error as error:
            raise StoreError(
                f"cannot change the state database {self.path}", str(error)
            ) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and alone: other writers wait (``BEGIN IMMEDIATE``)."""
        if self._db.in_transaction:
            yield self._db
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:
                yield self._db
        except sqlite3.Error as error:
            raise StoreError(f"cannot change the state database {self.path}", str(error)) from error

    def select(self, query: str, *values: object) -> list[sqlite3.Row]:
        """The rows of a query.  Raises StoreError."""
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"cannot read the state database {self.path}", str(error)) from error

    # -- networks ----------------------------------------------------------

    def network(self, uuid: str) -> Record | None:
        """The record of one network."""
        rows = self.select("SELECT * FROM network WHERE uuid = ?", uuid)
        return _record(rows[0]) if rows else None

    def networks(self, *states: State) -> list[Record]:
        """All records in these states (all, where none is named), by name."""
        rows = self.select("SELECT * FROM network ORDER BY name, uuid")
        return [record for record in map(_record, rows) if not states or record.state in states]

    def rivals(self, record: Record) -> list[Record]:
        """Others that are not down and claim this one's namespace or bridge."""
        rows = self.select(
            "SELECT * FROM network WHERE state != 'down' AND uuid != ?"
            " AND (namespace = ? OR bridge = ?)",
            record.uuid,
            record.namespace,
            record.bridge,
        )
        return [_record(row) for row in rows]

    def put(self, record: Record) -> None:
        """Write a record whole.

        Raises ConflictError where another network that is not down holds the
        namespace or the bridge.
        """
        with self.transaction() as db:
            rivals = self.rivals(record) if record.state != "down" else []
            if rivals:
                raise ConflictError(
                    f"network {record.name}: namespace {record.namespace} or bridge"
                    f" {record.bridge} belongs to {', '.join(rival.name for rival in rivals)}",
                    "stop that one first, or run virt-natns sync if it is gone",
                )
            db.execute(PUT, self._row(record))

    @staticmethod
    def _row(record: Record) -> tuple[object, ...]:
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

    def set_state(self, uuid: str, state: State) -> None:
        """Note that a network is up or down from now on."""
        with self.transaction() as db:
            db.execute(
                "UPDATE network SET state = ?, boot = ?, since = ? WHERE uuid = ?",
                (state, boot_id(), now(), uuid),
            )
            db.execute("UPDATE lease SET used = ? WHERE network = ?", (time.time(), uuid))

    def enter_start(self, record: Record) -> Record | None:
        """Record a start; returns the network to wait for instead, if there is one.

        libvirt sets the address on the bridge before its `started` hook lets us
        move it, and meanwhile refuses any other network with that subnet: so
        starts of overlapping subnets go one by one.
        """
        with self.transaction():
            for other in self.networks("starting"):
                if other.uuid != record.uuid and _blocks(other, record):
                    return other
            self.put(record)
        return None

    # -- leases ------------------------------------------------------------

    def lease(self, upstream: str, uuid: str) -> IPv4Address | None:
        """The address that a network leases from an upstream."""
        rows = self.select(
            "SELECT address FROM lease WHERE upstream = ? AND network = ?", upstream, uuid
        )
        return IPv4Address(rows[0]["address"]) if rows else None

    def leases(self, upstream: str) -> dict[IPv4Address, str]:
        """All leased addresses of an upstream, with the uuid of who holds each."""
        rows = self.select("SELECT address, network FROM lease WHERE upstream = ?", upstream)
        return {IPv4Address(row["address"]): row["network"] for row in rows}

    def reclaimable(self, upstream: str) -> list[IPv4Address]:
        """Leases of networks that do not run, the longest unused first.

        Networks that ran when the machine went down come last: they probably
        start again in a moment.
        """
        rows = self.select(
            "SELECT address, network.state AS state FROM lease"
            " LEFT JOIN network ON network.uuid = lease.network"
            " WHERE lease.upstream = ? AND"
            " (state IS NULL OR state = 'down' OR boot != ?)"
            " ORDER BY state IS NOT NULL AND state != 'down', used",
            upstream,
            boot_id(),
        )
        return [IPv4Address(row["address"]) for row in rows]

    def holder(self, upstream: str, address: IPv4Address) -> Record | None:
        """The network that leases an address, if it is known and not down."""
        rows = self.select(
            "SELECT network.* FROM lease JOIN network ON network.uuid = lease.network"
            " WHERE lease.upstream = ? AND address = ?",
            upstream,
            int(address),
        )
        record = _record(rows[0]) if rows else None
        if record and record.state != "down" and record.this_boot:
            return record
        return None

    def reserve(self, upstream: str, uuid: str, address: IPv4Address) -> bool:
        """Lease an address to a network, for good.

        Replaces the network's earlier lease from that upstream, and takes the
        address from a network that does not run.  False where one that runs
        holds it.
        """
        with self.transaction() as db:
            holder = self.holder(upstream, address)
            if holder and holder.uuid != uuid:
                return False
            db.execute(
                "DELETE FROM lease WHERE upstream = ? AND (address = ? OR network = ?)",
                (upstream, int(address), uuid),
            )
            db.execute(
                "INSERT INTO lease VALUES (?, ?, ?, ?)",
                (upstream, int(address), uuid, time.time()),
            )
        return True

    def release(self, upstream: str, uuid: str) -> None:
        """Give a lease back to the pool."""
        with self.transaction() as db:
            db.execute("DELETE FROM lease WHERE upstream = ? AND network = ?", (upstream, uuid))

    # -- transit subnets ---------------------------------------------------

    def transit(self, upstream: str) -> IPv4Network | None:
        """The transit subnet chosen for an upstream of kind "host"."""
        rows = self.select("SELECT subnet FROM transit WHERE upstream = ?", upstream)
        return IPv4Network(rows[0]["subnet"]) if rows else None

    def choose_transit(
        self, upstream: str, candidates: Iterable[IPv4Network], instead_of: IPv4Network | None
    ) -> IPv4Network:
        """Choose the first candidate for good, unless another was chosen meanwhile.

        ``instead_of`` is the earlier choice, whose leases end with it.
        """
        with self.transaction() as db:
            chosen = self.transit(upstream)
            if chosen is not None and chosen != instead_of:
                return chosen
            chosen = next(iter(candidates))
            db.execute("DELETE FROM lease WHERE upstream = ?", (upstream,))
            db.execute("INSERT OR REPLACE INTO transit VALUES (?, ?)", (upstream, str(chosen)))
        return chosen


def _blocks(other: Record, mine: Record) -> bool:
    """Whether ``other`` is between libvirt's `start` and `started` on my subnet."""
    waiting = other.taken_over and mine.taken_over and other.this_boot
    alive = now() - other.since < START_LIMIT
    overlap = any(a.overlaps(b) for a in other.subnets for b in mine.subnets)
    return waiting and alive and overlap
