# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lists of all networks and guests that libvirt knows, active or not.

A hook must not use this module: see ``libvirt``.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from libvirt_natns.daemons import libvirt, libvirtd
from libvirt_natns.errors import LibvirtError


@dataclass(frozen=True, slots=True)
class ListedNetwork:
    """A network of libvirt's.  ``xml`` is that of the active network, if it is active."""

    uuid: str
    name: str
    active: bool
    persistent: bool
    autostart: bool
    xml: bytes


@dataclass(frozen=True, slots=True)
class ListedGuest:
    """A guest of libvirt's.

    ``live`` is the XML of a guest that runs, ``definition`` that for its next start: None
    for a guest that is off, or for a transient guest.
    """

    uuid: str
    name: str
    live: bytes | None
    definition: bytes | None

    @property
    def running(self) -> bool:
        """True for a guest that runs."""
        return self.live is not None


# Of libvirt-network.h and libvirt-domain.h: filters of lists.  A question to one network or guest
# fails where it has ended since; a list does not.
NETWORKS_ACTIVE, NETWORKS_PERSISTENT, NETWORKS_AUTOSTART = 2, 4, 16
GUESTS_ACTIVE, GUESTS_PERSISTENT = 1, 4


def networks(*, wake: bool = True) -> list[ListedNetwork]:
    """Return all networks, by name.  Raises LibvirtError where libvirt does not answer.

    ``wake`` False starts no daemon that sleeps.
    """
    with libvirt.connected(wake=wake) as connection:
        active, persistent, autostart = (
            _uuids(connection.listAllNetworks(filter_))
            for filter_ in (NETWORKS_ACTIVE, NETWORKS_PERSISTENT, NETWORKS_AUTOSTART)
        )
        found = [(each, libvirt.xml_of(each)) for each in connection.listAllNetworks(0)]
    listed = []
    for network, xml in found:
        uuid = str(network.UUIDString())
        if xml is not None:
            listed.append(
                ListedNetwork(
                    uuid,
                    str(network.name()),
                    active=uuid in active,
                    persistent=uuid in persistent,
                    autostart=uuid in autostart,
                    xml=xml,
                )
            )
    return sorted(listed, key=lambda each: each.name)


def _uuids(listed: Iterable[Any]) -> set[str]:
    return {str(each.UUIDString()) for each in listed}


def guests(*, wake: bool = True) -> list[ListedGuest]:
    """Return all guests of all drivers, by name; ``wake`` as for ``networks``.

    Raises LibvirtError where no driver answers.
    """
    found: list[ListedGuest] = []
    silent: list[LibvirtError] = []
    drivers = (libvirtd.QEMU, libvirtd.LXC)
    for driver in drivers:
        try:
            with libvirt.connected(wake=wake, driver=driver) as connection:
                found += _guests(connection)
        except LibvirtError as error:
            silent.append(error)
    if len(silent) == len(drivers):
        raise silent[0]
    return sorted(found, key=lambda each: each.name)


def _guests(connection: Any) -> Iterator[ListedGuest]:  # noqa: ANN401
    active = _uuids(connection.listAllDomains(GUESTS_ACTIVE))
    persistent = _uuids(connection.listAllDomains(GUESTS_PERSISTENT))
    for domain in connection.listAllDomains(0):
        uuid = str(domain.UUIDString())
        live = libvirt.xml_of(domain) if uuid in active else None
        definition = libvirt.xml_of(domain, definition=True) if uuid in persistent else None
        if live or definition:
            yield ListedGuest(uuid, str(domain.name()), live, definition)
