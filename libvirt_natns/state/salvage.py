# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies rows that can still be read of a damaged database into another one."""

import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from libvirt_natns.errors import NatnsError
from libvirt_natns.state.networks import Store
from libvirt_natns.state.schema import VERSION

SALVAGED = ("network", "lease", "transit", "transit6", "reservation", "chosen_port")
"""Tables with what outlives networks and guests."""


def copy(damaged: Path, store: Store) -> None:
    """Add what can be read of a damaged database and contradicts nothing in ``store``."""
    if not damaged.exists():
        return
    with suppress(sqlite3.Error), closing(sqlite3.connect(damaged)) as old:
        if old.execute("PRAGMA user_version").fetchone()[0] != VERSION:
            return
        for table in SALVAGED:
            # All of a table, or nothing: a value may be damaged, too.
            with suppress(NatnsError), store.transaction() as db:
                _copy_table(old, db, table)
                store.check()
        with store.transaction() as db:
            _name_owners(old, db)


def _copy_table(old: sqlite3.Connection, db: sqlite3.Connection, table: str) -> None:
    # What runs has been adopted: all other networks are down.
    columns = [row[1] for row in db.execute(f"PRAGMA table_info ({table})")]
    values = ["'down'" if column == "state" else column for column in columns]
    marks = ", ".join("?" * len(columns))
    with suppress(sqlite3.Error):
        for row in old.execute(f"SELECT {', '.join(values)} FROM {table}"):
            db.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", tuple(row))


def _name_owners(old: sqlite3.Connection, db: sqlite3.Connection) -> None:
    """Name the guests at rest whose reservations were adopted: dnsmasq knows MACs alone."""
    with suppress(sqlite3.Error):
        for row in old.execute("SELECT owner, network, mac FROM reservation"):
            db.execute(
                "UPDATE reservation SET owner = ? WHERE owner = '' AND network = ? AND mac = ?",
                tuple(row),
            )
