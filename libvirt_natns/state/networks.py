# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lasting state: which networks were seen, and which upstream addresses each leases.

One SQLite database under /var/lib/libvirt-natns.  Hooks of several networks
run at once, in several processes: that no two hold one address, or one
namespace, is the database's own doing (primary keys and unique indexes), not
that of a check made before.

Times are seconds of CLOCK_BOOTTIME next to the boot's id, so a clock that is
set, or a reboot, never makes a dead start look alive; how long a lease was
unused is not measured at all, but counted.

Limit: a network is forgotten once it is down and its lease was given away, so
the database grows with the pools, not with the networks that ever ran.
"""

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from libvirt_natns import names
from libvirt_natns.addresses import Address, Family, IPNetwork, address_of, network_of, stored
from libvirt_natns.errors import ConflictError
from libvirt_natns.records import asdict, dataclass
from libvirt_natns.state import database

R = TypeVar("R")
T = TypeVar("T")

State = Literal["preparing", "starting", "up", "down"]
"""``preparing``: inside our `start` hook; ``starting``: from its end to `started`."""

LeaseKind = Literal["ipv4", "ipv6", "prefix"]
"""What is leased: an address of either family, or a prefix that is routed."""

Leasable = Address | IPv6Network

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
# Of a lease joined with its network; takes the boot's id.  A network that has
# moved to another upstream does not use what it had from the first.
RUNNING = "(network.state != 'down' AND network.boot = ? AND network.upstream = lease.upstream)"
# Of a lease; takes the boot's id.
GUESTS = (
    "EXISTS (SELECT 1 FROM static_nat WHERE scope = lease.upstream"
    " AND static_nat.address = lease.address AND static_nat.boot = ?)"
)
NEXT_USE = "(SELECT coalesce(max(used), 0) + 1 FROM lease)"


@dataclass(frozen=True, slots=True)
class Record:
    """A network as it was last seen; enough to tear it down without its XML."""

    uuid: str
    name: str
    namespace: str
    bridge: str
    upstream: str
    kind: str
    subnets: tuple[IPNetwork, ...]
    taken_over: bool
    state: State
    boot: str
    since: float
    document: bytes

    @property
    def this_boot(self) -> bool:
        """Whether the record was written since the machine was started."""
        return self.boot == boot_id()

    @property
    def unfinished(self) -> bool:
        """Whether its start goes on: in our `start` hook, or from there to `started`."""
        fresh = self.this_boot and now() - self.since < STALLED
        return self.state in ("preparing", "starting") and fresh

    @property
    def runs(self) -> bool:
        """Whether it is up, or on its way, since this boot."""
        return self.unfinished or (self.state == "up" and self.this_boot)


@dataclass(frozen=True, slots=True)
class Leased:
    """What a network leases from an upstream: an address a family, and a prefix."""

    address: IPv4Address | None = None
    address6: IPv6Address | None = None
    prefix: IPv6Network | None = None

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The addresses among it."""
        return tuple(each for each in (self.address, self.address6) if each)

    def of(self, family: Family) -> Address | None:
        """The address of one family."""
        return self.address if family == 4 else self.address6


@dataclass(frozen=True, slots=True)
class User:
    """A network that runs or starts, as far as the host is concerned."""

    uuid: str
    bridge: str
    upstream: str
    subnets: tuple[IPNetwork, ...]
    leased: Leased


@dataclass(frozen=True, slots=True)
class Lease:
    """An upstream address or a prefix as it is stored, and whose it is.

    A network's, or as "GUEST/MAC" a guest's own.
    """

    upstream: str
    segment: str
    kind: LeaseKind
    address: int | str
    network: str
    used: int


def owner_of(key: str) -> str:
    """The network or guest that a lease is filed under."""
    return key.partition("/")[0]


def _keys(owner: str) -> tuple[str, str]:
    """What is less and what is more than all keys of a guest's leases: "0" follows "/"."""
    return f"{owner}/", f"{owner}0"


def kind_of(leased: Leasable) -> LeaseKind:
    """What sort of lease it is."""
    if isinstance(leased, IPv6Network):
        return "prefix"
    return "ipv4" if isinstance(leased, IPv4Address) else "ipv6"


def kept(leased: Leasable) -> int | str:
    """An address or a prefix as it is stored."""
    return str(leased) if isinstance(leased, IPv6Network) else stored(leased)


def _leased_in(rows: list[sqlite3.Row]) -> Leased:
    return _leased((row["kind"], row["address"]) for row in rows)


def _leased(rows: Iterable[tuple[str | None, int | str | None]]) -> Leased:
    """What is leased, by its kind."""
    found = {kind: value for kind, value in rows if value is not None}
    prefix = found.get("prefix")
    return Leased(
        cast("IPv4Address | None", _address(found.get("ipv4"))),
        cast("IPv6Address | None", _address(found.get("ipv6"))),
        IPv6Network(cast(str, prefix)) if prefix else None,
    )


def _address(value: int | str | None) -> Address | None:
    return None if value is None else address_of(value)


VALUES: tuple[tuple[str, str, Callable[[Any], object]], ...] = (
    ("lease", "CASE WHEN kind != 'prefix' THEN address END", address_of),
    ("lease", "CASE WHEN kind = 'prefix' THEN address END", IPv6Network),
    ("transit", "subnet", IPv4Network),
    ("transit6", "subnet", IPv6Network),
    ("reservation", "address", address_of),
    ("forward", "address", address_of),
    ("forward", "target", address_of),
    ("static_nat", "address", address_of),
    ("static_nat", "target", address_of),
    ("guest", "document", bytes),
)
"""Values that have a form, each by its table and column, with what reads it."""


@cache
def boot_id() -> str:
    """The kernel's id of the running boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def now() -> float:
    """Seconds since boot, suspended time included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _record(row: sqlite3.Row) -> Record:
    values = dict(row)
    values["subnets"] = _subnets(values["subnets"])
    values["taken_over"] = bool(values["taken_over"])
    return Record(**values)


@lru_cache(maxsize=256)
def _subnets(text: str) -> tuple[IPNetwork, ...]:
    """A record's subnets; most networks of a host have the same few."""
    return tuple(map(network_of, text.split()))


class Store:
    """The state database.  Every method is one transaction unless inside one."""

    def __init__(self, directory: Path = names.STATE_DIRECTORY) -> None:
        """Open the database in a directory.

        Raises DamagedError, also where it is missing although networks run, FormatError or
        StoreError.
        """
        self.path = directory / database.FILE
        self._db = database.opened(directory)

    def close(self) -> None:
        self._db.close()

    def check(self) -> None:
        """Read everything.  Raises DamagedError where SQLite, or a value, shows damage."""
        database.check(self._db, self.path)
        self.networks()
        self.users()
        for table, column, make in VALUES:
            rows = self.select(f"SELECT {column} FROM {table} WHERE {column} IS NOT NULL")
            self.made(make, [row[0] for row in rows])

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
            raise database.failure(self.path, "change", error) from error

    def select(self, query: str, *values: object) -> list[sqlite3.Row]:
        """The rows of a query.  Raises StoreError."""
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise database.failure(self.path, "read", error) from error

    def made(self, make: Callable[[R], T], rows: Iterable[R]) -> list[T]:
        """Objects from rows.  Raises DamagedError for a value that can be none of ours."""
        return database.made(make, rows, self.path)

    def _records(self, rows: Iterable[sqlite3.Row]) -> list[Record]:
        return self.made(_record, rows)

    # -- networks ----------------------------------------------------------

    def network(self, uuid: str) -> Record | None:
        """The record of one network."""
        rows = self.select("SELECT * FROM network WHERE uuid = ?", uuid)
        return next(iter(self._records(rows)), None)

    def networks(self, *states: State) -> list[Record]:
        """All records in these states (all, where none is named), by name."""
        marks = ", ".join("?" * len(states))
        where = f"WHERE state IN ({marks})" if states else ""
        rows = self.select(f"SELECT * FROM network {where} ORDER BY name, uuid", *states)
        return self._records(rows)

    def rivals(self, record: Record) -> list[Record]:
        """Others that are not down, since this boot, and claim this one's namespace or bridge."""
        found = self.holders(record.namespace, record.bridge)
        return [other for other in found if other.this_boot and other.uuid != record.uuid]

    def holders(self, namespace: str = "", bridge: str = "") -> list[Record]:
        """Those that are not down, of whatever boot, and have this namespace or this bridge."""
        # SQLite uses a partial index for either half, but none for both at once.
        rows = self.select(
            "SELECT * FROM network WHERE state != 'down' AND namespace = ?"
            " UNION SELECT * FROM network WHERE state != 'down' AND bridge = ?",
            namespace,
            bridge,
        )
        return self._records(rows)

    def put(self, record: Record) -> None:
        """Write a record whole.

        Raises ConflictError where another network that is not down holds the
        namespace or the bridge.  One that held it when the machine went down
        holds it no more.
        """
        with self.transaction() as db:
            rivals = self.rivals(record) if record.state != "down" else []
            if rivals:
                raise ConflictError(
                    f"network {record.name}: namespace {record.namespace} or bridge"
                    f" {record.bridge} belongs to {', '.join(rival.name for rival in rivals)}",
                    "stop that one first, or run virt-natns sync if it is gone",
                )
            for column, value in (("namespace", record.namespace), ("bridge", record.bridge)):
                db.execute(
                    "UPDATE network SET state = 'down' WHERE state != 'down' AND boot != ?"
                    f" AND uuid != ? AND {column} = ?",
                    (boot_id(), record.uuid, value),
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
            db.execute(
                f"UPDATE lease SET used = {NEXT_USE} WHERE network = ? AND upstream ="
                " (SELECT upstream FROM network WHERE uuid = lease.network)",
                (uuid,),
            )

    def enter_start(self, record: Record) -> Record | None:
        """Record a start; returns the network to wait for instead, if there is one.

        libvirt sets the address on the bridge before its `started` hook lets us
        move it, and meanwhile refuses any other network with that subnet: so
        starts of overlapping subnets go one by one.
        """
        # Those who wait look often; only who sees the way free takes the lock.
        blocker = self._blocker(record)
        if blocker is None:
            with self.transaction():
                blocker = self._blocker(record)
                if blocker is None:
                    self.put(record)
        return blocker

    def _blocker(self, record: Record) -> Record | None:
        # A literal, for SQLite matches no parameter with the condition of a partial index.
        rows = self.select("SELECT * FROM network WHERE state = 'starting' ORDER BY name, uuid")
        for other in self._records(rows):
            if other.uuid != record.uuid and _blocks(other, record):
                return other
        return None

    # -- leases ------------------------------------------------------------
    #
    # A segment is where addresses must be unique: an upstream's bridge, which
    # several upstreams of the configuration may share.

    def leases(self, upstream: str, uuid: str) -> Leased:
        """What a network, or a guest's NIC, leases from an upstream."""
        rows = self.select(
            "SELECT kind, address FROM lease WHERE upstream = ? AND network = ?", upstream, uuid
        )
        return self.made(_leased_in, [rows])[0]

    def leased(self, segment: str) -> set[int | str]:
        """All that is leased in a segment, as it is stored."""
        rows = self.select("SELECT address FROM lease WHERE segment = ?", segment)
        return {row[0] for row in rows}

    def reclaimable(self, segment: str, kind: LeaseKind) -> list[int | str]:
        """Leases that no network uses now, as they are stored, the longest unused first.

        Networks that ran when the machine went down come last: they probably
        start again in a moment.
        """
        rows = self.select(
            "SELECT address FROM lease LEFT JOIN network ON network.uuid = lease.network"
            " WHERE segment = ? AND lease.kind = ?"
            f" AND NOT coalesce({RUNNING}, FALSE) AND NOT {GUESTS}"
            " ORDER BY coalesce(state != 'down' AND boot != ?, FALSE), used",
            segment,
            kind,
            boot_id(),
            boot_id(),
            boot_id(),
        )
        return [row["address"] for row in rows]

    def holder(self, segment: str, address: Leasable) -> Record | None:
        """The network that uses a leased address now: it runs, starts or is about to."""
        rows = self.select(
            "SELECT network.* FROM lease JOIN network ON network.uuid = lease.network"
            f" WHERE segment = ? AND address = ? AND {RUNNING}",
            segment,
            kept(address),
            boot_id(),
        )
        return next(iter(self._records(rows)), None)

    def reserve(self, upstream: str, segment: str, uuid: str, address: Leasable) -> bool:
        """Lease an address, or a prefix, to a network, for good.

        Replaces the network's earlier lease of that kind from that upstream, and
        takes the address from a network that does not use it.  False where one that
        does holds it.
        """
        with self.transaction() as db:
            holder = self.holder(segment, address)
            if holder and holder.uuid != uuid:
                return False
            if self.guest_holder(upstream, segment, uuid, address):
                return False
            kind, value = kind_of(address), kept(address)
            mine = "segment = ? AND address = ? OR upstream = ? AND network = ? AND kind = ?"
            which = (segment, value, upstream, uuid, kind)
            losers = db.execute(f"SELECT network FROM lease WHERE {mine}", which).fetchall()
            db.execute(f"DELETE FROM lease WHERE {mine}", which)
            db.execute(
                f"INSERT INTO lease VALUES (?, ?, ?, ?, ?, {NEXT_USE})",
                (upstream, segment, kind, value, uuid),
            )
            for row in losers:
                self._forget("uuid = ?", row["network"])
        return True

    def guest_holder(self, upstream: str, segment: str, uuid: str, address: Leasable) -> str | None:
        """Another guest, in words, that has an address as its own now."""
        # Also by another upstream of that segment; and while its lease is being changed.
        rows = self.select(
            "SELECT owner_name FROM static_nat"
            " WHERE scope = ? AND address = ? AND boot = ? AND owner != ?"
            " UNION SELECT owner_name FROM lease JOIN static_nat ON scope = lease.upstream"
            " AND static_nat.address = lease.address"
            " WHERE segment = ? AND lease.address = ? AND boot = ? AND owner != ?",
            *(upstream, kept(address), boot_id(), owner_of(uuid)),
            *(segment, kept(address), boot_id(), owner_of(uuid)),
        )
        return str(rows[0]["owner_name"]) if rows else None

    def has_leased(self, upstream: str, owner: str, address: Address) -> bool:
        """Whether a guest leases an address for any of its NICs."""
        rows = self.select(
            "SELECT 1 FROM lease"
            " WHERE upstream = ? AND address = ? AND network > ? AND network < ?",
            upstream,
            kept(address),
            *_keys(owner),
        )
        return bool(rows)

    def leases_of(self, owner: str) -> list[Lease]:
        """All leases of a network, or of a guest's NICs."""
        rows = self.select(
            "SELECT * FROM lease WHERE network = ? UNION"
            " SELECT * FROM lease WHERE network > ? AND network < ?",
            owner,
            *_keys(owner),
        )
        return [Lease(**dict(row)) for row in rows]

    def restore_leases(self, leases: Iterable[Lease]) -> None:
        """Give leases back to whom they were replaced for, unless somebody has them by now."""
        with self.transaction() as db:
            for lease in leases:
                holders = db.execute(
                    "SELECT network FROM lease WHERE segment = ? AND address = ?",
                    (lease.segment, lease.address),
                ).fetchall()
                if not holders:
                    db.execute(
                        "DELETE FROM lease WHERE upstream = ? AND network = ? AND kind = ?",
                        (lease.upstream, lease.network, lease.kind),
                    )
                    db.execute(
                        "INSERT INTO lease VALUES (:upstream, :segment, :kind, :address,"
                        " :network, :used)",
                        asdict(lease),
                    )

    def _forget(self, which: str, uuid: str) -> None:
        """Drop the networks, among these, of which no lease is kept any more.

        What is kept for guests in them goes along.
        """
        gone = self._db.execute(
            f"DELETE FROM network WHERE {which} AND state = 'down'"
            " AND NOT EXISTS (SELECT 1 FROM lease WHERE lease.network = network.uuid)"
            " RETURNING uuid",
            (uuid,),
        ).fetchall()
        for row in gone:
            for table in ("reservation", "chosen_port"):
                self._db.execute(f"DELETE FROM {table} WHERE network = ?", (row["uuid"],))

    def release(self, upstream: str, uuid: str, kind: LeaseKind) -> None:
        """Give a lease back to the pool."""
        with self.transaction() as db:
            # Others that failed to start before; this one may not be down yet.
            self._forget("uuid != ?", uuid)
            db.execute(
                "DELETE FROM lease WHERE upstream = ? AND network = ? AND kind = ?",
                (upstream, uuid, kind),
            )

    # -- what the host has -------------------------------------------------

    def users(self, uuid: str | None = None) -> list[User]:
        """Networks that run or start, all or one of them, with their leases."""
        rows = self.select(
            "SELECT uuid, bridge, network.upstream, subnets, lease.kind, address,"
            " state, boot, since"
            " FROM network LEFT JOIN lease"
            " ON lease.network = uuid AND lease.upstream = network.upstream"
            f" WHERE state != 'down' AND boot = ? {'' if uuid is None else 'AND uuid = ?'}"
            " ORDER BY name, uuid",
            boot_id(),
            *(() if uuid is None else (uuid,)),
        )
        alive = [row for row in rows if row["state"] == "up" or now() - row["since"] < STALLED]
        found: dict[str, list[sqlite3.Row]] = {}
        for row in alive:
            found.setdefault(row["uuid"], []).append(row)
        return self.made(_user, found.values())

    def host_part(self, uuid: str) -> str:
        """What the host holds for a network since this boot; "" for nothing."""
        rows = self.select(
            "SELECT part FROM host_part WHERE network = ? AND boot = ?", uuid, boot_id()
        )
        return str(rows[0]["part"]) if rows else ""

    def put_host_part(self, uuid: str, part: str) -> None:
        """Note what the host holds for a network."""
        with self.transaction() as db:
            db.execute("DELETE FROM host_part WHERE network = ?", (uuid,))
            if part:
                db.execute("INSERT INTO host_part VALUES (?, ?, ?)", (uuid, boot_id(), part))

    def put_host_parts(self, parts: Mapping[str, str]) -> None:
        """The same for all networks: the host holds nothing for any other."""
        rows = [(uuid, boot_id(), part) for uuid, part in parts.items() if part]
        with self.transaction() as db:
            db.execute("DELETE FROM host_part")
            db.executemany("INSERT INTO host_part VALUES (?, ?, ?)", rows)

    # -- transit subnets ---------------------------------------------------

    def transit(self, upstream: str) -> IPv4Network | None:
        """The transit subnet chosen for an upstream of kind "host"."""
        rows = self.select("SELECT subnet FROM transit WHERE upstream = ?", upstream)
        return IPv4Network(rows[0]["subnet"]) if rows else None

    def choose_transit(
        self, upstream: str, candidates: Iterable[IPv4Network], instead_of: IPv4Network | None
    ) -> IPv4Network:
        """Choose the first candidate for good, unless another was chosen meanwhile.

        ``instead_of`` is the earlier choice, whose leases end with it; it stays
        where a network has begun to use it.
        """
        with self.transaction() as db:
            chosen = self.transit(upstream)
            if chosen is not None and (chosen != instead_of or self.in_use(upstream)):
                return chosen
            chosen = next(iter(candidates))
            db.execute("DELETE FROM lease WHERE upstream = ? AND kind = 'ipv4'", (upstream,))
            db.execute("INSERT OR REPLACE INTO transit VALUES (?, ?)", (upstream, str(chosen)))
        return chosen

    def transit6(self, upstream: str) -> IPv6Network | None:
        """The transit prefix chosen for an upstream of kind "host"."""
        rows = self.select("SELECT subnet FROM transit6 WHERE upstream = ?", upstream)
        return IPv6Network(rows[0]["subnet"]) if rows else None

    def choose_transit6(self, upstream: str, candidate: IPv6Network) -> IPv6Network:
        """Choose a transit prefix for good, unless another was chosen meanwhile."""
        with self.transaction() as db:
            db.execute("INSERT OR IGNORE INTO transit6 VALUES (?, ?)", (upstream, str(candidate)))
            return self.transit6(upstream) or candidate

    def in_use(self, upstream: str) -> bool:
        """Whether any network runs on an upstream, or is about to."""
        return bool(
            self.select(
                "SELECT 1 FROM network WHERE upstream = ? AND state != 'down' AND boot = ? LIMIT 1",
                upstream,
                boot_id(),
            )
        )


def _user(rows: list[sqlite3.Row]) -> User:
    """A network, by a row for each of its leases."""
    first = rows[0]
    leased = _leased_in(rows)
    return User(
        first["uuid"], first["bridge"], first["upstream"], _subnets(first["subnets"]), leased
    )


def _blocks(other: Record, mine: Record) -> bool:
    """Whether ``other`` is between libvirt's `start` and `started` on my subnet."""
    waiting = other.taken_over and mine.taken_over and other.this_boot
    alive = now() - other.since < START_LIMIT
    # In IPv6 libvirt refuses nothing.
    ours = [each for each in mine.subnets if each.version == 4]
    overlap = any(a.overlaps(b) for a in other.subnets for b in ours)
    return waiting and alive and overlap
