# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations towards neighbours: addresses that are answered for, or announced."""

from dataclasses import dataclass

from libvirt_natns.addresses import Address, by_family
from libvirt_natns.errors import AddressTakenError
from libvirt_natns.kernel import address_probe, netns
from libvirt_natns.kernel.defer import at_once
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations.operation import ApplyContext, Operation


@dataclass(frozen=True, slots=True)
class ProxiedNeighbours(Operation):
    """IPv6 addresses that the kernel answers for on a link, in place of their stations."""

    namespace: str | None
    link: str
    addresses: tuple[Address, ...]

    def describe(self) -> str:
        where = f"on {self.link} in {self.namespace or 'the host'}"
        if not self.addresses:
            return f"no proxy entry {where}"
        return f"proxy entries for {', '.join(map(str, self.addresses))} {where}"

    def differs(self, kernel: Kernel) -> list[str]:
        wanted = set(self.addresses)
        present = kernel.at(self.namespace).neighbours6.proxied(self.link)
        if present == wanted:
            return []
        differing = [
            *(f"missing {address}" for address in sorted(wanted - present, key=by_family)),
            *(f"extra {address}" for address in sorted(present - wanted, key=by_family)),
        ]
        where = f"{self.link} in {self.namespace or 'the host'}"
        return [f"proxy entries on {where} differ: {', '.join(differing)}"]

    def ensure(self, context: ApplyContext) -> None:
        if context.is_fresh(self) and not self.addresses:
            return
        context.kernel.at(self.namespace).neighbours6.replace_proxied(self.link, self.addresses)


@dataclass(frozen=True, slots=True)
class Announcement(Operation):
    """An announcement of a link's address to the neighbours, after each change of the link.

    ``probing``: seconds for which the neighbours are asked first, if no caller has asked.
    """

    on_change_only = True

    namespace: str
    link: str
    address: Address
    mac: str
    probing: float = 0.0

    def describe(self) -> str:
        return f"announce {self.address} to the neighbours on {self.link}"

    def differs(self, kernel: Kernel) -> list[str]:
        return []

    def ensure(self, context: ApplyContext) -> None:
        # A caller without a background has probed in full before.  An address in force is
        # not given up because a neighbour answers for it (RFC 5227, 2.4).
        waits = context.later is at_once or not context.has_added(self)
        probing = 0.0 if waits else self.probing

        def announce() -> None:
            with netns.entered(self.namespace):
                announced = address_probe.announce(self.link, self.address, self.mac, probing)
            if not announced:
                raise AddressTakenError(self.namespace, str(self.address))

        # The announcement waits up to 20 ms for the kernel to see the link's carrier.
        context.later(announce)
