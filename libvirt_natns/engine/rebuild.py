# SPDX-License-Identifier: LGPL-2.1-or-later
"""Another state database in place of a damaged one.

The new database is made beside the damaged one and filled with what runs, see
``adoption``; then it takes the place of the damaged one, which is kept.  Until that
moment hooks find the damaged one and refuse to start networks of ours, so none is
leased an address that a running one has.

Rows that can still be read of the damaged database give networks and guests at rest
their leases, reservations and chosen ports back.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Protocol

from libvirt_natns import names
from libvirt_natns.engine.adoption import Adopted, adopt
from libvirt_natns.engine.engine import Engine
from libvirt_natns.errors import DamagedError, StoreError
from libvirt_natns.kernel.locks import locked
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.state import database, salvage
from libvirt_natns.state.store import Store

NAME = "state database"


class Running(Protocol):
    """The domains that libvirt has active."""

    @property
    def domains(self) -> Mapping[str, bytes]:
        """Their XML by uuid."""


def rebuild(
    settings: Config,
    ask: Callable[[], Mapping[str, bytes] | None],
    ask_guests: Callable[[], Running | None],
    directory: Path = names.STATE_DIRECTORY,
) -> Adopted:
    """Rebuild the state database if it is damaged, or missing while networks run.

    ``ask`` and ``ask_guests`` get what is active from libvirt; None where it does not
    answer.  Returns what was done.  Raises StoreError where the database cannot be
    rebuilt, and leaves it as it is.
    """
    if damage(directory) is None:
        return Adopted([], [])
    with locked(directory / "rebuild"):
        try:
            # Somebody else may have done it meanwhile.
            found = damage(directory)
            return _rebuild(settings, ask, ask_guests, directory, found) if found else _nothing()
        finally:
            shutil.rmtree(directory / "rebuild", ignore_errors=True)


def damage(directory: Path = names.STATE_DIRECTORY) -> DamagedError | None:
    """What is damaged; None where nothing is.  Raises StoreError for other trouble."""
    try:
        database.check_there(directory)
        with closing(Store(directory)) as store:
            store.check()
    except DamagedError as error:
        return error
    return None


def _nothing() -> Adopted:
    return Adopted([], [])


def _rebuild(
    settings: Config,
    ask: Callable[[], Mapping[str, bytes] | None],
    ask_guests: Callable[[], Running | None],
    directory: Path,
    found: DamagedError,
) -> Adopted:
    active, running = ask(), ask_guests()
    if active is None or running is None:
        raise StoreError(found.fact, "start libvirt, which must tell what runs, and try again")
    fresh = directory / "rebuild/new"
    shutil.rmtree(fresh, ignore_errors=True)
    with closing(Store(fresh)) as store, Kernel() as kernel:
        adopted = adopt(Engine(settings, store, kernel), active, running.domains)
        salvage.copy(directory / database.FILE, store)
    about = found.fact.removeprefix(f"state database {directory / database.FILE}: ")
    told = f"{about}: made anew from what runs"
    kept = _swap(fresh, directory)
    if kept is not None:
        told += f"; the damaged file is {kept}"
    return Adopted([(NAME, told), *adopted.found], adopted.errors)


def _swap(fresh: Path, directory: Path) -> Path | None:
    """Put a new database in place of the damaged one; returns what that is called now."""
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
