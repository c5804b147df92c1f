# SPDX-License-Identifier: LGPL-2.1-or-later
"""What networks need of router namespaces; loaded only where there is one.

Most hosts have none, and a hook that libvirt waits for need not read how one is made.
"""

from collections.abc import Callable, Iterable, Mapping

from libvirt_natns import names
from libvirt_natns.model import Forward, Upstream
from libvirt_natns.store import Store


def complete(upstream: Upstream) -> Upstream:
    """An upstream of kind "router" with all that its router has.  Raises UpstreamError."""
    from libvirt_natns.router import networks

    return networks.complete(upstream)


def ensure(store: Store, announce: Callable[[str], None]) -> list[str]:
    """Bring the rules of all routers to what their networks publish; returns what differed."""
    if not (names.STATE_DIRECTORY / "routers").is_dir():
        return []
    from libvirt_natns.router import networks

    return networks.ensure(store, announce)


def check_claims(claims: Iterable[Forward], routers: Mapping[str, str]) -> None:
    """Refuse forwards that a router cannot serve; ``routers`` by network.  Raises NatnsError."""
    if not routers:
        return
    from libvirt_natns.router import networks

    networks.check_claims(claims, routers)


def ports_of_host(upstream: Upstream, protocol: str) -> set[int]:
    """Ports of an upstream's router that lead to the host; none for other kinds."""
    if upstream.kind != "router":
        return set()
    from libvirt_natns.router import networks

    return networks.ports_of_host(upstream.name, protocol)
