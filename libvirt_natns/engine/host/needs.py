# SPDX-License-Identifier: LGPL-2.1-or-later
"""Needs of networks towards the host, as data."""

from collections.abc import Iterable
from dataclasses import dataclass

from libvirt_natns.firewall import host_policy
from libvirt_natns.model.transit_segment import HostSegment
from libvirt_natns.operations.addressing import Route


@dataclass(frozen=True, slots=True)
class Needs:
    """Needs of one network that runs, or of all of them together, towards the host.

    ``transits`` are transit bridges of the host.  ``public`` are subnets that pass
    an upstream's bridge untranslated.  ``routes`` lead to subnets that the host routes, and
    ``routes6`` is true if the host must forward IPv6.  ``dhcp`` are bridges on which a
    DHCP server leases addresses.  ``followed`` are networks with conntrack's helpers.
    """

    transits: tuple[HostSegment, ...] = ()
    private: tuple[host_policy.Private, ...] = ()
    provider: tuple[host_policy.Provider, ...] = ()
    forwards: tuple[host_policy.HostForward, ...] = ()
    public: tuple[host_policy.Provider, ...] = ()
    routes: tuple[Route, ...] = ()
    routes6: bool = False
    dhcp: tuple[str, ...] = ()
    followed: tuple[host_policy.Followed, ...] = ()


def together(all_needs: Iterable[Needs]) -> Needs:
    """Return the needs of several networks as one."""
    parts = list(all_needs)
    return Needs(
        tuple({each.name: each for part in parts for each in part.transits}.values()),
        tuple(each for part in parts for each in part.private),
        tuple(each for part in parts for each in part.provider),
        tuple(each for part in parts for each in part.forwards),
        tuple(each for part in parts for each in part.public),
        tuple(each for part in parts for each in part.routes),
        any(part.routes6 for part in parts),
        tuple(dict.fromkeys(each for part in parts for each in part.dhcp)),
        tuple(each for part in parts for each in part.followed),
    )
