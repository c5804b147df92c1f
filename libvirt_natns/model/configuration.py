# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration as a value."""

from dataclasses import dataclass, field
from typing import Literal

from libvirt_natns.model.metadata import DefaultRoute
from libvirt_natns.model.upstream import HOST_UPSTREAM, RouterUpstream, Upstream

Scope = Literal["isolated", "annotated"]
FirewallChoice = Literal["auto", "nftables", "iptables"]

DEFAULT_AUTO_PORTS = (20000, 29999)


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration; without a file, the defaults below.

    ``auto_ports`` are the first and the last port that start="auto" chooses from.
    """

    scope: Scope = "isolated"
    firewall: FirewallChoice = "auto"
    upstream: str = "host"
    upstreams: dict[str, Upstream] = field(default_factory=lambda: {"host": HOST_UPSTREAM})
    auto_ports: tuple[int, int] = DEFAULT_AUTO_PORTS
    default_route: DefaultRoute = "auto"

    @property
    def routers(self) -> dict[str, RouterUpstream]:
        """Return the upstreams of kind "router", by name."""
        return {
            name: upstream
            for name, upstream in self.upstreams.items()
            if isinstance(upstream, RouterUpstream)
        }
