# SPDX-License-Identifier: LGPL-2.1-or-later
"""The file of the state database: transactions, its format, and damage.

Three kinds of trouble have a type of error each, as each has another remedy:

* Damage: SQLite, or a value in a row, says so, or the file is missing although
  networks run.  ``rebuild`` puts the file aside and makes another one.
* A later format: a later version wrote it.  The file is whole and stays where it is.
* All else: a full disk, a read-only file system, missing rights.  The file is whole.

An earlier format is brought to today's in one transaction, so a migration that fails
leaves the file as it was.
"""

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from libvirt_natns import __version__, names
from libvirt_natns.errors import DamagedError, FormatError, StoreError
from libvirt_natns.kernel.locks import at_most, locked
from libvirt_natns.state.schema import MIGRATIONS, SCHEMA, VERSION

SQLError = sqlite3.Error
"""SQLite's own error, for callers that go on without the database."""

IntegrityError = sqlite3.IntegrityError
Connection = sqlite3.Connection
Row = sqlite3.Row

R = TypeVar("R")
T = TypeVar("T")

FILE = "state.db"
COMPANIONS = ("-wal", "-shm")
"""Files of SQLite's beside an open database: the latest transactions, and an index of them."""

BUSY_TIMEOUT = 30.0
"""How long, in seconds, a process waits for another one's transaction."""

DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

REBUILD = "run virt-natns sync, which keeps the damaged file and rebuilds the database"


class Database:
    """An open state database.  Every method is one transaction unless inside one."""

    def __init__(self, directory: Path) -> None:
        """Open the database in a directory; see ``opened`` for the errors."""
        self.path = directory / FILE
        self._db = opened(directory)

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Make all changes or none, and alone: other writers wait (``BEGIN IMMEDIATE``)."""
        if self._db.in_transaction:
            yield self._db
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:
                yield self._db
        except sqlite3.Error as error:
            raise failure(self.path, "change", error) from error

    def select(self, query: str, *values: object) -> list[sqlite3.Row]:
        """Return the rows of a query.  Raises StoreError."""
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise failure(self.path, "read", error) from error

    def made(self, make: Callable[[R], T], rows: Iterable[R]) -> list[T]:
        """Return objects made of rows.  Raises DamagedError for a value that has no meaning."""
        try:
            return [make(row) for row in rows]
        except (ValueError, TypeError, LookupError) as error:
            fact = f"state database {self.path}: is damaged ({error})"
            raise DamagedError(fact, REBUILD) from error

    def first(self, make: Callable[[R], T], rows: Iterable[R]) -> T | None:
        """Return an object made of the first row; None without rows.  Raises DamagedError."""
        return next(iter(self.made(make, rows)), None)

    def check(self) -> None:
        """Read the whole database.  Raises DamagedError where SQLite finds damage."""
        try:
            verdict = self._db.execute("PRAGMA integrity_check (1)").fetchone()[0]
        except sqlite3.Error as error:
            raise failure(self.path, "read", error) from error
        if verdict != "ok":
            told = " ".join(str(verdict).split())
            raise DamagedError(f"state database {self.path}: is damaged ({told})", REBUILD)


def opened(directory: Path) -> sqlite3.Connection:
    """Open the database in a directory, in today's format; make it where there is none.

    Raises DamagedError, also where it is missing although networks run, FormatError or
    StoreError.
    """
    path = directory / FILE
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.stat().st_mode & 0o077:
            # A user who may read a database may hold its locks, and keep all others waiting.
            directory.chmod(0o700)
        # The service hands it from thread to thread; never two use it at once.
        db = sqlite3.connect(
            path, timeout=at_most(BUSY_TIMEOUT), isolation_level=None, check_same_thread=False
        )
    except (OSError, sqlite3.Error) as error:
        raise failure(path, "open", error) from error
    try:
        db.row_factory = sqlite3.Row
        if _format(db) in (0, *MIGRATIONS):
            _create(db, directory)
        db.execute("PRAGMA synchronous = NORMAL")
        if _format(db) != VERSION:
            raise _later(db, path)
    except (OSError, sqlite3.Error) as error:
        db.close()
        raise failure(path, "open", error) from error
    except BaseException:
        db.close()
        raise
    return db


def failure(path: Path, verb: str, error: Exception) -> StoreError:
    """Return the error for an error of SQLite's, or of the file system's, by its kind."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in DAMAGE or "no such table" in str(error) or "no such column" in str(error):
        return DamagedError(f"state database {path}: is damaged ({error})", REBUILD)
    told = str(error)
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        told += f"; check its file system (df {path.parent})"
    return StoreError(f"cannot {verb} the state database {path}", told)


def check_there(directory: Path = names.STATE_DIRECTORY) -> None:
    """Raise DamagedError where the database is missing although networks run."""
    path = directory / FILE
    try:
        empty = path.stat().st_size == 0
    except OSError:
        empty = True
    if empty and directory == names.STATE_DIRECTORY and _networks_run():
        raise _missing(path)


def _missing(path: Path) -> DamagedError:
    return DamagedError(
        f"state database {path}: is missing, although networks run", REBUILD.split(",")[0]
    )


def _networks_run() -> bool:
    """True if namespaces and run-time directories of networks are there.

    Both are asked for, as either alone may be left over.
    """
    with_directory = any(names.network_directory("").glob("*"))
    return with_directory and any(names.NETNS_DIRECTORY.glob("nat-*"))


def _format(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _create(db: sqlite3.Connection, directory: Path) -> None:
    """Make the database, or bring one of an earlier format to today's."""
    # SQLite does not wait for another process that changes the journal's
    # mode at the same moment, but fails: the lock makes it wait.
    with locked(directory):
        found = _format(db)
        if found not in (0, *MIGRATIONS):
            return
        if not found and directory == names.STATE_DIRECTORY and _networks_run():
            raise _missing(directory / FILE)
        db.execute("PRAGMA journal_mode = WAL")
        steps = "".join(MIGRATIONS.get(each, "") for each in range(found, VERSION))
        written = f"INSERT OR REPLACE INTO writer VALUES ({VERSION}, '{__version__}');"
        try:
            db.executescript(f"BEGIN IMMEDIATE;{steps if found else ''}{SCHEMA}{written}COMMIT;")
        except sqlite3.Error as error:
            if not found or getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGE:
                raise
            raise StoreError(
                f"state database {directory / FILE}: cannot be brought from format {found} to"
                f" {VERSION} ({error}), and was left as it was",
                "fix the cause, or install the version that wrote it",
            ) from error


def _later(db: sqlite3.Connection, path: Path) -> FormatError:
    found = _format(db)
    try:
        row = db.execute("SELECT version FROM writer WHERE format = ?", (found,)).fetchone()
    except sqlite3.Error:
        row = None
    writer = f"version {row[0]}" if row else "a later version"
    return FormatError(
        f"state database {path}: has format {found}, written by {writer}"
        f" (version {__version__} reads formats 1 to {VERSION})",
        f"install {writer} again, or move the file away and run virt-natns sync",
    )


def put_aside(directory: Path, stamp: str) -> Path:
    """Rename a database and its companions out of the way; returns its new path.

    ``stamp`` becomes part of the name.  The caller holds the directory's lock, so
    no other process makes a database at the same time.
    """
    path = directory / FILE
    aside = path.with_name(f"{FILE}.damaged-{stamp}")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}+")
    # The log first, and again last: SQLite would apply a log that is left to the next database.
    for suffix in (*COMPANIONS, "", *COMPANIONS):
        with suppress(FileNotFoundError):
            path.with_name(f"{path.name}{suffix}").rename(f"{aside}{suffix}")
    return aside
