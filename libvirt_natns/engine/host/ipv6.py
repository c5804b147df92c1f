# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host as a router in IPv6: its forwarding, and its routes to networks' prefixes.

The kernel decides for all links at once whether it forwards IPv6
(net.ipv6.conf.all.forwarding), and one that does believes no router's advertisements,
by which many a host has its own address and default route, unless ``accept_ra`` is 2.
So that comes first: when forwarding begins, the routes that were learned stay
only where it is.  Links that are to come get it from "default".

All of it is put back when no network needs it any more, but for what somebody else
has changed meanwhile.  Limit: of who else may rely on forwarding only libvirt's own
networks are known.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from libvirt_natns.engine.operations.addresses import Route
from libvirt_natns.engine.operations.links import Sysctl
from libvirt_natns.engine.operations.operation import Operation, Plan
from libvirt_natns.kernel.session import Kernel

FORWARDING = "net/ipv6/conf/all/forwarding"
SETTINGS = Path("/proc/sys/net/ipv6/conf")
ACCEPTED, ACCEPTED_BY_ROUTERS = "1", "2"


class Needs(Protocol):
    """What of the host's needs is about IPv6."""

    @property
    def routes6(self) -> bool:
        """Whether it must forward."""

    @property
    def routes(self) -> tuple[Route, ...]:
        """Its routes to networks' prefixes."""


def plan_of(kernel: Kernel, needs: Needs) -> Plan:
    """What the host must be like: nothing, where no network needs any of it."""
    if not needs.routes6:
        return ()
    first: list[Operation] = []
    if kernel.sysctl(None, FORWARDING) != "1":
        first += (Sysctl(None, key, ACCEPTED_BY_ROUTERS) for key in _believing(kernel))
    return (*first, Sysctl(None, FORWARDING, "1"), *needs.routes)


def _believing(kernel: Kernel) -> Iterator[str]:
    """The settings of links that believe routers as long as the host is none."""
    for directory in sorted(SETTINGS.iterdir()):
        key = _accept_ra(directory.name)
        if directory.name in ("all", "lo") or kernel.sysctl(None, key) != ACCEPTED:
            continue
        link = kernel.link(None, directory.name)
        # The ports of a bridge speak no IPv6, and there may be thousands.
        if directory.name == "default" or (link is not None and link.master is None):
            yield key


def _accept_ra(link: str) -> str:
    return f"net/ipv6/conf/{link}/accept_ra"


def put_back(kernel: Kernel, settings: Mapping[str, str]) -> None:
    """Set what was changed to what it was, the forwarding first."""
    there = kernel.sysctls(None, settings)
    for key in sorted(settings, key=lambda each: each != FORWARDING):
        ours = "1" if key == FORWARDING else ACCEPTED_BY_ROUTERS
        if there.get(key) == ours and settings[key]:
            kernel.set_sysctl(None, key, settings[key])
