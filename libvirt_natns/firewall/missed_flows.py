# SPDX-License-Identifier: LGPL-2.1-or-later
"""Flows that began before the rules that translate their destination: see ``early_flows``."""

from collections.abc import Iterable, Iterator
from contextlib import suppress

from libvirt_natns.addresses import Address
from libvirt_natns.errors import KernelError
from libvirt_natns.firewall.rule import Rule
from libvirt_natns.kernel import early_flows
from libvirt_natns.kernel.conntrack import PROTOCOLS
from libvirt_natns.kernel.early_flows import Translation


def end(namespace: str | None, rules: Iterable[Rule]) -> None:
    """End the flows that rules which are in force now would translate; None is the host.

    Rules that were loaded are worth more than an entry that could not be deleted: an error
    is ignored.
    """
    with suppress(KernelError):
        early_flows.cut(namespace, translations(rules))


def translations(rules: Iterable[Rule]) -> Iterator[Translation]:
    """Yield the translations of destinations among rules."""
    for rule in rules:
        if rule.action != "dnat" or rule.family is None:
            continue
        first, last = rule.span or (0, 0)
        protocol = PROTOCOLS.get(rule.protocol or "", 0)
        named = () if rule.not_destinations else rule.destinations
        excluded = rule.destinations if rule.not_destinations else ()
        addresses: list[Address | None] = [network.network_address for network in named]
        for address in addresses or [None]:
            own = rule.local and address is not None
            yield Translation(
                rule.family, address, protocol, first, last, rule.sources, excluded, own
            )
