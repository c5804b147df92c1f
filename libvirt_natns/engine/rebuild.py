# SPDX-License-Identifier: LGPL-2.1-or-later
"""Another state database in place of a damaged one.

The new database is made beside the damaged one and filled with networks and guests that
run (``adoption``).  Then it takes the place of the damaged one, which is kept.  Until that
moment hooks find the damaged database and refuse to start networks of ours.  So no network
is leased an address that a running one has.

Readable rows of the damaged database give networks and guests at rest their leases,
reservations and chosen ports back.
"""

import shutil
import time
from contextlib import closing
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.engine.adoption import Adopted, adopt
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.reconcile.active import AskGuests, AskNetworks
from libvirt_natns.errors import DamagedError, StoreError
from libvirt_natns.kernel.locks import locked
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.state import database, salvage
from libvirt_natns.state.store import Store

NAME = "state database"


def rebuild(
    settings: Config,
    ask: AskNetworks,
    ask_guests: AskGuests,
    directory: Path = names.STATE_DIRECTORY,
) -> Adopted:
    """Rebuild the state database if it is damaged, or missing while networks run.

    ``ask`` and ``ask_guests`` get the active networks and guests from libvirt.  Return the
    adopted ones.  Raises StoreError where the database cannot be rebuilt, and leaves it
    as it is.
    """
    if damage(directory) is None:
        return Adopted([], [])
    with locked(directory / "rebuild"):
        try:
            # Another process may have rebuilt it until the lock was free.
            error = damage(directory)
            return (
                _rebuild(settings, ask, ask_guests, directory, error) if error else Adopted([], [])
            )
        finally:
            shutil.rmtree(directory / "rebuild", ignore_errors=True)


def damage(directory: Path = names.STATE_DIRECTORY) -> DamagedError | None:
    """Return the damage of the database, None if it is sound.  Raises StoreError."""
    try:
        database.check_there(directory)
        with closing(Store(directory)) as store:
            store.check()
    except DamagedError as error:
        return error
    return None


def _rebuild(
    settings: Config,
    ask: AskNetworks,
    ask_guests: AskGuests,
    directory: Path,
    error: DamagedError,
) -> Adopted:
    active, running = ask(), ask_guests()
    if active is None or running is None:
        raise StoreError(error.fact, "start libvirt, and try again")
    fresh = directory / "rebuild/new"
    shutil.rmtree(fresh, ignore_errors=True)
    with closing(Store(fresh)) as store, Kernel() as kernel:
        adopted = adopt(Engine(settings, store, kernel), active, running.domains)
        salvage.copy(directory / database.FILE, store)
    about = error.fact.removeprefix(f"state database {directory / database.FILE}: ")
    line = f"{about}: rebuilt from running networks and guests"
    kept = _swap(fresh, directory)
    if kept is not None:
        line += f"; the damaged file is {kept}"
    return Adopted([(NAME, line), *adopted.found], adopted.errors)


def _swap(fresh: Path, directory: Path) -> Path | None:
    """Put a new database in place of the damaged one, and return where the damaged one is."""
    path = directory / database.FILE
    # No other process makes a database in between.
    with locked(directory):
        try:
            there = path.exists() and path.stat().st_size > 0
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            kept = database.put_aside(directory, stamp) if there else None
            (fresh / database.FILE).rename(path)
        except OSError as error:
            raise database.failure(path, "replace", error) from error
    return kept
