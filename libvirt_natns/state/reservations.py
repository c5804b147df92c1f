# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reservations: the DHCP address that a guest's NIC always gets in a network."""

from collections.abc import Callable, Iterable

from libvirt_natns.addresses import Address, Family, address_of, stored
from libvirt_natns.errors import ConflictError
from libvirt_natns.kernel import boot_clock
from libvirt_natns.state.database import Database, Row

# Of a reservation; takes the boot's id twice.
IN_FORCE = (
    "(EXISTS (SELECT 1 FROM forward WHERE owner = reservation.owner AND boot = ? AND published)"
    " OR EXISTS (SELECT 1 FROM static_nat"
    " WHERE owner = reservation.owner AND boot = ? AND published))"
)
NEXT_USE = "(SELECT coalesce(max(used), 0) + 1 FROM reservation)"


class ReservationTable:
    """Reservations in the state database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, network: str, mac: str, family: Family = 4) -> Address | None:
        """Return the DHCP address of a family that is reserved for a NIC in a network."""
        rows = self._database.select(
            "SELECT address FROM reservation WHERE network = ? AND mac = ? AND family = ?",
            network,
            mac,
            family,
        )
        return self._database.first(_address, rows)

    def all(self, network: str, family: Family = 4) -> dict[str, Address]:
        """Return all DHCP addresses of a family that are reserved in a network, by MAC."""
        rows = self._database.select(
            "SELECT mac, address FROM reservation WHERE network = ? AND family = ?"
            " ORDER BY address",
            network,
            family,
        )
        return dict(self._database.made(_by_mac, rows))

    def for_dhcp(self, network: str, most: int, family: Family = 4) -> dict[str, Address]:
        """Return the reservations of a family that DHCP must know, by MAC.

        They are all of guests with a claim in force, and the latest used of others, up to
        ``most`` together: guests without a reservation need addresses, too.
        """
        rows = self._database.select(
            f"SELECT mac, address, {IN_FORCE} AS present FROM reservation WHERE network = ?"
            " AND family = ? ORDER BY present DESC, used DESC",
            boot_clock.boot_id(),
            boot_clock.boot_id(),
            network,
            family,
        )
        count = max(most, sum(row["present"] for row in rows))
        reserved = self._database.made(_by_mac, rows[:count])
        return dict(sorted(reserved, key=lambda each: int(each[1])))

    def reserve(
        self,
        network: str,
        mac: str,
        owner: str,
        candidates: Iterable[Address],
        usable: Callable[[Address], bool],
        family: Family = 4,
    ) -> Address:
        """Reserve the first free candidate for a guest's NIC, for good.

        Without a free candidate, a ``usable`` address is taken from a guest that does
        not run, the longest unused first.  Raises ConflictError where there is none.
        """
        with self._database.transaction() as db:
            address = self.get(network, mac, family)
            if address is not None:
                # Its guest may have been undefined, and the NIC may be another guest's now.
                db.execute(
                    "UPDATE reservation SET owner = ?"
                    " WHERE network = ? AND mac = ? AND family = ? AND owner != ?",
                    (owner, network, mac, family, owner),
                )
                return address
            taken = set(self.all(network, family).values())
            address = next((each for each in candidates if each not in taken), None)
            if address is None:
                address = next(filter(usable, self._reclaimable(network, family)), None)
            if address is None:
                raise ConflictError(
                    f"no DHCP address is left for {mac}", "enlarge the network's <dhcp> range"
                )
            db.execute(
                "DELETE FROM reservation WHERE network = ? AND address = ?",
                (network, stored(address)),
            )
            db.execute(
                f"INSERT INTO reservation VALUES (?, ?, ?, ?, ?, {NEXT_USE})",
                (network, mac, family, stored(address), owner),
            )
            return address

    def _reclaimable(self, network: str, family: Family) -> list[Address]:
        """Return the addresses of guests that do not run, the longest unused first.

        Guests that ran when the machine went down come last: they probably start
        again in a moment.
        """
        rows = self._database.select(
            "SELECT address FROM reservation LEFT JOIN guest ON guest.uuid = owner"
            " WHERE network = ? AND family = ? AND coalesce(boot != ?, TRUE)"
            " ORDER BY guest.uuid IS NOT NULL, used",
            network,
            family,
            boot_clock.boot_id(),
        )
        return self._database.made(_address, rows)

    def drop(self, network: str, mac: str, family: Family = 4) -> None:
        """Delete a NIC's reservation: the network's own XML decides the address now."""
        with self._database.transaction() as db:
            db.execute(
                "DELETE FROM reservation WHERE network = ? AND mac = ? AND family = ?",
                (network, mac, family),
            )


def _address(row: Row) -> Address:
    return address_of(row["address"])


def _by_mac(row: Row) -> tuple[str, Address]:
    return row["mac"], address_of(row["address"])
