# SPDX-License-Identifier: LGPL-2.1-or-later
"""The part of router namespaces that networks need, loaded only where a router exists.

Most hosts have no router, and libvirt waits for a hook, which need not load its code.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from libvirt_natns import names
from libvirt_natns.addresses import Address
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.publication import Forward
from libvirt_natns.model.segment import Segment
from libvirt_natns.model.transit_segment import RouterSegment
from libvirt_natns.model.upstream import RouterUpstream
from libvirt_natns.state.store import Store

if TYPE_CHECKING:
    from libvirt_natns.upstream.router.lifecycle import RouterLifecycle


def complete(upstream: RouterUpstream) -> RouterSegment:
    """Return the segment of an upstream with a router that is up.  Raises UpstreamError."""
    from libvirt_natns.upstream.router import client_networks

    return client_networks.complete(upstream)


def neighbours(upstream: RouterUpstream) -> set[Address]:
    """Return the known stations on the link of a router's NIC, with the host and the router."""
    from libvirt_natns.upstream.router import client_networks

    return client_networks.neighbours(upstream.name)


def ensure(store: Store, config: Config, announce: Callable[[str], None]) -> list[str]:
    """Bring the rules of all routers to what their networks publish; returns what differed."""
    if not (names.STATE_DIRECTORY / "routers").is_dir():
        return []
    from libvirt_natns.upstream.router import client_networks

    return client_networks.ensure(store, config, announce)


def differences(config: Config, kernel: Kernel, store: Store) -> list[str]:
    """Return in words how the routers that are up differ from what they should be."""
    verbs = _lifecycle(config, kernel, store)
    if verbs is None:
        return []
    from libvirt_natns.upstream.router import health

    return health.all_differences(verbs)


def repair(config: Config, kernel: Kernel, store: Store, *, configured: bool) -> list[str]:
    """Repair the routers that are up; returns what differed.  Raises a NatnsError.

    ``configured``: changed ``host_ports`` of the configuration come into force.
    """
    verbs = _lifecycle(config, kernel, store)
    if verbs is None:
        return []
    from libvirt_natns.upstream.router import health

    return health.repair_all(verbs, configured=configured)


def expire_overdue() -> list[str]:
    """Take back the routers that were not confirmed in time; returns what was done.

    Their timer may have been killed.  Raises a NatnsError or OSError.
    """
    if not any((names.STATE_DIRECTORY / "routers").glob("*.json")):
        return []
    from libvirt_natns.upstream.router import journal
    from libvirt_natns.upstream.router.lifecycle import RouterLifecycle

    if not any(record.is_overdue for record in journal.load_all()):
        return []
    with Kernel() as kernel:
        return RouterLifecycle(Config(), kernel).expire_overdue()


def _lifecycle(config: Config, kernel: Kernel, store: Store) -> "RouterLifecycle | None":
    if not (names.STATE_DIRECTORY / "routers").is_dir():
        return None
    from libvirt_natns.upstream.router import client_networks
    from libvirt_natns.upstream.router.lifecycle import RouterLifecycle

    return RouterLifecycle(config, kernel, partial(client_networks.needs, store, config))


def check_claims(claims: Iterable[Forward], routers: Mapping[str, str]) -> None:
    """Refuse forwards that a router cannot serve; ``routers`` by network.  Raises NatnsError."""
    if not routers:
        return
    from libvirt_natns.upstream.router import client_networks

    client_networks.check_claims(claims, routers)


def ports_of_host(segment: Segment, protocol: str) -> set[int]:
    """Return the ports of an upstream's router that lead to the host; none for other kinds."""
    if not isinstance(segment, RouterSegment):
        return set()
    from libvirt_natns.upstream.router import client_networks

    return client_networks.ports_of_host(segment.name, protocol)
