# SPDX-License-Identifier: LGPL-2.1-or-later
"""The address on which a forward listens, and its target."""

from dataclasses import dataclass

from libvirt_natns.addresses import Address, Family, by_family, is_placeholder
from libvirt_natns.engine.publication.attachment import ANY, ANY6, Attachment
from libvirt_natns.engine.publication.choices import Choices
from libvirt_natns.engine.publication.port_spans import PortSpan
from libvirt_natns.errors import DocumentError
from libvirt_natns.model.metadata import PortForward
from libvirt_natns.model.network import Domain
from libvirt_natns.values import quoted


@dataclass(frozen=True, slots=True)
class ListenTarget:
    """The address on which a forward listens, None for no address, and its target.

    ``direct``: clients may use the target's own address, on ports that are not translated.
    """

    listen: Address | None
    target: Address
    direct: bool = False

    def address(self, span: PortSpan) -> Address | None:
        """Return the address on which these ports listen."""
        first, last, to, to_last = span
        unchanged = (first, last) == (to, to_last)
        return self.target if self.direct and unchanged else self.listen


def way_to(
    who: str, wanted: PortForward, at: Attachment, target: Address, own: set[Address]
) -> ListenTarget:
    """Return how a guest's address is reached: by the network's address, or one of ``own``.

    Raises DocumentError.
    """
    family: Family = 4 if target.version == 4 else 6
    public = at.is_public(target)
    if wanted.address is None:
        everywhere = at.segment.shares_addresses and at.outside.of(family) is not None
        listen = (ANY if family == 4 else ANY6) if everywhere else at.outside.of(family)
        return ListenTarget(listen, target, public)
    if public and wanted.address == target:
        return ListenTarget(None, target, True)
    # Any address of the host or router will do, 127.0.0.1 too.  It is checked there.
    if not at.segment.shares_addresses:
        _check_listen(who, wanted.address, {*at.outside.addresses, *own})
    return ListenTarget(wanted.address, target)


def _check_listen(who: str, wanted: Address, own: set[Address]) -> None:
    if wanted not in own:
        leased = [each for each in own if not is_placeholder(each)]
        listed = ", ".join(map(str, sorted(leased, key=by_family))) or "its future addresses"
        raise DocumentError(
            f"{who}: <natns:portForward address='{wanted}'> is not an address of its network",
            f"use {listed}, or leave address out",
        )


def target_of(
    domain: Domain, wanted: PortForward, at: Attachment, choices: Choices, family: Family
) -> Address:
    """Return a forward's target: the given address, or the NIC's DHCP address.

    Raises DocumentError or ConflictError.
    """
    if wanted.guest_address is None:
        return choices.target(domain, at, family)
    reachable = [subnet.network for subnet in at.network.subnets]
    reachable += [route.destination for route in at.network.routes]
    gateways = {subnet.gateway for subnet in at.network.subnets}
    inside = any(wanted.guest_address in subnet for subnet in reachable)
    if not inside or wanted.guest_address in gateways:
        raise DocumentError(
            f"guest {quoted(domain.name)}: <natns:portForward"
            f" guestAddress='{wanted.guest_address}'> is no guest's address in network"
            f" {quoted(at.network.name)}",
            f"use one of {', '.join(map(str, reachable))}",
        )
    return wanted.guest_address
