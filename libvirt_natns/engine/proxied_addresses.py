# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses in a proxied prefix that a station outside has, although a guest claims them.

ndppd asks the guests' side alone (RFC 4389 wants duplicates looked for on both).  So
guests' addresses are asked for outside, too.  An address that is answered for there is
cut out of ndppd's prefixes.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from ipaddress import IPv6Address
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.addresses import Address
from libvirt_natns.daemons import ndppd
from libvirt_natns.kernel import address_probe, netns
from libvirt_natns.operations.daemon_operations import NeighbourProxy
from libvirt_natns.operations.operation import Plan

MOST = 256
"""Addresses of a network that are asked for at a time, and that are kept as outside."""

AGAIN = 60.0
"""Seconds after which an address is asked for again: its owner may have been switched on."""


class Asked:
    """Times at which addresses were asked for last, for a process that asks again and again."""

    def __init__(self) -> None:
        self._asked: dict[IPv6Address, float] = {}

    def due(self, addresses: Iterable[Address]) -> list[IPv6Address]:
        """Return the global addresses that were not asked for within ``AGAIN``."""
        now = time.monotonic()
        self._asked = {each: at for each, at in self._asked.items() if now - at < AGAIN}
        global_addresses = {
            each
            for each in addresses
            if isinstance(each, IPv6Address) and not each.is_link_local and each not in self._asked
        }
        return sorted(global_addresses)

    def note(self, addresses: Iterable[IPv6Address]) -> None:
        """Note that the addresses are asked for now."""
        self._asked |= dict.fromkeys(addresses, time.monotonic())


def _file(uuid: str) -> Path:
    return names.network_directory(uuid) / "elsewhere"


def known(uuid: str) -> tuple[IPv6Address, ...]:
    """Return the addresses that were found outside since the network started."""
    try:
        words = _file(uuid).read_text().split()
    except (OSError, UnicodeDecodeError):
        return ()
    addresses = []
    for word in words:
        with suppress(ValueError):
            addresses.append(IPv6Address(word))
    return tuple(addresses)


def networks() -> list[str]:
    """Return the uuids of networks that were given an ndppd."""
    files = names.RUN_DIRECTORY.glob("networks/*/ndppd*.conf")
    return sorted({file.parent.name for file in files})


def outermost(plan: Plan) -> ndppd.Proxy | None:
    """Return the ndppd of a plan that the provider's stations hear, if there is one."""
    daemons = [each.daemon for each in plan if isinstance(each, NeighbourProxy)]
    asked = [daemon for daemon in daemons if daemon.prefixes]
    return next((each for each in asked if each.in_host), next(iter(asked), None))


def look(
    proxy: ndppd.Proxy, due: Sequence[IPv6Address], seconds: float
) -> tuple[IPv6Address, ...] | None:
    """Ask outside for addresses on the guests' side; None where nothing has changed.

    Takes ``seconds`` where an address is in the proxy's prefixes.  Raises UpstreamError
    or KernelError.
    """
    mine = [each for each in due if any(each in prefix for prefix in proxy.prefixes)]
    before = known(proxy.uuid)
    answered: set[Address] = set()
    if mine and seconds:
        with netns.entered(proxy.namespace):
            answered = address_probe.probe(proxy.link, mine, seconds)
    # An address that no guest has now was not asked for: what is known of it stays.
    kept = [each for each in before if each not in mine or each in answered]
    fresh = [each for each in mine if each in answered and each not in kept]
    outside = tuple((*kept, *fresh)[-MOST:])
    return None if outside == before else outside


def note(uuid: str, addresses: Iterable[IPv6Address]) -> None:
    """Write down the addresses that are outside, until the network stops."""
    _file(uuid).write_text("".join(f"{each}\n" for each in addresses))
