# SPDX-License-Identifier: LGPL-2.1-or-later
"""The NICs that DHCP gives a default route: read from the records of guests, and decided.

A guest's NIC in a network of ours is its way out, unless another of its NICs is.  Only guests
with another NIC, or with ``defaultRoute`` in their metadata, matter here.  A NIC of which
nothing is known gets a default route if its network gives one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial

from libvirt_natns.daemons.dnsmasq_routes import RoutedNics
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine.guests.nics import is_in, may_name, networks_at
from libvirt_natns.engine.host import libvirt_status
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.metadata import (
    AddressRequest,
    DefaultRoute,
    InterfaceRequest,
    NatMetadata,
    PortForward,
)
from libvirt_natns.model.network import Domain, LibvirtNetwork, Network, Nic
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store


@dataclass(frozen=True, slots=True)
class PlacedNic:
    """A guest's NIC in a network of ours, by the network's uuid.

    ``wish`` is what is said of its default route, and ``publishes`` tells that the guest
    publishes something through it: the answers need a way back.
    """

    mac: str
    network: str
    wish: DefaultRoute
    publishes: bool


def chosen(placed: Sequence[PlacedNic], *, leaves_elsewhere: bool) -> set[PlacedNic]:
    """Return the NICs that get a default route; ``placed`` are in the guest's order.

    With "auto", a NIC gets one that publishes something.  Without such NICs, the first NIC
    gets one if it is the guest's only way out.
    """
    asked = {nic for nic in placed if nic.wish == "yes" or (nic.wish == "auto" and nic.publishes)}
    if asked or leaves_elsewhere:
        return asked
    return set([nic for nic in placed if nic.wish == "auto"][:1])


class _Networks:
    """Facts of networks for one decision; networks that many guests share are looked up once."""

    def __init__(self, store: Store, config: Config) -> None:
        self.ours = cache(partial(networks_at, store))
        self.wish = cache(partial(_wish_of_record, config))
        self.leads_out = cache(_leads_out)


def routed_nics(store: Store, config: Config, network: Network) -> RoutedNics:
    """Return the NICs of a network that DHCP gives a default route."""
    others = network_wish(network, config) != "no"
    networks = _Networks(store, config)
    exceptions = {
        nic.mac
        for domain in _with_choice(store, network)
        for nic, routed in _routes_of(networks, domain)
        if nic.network == network.uuid and routed != others
    }
    return RoutedNics(others, tuple(sorted(exceptions)))


def network_wish(network: LibvirtNetwork, config: Config) -> DefaultRoute:
    """Return what a network, or else the configuration, says of default routes."""
    return (network.nat and network.nat.default_route) or config.default_route


def _wish_of_record(config: Config, record: NetworkRecord) -> DefaultRoute:
    return network_wish(libvirt_xml.parse_network(record.document), config)


def _routes_of(networks: _Networks, domain: Domain) -> list[tuple[PlacedNic, bool]]:
    """Return each NIC of a guest in a network of ours, and whether it gets a default route."""
    ours = [(nic, each) for nic in domain.nics for each in networks.ours(nic.network, nic.bridge)]
    placed = [
        PlacedNic(
            nic.mac,
            record.uuid,
            _wish(domain, nic) or networks.wish(record),
            _publishes(domain, nic, first=nic == ours[0][0]),
        )
        for nic, record in ours
    ]
    inside = {nic for nic, _ in ours}
    others = [nic for nic in domain.nics if nic not in inside]
    elsewhere = domain.outward or any(networks.leads_out(n.network, n.bridge) for n in others)
    routed = chosen(placed, leaves_elsewhere=elsewhere)
    return [(nic, nic in routed) for nic in placed]


def matters(document: bytes) -> bool:
    """True if a guest's XML may have several NICs, or ``defaultRoute``; it is not parsed."""
    return document.count(b"<interface") > 1 or b"defaultRoute" in document


def _with_choice(store: Store, network: Network) -> Iterator[Domain]:
    """Yield the recorded guests that run, may have a NIC in a network, and have a choice."""
    for record in store.guests.running():
        if matters(record.document) and may_name(record.document, network):
            domain = _parsed(record.document)
            if any(is_in(nic, network) for nic in domain.nics):
                yield domain


# The service decides again whenever a guest of a network starts.
@lru_cache(maxsize=1024)
def _parsed(document: bytes) -> Domain:
    """Return a recorded guest; without metadata that is refused by now."""
    read = libvirt_xml.read_domain(document)
    return read.outcome if isinstance(read.outcome, Domain) else read.plain


def _wish(domain: Domain, nic: Nic) -> DefaultRoute | None:
    """Return what a guest's metadata says of a NIC; None where its network decides."""
    if domain.nat is None:
        return None
    for request in domain.nat.interfaces:
        if _selects(request, domain, nic):
            return request.default_route
    return domain.nat.default_route


def _publishes(domain: Domain, nic: Nic, *, first: bool) -> bool:
    """True if a guest's metadata publishes something through a NIC, by default the first one."""
    nat = domain.nat or NatMetadata()
    wanted: tuple[PortForward | AddressRequest, ...] = (*nat.forwards, *nat.addresses)
    return any(
        _selects(each, domain, nic) or (first and each.network is None and each.mac is None)
        for each in wanted
    )


def _selects(
    request: InterfaceRequest | PortForward | AddressRequest, domain: Domain, nic: Nic
) -> bool:
    """True if an element names a NIC: by its MAC address, or as the first NIC in its network."""
    if request.network is None:
        return request.mac == nic.mac
    return nic == next((each for each in domain.nics if each.network == request.network), None)


def _leads_out(network: str | None, bridge: str | None) -> bool:
    """True if a NIC in no running network of ours leads outside."""
    if network:
        return libvirt_status.forwards(network)
    return bridge is not None and bridge not in libvirt_status.isolated_bridges()
