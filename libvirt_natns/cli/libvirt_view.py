# SPDX-License-Identifier: LGPL-2.1-or-later
"""All networks and guests of libvirt, as listings judge them.

A network has the verdict whether it is handled, and why.  A guest has its metadata, or the reason
why the metadata is refused.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from libvirt_natns.daemons import libvirt_listing
from libvirt_natns.daemons.libvirt_listing import ListedGuest, ListedNetwork
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.errors import DocumentError, LibvirtError
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.network import Domain, Network, Nic
from libvirt_natns.upstream import selection

BRIDGE = "virbrN"
"""Stands for the bridge that libvirt would choose for a network without."""


@dataclass(frozen=True)
class JudgedNetwork:
    """A network of libvirt's; ``network`` is None for a network that is not handled."""

    listed: ListedNetwork
    network: Network | None
    reason: str


@dataclass(frozen=True)
class Definition:
    """A guest's definition or running XML.

    ``domain`` is without metadata where that is refused, and ``error`` says why.
    """

    domain: Domain
    error: str | None = None


@dataclass(frozen=True)
class JudgedGuest:
    """A guest of libvirt's: as it runs, and as it starts the next time; None for neither."""

    listed: ListedGuest
    live: Definition | None
    definition: Definition | None

    @property
    def present(self) -> Definition | None:
        """The running guest's definition, else the one for its next start."""
        return self.live or self.definition


@dataclass(frozen=True)
class LibvirtView:
    """libvirt's networks and guests.  ``silent`` says why there are none, if libvirt is silent."""

    networks: tuple[JudgedNetwork, ...]
    guests: tuple[JudgedGuest, ...] = ()
    silent: str | None = None

    @cached_property
    def handled(self) -> Mapping[str, JudgedNetwork]:
        """Return the networks that are handled, by name."""
        return {each.listed.name: each for each in self.networks if each.network is not None}

    @cached_property
    def _by_bridge(self) -> Mapping[str, JudgedNetwork]:
        return {each.network.bridge: each for each in self.handled.values() if each.network}

    def network_of(self, nic: Nic) -> JudgedNetwork | None:
        """Return the handled network that a NIC is in; None for another network or bridge."""
        if nic.network:
            return self.handled.get(nic.network)
        return self._by_bridge.get(nic.bridge or "")


def view(config: Config, *, guests: bool = True, wake: bool = True) -> LibvirtView:
    """Return libvirt's networks and, with ``guests``, its guests.

    ``wake`` False starts no daemon that sleeps.
    """
    try:
        networks = libvirt_listing.networks(wake=wake)
        found = libvirt_listing.guests(wake=wake) if guests else []
    except LibvirtError as error:
        return LibvirtView((), silent=str(error))
    judged = (_judged_guest(each) for each in found)
    return LibvirtView(judged_networks(networks, config), tuple(each for each in judged if each))


def judged_networks(networks: Iterable[ListedNetwork], config: Config) -> tuple[JudgedNetwork, ...]:
    """Return networks with the verdict whether they are handled."""
    return tuple(_judged(each, config) for each in networks)


def _judged(listed: ListedNetwork, config: Config) -> JudgedNetwork:
    try:
        network = libvirt_xml.parse_network(listed.xml, bridge=BRIDGE)
        verdict = selection.verdict(network, config)
    except DocumentError as error:
        return JudgedNetwork(listed, None, str(error))
    return JudgedNetwork(listed, verdict.network, verdict.reason)


def _judged_guest(listed: ListedGuest) -> JudgedGuest | None:
    """Return a guest with its metadata; None for a document that is none of libvirt's."""
    try:
        live, definition = (
            _definition(xml) if xml else None for xml in (listed.live, listed.definition)
        )
    except DocumentError:
        return None
    return JudgedGuest(listed, live, definition)


def _definition(xml: bytes) -> Definition:
    document = libvirt_xml.read_domain(xml)
    try:
        return Definition(document.domain)
    except DocumentError as error:
        return Definition(document.plain, str(error))


def complaints(view: LibvirtView, named: str | None) -> list[str]:
    """Return why forwards of guests may be missing in a list, in words.

    ``named`` is the name or uuid of the only guest in the list.
    """
    if view.silent is not None:
        return [f"{view.silent}: forwards of guests that are off are not shown"]
    errors = [
        each.present.error
        for each in view.guests
        if each.present is not None and named in (None, each.listed.name, each.listed.uuid)
    ]
    return [error for error in errors if error is not None]
