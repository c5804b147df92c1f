# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state database by topic: a table object for each, on one connection.

It is one SQLite database under /var/lib/libvirt-natns.  Hooks run at once, in several
processes: primary keys, unique indexes and a trigger decide between them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

from libvirt_natns import names
from libvirt_natns.addresses import address_of
from libvirt_natns.state.chosen_ports import ChosenPortTable
from libvirt_natns.state.claims import ClaimTable, port_sets_of, sources_of
from libvirt_natns.state.database import Connection, Database, Row
from libvirt_natns.state.guests import GuestTable
from libvirt_natns.state.host_records import HostTable
from libvirt_natns.state.leases import LeaseTable
from libvirt_natns.state.networks import NetworkTable
from libvirt_natns.state.reservations import ReservationTable
from libvirt_natns.state.transit_subnets import TransitTable

FORMS: tuple[tuple[str, str, Callable[[Any], object]], ...] = (
    ("lease", "CASE WHEN kind != 'prefix' THEN address END", address_of),
    ("lease", "CASE WHEN kind = 'prefix' THEN address END", IPv6Network),
    ("transit", "subnet", IPv4Network),
    ("transit6", "subnet", IPv6Network),
    ("reservation", "address", address_of),
    ("forward", "address", address_of),
    ("forward", "target", address_of),
    ("forward", "first", range),
    ("forward", "last", range),
    ("forward", "sources", sources_of),
    ("static_nat", "address", address_of),
    ("static_nat", "target", address_of),
    ("static_nat", "ports", port_sets_of),
    ("chosen_port", "port", int),
    ("guest", "document", bytes),
)
"""Values that have a form: table, column, and the function that reads the value."""


class Store:
    """The state database."""

    def __init__(self, directory: Path = names.STATE_DIRECTORY) -> None:
        """Open the database in a directory.

        Raises DamagedError, also where it is missing although networks run, FormatError or
        StoreError.
        """
        self._database = database = Database(directory)
        self.networks = NetworkTable(database)
        self.leases = LeaseTable(database)
        self.transit = TransitTable(database, self.networks)
        self.host = HostTable(database)
        self.guests = GuestTable(database)
        self.claims = ClaimTable(database, self.leases)
        self.reservations = ReservationTable(database)
        self.chosen_ports = ChosenPortTable(database)

    @property
    def path(self) -> Path:
        """Return the path of the database's file."""
        return self._database.path

    def close(self) -> None:
        self._database.close()

    def transaction(self) -> AbstractContextManager[Connection]:
        """Make all changes of a ``with`` block, or none, in a single transaction."""
        return self._database.transaction()

    def select(self, query: str, *values: object) -> list[Row]:
        """Return the rows of a query.  Raises StoreError."""
        return self._database.select(query, *values)

    def check(self) -> None:
        """Read everything.  Raises DamagedError where SQLite, or a value, shows damage."""
        self._database.check()
        self.networks.all()
        self.host.users()
        for table, column, make in FORMS:
            rows = self.select(f"SELECT {column} FROM {table} WHERE {column} IS NOT NULL")
            self._database.made(make, [row[0] for row in rows])
