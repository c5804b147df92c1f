# SPDX-License-Identifier: LGPL-2.1-or-later
"""From libvirt's events to the engine's verbs: a table.

Whether a failure may stop libvirt stands with the events in ``hook``, which
must know it without importing this.
"""

from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial

from libvirt_natns import names
from libvirt_natns.documents import config, libvirt_xml, ownership
from libvirt_natns.documents.libvirt_xml import DomainDocument
from libvirt_natns.documents.xml_sniff import Glance, at_domain, at_network
from libvirt_natns.engine import shared_host
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.factory import Once, Resident, Sessions
from libvirt_natns.engine.guests.guest_engine import Guests
from libvirt_natns.engine.guests.nics import in_ours
from libvirt_natns.engine.host.libvirt_status import await_status
from libvirt_natns.engine.network_end import do_all, end_given_up, leave
from libvirt_natns.engine.removal import abandon, remove_unrecorded
from libvirt_natns.errors import ConfigError, DocumentError, NatnsError, StoreError
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.network import LibvirtNetwork, Network, Nic
from libvirt_natns.state.store import Store
from libvirt_natns.upstream.selection import verdict
from libvirt_natns.values import quoted


@dataclass(frozen=True)
class Event:
    """An event of libvirt.  ``seen`` works also where a network's XML is not acceptable."""

    xml: bytes
    sessions: Sessions = field(default_factory=Once)

    @cached_property
    def seen(self) -> Glance:
        return at_network(self.xml)

    @cached_property
    def network(self) -> LibvirtNetwork:
        """Return the network.  Raises DocumentError."""
        network = libvirt_xml.parse_hook_data(self.xml).network
        if not network.uuid:
            raise DocumentError(
                f"network {quoted(network.name)} has no uuid", "start it with libvirt"
            )
        return network

    @cached_property
    def guest(self) -> DomainDocument:
        """Return the guest, parsed once.  Raises DocumentError."""
        return libvirt_xml.read_domain(self.xml)


FollowUp = Callable[[Resident], None]
"""Work of a resident process, once libvirt has its answer."""

Verb = Callable[[Event], FollowUp | None]


def _prepare(event: Event) -> FollowUp | None:
    settings = config.load()
    network = _handled(event, settings)
    if network is None:
        return None
    with event.sessions.engine(settings) as verbs:
        end_given_up(verbs, network.uuid)
        verbs.prepare(network, event.xml)
    return partial(_build, network, event.xml)


def _build(network: Network, xml: bytes, resident: Resident) -> None:
    """Build ahead while libvirt makes the bridge; libvirt may give up without an event."""
    try:
        with resident.engine() as verbs:
            verbs.build(network, xml)
    finally:
        resident.expect(network.uuid)


def _up(event: Event) -> None:
    try:
        settings = config.load()
        network = _handled(event, settings)
        if network is not None:
            with event.sessions.engine(settings) as verbs:
                verbs.up(network, event.xml)
                _beside(verbs, network)
    except BaseException:
        _abandon(event.seen)
        raise


def _beside(verbs: Engine, network: Network) -> None:
    """Do further work after a start; the network stays up if that work fails."""
    do_all(
        verbs,
        ("publishing guests again", partial(Guests(verbs).rejoin, network)),
        ("ending starts that libvirt gave up", partial(end_given_up, verbs, network.uuid)),
    )


def _refresh(event: Event) -> None:
    with event.sessions.engine() as verbs:
        if isinstance(event.network, Network):
            verbs.refresh(event.network, event.xml)
            # The edited metadata may have moved the network to another upstream.
            Guests(verbs).rejoin(event.network)
        # A <host> may have come or gone.
        Guests(verbs).refresh(event.network.uuid)


def _down(event: Event) -> None:
    """Take down what is recorded; today's XML and configuration may be broken."""
    seen = event.seen
    try:
        try:
            settings = config.load()
        except ConfigError:
            with event.sessions.engine(Config()) as verbs:
                verbs.down(seen.uuid, seen.name, shared=False)
            raise
        with event.sessions.engine(settings) as verbs:
            record = verbs.store.networks.get(seen.uuid)
            verbs.down(seen.uuid, seen.name)
            end_given_up(verbs, seen.uuid, wait=True)
            leave(verbs, record)
    except StoreError:
        with Kernel() as kernel:
            remove_unrecorded(kernel, seen.uuid, names.namespace(seen.name))
        raise


def _handled(event: Event, settings: Config) -> Network | None:
    """Return a network that starts if it is ours; else remove leftovers of a missed end.

    The content of a network that is not ours is not judged.
    """
    seen = event.seen
    network = verdict(event.network, settings).network if seen.ours(settings.scope) else None
    if network is not None:
        return network
    if seen.uuid and names.network_directory(seen.uuid).is_dir():
        # A network that is not ours starts also where this fails; sync tries again.
        with suppress(NatnsError), event.sessions.engine(settings) as verbs:
            record = verbs.store.networks.get(seen.uuid)
            verbs.down(seen.uuid)
            leave(verbs, record)
    return None


def _abandon(seen: Glance) -> None:
    """Remove libvirt's part after a `started` that failed: libvirt leaves it.

    A network that is not ours goes on, as libvirt does not hear of the failure.
    """
    if ownership.of_network(seen):
        with Kernel() as kernel:
            abandon(kernel, seen.name, seen.bridge)


def _plug(event: Event) -> None:
    port = libvirt_xml.parse_hook_data(event.xml).port
    if port is not None:
        with event.sessions.engine() as verbs:
            Guests(verbs).plug(port.owner_uuid, Nic(port.mac, event.network.name))


def _unplug(event: Event) -> None:
    port = libvirt_xml.parse_hook_data(event.xml).port
    if port is not None:
        with event.sessions.engine() as verbs:
            Guests(verbs).unplug(port.owner_uuid, Nic(port.mac, event.network.name))


def _claim(event: Event) -> None:
    if _is_ours(event):
        with event.sessions.engine() as verbs:
            Guests(verbs).claim(event.guest.domain, event.xml)
        return
    # Wrong metadata must not stop a guest that is not ours.
    with suppress(NatnsError):
        _forget(event)


def _publish(event: Event) -> None:
    if _is_ours(event):
        with event.sessions.engine() as verbs:
            Guests(verbs).publish(event.guest.domain, event.xml)


def _is_ours(event: Event) -> bool:
    """True if a guest has a NIC in a network of ours; the configuration is not read.

    Raises StoreError.  ``ownership`` decides then whether that may stop the guest.
    """
    with closing(Store()) as store:
        return bool(in_ours(store, event.guest.plain))


# A guest that ends is known by its uuid: its document may not be acceptable any more.


def _withdraw(event: Event) -> None:
    with event.sessions.engine() as verbs:
        Guests(verbs).withdraw(at_domain(event.xml).uuid)


def _forget(event: Event) -> None:
    with event.sessions.engine() as verbs:
        Guests(verbs).forget(at_domain(event.xml).uuid)


def _follow_lease(event: Event) -> None:
    """Follow a network's DHCP lease; ``event.xml`` has the network's uuid instead of XML."""
    with event.sessions.engine() as verbs:
        verbs.follow_lease(event.xml.decode())


def _reopen(event: Event) -> None:
    """Follow the start of a network of others; libvirt does not wait for this."""
    if event.seen.forwards6:
        await_status(event.seen.name)
    _follow_forwarding(event)


def _follow_forwarding(event: Event) -> None:
    with event.sessions.engine() as verbs:
        shared_host.follow_forwarding(verbs)


GUEST: dict[tuple[str, str], Verb] = {
    ("prepare", "begin"): _claim,
    ("start", "begin"): _publish,
    ("stopped", "end"): _withdraw,
    ("release", "end"): _forget,
    ("reconnect", "begin"): _publish,
    ("attach", "begin"): _publish,
}

NETWORK: dict[tuple[str, str], Verb] = {
    ("start", "begin"): _prepare,
    ("started", "begin"): _up,
    ("updated", "begin"): _refresh,
    ("stopped", "end"): _down,
    ("port-created", "begin"): _plug,
    ("port-deleted", "begin"): _unplug,
    ("plugged", "begin"): _plug,
    ("unplugged", "begin"): _unplug,
}

LEASE: dict[tuple[str, str], Verb] = {("changed", "-"): _follow_lease}

HOST: dict[tuple[str, str], Verb] = {
    ("forwarding", "started"): _reopen,
    ("forwarding", "stopped"): _follow_forwarding,
}

TABLES = {"network": NETWORK, "guest": GUEST, "lease": LEASE, "host": HOST}


def answer(
    kind: str, event: tuple[str, str], data: bytes, sessions: Sessions | None = None
) -> FollowUp | None:
    """Answer one event of a "network", a "guest", a "lease" or the "host".

    Raises a NatnsError to refuse it.
    """
    return TABLES[kind][event](Event(data, sessions or Once()))
