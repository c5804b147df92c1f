# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lasting state of guests: what they publish, and which addresses are theirs.

Lives in the same database as ``store``.  That no two forwards claim one port of
one address is the database's doing: a trigger refuses the second one, however
many hooks run at once.
"""

import sqlite3
from collections.abc import Callable, Iterable
from typing import cast

from libvirt_natns.addresses import Address, Family, address_of, network_of, stored
from libvirt_natns.errors import ConflictError, StoreError
from libvirt_natns.model.publication import Forward, PortSet, Protocol, StaticNat
from libvirt_natns.records import dataclass
from libvirt_natns.state.networks import Store, boot_id
from libvirt_natns.state.schema import ANY_SELECTOR

# Of a reservation; takes the boot's id twice.
IN_FORCE = (
    "(EXISTS (SELECT 1 FROM forward WHERE owner = reservation.owner AND boot = ? AND published)"
    " OR EXISTS (SELECT 1 FROM static_nat"
    " WHERE owner = reservation.owner AND boot = ? AND published))"
)
LATEST = "(SELECT coalesce(max(used), 0) + 1 FROM reservation)"

EVERYWHERE = (0, "::")
"""All of the host's addresses, a family each, as they are stored."""


@dataclass(frozen=True, slots=True)
class GuestRecord:
    """A guest whose metadata has something to say, as it was last seen."""

    uuid: str
    name: str
    boot: str
    published: bool
    document: bytes

    @property
    def this_boot(self) -> bool:
        return self.boot == boot_id()


@dataclass(frozen=True, slots=True)
class Claims:
    """All that a guest (or a network itself) wants of networks' upstream addresses."""

    owner: str
    forwards: tuple[Forward, ...] = ()
    addresses: tuple[StaticNat, ...] = ()


@dataclass(frozen=True, slots=True)
class Scope:
    """Where a network's claims must be unique: in its upstream.

    ``shared``: its networks share the addresses, namely the host's, and each port
    leads to one of them only.
    """

    upstream: str
    shared: bool


@dataclass(frozen=True, slots=True)
class PortKey:
    """What a port is chosen for: ``selector`` tells the owner's forwards to one port apart."""

    owner: str
    network: str
    proto: Protocol
    selector: str
    target_port: int


class Registry:
    """Guests' tables of the state database."""

    def __init__(self, store: Store) -> None:
        self._store = store

    # -- guests ------------------------------------------------------------

    def guest(self, uuid: str) -> GuestRecord | None:
        """The record of one guest."""
        rows = self._store.select("SELECT * FROM guest WHERE uuid = ?", uuid)
        return _guest(rows[0]) if rows else None

    def guests_in(self, network: str) -> list[GuestRecord]:
        """Recorded guests that claim something in a network, by name."""
        rows = self._store.select(
            "SELECT * FROM guest WHERE uuid IN (SELECT owner FROM forward WHERE network = ?"
            " UNION SELECT owner FROM static_nat WHERE network = ?) ORDER BY name",
            network,
            network,
        )
        return self._store.made(_guest, rows)

    def guests(self) -> list[GuestRecord]:
        """All recorded guests, by name."""
        rows = self._store.select("SELECT * FROM guest ORDER BY name")
        return self._store.made(_guest, rows)

    def put_guest(self, uuid: str, name: str, document: bytes, published: bool) -> None:
        """Record a guest that is about to run, or runs."""
        with self._store.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO guest VALUES (?, ?, ?, ?, ?)",
                (uuid, name, boot_id(), int(published), document),
            )

    def forget_guest(self, uuid: str) -> None:
        """Forget a guest that has stopped.  Its reservations and chosen ports stay."""
        with self._store.transaction() as db:
            for table, column in (("guest", "uuid"), ("forward", "owner"), ("static_nat", "owner")):
                db.execute(f"DELETE FROM {table} WHERE {column} = ?", (uuid,))

    # -- claims ------------------------------------------------------------

    def claim(self, claims: Claims, scopes: dict[str, Scope], published: bool) -> None:
        """Replace all claims of an owner by these.

        ``published`` tells whether they are in force, or only taken for a guest
        that is about to start.  Raises ConflictError, and changes nothing,
        where somebody else holds one.
        """
        with self._store.transaction() as db:
            db.execute("DELETE FROM forward WHERE owner = ?", (claims.owner,))
            db.execute("DELETE FROM static_nat WHERE owner = ?", (claims.owner,))
            for forward in claims.forwards:
                self._insert(db, forward, scopes[forward.network], published)
            for static in claims.addresses:
                self._insert_static(db, static, scopes[static.network].upstream, published)

    def _insert(
        self, db: sqlite3.Connection, forward: Forward, scope: Scope, published: bool
    ) -> None:
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
            boot_id(),
        )
        statement = f"INSERT INTO forward VALUES ({', '.join('?' * len(row))})"
        try:
            db.execute(statement, row)
        except sqlite3.IntegrityError:
            self._evict(db, forward, scope.upstream, claimed)
            try:
                db.execute(statement, row)
            except sqlite3.IntegrityError as error:
                raise StoreError("the state database refuses a forward", str(error)) from error

    def _evict(
        self, db: sqlite3.Connection, forward: Forward, upstream: str, claimed: int | str
    ) -> None:
        """Remove claims of an earlier boot that are in the way; refuse for any other."""
        rivals = db.execute(
            "SELECT rowid AS id, * FROM forward WHERE scope = ? AND proto = ?"
            " AND claimed = ? AND first <= ? AND last >= ?",
            (upstream, forward.proto, claimed, forward.last, forward.first),
        ).fetchall()
        for rival in rivals:
            if rival["boot"] != boot_id():
                db.execute("DELETE FROM forward WHERE rowid = ?", (rival["id"],))
                continue
            ports = _ports(max(rival["first"], forward.first), min(rival["last"], forward.last))
            where = "the host" if claimed in EVERYWHERE else forward.address
            raise ConflictError(
                f"{forward.owner_name}: {forward.proto} port {ports} of {where}"
                f" is forwarded to {rival['owner_name']} already",
                "choose another port, or start='auto'",
            )

    def _insert_static(
        self, db: sqlite3.Connection, static: StaticNat, scope: str, published: bool
    ) -> None:
        self.check_static(scope, static.address, static.owner, static.owner_name)
        if not self._store.has_leased(scope, static.owner, static.address):
            # Between the lease and this claim nothing has shown that it is in use.
            raise ConflictError(
                f"{static.owner_name}: address {static.address} was leased to another meanwhile",
                "try again, or choose another",
            )
        db.execute(
            "DELETE FROM static_nat WHERE scope = ? AND address = ? AND boot != ?",
            (scope, stored(static.address), boot_id()),
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
                boot_id(),
            ),
        )

    def check_static(self, scope: str, address: Address, owner: str, owner_name: str) -> None:
        """Refuse an address that is another guest's.  Raises ConflictError."""
        # By uuid: a name changes, and two drivers may each have a guest of that name.
        rows = self._store.select(
            "SELECT owner_name FROM static_nat"
            " WHERE scope = ? AND address = ? AND boot = ? AND owner != ?",
            scope,
            stored(address),
            boot_id(),
            owner,
        )
        if rows:
            raise ConflictError(
                f"{owner_name}: address {address} belongs to {rows[0]['owner_name']} already",
                "choose another, or address='auto'",
            )

    def drop_claims(self, owner: str) -> None:
        """Give all claims of an owner back."""
        self.claim(Claims(owner), {}, published=False)

    def set_published(self, owner: str, published: bool) -> None:
        """Put an owner's claims into force, or out of it while keeping them."""
        with self._store.transaction() as db:
            for table in ("forward", "static_nat"):
                db.execute(
                    f"UPDATE {table} SET published = ? WHERE owner = ?", (int(published), owner)
                )
            db.execute("UPDATE guest SET published = ? WHERE uuid = ?", (int(published), owner))
            if not published:
                db.execute(f"UPDATE reservation SET used = {LATEST} WHERE owner = ?", (owner,))

    def move(self, network: str, address: Address) -> None:
        """Have what listens on a network's former upstream address listen on this one.

        Addresses of guests' own, and the host's, are no such; nor are those of the
        other family.
        """
        here = stored(address)
        with self._store.transaction() as db:
            moved = db.execute(
                "UPDATE forward SET address = ?, claimed = ? WHERE network = ?"
                f" AND claimed NOT IN {EVERYWHERE} AND typeof(address) = typeof(?)"
                " AND address NOT IN (?, target) AND address NOT IN"
                " (SELECT address FROM static_nat WHERE network = forward.network)",
                (here, here, network, here, here),
            ).rowcount
            if moved:
                # What was claimed there before a reboot is void, and none may overlap.
                db.execute("DELETE FROM forward WHERE claimed = ? AND boot != ?", (here, boot_id()))

    def forwards(
        self, network: str | None = None, owner: str | None = None, published: bool = True
    ) -> tuple[Forward, ...]:
        """Claimed forwards, of a network or an owner; by default only those in force."""
        rows = self._claimed("forward", "proto, address, first", network, owner, published)
        return tuple(self._store.made(_forward, rows))

    def static_nats(
        self, network: str | None = None, owner: str | None = None, published: bool = True
    ) -> tuple[StaticNat, ...]:
        """The same for addresses of guests' own."""
        rows = self._claimed("static_nat", "address", network, owner, published)
        return tuple(self._store.made(_static, rows))

    def _claimed(
        self, table: str, order: str, network: str | None, owner: str | None, published: bool
    ) -> list[sqlite3.Row]:
        # Only what is asked for stands in the query, or SQLite would use no index.
        asked = {"network": network, "owner": owner, "boot": boot_id()}
        wanted = {column: value for column, value in asked.items() if value is not None}
        where = [f"{column} = ?" for column in wanted] + ["published"] * published
        return self._store.select(
            f"SELECT * FROM {table} WHERE {' AND '.join(where)} ORDER BY {order}",
            *wanted.values(),
        )

    def ports_claimed(self, proto: str) -> set[int]:
        """All ports of a protocol that somebody claims, of whatever address."""
        rows = self._store.select(
            "SELECT first, last FROM forward WHERE proto = ? AND boot = ?", proto, boot_id()
        )
        return {port for first, last in rows for port in range(first, last + 1)}

    # -- reservations ------------------------------------------------------

    def reservation(self, network: str, mac: str, family: Family = 4) -> Address | None:
        """The DHCP address of a family that is kept for a NIC in a network."""
        rows = self._store.select(
            "SELECT address FROM reservation WHERE network = ? AND mac = ? AND family = ?",
            network,
            mac,
            family,
        )
        return address_of(rows[0]["address"]) if rows else None

    def reservations(self, network: str, family: Family = 4) -> dict[str, Address]:
        """All DHCP addresses of a family that are kept in a network, by MAC."""
        rows = self._store.select(
            "SELECT mac, address FROM reservation WHERE network = ? AND family = ?"
            " ORDER BY address",
            network,
            family,
        )
        return {row["mac"]: address_of(row["address"]) for row in rows}

    def reservations_known(self, network: str, most: int, family: Family = 4) -> dict[str, Address]:
        """Those of a family that DHCP must know, by MAC.

        All of guests that have published something, and of others the latest used,
        as long as they are ``most`` together: strangers find no room else.
        """
        rows = self._store.select(
            f"SELECT mac, address, {IN_FORCE} AS present FROM reservation WHERE network = ?"
            " AND family = ? ORDER BY present DESC, used DESC",
            boot_id(),
            boot_id(),
            network,
            family,
        )
        count = max(most, sum(row["present"] for row in rows))
        known = sorted(rows[:count], key=lambda row: int(address_of(row["address"])))
        return {row["mac"]: address_of(row["address"]) for row in known}

    def reserve(
        self,
        network: str,
        mac: str,
        owner: str,
        candidates: Iterable[Address],
        usable: Callable[[Address], bool],
        family: Family = 4,
    ) -> Address:
        """Keep the first candidate that nobody else has for a guest's NIC, for good.

        Where there is none, a ``usable`` one is taken from a guest that does not
        run, the longest unused first.  Raises ConflictError where there is none,
        either.
        """
        with self._store.transaction() as db:
            address = self.reservation(network, mac, family)
            if address is not None:
                # The definition it was made for may be gone, and the NIC another guest's.
                db.execute(
                    "UPDATE reservation SET owner = ?"
                    " WHERE network = ? AND mac = ? AND family = ? AND owner != ?",
                    (owner, network, mac, family, owner),
                )
                return address
            taken = set(self.reservations(network, family).values())
            address = next((each for each in candidates if each not in taken), None)
            if address is None:
                address = next(filter(usable, self._reclaimable(network, family)), None)
            if address is None:
                raise ConflictError(
                    f"no DHCP address is left for {mac}", "enlarge the network's <dhcp> range"
                )
            db.execute(
                "DELETE FROM reservation WHERE network = ? AND address = ?",
                (network, stored(address)),
            )
            db.execute(
                f"INSERT INTO reservation VALUES (?, ?, ?, ?, ?, {LATEST})",
                (network, mac, family, stored(address), owner),
            )
            return address

    def _reclaimable(self, network: str, family: Family) -> list[Address]:
        """Addresses of guests that do not run, the longest unused first.

        Guests that ran when the machine went down come last: they probably start
        again in a moment.
        """
        rows = self._store.select(
            "SELECT address FROM reservation LEFT JOIN guest ON guest.uuid = owner"
            " WHERE network = ? AND family = ? AND coalesce(boot != ?, TRUE)"
            " ORDER BY guest.uuid IS NOT NULL, used",
            network,
            family,
            boot_id(),
        )
        return [address_of(row["address"]) for row in rows]

    def drop_reservation(self, network: str, mac: str, family: Family = 4) -> None:
        """Give a NIC's DHCP address up: the network's own XML has other plans for it."""
        with self._store.transaction() as db:
            db.execute(
                "DELETE FROM reservation WHERE network = ? AND mac = ? AND family = ?",
                (network, mac, family),
            )

    # -- chosen ports ------------------------------------------------------

    def chosen_port(self, key: PortKey) -> int | None:
        """The port that was chosen for a range with start="auto"."""
        rows = self._store.select(
            "SELECT port FROM chosen_port WHERE owner = ? AND network = ? AND proto = ?"
            " AND selector IN (?, ?) AND target_port = ? ORDER BY selector = ? LIMIT 1",
            key.owner,
            key.network,
            key.proto,
            key.selector,
            ANY_SELECTOR,
            key.target_port,
            ANY_SELECTOR,
        )
        return int(rows[0]["port"]) if rows else None

    def choose_port(self, key: PortKey, port: int) -> None:
        """Keep a chosen port, in place of an earlier one, and from whomever it was kept for."""
        with self._store.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO chosen_port VALUES"
                " (?, ?, ?, ?, ?, ?, (SELECT coalesce(max(used), 0) + 1 FROM chosen_port))",
                (key.owner, key.network, key.proto, key.selector, key.target_port, port),
            )

    def reclaimable_ports(self, proto: Protocol) -> list[int]:
        """Chosen ports of guests and networks that are not recorded, the longest unused first."""
        rows = self._store.select(
            "SELECT port FROM chosen_port WHERE proto = ?"
            " AND NOT EXISTS (SELECT 1 FROM guest WHERE uuid = owner)"
            " AND NOT EXISTS (SELECT 1 FROM network WHERE uuid = owner) ORDER BY used",
            proto,
        )
        return [int(row["port"]) for row in rows]

    def is_claimed(self, key: PortKey, scope: Scope, address: Address, port: int) -> bool:
        """Whether somebody else than a chosen port's owner has it where that listens."""
        rows = self._store.select(
            "SELECT 1 FROM forward WHERE scope = ? AND proto = ? AND claimed = ?"
            " AND first <= ? AND last >= ? AND owner != ? AND boot = ?",
            scope.upstream,
            key.proto,
            _claimed(scope, address),
            port,
            port,
            key.owner,
            boot_id(),
        )
        return bool(rows)

    def chosen_ports(self) -> set[tuple[str, int]]:
        """All ports that are kept for somebody, with their protocols."""
        rows = self._store.select("SELECT proto, port FROM chosen_port")
        return {(row["proto"], row["port"]) for row in rows}


def _claimed(scope: Scope, address: Address, *, own: bool = False) -> int | str:
    """Where the ports of an address must be unique: one place a family in the host.

    ``own``: it is the guest's own, not the host's.
    """
    return EVERYWHERE[address.version == 6] if scope.shared and not own else stored(address)


def _guest(row: sqlite3.Row) -> GuestRecord:
    values = dict(row)
    return GuestRecord(**{**values, "published": bool(values["published"])})


def _forward(row: sqlite3.Row) -> Forward:
    return Forward(
        owner=row["owner"],
        owner_name=row["owner_name"],
        network=row["network"],
        proto=cast(Protocol, row["proto"]),
        address=address_of(row["address"]),
        first=row["first"],
        last=row["last"],
        target=address_of(row["target"]),
        to=row["target_port"],
        to_last=row["target_last"],
        sources=tuple(map(network_of, row["sources"].split())),
    )


def _static(row: sqlite3.Row) -> StaticNat:
    ports = []
    for text in row["ports"].split():
        proto, _, span = text.partition(":")
        first, _, last = span.partition("-")
        ports.append(PortSet(cast(Protocol, proto), int(first), int(last)))
    return StaticNat(
        owner=row["owner"],
        owner_name=row["owner_name"],
        network=row["network"],
        address=address_of(row["address"]),
        target=address_of(row["target"]),
        ports=tuple(ports),
    )


def _ports(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
