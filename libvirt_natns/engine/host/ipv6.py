# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host as a router in IPv6: its forwarding, and its routes to networks' prefixes.

The kernel forwards IPv6 on all links or on none (net.ipv6.conf.all.forwarding).  A kernel
that forwards ignores router advertisements unless ``accept_ra`` is 2.  Many hosts have
their own address and default route from advertisements.  So ``accept_ra`` comes first:
when forwarding begins, learned routes stay only where it is 2.  Links that are to come get
it from "default".

All settings are restored when no network needs them any more, except those that another
program has changed since.  Limit: of others that rely on forwarding, only libvirt's own
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
    """The networks' needs that are about IPv6."""

    @property
    def routes6(self) -> bool:
        """True if the host must forward IPv6."""

    @property
    def routes(self) -> tuple[Route, ...]:
        """The host's routes to networks' prefixes."""


def plan_of(kernel: Kernel, needs: Needs) -> Plan:
    """Return the host's plan for IPv6; empty if no network needs any of it."""
    if not needs.routes6:
        return ()
    first: list[Operation] = []
    if kernel.host.sysctls.get(FORWARDING) != "1":
        first += (Sysctl(None, key, ACCEPTED_BY_ROUTERS) for key in _believing(kernel))
    return (*first, Sysctl(None, FORWARDING, "1"), *needs.routes)


def _believing(kernel: Kernel) -> Iterator[str]:
    """Yield the settings of links that accept advertisements while the host does not forward."""
    for directory in sorted(SETTINGS.iterdir()):
        key = f"net/ipv6/conf/{directory.name}/accept_ra"
        if directory.name in ("all", "lo") or kernel.host.sysctls.get(key) != ACCEPTED:
            continue
        link = kernel.host.links.get(directory.name)
        # The ports of a bridge speak no IPv6, and there may be thousands.
        if directory.name == "default" or (link is not None and link.master is None):
            yield key


def put_back(kernel: Kernel, settings: Mapping[str, str]) -> None:
    """Restore former values, the forwarding first."""
    there = kernel.host.sysctls.values(settings)
    for key in sorted(settings, key=lambda each: each != FORWARDING):
        ours = "1" if key == FORWARDING else ACCEPTED_BY_ROUTERS
        if there.get(key) == ours and settings[key]:
            kernel.host.sysctls.set(key, settings[key])
