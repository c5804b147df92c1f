# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reloads of the host's whole ruleset, which also remove rules of ours.

``systemctl restart nftables`` flushes everything, and so does iptables-restore with a table.
Neither means us, however often it comes.  A program that deletes our rules alone leaves the
tables of others as they are.  The kernel never gives out the number of a table twice, so
a table that was made anew shows.

Limits: where no other table was there, a reload cannot be told from a deletion of our table.
Legacy iptables has no such numbers: if a chain of ours has gone, its table was reloaded.
"""

from collections.abc import Iterable, Mapping

from libvirt_natns.firewall import nfnetlink
from libvirt_natns.firewall.nftables import TABLE

RULES = ("nftables: ", "iptables: ", "ip6tables: ")
"""The beginnings of differences of the host's rules."""
LEGACY = RULES[1:]
GONE = " is missing"


class Reloads:
    """Tells repairs after a reload from repairs that another program undoes on purpose."""

    def __init__(self) -> None:
        self._tables: Mapping[str, int] = {}

    def look(self) -> bool | None:
        """Return whether a table of others was made anew, or has gone, since the last look.

        None where there was no table of others.
        """
        present = nfnetlink.table_numbers()
        before = {name: number for name, number in self._tables.items() if name != TABLE}
        self._tables = present
        if not before:
            return None
        return any(present.get(name) != number for name, number in before.items())

    def undone(self, differences: Iterable[str]) -> list[str] | None:
        """Return the differences by which another program may have undone a repair.

        None if nothing but a reload has been repaired, as is plain.
        """
        reloaded = self.look()
        listed = list(differences)
        if reloaded is False:
            legacy = any(line.startswith(LEGACY) and line.endswith(GONE) for line in listed)
            return [line for line in listed if not (legacy and line.startswith(LEGACY))]
        undone = [line for line in listed if not line.startswith(RULES)]
        return undone or (None if reloaded else [])
