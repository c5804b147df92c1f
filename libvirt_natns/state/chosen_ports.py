# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports chosen for ranges with start="auto", kept until no other port is left."""

from dataclasses import dataclass

from libvirt_natns.model.publication import PortProtocol
from libvirt_natns.state.database import Database, Row
from libvirt_natns.state.schema import ANY_SELECTOR


@dataclass(frozen=True, slots=True)
class PortKey:
    """The forward that a port is chosen for.

    ``selector`` tells the owner's forwards to one port apart.
    """

    owner: str
    network: str
    proto: PortProtocol
    selector: str
    target_port: int


class ChosenPortTable:
    """Chosen ports in the state database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, key: PortKey) -> int | None:
        """Return the port that was chosen for a forward."""
        rows = self._database.select(
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
        return self._database.first(_port, rows)

    def put(self, key: PortKey, port: int) -> None:
        """Keep a chosen port, in place of an earlier one; another forward that had it loses it."""
        with self._database.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO chosen_port VALUES"
                " (?, ?, ?, ?, ?, ?, (SELECT coalesce(max(used), 0) + 1 FROM chosen_port))",
                (key.owner, key.network, key.proto, key.selector, key.target_port, port),
            )

    def reclaimable(self, proto: PortProtocol) -> list[int]:
        """Return chosen ports of owners without a record, the longest unused first."""
        rows = self._database.select(
            "SELECT port FROM chosen_port WHERE proto = ?"
            " AND NOT EXISTS (SELECT 1 FROM guest WHERE uuid = owner)"
            " AND NOT EXISTS (SELECT 1 FROM network WHERE uuid = owner) ORDER BY used",
            proto,
        )
        return self._database.made(_port, rows)

    def all(self) -> set[tuple[str, int]]:
        """Return all chosen ports with their protocols."""
        rows = self._database.select("SELECT proto, port FROM chosen_port")
        return set(self._database.made(lambda row: (row["proto"], _port(row)), rows))


def _port(row: Row) -> int:
    return int(row["port"])
