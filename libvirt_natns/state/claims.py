# SPDX-License-Identifier: LGPL-2.1-or-later
"""Claims of guests and networks: forwards and static NAT on upstream addresses.

A trigger of the database refuses a forward for a port that another forward of that
address has, however many hooks run at once.
"""

from dataclasses import dataclass
from itertools import chain
from typing import cast

from libvirt_natns.addresses import Address, IPNetwork, address_of, network_of, stored
from libvirt_natns.errors import ConflictError, StoreError
from libvirt_natns.kernel import boot_clock
from libvirt_natns.model.publication import Forward, PortProtocol, PortSet, StaticNat
from libvirt_natns.spans import span_text
from libvirt_natns.state.chosen_ports import PortKey
from libvirt_natns.state.claim_scope import ClaimScope
from libvirt_natns.state.database import Connection, Database, IntegrityError, Row
from libvirt_natns.state.leases import LeaseTable
from libvirt_natns.state.reservations import NEXT_USE

EVERYWHERE = (0, "::")
"""All of the host's addresses, one for each family, as they are stored."""


@dataclass(frozen=True, slots=True)
class Claims:
    """All claims of a guest, or of a network itself, on networks' upstream addresses."""

    owner: str
    forwards: tuple[Forward, ...] = ()
    addresses: tuple[StaticNat, ...] = ()


class ClaimTable:
    """Forwards and static NAT in the state database."""

    def __init__(self, database: Database, leases: LeaseTable) -> None:
        self._database = database
        self._leases = leases

    def put(self, claims: Claims, scopes: dict[str, ClaimScope], published: bool) -> None:
        """Replace all claims of an owner by these.

        ``published``: they are in force, and not only taken for a guest that is about
        to start.  Raises ConflictError, and changes nothing, where another owner holds
        one of them.
        """
        with self._database.transaction() as db:
            db.execute("DELETE FROM forward WHERE owner = ?", (claims.owner,))
            db.execute("DELETE FROM static_nat WHERE owner = ?", (claims.owner,))
            for forward in claims.forwards:
                self._insert(db, forward, scopes[forward.network], published)
            for static in claims.addresses:
                self._insert_static(db, static, scopes[static.network].upstream, published)

    def _insert(self, db: Connection, forward: Forward, scope: ClaimScope, published: bool) -> None:
        claimed = _claimed(scope, forward.address, own=forward.own)
        row = (
            scope.upstream,
            forward.owner,
            forward.owner_name,
            forward.network,
            forward.proto,
            stored(forward.address),
            claimed,
            forward.first,
            forward.last,
            stored(forward.target),
            forward.to,
            forward.to_last,
            " ".join(map(str, forward.sources)),
            int(published),
            boot_clock.boot_id(),
        )
        statement = f"INSERT INTO forward VALUES ({', '.join('?' * len(row))})"
        try:
            db.execute(statement, row)
        except IntegrityError:
            self._evict(db, forward, scope.upstream, claimed)
            try:
                db.execute(statement, row)
            except IntegrityError as error:
                raise StoreError("the state database refuses a forward", str(error)) from error

    def _evict(self, db: Connection, forward: Forward, upstream: str, claimed: int | str) -> None:
        """Delete claims of an earlier boot that are in the way; refuse for any other."""
        rivals = db.execute(
            "SELECT rowid AS id, * FROM forward WHERE scope = ? AND proto = ?"
            " AND claimed = ? AND first <= ? AND last >= ?",
            (upstream, forward.proto, claimed, forward.last, forward.first),
        ).fetchall()
        for rival in rivals:
            if rival["boot"] != boot_clock.boot_id():
                db.execute("DELETE FROM forward WHERE rowid = ?", (rival["id"],))
                continue
            ports = span_text(max(rival["first"], forward.first), min(rival["last"], forward.last))
            where = "the host" if claimed in EVERYWHERE else forward.address
            raise ConflictError(
                f"{forward.owner_name}: {forward.proto} port {ports} of {where}"
                f" is forwarded to {rival['owner_name']} already",
                "choose another port, or start='auto'",
            )

    def _insert_static(
        self, db: Connection, static: StaticNat, scope: str, published: bool
    ) -> None:
        self.check_address(scope, static.address, static.owner, static.owner_name)
        if not self._leases.has(scope, static.owner, static.address):
            # Another applicant could take the lease, as no claim protected it before.
            raise ConflictError(
                f"{static.owner_name}: address {static.address}"
                " was just leased to another network or guest",
                "try again, or choose another address",
            )
        db.execute(
            "DELETE FROM static_nat WHERE scope = ? AND address = ? AND boot != ?",
            (scope, stored(static.address), boot_clock.boot_id()),
        )
        ports = " ".join(f"{p.proto}:{p.first}-{p.last}" for p in static.ports)
        db.execute(
            "INSERT INTO static_nat VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                scope,
                stored(static.address),
                static.owner,
                static.owner_name,
                static.network,
                stored(static.target),
                ports,
                int(published),
                boot_clock.boot_id(),
            ),
        )

    def check_address(self, scope: str, address: Address, owner: str, owner_name: str) -> None:
        """Refuse an address that belongs to another guest.  Raises ConflictError."""
        # By uuid: a name changes, and two drivers may each have a guest of that name.
        rows = self._database.select(
            "SELECT owner_name FROM static_nat"
            " WHERE scope = ? AND address = ? AND boot = ? AND owner != ?",
            scope,
            stored(address),
            boot_clock.boot_id(),
            owner,
        )
        if rows:
            raise ConflictError(
                f"{owner_name}: address {address} belongs to {rows[0]['owner_name']} already",
                "choose another address, or address='auto'",
            )

    def drop(self, owner: str) -> None:
        """Delete all claims of an owner."""
        self.put(Claims(owner), {}, published=False)

    def set_published(self, owner: str, published: bool) -> None:
        """Put an owner's claims into force, or out of force while keeping them."""
        with self._database.transaction() as db:
            for table in ("forward", "static_nat"):
                db.execute(
                    f"UPDATE {table} SET published = ? WHERE owner = ?", (int(published), owner)
                )
            db.execute("UPDATE guest SET published = ? WHERE uuid = ?", (int(published), owner))
            if not published:
                db.execute(f"UPDATE reservation SET used = {NEXT_USE} WHERE owner = ?", (owner,))

    def move(self, network: str, address: Address) -> None:
        """Move forwards from a network's former upstream address to this address.

        Forwards on static NAT addresses, on the host's addresses and of the other family stay.
        """
        here = stored(address)
        with self._database.transaction() as db:
            moved = db.execute(
                "UPDATE forward SET address = ?, claimed = ? WHERE network = ?"
                f" AND claimed NOT IN {EVERYWHERE} AND typeof(address) = typeof(?)"
                " AND address NOT IN (?, target) AND address NOT IN"
                " (SELECT address FROM static_nat WHERE network = forward.network)",
                (here, here, network, here, here),
            ).rowcount
            if moved:
                # Claims of an earlier boot are void, and no two claims may overlap.
                db.execute(
                    "DELETE FROM forward WHERE claimed = ? AND boot != ?",
                    (here, boot_clock.boot_id()),
                )

    def forwards(
        self, network: str | None = None, owner: str | None = None, published: bool = True
    ) -> tuple[Forward, ...]:
        """Return forwards, of a network or an owner; by default only forwards in force."""
        rows = self._claimed("forward", "proto, address, first", network, owner, published)
        return tuple(self._database.made(_forward, rows))

    def static_nats(
        self, network: str | None = None, owner: str | None = None, published: bool = True
    ) -> tuple[StaticNat, ...]:
        """Return static NAT, of a network or an owner; by default only static NAT in force."""
        rows = self._claimed("static_nat", "address", network, owner, published)
        return tuple(self._database.made(_static, rows))

    def _claimed(
        self, table: str, order: str, network: str | None, owner: str | None, published: bool
    ) -> list[Row]:
        # The query has no column that is not asked for, or SQLite would use no index.
        asked = {"network": network, "owner": owner, "boot": boot_clock.boot_id()}
        wanted = {column: value for column, value in asked.items() if value is not None}
        where = [f"{column} = ?" for column in wanted]
        if published:
            where.append("published")
        return self._database.select(
            f"SELECT * FROM {table} WHERE {' AND '.join(where)} ORDER BY {order}",
            *wanted.values(),
        )

    def ports(self, proto: str) -> set[int]:
        """Return all claimed ports of a protocol, on any address."""
        rows = self._database.select(
            "SELECT first, last FROM forward WHERE proto = ? AND boot = ?",
            proto,
            boot_clock.boot_id(),
        )
        return set(chain.from_iterable(self._database.made(_ports, rows)))

    def is_claimed(self, key: PortKey, scope: ClaimScope, address: Address, port: int) -> bool:
        """True if another owner has claimed a chosen port on an address where it listens."""
        rows = self._database.select(
            "SELECT 1 FROM forward WHERE scope = ? AND proto = ? AND claimed = ?"
            " AND first <= ? AND last >= ? AND owner != ? AND boot = ?",
            scope.upstream,
            key.proto,
            _claimed(scope, address),
            port,
            port,
            key.owner,
            boot_clock.boot_id(),
        )
        return bool(rows)


def _claimed(scope: ClaimScope, address: Address, *, own: bool = False) -> int | str:
    """Return the address on which ports must be unique: in the host, one for each family.

    ``own``: the address is the guest's own, not the host's.
    """
    return EVERYWHERE[address.version == 6] if scope.shared and not own else stored(address)


def _forward(row: Row) -> Forward:
    return Forward(
        owner=row["owner"],
        owner_name=row["owner_name"],
        network=row["network"],
        proto=cast(PortProtocol, row["proto"]),
        address=address_of(row["address"]),
        first=row["first"],
        last=row["last"],
        target=address_of(row["target"]),
        to=row["target_port"],
        to_last=row["target_last"],
        sources=sources_of(row["sources"]),
    )


def _static(row: Row) -> StaticNat:
    return StaticNat(
        owner=row["owner"],
        owner_name=row["owner_name"],
        network=row["network"],
        address=address_of(row["address"]),
        target=address_of(row["target"]),
        ports=port_sets_of(row["ports"]),
    )


def _ports(row: Row) -> range:
    return range(row["first"], row["last"] + 1)


def sources_of(text: str) -> tuple[IPNetwork, ...]:
    """Return the allowed clients of a forward, from its row."""
    return tuple(map(network_of, text.split()))


def port_sets_of(text: str) -> tuple[PortSet, ...]:
    """Return the ports of a static NAT, from its row."""
    return tuple(map(_port_set, text.split()))


def _port_set(text: str) -> PortSet:
    proto, _, span = text.partition(":")
    first, _, last = span.partition("-")
    return PortSet(cast(PortProtocol, proto), int(first), int(last))
