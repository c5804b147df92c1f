# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks as the host sees them: its users, and each network's part of the host's rules."""

from collections.abc import Mapping
from dataclasses import dataclass

from libvirt_natns.addresses import IPNetwork
from libvirt_natns.kernel import boot_clock
from libvirt_natns.state.database import Database, Row
from libvirt_natns.state.leases import Leased, leased_in
from libvirt_natns.state.networks import STALLED, subnets_of


@dataclass(frozen=True, slots=True)
class User:
    """A network that runs or starts, as far as the host is concerned.

    ``document`` is the network's XML where it has the word "helpers", and else empty: few
    networks choose their own, and there may be a thousand.
    """

    uuid: str
    bridge: str
    upstream: str
    subnets: tuple[IPNetwork, ...]
    leased: Leased
    document: bytes = b""


class HostTable:
    """Users of the host and their parts of its rules, in the state database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def users(self, uuid: str | None = None) -> list[User]:
        """Return networks that run or start, all or one of them, with their leases."""
        rows = self._database.select(
            "SELECT uuid, bridge, network.upstream, subnets, lease.kind, address,"
            " state, boot, since,"
            " CASE WHEN instr(document, CAST('helpers' AS BLOB)) THEN document ELSE x'' END"
            " AS document"
            " FROM network LEFT JOIN lease"
            " ON lease.network = uuid AND lease.upstream = network.upstream"
            f" WHERE state != 'down' AND boot = ? {'' if uuid is None else 'AND uuid = ?'}"
            " ORDER BY name, uuid",
            boot_clock.boot_id(),
            *(() if uuid is None else (uuid,)),
        )
        by_network: dict[str, list[Row]] = {}
        for row, counts in zip(rows, self._database.made(_counts, rows), strict=True):
            if counts:
                by_network.setdefault(row["uuid"], []).append(row)
        return self._database.made(_user, by_network.values())

    def part(self, uuid: str) -> str:
        """Return a network's part of the host's rules since this boot; "" for none."""
        rows = self._database.select(
            "SELECT part FROM host_part WHERE network = ? AND boot = ?", uuid, boot_clock.boot_id()
        )
        return str(rows[0]["part"]) if rows else ""

    def put_part(self, uuid: str, part: str) -> None:
        """Record a network's part of the host's rules."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM host_part WHERE network = ?", (uuid,))
            if part:
                db.execute(
                    "INSERT INTO host_part VALUES (?, ?, ?)", (uuid, boot_clock.boot_id(), part)
                )

    def put_parts(self, parts: Mapping[str, str]) -> None:
        """Record the parts of all networks: the host has rules for no other network."""
        rows = [(uuid, boot_clock.boot_id(), part) for uuid, part in parts.items() if part]
        with self._database.transaction() as db:
            db.execute("DELETE FROM host_part")
            db.executemany("INSERT INTO host_part VALUES (?, ?, ?)", rows)


def _counts(row: Row) -> bool:
    """True if a network is up, or its start goes on."""
    return row["state"] == "up" or boot_clock.now() - float(row["since"]) < STALLED


def _user(rows: list[Row]) -> User:
    """Return a network, from a row for each of its leases."""
    first = rows[0]
    leased = leased_in(rows)
    return User(
        first["uuid"],
        first["bridge"],
        first["upstream"],
        subnets_of(first["subnets"]),
        leased,
        first["document"],
    )
