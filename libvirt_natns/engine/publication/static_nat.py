# SPDX-License-Identifier: LGPL-2.1-or-later
"""Static NAT: upstream addresses of single guests."""

from libvirt_natns.addresses import Family
from libvirt_natns.engine.publication.attachment import Attachment
from libvirt_natns.engine.publication.choices import Choices
from libvirt_natns.errors import ConflictError, DocumentError
from libvirt_natns.model.metadata import AddressRequest
from libvirt_natns.model.network import Domain
from libvirt_natns.model.publication import StaticNat
from libvirt_natns.values import quoted


def select_nic(
    domain: Domain, element: str, network: str | None, mac: str | None, among: list[Attachment]
) -> Attachment:
    """Return the NIC that an element's ``network`` or ``mac`` names; else the first NIC.

    Raises DocumentError.
    """
    for attachment in among:
        if network in (None, attachment.network.name) and mac in (None, attachment.nic.mac):
            return attachment
    named = f"network='{network}'" if network else f"mac='{mac}'"
    raise DocumentError(
        f"guest {quoted(domain.name)}: <natns:{element} {named}> names no NIC of the guest in a"
        " network that libvirt-natns handles",
        "correct it with virsh edit",
    )


def check_requests(domain: Domain, attachments: list[Attachment]) -> None:
    """Refuse two addresses for one NIC, and one address for two NICs.

    The metadata alone does not show either.  Raises DocumentError.
    """
    nics, addresses = set(), set()
    for request in domain.nat.addresses if domain.nat else ():
        at = select_nic(domain, "address", request.network, request.mac, attachments)
        nic = (at.network.uuid, at.nic.mac, _family_of(request, at))
        address = (at.segment.name, request.address)
        if nic in nics:
            raise DocumentError(
                f"guest {quoted(domain.name)}: two <natns:address> are for the NIC {at.nic.mac} in"
                f" network {quoted(at.network.name)}",
                "remove one of them",
            )
        if request.address is not None and address in addresses:
            raise DocumentError(
                f"guest {quoted(domain.name)}: two <natns:address> ask for {request.address}",
                "choose another address for one of them, or address='auto'",
            )
        nics.add(nic)
        addresses.add(address)


def static_nat(
    domain: Domain, request: AddressRequest, attachments: list[Attachment], choices: Choices
) -> StaticNat:
    """Return the static NAT of an <natns:address>.  Raises ConflictError or LeaseError."""
    at = select_nic(domain, "address", request.network, request.mac, attachments)
    if at.segment.shares_addresses:
        raise ConflictError(
            f"guest {quoted(domain.name)}: upstream {at.segment.name} of network"
            f" {quoted(at.network.name)} has no addresses for guests",
            "use an upstream of kind 'bridge' for <natns:address>",
        )
    family = _family_of(request, at)
    return StaticNat(
        domain.uuid,
        f"guest {domain.name}",
        at.network.uuid,
        choices.address(request, domain, at, family),
        choices.target(domain, at, family),
        request.ports,
    )


def _family_of(request: AddressRequest, at: Attachment) -> Family:
    """Return the family of a requested address: "auto" is IPv4, if the network has it."""
    if request.address is not None:
        return 4 if request.address.version == 4 else 6
    return 4 if at.outside.address is not None or at.outside.address6 is None else 6
