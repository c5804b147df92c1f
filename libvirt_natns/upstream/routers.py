# SPDX-License-Identifier: LGPL-2.1-or-later
"""What networks need of router namespaces; loaded only where there is one.

Most hosts have none, and a hook that libvirt waits for need not read how one is made.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from libvirt_natns import names
from libvirt_natns.addresses import Address
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.publication import Forward
from libvirt_natns.model.upstream import Upstream
from libvirt_natns.state.store import Store

if TYPE_CHECKING:
    from libvirt_natns.upstream.router.lifecycle import Machine


def complete(upstream: Upstream) -> Upstream:
    """An upstream of kind "router" with all that its router has.  Raises UpstreamError."""
    from libvirt_natns.upstream.router import networks

    return networks.complete(upstream)


def neighbours(upstream: Upstream) -> set[Address]:
    """Known stations on the link of a router's NIC, the host and itself among them."""
    from libvirt_natns.upstream.router import networks

    return networks.neighbours(upstream.name)


def ensure(store: Store, announce: Callable[[str], None]) -> list[str]:
    """Bring the rules of all routers to what their networks publish; returns what differed."""
    if not (names.STATE_DIRECTORY / "routers").is_dir():
        return []
    from libvirt_natns.upstream.router import networks

    return networks.ensure(store, announce)


def differences(config: Config, kernel: Kernel, store: Store) -> list[str]:
    """What differs of the routers that are up, in words."""
    machine = _machine(config, kernel, store)
    return machine.all_differences() if machine else []


def repair(config: Config, kernel: Kernel, store: Store, *, configured: bool) -> list[str]:
    """Repair the routers that are up; returns what differed.  Raises a NatnsError.

    Where they are to be as ``configured``, changed ``host_ports`` come into force.
    """
    machine = _machine(config, kernel, store)
    return machine.repair_all(configured=configured) if machine else []


def expire_overdue() -> list[str]:
    """Take back the routers that were not confirmed in time; returns what was done.

    Their timer may have been killed.  Raises a NatnsError or OSError.
    """
    if not any((names.STATE_DIRECTORY / "routers").glob("*.json")):
        return []
    from libvirt_natns.upstream.router import journal
    from libvirt_natns.upstream.router.lifecycle import Machine

    if not any(record.is_overdue for record in journal.load_all()):
        return []
    with Kernel() as kernel:
        return Machine(Config(), kernel).expire_overdue()


def _machine(config: Config, kernel: Kernel, store: Store) -> "Machine | None":
    if not (names.STATE_DIRECTORY / "routers").is_dir():
        return None
    from libvirt_natns.upstream.router import networks
    from libvirt_natns.upstream.router.lifecycle import Machine

    return Machine(config, kernel, partial(networks.needs, store))


def check_claims(claims: Iterable[Forward], routers: Mapping[str, str]) -> None:
    """Refuse forwards that a router cannot serve; ``routers`` by network.  Raises NatnsError."""
    if not routers:
        return
    from libvirt_natns.upstream.router import networks

    networks.check_claims(claims, routers)


def ports_of_host(upstream: Upstream, protocol: str) -> set[int]:
    """Ports of an upstream's router that lead to the host; none for other kinds."""
    if upstream.kind != "router":
        return set()
    from libvirt_natns.upstream.router import networks

    return networks.ports_of_host(upstream.name, protocol)
