# SPDX-License-Identifier: LGPL-2.1-or-later
"""Transit subnets and prefixes, chosen once for each upstream of kind "host"."""

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network

from libvirt_natns.state.database import Database
from libvirt_natns.state.networks import NetworkTable


class TransitTable:
    """Transit subnets and prefixes in the state database."""

    def __init__(self, database: Database, networks: NetworkTable) -> None:
        self._database = database
        self._networks = networks

    def subnet(self, upstream: str) -> IPv4Network | None:
        """Return the transit subnet chosen for an upstream."""
        rows = self._database.select("SELECT subnet FROM transit WHERE upstream = ?", upstream)
        return self._database.first(lambda row: IPv4Network(row["subnet"]), rows)

    def choose_subnet(
        self, upstream: str, candidates: Iterable[IPv4Network], instead_of: IPv4Network | None
    ) -> IPv4Network:
        """Choose the first candidate for good, unless another process has chosen before.

        ``instead_of`` is the earlier choice.  Its leases end with it.  It stays where a
        network has begun to use it.
        """
        with self._database.transaction() as db:
            chosen = self.subnet(upstream)
            if chosen is not None and (chosen != instead_of or self._networks.in_use(upstream)):
                return chosen
            chosen = next(iter(candidates))
            db.execute("DELETE FROM lease WHERE upstream = ? AND kind = 'ipv4'", (upstream,))
            db.execute("INSERT OR REPLACE INTO transit VALUES (?, ?)", (upstream, str(chosen)))
        return chosen

    def prefix(self, upstream: str) -> IPv6Network | None:
        """Return the transit prefix chosen for an upstream."""
        rows = self._database.select("SELECT subnet FROM transit6 WHERE upstream = ?", upstream)
        return self._database.first(lambda row: IPv6Network(row["subnet"]), rows)

    def choose_prefix(self, upstream: str, candidate: IPv6Network) -> IPv6Network:
        """Choose a transit prefix for good, unless another process has chosen before."""
        with self._database.transaction() as db:
            db.execute("INSERT OR IGNORE INTO transit6 VALUES (?, ?)", (upstream, str(candidate)))
            return self.prefix(upstream) or candidate
