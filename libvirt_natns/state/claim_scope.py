# SPDX-License-Identifier: LGPL-2.1-or-later
"""The scope of claims: networks that share addresses and ports."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class ClaimScope:
    """The upstream in which a network's claims must be unique.

    ``shared``: networks of the upstream share the host's addresses, and each port leads
    to one network only.
    """

    upstream: str
    shared: bool

    @classmethod
    def of(cls, upstream: str, kind: str) -> Self:
        """Return the scope of networks on an upstream of that kind.

        All upstreams of kind "host" are one scope: they share the host's addresses.
        Networks on a router share the router's addresses.
        """
        return cls("" if kind == "host" else upstream, kind in ("host", "router"))

    @property
    def in_host(self) -> bool:
        """True if the host itself listens on the ports."""
        return self.shared and not self.upstream
