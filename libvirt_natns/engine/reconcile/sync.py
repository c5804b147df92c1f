# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command sync: everything that differs from the records, or from libvirt, is repaired.

The module does not call libvirt: the caller hands over a way to ask which networks and guests are
active. libvirt is asked after the records were read.  A network that was recorded as up by then and
is not active has ended.  A network that starts at the same time is left alone.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from libvirt_natns import names
from libvirt_natns.daemons import dns_relay, dnsmasq_trial
from libvirt_natns.documents import libvirt_xml, xml_sniff
from libvirt_natns.engine import proxied_addresses, relay_check
from libvirt_natns.engine.adoption import adopt
from libvirt_natns.engine.down import down_unless_changed, tidy
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.guests.guest_engine import Guests
from libvirt_natns.engine.network_record import move_in_words
from libvirt_natns.engine.reconcile.active import (
    Active,
    AskGuests,
    AskNetworks,
    is_active,
    leftovers,
    name_of,
    network_of_ours,
    no_guests,
    stopped_guests,
    why_over,
)
from libvirt_natns.engine.reconcile.comparison import NO_ROUTER
from libvirt_natns.engine.reconcile.repairs import (
    NamedRepair,
    Outcome,
    repair_all,
    repair_latest,
    together,
)
from libvirt_natns.errors import ConflictError, NatnsError
from libvirt_natns.kernel.boot_clock import now
from libvirt_natns.model.network import Network
from libvirt_natns.state.guests import GuestRecord
from libvirt_natns.state.networks import NetworkRecord

if TYPE_CHECKING:
    from libvirt_natns.daemons.libvirt import ActiveDomains

RECENT = 5.0
"""Seconds within which libvirt sends the event of a start that its hooks told us of."""

NOT_OURS = "is not to be handled any more"


def sync_all(
    engine: Engine,
    ask: AskNetworks,
    ask_guests: AskGuests = no_guests,
    *,
    configured: bool = True,
) -> Outcome:
    """Repair all differences, and change nothing else.

    With ``configured``, networks that run move to the upstreams that today's configuration
    gives them.
    """
    records = engine.store.networks.all("preparing", "starting", "up")
    recorded = Guests(engine).store.guests.all()
    active, running = ask(), ask_guests()
    here = _running(engine, records, active)
    adopted = adopt(engine, active or {}, running.domains if running else {})
    done = [
        Outcome(adopted.found, adopted.errors),
        # Behind the adoption: the host keeps what recorded networks need.
        _hear_relays(engine),
        # Ends come first: another network may have the name or the bridge by now.
        repair_all(engine, _endings(engine, records, here, asked=active is not None)),
        repair_latest(
            engine,
            here,
            ask,
            lambda uuid, xml: (name_of(xml), partial(_repair_active, uuid, xml, ask, configured)),
        ),
        repair_all(engine, [("host", partial(Engine.ensure_host, configured=True))]),
        repair_all(engine, [("dnsmasq", tidy_trials)]),
        repair_all(
            engine,
            ((uuid, partial(_look_elsewhere, uuid)) for uuid in proxied_addresses.networks()),
        ),
    ]
    if running is not None:
        # The guests' networks are there by now.
        done += _guests(engine, recorded, running, ask_guests)
    return together(done)


def _hear_relays(engine: Engine) -> Outcome:
    """Forget complaints of DNS relays that answer by now, ahead of the networks that ask them."""
    outcome = Outcome([], [])
    if any(map(dns_relay.complaint, dns_relay.present())):
        # A part of the host, or the bridge's zone of firewalld's, may keep networks from a relay.
        outcome = repair_all(engine, [("host", partial(Engine.ensure_host, configured=True))])
    relay_check.recheck(engine)
    return outcome


def _guests(
    engine: Engine, recorded: list[GuestRecord], running: "ActiveDomains", ask: AskGuests
) -> list[Outcome]:
    """Bring all guests to libvirt's, and return the outcomes."""
    by_uuid = {record.uuid: record for record in recorded}
    for record in Guests(engine).store.guests.all():
        # An adopted guest has its row from the XML that is compared here.
        if record.document == running.domains.get(record.uuid):
            by_uuid.setdefault(record.uuid, record)

    def latest() -> Mapping[str, bytes] | None:
        # The rows are read before libvirt is asked, as at first: see ``converge``.
        by_uuid.update({record.uuid: record for record in Guests(engine).store.guests.all()})
        return _domains(ask())

    return [
        repair_all(engine, _guest_endings(recorded, running)),
        repair_latest(
            engine,
            running.domains,
            latest,
            lambda uuid, xml: (
                xml_sniff.at_domain(xml).name,
                partial(_converge_guest, xml, by_uuid.get(uuid)),
            ),
        ),
        repair_all(engine, [("guests", _tidy_guests)]),
    ]


def _look_elsewhere(uuid: str, engine: Engine) -> list[str]:
    return engine.look_elsewhere(uuid, proxied_addresses.Asked())


def _guest_endings(recorded: list[GuestRecord], running: "ActiveDomains") -> Iterator[NamedRepair]:
    for record in stopped_guests(recorded, running):
        yield record.name, partial(_end_guest, record)


def _domains(running: "ActiveDomains | None") -> Mapping[str, bytes] | None:
    return running.domains if running else None


def tidy_trials(_: Engine) -> list[str]:
    """Remove leftovers of dnsmasq's trials, and return what was removed."""
    return dnsmasq_trial.tidy()


def _tidy_guests(engine: Engine) -> list[str]:
    Guests(engine).tidy()
    return []


def _end_guest(record: GuestRecord, engine: Engine) -> list[str]:
    return Guests(engine).end(record)


def _converge_guest(xml: bytes, record: GuestRecord | None, engine: Engine) -> list[str]:
    return Guests(engine).converge(xml, record)


def _running(
    engine: Engine, records: list[NetworkRecord], active: Active | None
) -> dict[str, bytes]:
    """Return active networks, by their bridges where libvirt does not answer."""
    if active is not None:
        return dict(active)
    return {record.uuid: record.document for record in records if is_active(engine, record, active)}


def _endings(
    engine: Engine, records: list[NetworkRecord], running: Mapping[str, bytes], *, asked: bool
) -> Iterator[NamedRepair]:
    for record in records:
        if record.uuid not in running:
            yield record.name, partial(_end, record)
    for uuid, namespace in leftovers(engine):
        # Without a record and without libvirt, the bridge shows whether the network runs.
        if uuid not in running and (asked or not _on_a_bridge(engine, uuid)):
            yield namespace or uuid, partial(_tidy, uuid, namespace)


def _on_a_bridge(engine: Engine, uuid: str) -> bool:
    """Return whether a network's namespace is connected with the bridge that libvirt made."""
    return engine.kernel.host.links.master(names.private_patch(uuid)) is not None


def _end(record: NetworkRecord, engine: Engine) -> list[str]:
    ended = down_unless_changed(engine, record)
    return [f"{why_over(record)}: removed"] if ended and record.this_boot else []


def _tidy(uuid: str, namespace: str | None, engine: Engine) -> list[str]:
    return ["was left over: removed"] if tidy(engine, uuid, namespace) else []


def _repair_active(
    uuid: str, xml: bytes, ask: AskNetworks, configured: bool, engine: Engine
) -> list[str]:
    """Repair a network; drop an error if the network has ended at the same time."""
    try:
        return _repair(engine, uuid, xml, configured=configured)
    except Exception:
        active = ask()
        if active is None or uuid in active:
            raise
    return []


def _repair(engine: Engine, uuid: str, xml: bytes, *, configured: bool = False) -> list[str]:
    record = engine.store.networks.get(uuid)
    if record and record.unfinished:
        return []
    up = record is not None and record.runs
    if up and xml_sniff.at_network(xml).untouched:
        # Its end was missed, and the network that runs now is not to be handled.
        engine.hand_back(libvirt_xml.parse_any_network(xml))
        return [f"{NOT_OURS}: given back to libvirt"]
    # A network that is up stays up where only the configuration's scope has changed.
    network = libvirt_xml.parse_network(xml) if up else network_of_ours(engine, xml)
    if network is None:
        return []
    repaired = _up(engine, network, xml, configured)
    if record and up:
        Guests(engine).follow_move(record, network)
        repaired = _moved(engine, record) or repaired
    return repaired if up else [f"{NO_ROUTER}: made a router"]


def _moved(engine: Engine, former: NetworkRecord) -> list[str]:
    """Return a line about a network that has moved; empty if it stays on its upstream.

    All that differs from the former upstream would be a line each, and says less.
    """
    record = engine.store.networks.get(former.uuid)
    move = move_in_words(former, record.upstream, record.kind) if record else None
    return [move] if move else []


def _up(engine: Engine, network: Network, xml: bytes, configured: bool) -> list[str]:
    """Bring a network up, also where another network has left its namespace behind."""
    try:
        return engine.up(network, xml, configured=configured)
    except ConflictError:
        namespace = names.namespace(network.name)
        owner = engine.kernel.namespace_owner(namespace)
        if not owner or owner == network.uuid or not tidy(engine, owner, namespace):
            raise
    return engine.up(network, xml, configured=configured)


def network_changed(engine: Engine, uuid: str, ask: Callable[[], bytes | None]) -> list[str]:
    """Bring one network to its XML in libvirt, and return what was wrong.

    ``ask`` gets the XML from libvirt, or None if the network is not active.  libvirt is
    asked after the record was read.
    """
    record = engine.store.networks.get(uuid)
    xml = ask()
    if xml is None:
        return _end(record, engine) if record and record.state != "down" else []
    if record and _has_just_started(record, xml):
        return []
    guests = Guests(engine)
    before = guests.held(uuid)
    try:
        repaired = _repair(engine, uuid, xml)
    except Exception:
        if ask() is None:
            return []
        raise
    guests.cut_since(before)
    return repaired


def _has_just_started(record: NetworkRecord, xml: bytes) -> bool:
    """True if hooks have told of a network's start, so that nothing is left to do."""
    if record.state != "up" or not record.this_boot or now() - record.since > RECENT:
        return False
    with suppress(NatnsError):
        return libvirt_xml.parse_network(record.document) == libvirt_xml.parse_network(xml)
    return False
