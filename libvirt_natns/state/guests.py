# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records of guests that publish a port or ask for an address in their metadata."""

from dataclasses import dataclass

from libvirt_natns.kernel import boot_clock
from libvirt_natns.state.database import Database, Row


@dataclass(frozen=True, slots=True)
class GuestRecord:
    """A guest with claims, as it was last seen."""

    uuid: str
    name: str
    boot: str
    published: bool
    document: bytes

    @property
    def this_boot(self) -> bool:
        return self.boot == boot_clock.boot_id()


class GuestTable:
    """Records of guests in the state database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, uuid: str) -> GuestRecord | None:
        """Return the record of one guest."""
        rows = self._database.select("SELECT * FROM guest WHERE uuid = ?", uuid)
        return self._database.first(_guest, rows)

    def in_network(self, network: str) -> list[GuestRecord]:
        """Return the guests with a claim in a network, by name."""
        rows = self._database.select(
            "SELECT * FROM guest WHERE uuid IN (SELECT owner FROM forward WHERE network = ?"
            " UNION SELECT owner FROM static_nat WHERE network = ?) ORDER BY name",
            network,
            network,
        )
        return self._database.made(_guest, rows)

    def all(self) -> list[GuestRecord]:
        """Return all recorded guests, by name."""
        rows = self._database.select("SELECT * FROM guest ORDER BY name")
        return self._database.made(_guest, rows)

    def running(self) -> list[GuestRecord]:
        """Return the recorded guests that run since this boot, by name."""
        rows = self._database.select(
            "SELECT * FROM guest WHERE published AND boot = ? ORDER BY name", boot_clock.boot_id()
        )
        return self._database.made(_guest, rows)

    def put(self, uuid: str, name: str, document: bytes, published: bool) -> None:
        """Record a guest that is about to run, or runs."""
        with self._database.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO guest VALUES (?, ?, ?, ?, ?)",
                (uuid, name, boot_clock.boot_id(), int(published), document),
            )

    def forget(self, uuid: str) -> None:
        """Delete a guest that has stopped, with its claims; reservations and chosen ports stay."""
        with self._database.transaction() as db:
            for table, column in (("guest", "uuid"), ("forward", "owner"), ("static_nat", "owner")):
                db.execute(f"DELETE FROM {table} WHERE {column} = ?", (uuid,))


def _guest(row: Row) -> GuestRecord:
    values = dict(row)
    return GuestRecord(**{**values, "published": bool(values["published"])})
