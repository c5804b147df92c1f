# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies of readable rows of a damaged database into another database."""

import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from libvirt_natns.errors import NatnsError
from libvirt_natns.state.schema import VERSION
from libvirt_natns.state.store import Store

SALVAGED = ("network", "lease", "transit", "transit6", "reservation", "chosen_port")
"""Tables with rows that outlive networks and guests."""


def copy(damaged: Path, store: Store) -> None:
    """Add readable rows of a damaged database that contradict nothing in ``store``."""
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
    # Running networks have been adopted: all others are down.
    columns = [row[1] for row in db.execute(f"PRAGMA table_info ({table})")]
    values = ["'down'" if column == "state" else column for column in columns]
    marks = ", ".join("?" * len(columns))
    with suppress(sqlite3.Error):
        for row in old.execute(f"SELECT {', '.join(values)} FROM {table}"):
            db.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", tuple(row))


def _name_owners(old: sqlite3.Connection, db: sqlite3.Connection) -> None:
    """Set the owners of adopted reservations: dnsmasq, their source, knows MACs alone."""
    with suppress(sqlite3.Error):
        for row in old.execute("SELECT owner, network, mac FROM reservation"):
            db.execute(
                "UPDATE reservation SET owner = ? WHERE owner = '' AND network = ? AND mac = ?",
                tuple(row),
            )
