# SPDX-License-Identifier: LGPL-2.1-or-later
"""Leases of upstream addresses and prefixes, of networks and of guests' NICs.

The primary key of the table keeps two applicants from one address, not a check made
before.  A segment is the Ethernet on which addresses must be unique: an upstream's
bridge, which several upstreams of the configuration may share.

The time for which a lease was unused is not measured, but counted: each use has a number.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import Literal, cast

from libvirt_natns.addresses import Address, Family, address_of, stored
from libvirt_natns.kernel import boot_clock
from libvirt_natns.state.database import Database, Row
from libvirt_natns.state.networks import NetworkRecord, record_of

LeaseKind = Literal["ipv4", "ipv6", "prefix"]
"""Kind of a lease: an address of either family, or a prefix that is routed."""

Leasable = Address | IPv6Network

# Of a lease joined with its network; takes the boot's id.  A network that has
# moved to another upstream does not use its lease from the former upstream.
RUNNING = "(network.state != 'down' AND network.boot = ? AND network.upstream = lease.upstream)"
# Of a lease; takes the boot's id.
GUESTS = (
    "EXISTS (SELECT 1 FROM static_nat WHERE scope = lease.upstream"
    " AND static_nat.address = lease.address AND static_nat.boot = ?)"
)
NEXT_USE = "(SELECT coalesce(max(used), 0) + 1 FROM lease)"


@dataclass(frozen=True, slots=True)
class Leased:
    """Leases of a network from an upstream: an address of each family, and a prefix."""

    address: IPv4Address | None = None
    address6: IPv6Address | None = None
    prefix: IPv6Network | None = None

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Return the leased addresses."""
        return tuple(address for address in (self.address, self.address6) if address)

    def of(self, family: Family) -> Address | None:
        """Return the address of one family."""
        return self.address if family == 4 else self.address6


@dataclass(frozen=True, slots=True)
class StoredLease:
    """A row of the table: an upstream address or a prefix as it is stored, and its owner.

    ``network`` is the network's uuid or, for a guest's own address, "GUEST/MAC".
    """

    upstream: str
    segment: str
    kind: LeaseKind
    address: int | str
    network: str
    used: int


class LeaseTable:
    """Leases in the state database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, upstream: str, key: str) -> Leased:
        """Return the leases of a network, or of a guest's NIC, from an upstream."""
        rows = self._database.select(
            "SELECT kind, address FROM lease WHERE upstream = ? AND network = ?", upstream, key
        )
        return self._database.made(leased_in, [rows])[0]

    def in_segment(self, segment: str) -> set[int | str]:
        """Return all addresses and prefixes leased in a segment, as they are stored."""
        rows = self._database.select("SELECT address FROM lease WHERE segment = ?", segment)
        return {row[0] for row in rows}

    def reclaimable(self, segment: str, family: Family) -> list[Address]:
        """Return leased addresses that no network uses now, the longest unused first.

        Networks that ran when the machine went down come last: they probably
        start again in a moment.
        """
        rows = self._reclaimable(segment, "ipv4" if family == 4 else "ipv6")
        return self._database.made(lambda row: address_of(row["address"]), rows)

    def reclaimable_prefixes(self, segment: str) -> list[IPv6Network]:
        """Return leased prefixes that no network uses now, in the same order."""
        rows = self._reclaimable(segment, "prefix")
        return self._database.made(lambda row: IPv6Network(row["address"]), rows)

    def _reclaimable(self, segment: str, kind: LeaseKind) -> list[Row]:
        return self._database.select(
            "SELECT address FROM lease LEFT JOIN network ON network.uuid = lease.network"
            " WHERE segment = ? AND lease.kind = ?"
            f" AND NOT coalesce({RUNNING}, FALSE) AND NOT {GUESTS}"
            " ORDER BY coalesce(state != 'down' AND boot != ?, FALSE), used",
            segment,
            kind,
            boot_clock.boot_id(),
            boot_clock.boot_id(),
            boot_clock.boot_id(),
        )

    def holder(self, segment: str, address: Leasable) -> NetworkRecord | None:
        """Return the network that uses a leased address now: it runs, starts or is about to."""
        rows = self._database.select(
            "SELECT network.* FROM lease JOIN network ON network.uuid = lease.network"
            f" WHERE segment = ? AND address = ? AND {RUNNING}",
            segment,
            kept(address),
            boot_clock.boot_id(),
        )
        return self._database.first(record_of, rows)

    def reserve(self, upstream: str, segment: str, key: str, address: Leasable) -> bool:
        """Lease an address, or a prefix, to a network or a guest's NIC, for good.

        The lease replaces an earlier one of that kind from that upstream.  A network
        that does not use the address loses it.  False where a network or guest uses it.
        """
        with self._database.transaction() as db:
            holder = self.holder(segment, address)
            if holder and holder.uuid != key:
                return False
            if self.guest_holder(upstream, segment, key, address):
                return False
            kind, value = kind_of(address), kept(address)
            mine = "segment = ? AND address = ? OR upstream = ? AND network = ? AND kind = ?"
            which = (segment, value, upstream, key, kind)
            losers = db.execute(f"SELECT network FROM lease WHERE {mine}", which).fetchall()
            db.execute(f"DELETE FROM lease WHERE {mine}", which)
            db.execute(
                f"INSERT INTO lease VALUES (?, ?, ?, ?, ?, {NEXT_USE})",
                (upstream, segment, kind, value, key),
            )
            for row in losers:
                self._forget("uuid = ?", row["network"])
        return True

    def guest_holder(self, upstream: str, segment: str, key: str, address: Leasable) -> str | None:
        """Return the name of another guest that has an address as its own now."""
        # Also by another upstream of that segment; and while its lease is being changed.
        rows = self._database.select(
            "SELECT owner_name FROM static_nat"
            " WHERE scope = ? AND address = ? AND boot = ? AND owner != ?"
            " UNION SELECT owner_name FROM lease JOIN static_nat ON scope = lease.upstream"
            " AND static_nat.address = lease.address"
            " WHERE segment = ? AND lease.address = ? AND boot = ? AND owner != ?",
            *(upstream, kept(address), boot_clock.boot_id(), owner_of(key)),
            *(segment, kept(address), boot_clock.boot_id(), owner_of(key)),
        )
        return str(rows[0]["owner_name"]) if rows else None

    def has(self, upstream: str, owner: str, address: Address) -> bool:
        """True if a guest leases an address for any of its NICs."""
        rows = self._database.select(
            "SELECT 1 FROM lease"
            " WHERE upstream = ? AND address = ? AND network > ? AND network < ?",
            upstream,
            kept(address),
            *_bounds(owner),
        )
        return bool(rows)

    def all_of(self, owner: str) -> list[StoredLease]:
        """Return all leases of a network, or of a guest's NICs."""
        rows = self._database.select(
            "SELECT * FROM lease WHERE network = ? UNION"
            " SELECT * FROM lease WHERE network > ? AND network < ?",
            owner,
            *_bounds(owner),
        )
        return [StoredLease(**dict(row)) for row in rows]

    def restore(self, leases: Iterable[StoredLease]) -> None:
        """Restore replaced leases, where their address is still free."""
        with self._database.transaction() as db:
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

    def release(self, upstream: str, key: str, kind: LeaseKind) -> None:
        """Give a lease back to the pool."""
        with self._database.transaction() as db:
            # Others that failed to start before; this network may not be down yet.
            self._forget("uuid != ?", key)
            db.execute(
                "DELETE FROM lease WHERE upstream = ? AND network = ? AND kind = ?",
                (upstream, key, kind),
            )

    def _forget(self, which: str, uuid: str) -> None:
        """Delete the networks, among these, that are down and have no lease any more.

        Reservations and chosen ports of guests in them are deleted, too.
        """
        with self._database.transaction() as db:
            gone = db.execute(
                f"DELETE FROM network WHERE {which} AND state = 'down'"
                " AND NOT EXISTS (SELECT 1 FROM lease WHERE lease.network = network.uuid)"
                " RETURNING uuid",
                (uuid,),
            ).fetchall()
            for row in gone:
                for table in ("reservation", "chosen_port"):
                    db.execute(f"DELETE FROM {table} WHERE network = ?", (row["uuid"],))


def owner_of(key: str) -> str:
    """Return the uuid of the network or guest that a lease is filed under."""
    return key.partition("/")[0]


def _bounds(owner: str) -> tuple[str, str]:
    """Return texts below and above all keys of a guest's leases: "0" follows "/"."""
    return f"{owner}/", f"{owner}0"


def kind_of(leased: Leasable) -> LeaseKind:
    """Return the kind of a lease."""
    if isinstance(leased, IPv6Network):
        return "prefix"
    return "ipv4" if isinstance(leased, IPv4Address) else "ipv6"


def kept(leased: Leasable) -> int | str:
    """Return an address or a prefix as it is stored."""
    return str(leased) if isinstance(leased, IPv6Network) else stored(leased)


def leased_in(rows: list[Row]) -> Leased:
    """Return the leases in rows with the columns kind and address, which may be NULL."""
    values = {row["kind"]: row["address"] for row in rows if row["address"] is not None}
    prefix = values.get("prefix")
    return Leased(
        cast("IPv4Address | None", _address(values.get("ipv4"))),
        cast("IPv6Address | None", _address(values.get("ipv6"))),
        IPv6Network(cast(str, prefix)) if prefix else None,
    )


def _address(value: int | str | None) -> Address | None:
    return None if value is None else address_of(value)
