# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks and guests that libvirt has active, and how records compare with them."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from libvirt_natns import names
from libvirt_natns.documents import libvirt_xml, xml_sniff
from libvirt_natns.engine import given_up
from libvirt_natns.engine.engine import Engine
from libvirt_natns.model.network import Network
from libvirt_natns.state.guests import GuestRecord
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.upstream.selection import verdict

if TYPE_CHECKING:
    # The module needs libvirt-python, which hooks and the service can do without.
    from libvirt_natns.daemons.libvirt import ActiveDomains

Active = Mapping[str, bytes]
"""Networks that libvirt has active: their XML by uuid."""

AskNetworks = Callable[[], Active | None]
"""Asks libvirt for the active networks; returns None where libvirt does not answer.

A network with a bridge then counts as active."""


AskGuests = Callable[[], "ActiveDomains | None"]
"""Asks libvirt for the running guests; returns None where libvirt does not answer.

All guests stay as they are then."""


def no_guests() -> None:
    """Answer as a libvirt that leaves all guests alone."""


Finding = tuple[str, str]
"""A network's name, or "host" for the part that networks share, and a difference in words."""

NOT_ACTIVE = "is not active in libvirt any more"
GIVEN_UP = "is left over from a start that libvirt gave up"


def stopped_guests(recorded: list[GuestRecord], running: "ActiveDomains") -> list[GuestRecord]:
    """Return the recorded guests that surely do not run."""
    return [
        record
        for record in recorded
        if record.uuid not in running.domains
        and not running.may_run(libvirt_xml.is_container(record.document))
    ]


def is_active(engine: Engine, record: NetworkRecord, active: Active | None) -> bool:
    """True if libvirt lists a network; without an answer, if the network's bridge is there."""
    if active is not None:
        # libvirt lists a network once its start is over.
        return record.uuid in active
    if record.unfinished:
        return not given_up.is_given_up(record)
    return engine.kernel.host.links.get(record.bridge) is not None


def why_over(record: NetworkRecord) -> str:
    """Return why a network that is not active is to be removed."""
    return NOT_ACTIVE if record.state == "up" else GIVEN_UP


def name_of(xml: bytes) -> str:
    """Return a network's name, or "?" if its XML has none."""
    return xml_sniff.at_network(xml).name or "?"


def network_of_ours(engine: Engine, xml: bytes) -> Network | None:
    """Return the network, or None if it is not to be handled.  Raises DocumentError."""
    if xml_sniff.at_network(xml).untouched:
        return None
    return verdict(libvirt_xml.parse_any_network(xml), engine.config).network


def leftovers(engine: Engine) -> Iterator[tuple[str, str | None]]:
    """Yield namespaces and directories of ours without a network that is recorded as running.

    Each is given as the network's uuid, with the namespace where there is one.  A namespace
    under a running network's name is not looked at here, but with that network.
    """
    records = engine.store.networks.all("preparing", "starting", "up")
    running = {record.uuid for record in records}
    named = {record.namespace for record in records if record.this_boot}
    owners = {}
    for file in names.NETNS_DIRECTORY.glob("nat-*"):
        owner = None if file.name in named else engine.kernel.namespace_owner(file.name)
        if owner and owner not in running:
            owners[owner] = file.name
    yield from owners.items()
    directories = names.network_directory("").glob("*")
    for uuid in {directory.name for directory in directories} - running - owners.keys():
        yield uuid, None
