# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads from a state database of any format, for hooks that cannot open it otherwise."""

import sqlite3
from contextlib import closing

BUSY_TIMEOUT = 1.0
"""Seconds to wait for a state database that another process changes."""


def has_network(database: str, uuid: str) -> bool:
    """True if a network has a record, in any state.  Raises sqlite3.Error.

    ``database`` is the path of the file, which is not made where it is missing.
    """
    # SQLite needs to write for the recovery of a database that was open in a crash.
    with closing(sqlite3.connect(f"file:{database}?mode=rw", uri=True, timeout=BUSY_TIMEOUT)) as db:
        return db.execute("SELECT 1 FROM network WHERE uuid = ?", (uuid,)).fetchone() is not None
