# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ``<natns:nat>`` element as a value, and the checks that a schema cannot make.

The element satisfies its schema when it comes here, so every value has the right form.
Limits: claims of *different* guests are not compared here, and a guest's networks are
not known; that needs the networks' bridges.
"""

from __future__ import annotations

from collections.abc import Collection

from libvirt_natns.documents.xml_attributes import (
    AddressXml,
    InterfaceXml,
    NatXml,
    NicXml,
    UpstreamXml,
)
from libvirt_natns.documents.xml_forwards import check_targets, forwards
from libvirt_natns.documents.xml_ports import allowed
from libvirt_natns.documents.xml_subnets import own_subnets
from libvirt_natns.documents.xml_values import NS, Element, error, value_error
from libvirt_natns.model.metadata import AddressRequest, InterfaceRequest, NatMetadata
from libvirt_natns.model.subnet import Subnet
from libvirt_natns.values import alternatives


def of_domain(nat: Element, macs: Collection[str]) -> NatMetadata:
    """Return the metadata of a domain; ``macs`` are the addresses of its NICs.

    DocumentError for a contradiction in it.
    """
    for element in nat:
        _check_nic(element, macs)
    return NatMetadata(
        forwards=forwards(nat),
        addresses=_requests(nat),
        default_route=NatXml.default_route.of(nat),
        interfaces=_interfaces(nat),
    )


def of_network(nat: Element, subnets: tuple[Subnet, ...]) -> NatMetadata:
    """Return the metadata of a network; ``subnets`` come from libvirt's ``<ip>``.

    DocumentError for a contradiction in it, or to the network.
    """
    upstream = nat.find(f"{NS}upstream")
    own = own_subnets(nat, subnets)
    check_targets(nat, own or subnets)
    return NatMetadata(
        enabled=NatXml.enabled.of(nat),
        upstream=None if upstream is None else UpstreamXml.name.of(upstream),
        address=None if upstream is None else UpstreamXml.address.of(upstream),
        address6=None if upstream is None else UpstreamXml.address6.of(upstream),
        subnets=own,
        forwards=forwards(nat),
        default_route=NatXml.default_route.of(nat),
        helpers=NatXml.helpers.of(nat),
    )


def _check_nic(element: Element, macs: Collection[str]) -> None:
    """Refuse a MAC address that no NIC of the guest has."""
    if NicXml.mac.name in element.attrib and NicXml.mac.of(element) not in macs:
        present = f": {alternatives(macs)}" if macs else ", but the guest has none"
        expected = f"the MAC address of a NIC of the guest in a network or on a bridge{present}"
        raise value_error(element, NicXml.mac.name, expected)


def _interfaces(nat: Element) -> tuple[InterfaceRequest, ...]:
    lines: dict[tuple[str | None, str | None], int] = {}
    requests = []
    for element in nat.findall(f"{NS}interface"):
        request = InterfaceRequest(
            InterfaceXml.default_route.required(element),
            InterfaceXml.network.of(element),
            InterfaceXml.mac.of(element),
        )
        selector = (request.network, request.mac)
        if selector in lines:
            fact = f"selects the same NIC as line {lines[selector]}"
            raise error(element, fact, "another network or mac")
        lines[selector] = element.sourceline
        requests.append(request)
    return tuple(requests)


def _requests(nat: Element) -> tuple[AddressRequest, ...]:
    lines: dict[tuple[object, ...], int] = {}
    requests = []
    for element in nat.findall(f"{NS}address"):
        request = _request(element)
        # "auto" is an IPv4 address, except in a network without IPv4.
        family = request.address.version if request.address else 4
        selector = (request.network, request.mac, family)
        if selector in lines:
            fact = f"selects the same NIC as line {lines[selector]}"
            raise error(element, fact, "another network or mac")
        lines[selector] = element.sourceline
        requests.append(request)
    return tuple(requests)


def _request(element: Element) -> AddressRequest:
    return AddressRequest(
        address=AddressXml.address.of(element),
        network=AddressXml.network.of(element),
        mac=AddressXml.mac.of(element),
        ports=allowed(element),
    )
