# SPDX-License-Identifier: LGPL-2.1-or-later
"""check and sync: what was recorded against what the kernel and libvirt show.

Nothing here calls libvirt: the caller hands over a way to ask which networks
are active.  It is asked after the records were read: what was recorded as up
by then and is not active any more has ended, while a network that starts in
the meantime is let alone.

Networks are repaired several at once, each worker with a database connection and
a kernel session of its own: what takes long is to wait, for an address that might
answer, for dnsmasq, and for the kernel.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Protocol

from libvirt_natns import names
from libvirt_natns.daemons import dnsmasq_trial
from libvirt_natns.documents import libvirt_xml, xml_sniff
from libvirt_natns.engine import apply, given_up, proxied_addresses
from libvirt_natns.engine.adoption import adopt
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.guests import Guests
from libvirt_natns.errors import ConflictError, NatnsError
from libvirt_natns.kernel.boot import now
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.network import Network
from libvirt_natns.records import dataclass, replace
from libvirt_natns.state.guests import GuestRecord
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import dhcp, selection
from libvirt_natns.upstream.selection import verdict

Active = Mapping[str, bytes]
"""Networks that libvirt has active: their XML by uuid."""

Ask = Callable[[], Active | None]
"""Asks libvirt for them; None where it does not answer.  A network whose bridge
is there counts as active then."""


class Running(Protocol):
    """The domains that libvirt has active."""

    @property
    def domains(self) -> Mapping[str, bytes]:
        """Their XML by uuid."""

    def may_run(self, container: bool) -> bool:
        """Whether one that is not among them may run all the same: nobody could tell."""


AskGuests = Callable[[], Running | None]
"""Asks libvirt for them; None where it does not answer.  All stay as they are then."""


def no_guests() -> None:
    """Leaves guests alone."""


Finding = tuple[str, str]
"""A network's name ("host" for what they share), and what is to be said of it."""

Repair = tuple[str, Callable[[Engine], list[str]]]
"""A network's name, and what repairs it and returns what was wrong."""

WORKERS = 8
"""How many networks are repaired at once."""

ROUNDS = 3
"""How often one is repaired at most where libvirt's word changes meanwhile."""

RECENT = 5.0
"""Seconds within which libvirt tells others of a start that its hooks told us of."""

NOT_ACTIVE = "is not active in libvirt any more"
GIVEN_UP = "is left over from a start that libvirt gave up"
NO_ROUTER = "is active in libvirt, but has no router"
NOT_OURS = "is not to be handled any more"


# -- looking -----------------------------------------------------------------


def differences(engine: Engine, record: NetworkRecord) -> list[str]:
    """How the kernel differs from what a network that is up needs, in words."""
    if record.state != "up":
        return []
    try:
        network = libvirt_xml.parse_network(record.document)
        upstream = engine.planner.upstream(network)
        lacks = engine.planner.lacks(network, upstream)
        if lacks:
            return [f"no {what} of upstream {upstream.name} is leased" for what in lacks]
        plan = engine.planner.plan(network, upstream)
        configured = selection.upstream_of(network, engine.config)
        found = dhcp.differences(engine.store, record, network, upstream, configured)
        return found + apply.differences(engine.kernel, plan)
    except NatnsError as error:
        return [str(error)]


def host_differences(engine: Engine) -> list[str]:
    """The same for what the networks share in the host."""
    try:
        return engine.host_differences()
    except NatnsError as error:
        return [str(error)]


def host_obstacles(engine: Engine) -> tuple[str, ...]:
    """Return a note for each chain of others that drops the networks' packets.

    Notes are no differences: the chain is an administrator's, and no repair changes it.
    """
    try:
        return engine.host_obstacles()
    except NatnsError as error:
        return (str(error),)


def missed(engine: Engine, ask: Ask) -> list[Finding]:
    """Starts and stops that no hook told of, and what a lost record has left behind."""
    records = engine.store.networks.all("preparing", "starting", "up")
    active = ask()
    # What was up before a reboot has left nothing.
    found = [
        (record.name, _why_over(record))
        for record in records
        if record.this_boot and not _is_active(engine, record, active)
    ]
    for uuid, xml in (active or {}).items():
        found += [(_name(xml), what) for what in _unhandled(engine, uuid, xml)]
    found += [
        (namespace or uuid, "is left over")
        for uuid, namespace in _leftovers(engine)
        if uuid not in (active or {})
    ]
    return found


def guest_differences(engine: Engine, ask: AskGuests) -> list[Finding]:
    """Guests whose metadata says something else than is published, or that have gone."""
    recorded = Guests(engine).store.guests.all()
    running = ask()
    if running is None:
        return []
    found = [(record.name, NOT_ACTIVE) for record in _stopped(recorded, running)]
    for xml in running.domains.values():
        name = xml_sniff.at_domain(xml).name
        found += [(name, what) for what in Guests(engine).differences(xml)]
    return found


def _stopped(recorded: list[GuestRecord], running: Running) -> list[GuestRecord]:
    return [
        record
        for record in recorded
        if record.uuid not in running.domains
        and not running.may_run(libvirt_xml.is_container(record.document))
    ]


def _unhandled(engine: Engine, uuid: str, xml: bytes) -> list[str]:
    """Why an active network is not up, although it is ours."""
    record = engine.store.networks.get(uuid)
    up = record is not None and record.runs
    try:
        if up or _network_of_ours(engine, xml) is None:
            return []
    except NatnsError as error:
        return [f"{NO_ROUTER}: {error}"]
    return [NO_ROUTER]


def _network_of_ours(engine: Engine, xml: bytes) -> Network | None:
    """The network, if it is to be handled.  Raises DocumentError."""
    if xml_sniff.at_network(xml).untouched:
        return None
    network = libvirt_xml.parse_network(xml)
    return network if verdict(network, engine.config).handled else None


def _leftovers(engine: Engine) -> Iterator[tuple[str, str | None]]:
    """Namespaces and directories of ours whose network is not recorded as running.

    As the network's uuid, with the namespace where there is one.  A namespace that
    bears the name of one that runs is looked at when that one is.
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


def _is_active(engine: Engine, record: NetworkRecord, active: Active | None) -> bool:
    if active is not None:
        # libvirt tells of a network once its start is over.
        return record.uuid in active
    if record.unfinished:
        return not given_up.is_given_up(record)
    return engine.kernel.link(None, record.bridge) is not None


def _name(xml: bytes) -> str:
    return xml_sniff.at_network(xml).name or "?"


# -- repairing ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was wrong and has been repaired, and in words what could not be."""

    repaired: list[Finding]
    errors: list[str]


def sync(engine: Engine, ask: Ask, ask_guests: AskGuests = no_guests) -> Outcome:
    """Repair everything; what is well is not touched."""
    records = engine.store.networks.all("preparing", "starting", "up")
    recorded = Guests(engine).store.guests.all()
    active, running = ask(), ask_guests()
    here = _running(engine, records, active)
    adopted = adopt(engine, active or {}, running.domains if running else {})
    done = [
        Outcome(adopted.found, adopted.errors),
        # First, for their names and bridges may be another network's by now.
        _carry_out(engine, _endings(engine, records, here, asked=active is not None)),
        _carry_out_latest(engine, here, ask, lambda uuid, xml: _network_repair(uuid, xml, ask)),
        _carry_out(engine, [("host", partial(Engine.ensure_host, configured=True))]),
        _carry_out(engine, [("dnsmasq", _tidy_trials)]),
        _carry_out(
            engine,
            ((uuid, partial(_look_elsewhere, uuid)) for uuid in proxied_addresses.networks()),
        ),
    ]
    if running is not None:
        # Their networks are there by now.
        done.append(_carry_out(engine, _guest_endings(recorded, running)))
        known = {record.uuid: record for record in recorded}
        done.append(
            _carry_out_latest(
                engine,
                running.domains,
                lambda: _domains(ask_guests()),
                lambda uuid, xml: _guest_repair(xml, known.get(uuid)),
            )
        )
        done.append(_carry_out(engine, [("guests", _tidy_guests)]))
    return _together(done)


def _look_elsewhere(uuid: str, engine: Engine) -> list[str]:
    return engine.look_elsewhere(uuid, proxied_addresses.Asked())


def _guest_endings(recorded: list[GuestRecord], running: Running) -> Iterator[Repair]:
    for record in _stopped(recorded, running):
        yield record.name, partial(_end_guest, record)


def _guest_repair(xml: bytes, record: GuestRecord | None) -> Repair:
    return xml_sniff.at_domain(xml).name, partial(_converge_guest, xml, record)


def _network_repair(uuid: str, xml: bytes, ask: Ask) -> Repair:
    return _name(xml), partial(_repair_active, uuid, xml, ask)


def _domains(running: Running | None) -> Mapping[str, bytes] | None:
    return running.domains if running else None


def _tidy_trials(_: Engine) -> list[str]:
    return dnsmasq_trial.tidy()


def _tidy_guests(engine: Engine) -> list[str]:
    Guests(engine).tidy()
    return []


def _end_guest(record: GuestRecord, engine: Engine) -> list[str]:
    return Guests(engine).end(record)


def _converge_guest(xml: bytes, record: GuestRecord | None, engine: Engine) -> list[str]:
    """Bring a guest to its XML, unless an event has brought it to another since ``record``."""
    guests = Guests(engine)
    latest = guests.store.guests.get(record.uuid) if record else None
    if record and latest and latest.document != record.document:
        return []
    return guests.converge(xml, record is not None)


def _carry_out_latest(
    engine: Engine,
    documents: Mapping[str, bytes],
    ask: Callable[[], Mapping[str, bytes] | None],
    repair: Callable[[str, bytes], Repair],
) -> Outcome:
    """Repair each by its XML, and again those of which libvirt says something else by then.

    An event may bring newer XML, and have it applied, between the listing and the
    repair: what was repaired by the older one is wrong then, and no event is to come.
    """
    done: list[Outcome] = []
    for _ in range(ROUNDS):
        outcomes = _outcomes(engine, [repair(*each) for each in documents.items()])
        by_uuid = dict(zip(documents, outcomes, strict=True))
        touched = {uuid for uuid, one in by_uuid.items() if one.repaired or one.errors}
        latest = (ask() if touched else None) or {}
        documents = {
            uuid: latest[uuid]
            for uuid in touched & latest.keys()
            if latest[uuid] != documents[uuid]
        }
        for uuid, one in by_uuid.items():
            done.append(replace(one, errors=[]) if uuid in documents else one)
    return _together(done)


def _carry_out(engine: Engine, repairs: Iterable[Repair]) -> Outcome:
    """All of it, whatever fails on the way."""
    return _together(_outcomes(engine, repairs))


def _outcomes(engine: Engine, repairs: Iterable[Repair]) -> list[Outcome]:
    """What came of each repair, in order; several are carried out at once."""
    jobs = list(enumerate(repairs))
    waiting = deque(jobs)
    workers = min(WORKERS, len(jobs))
    outcomes: dict[int, Outcome] = {}

    def work() -> None:
        with _engine_like(engine) as own:
            while waiting:
                try:
                    number, repair = waiting.popleft()
                except IndexError:
                    return
                outcomes[number] = _attempt(own, repair)
                # Or it would keep a socket in every namespace.
                own.kernel.close()

    if workers < 2:
        outcomes = {number: _attempt(engine, repair) for number, repair in jobs}
    else:
        with ThreadPoolExecutor(workers) as pool:
            for future in [pool.submit(work) for _ in range(workers)]:
                future.result()
    return [outcomes[number] for number, _ in jobs]


def _together(outcomes: Iterable[Outcome]) -> Outcome:
    whole = Outcome([], [])
    for each in outcomes:
        whole.repaired.extend(each.repaired)
        whole.errors.extend(each.errors)
    return whole


@contextmanager
def _engine_like(engine: Engine) -> Iterator[Engine]:
    """The same verbs with a database connection and a kernel session of their own."""
    with closing(Store(engine.store.path.parent)) as store, Kernel() as kernel:
        yield replace(engine, store=store, kernel=kernel)


def _attempt(engine: Engine, repair: Repair) -> Outcome:
    name, mend = repair
    try:
        return Outcome([(name, what) for what in mend(engine)], [])
    except NatnsError as error:
        told = str(error)
        return Outcome([], [told if name in told else f"{name}: {told}"])


def _running(
    engine: Engine, records: list[NetworkRecord], active: Active | None
) -> dict[str, bytes]:
    """Networks that are active, by their bridges where libvirt does not answer."""
    if active is not None:
        return dict(active)
    return {
        record.uuid: record.document for record in records if _is_active(engine, record, active)
    }


def _endings(
    engine: Engine, records: list[NetworkRecord], running: Mapping[str, bytes], *, asked: bool
) -> Iterator[Repair]:
    for record in records:
        if record.uuid not in running:
            yield record.name, partial(_end, record)
    for uuid, namespace in _leftovers(engine):
        # Without a record and without libvirt, the bridge tells.
        if uuid not in running and (asked or not _on_a_bridge(engine, uuid)):
            yield namespace or uuid, partial(_tidy, uuid, namespace)


def _on_a_bridge(engine: Engine, uuid: str) -> bool:
    """Return whether a network's namespace is connected with the bridge that libvirt made."""
    return engine.kernel.master_of(names.private_patch(uuid)) is not None


def _end(record: NetworkRecord, engine: Engine) -> list[str]:
    ended = engine.down_unless_changed(record)
    return [f"{_why_over(record)}: removed"] if ended and record.this_boot else []


def _why_over(record: NetworkRecord) -> str:
    return NOT_ACTIVE if record.state == "up" else GIVEN_UP


def _tidy(uuid: str, namespace: str | None, engine: Engine) -> list[str]:
    return ["was left over: removed"] if engine.tidy(uuid, namespace) else []


def _repair_active(uuid: str, xml: bytes, ask: Ask, engine: Engine) -> list[str]:
    """Repair a network, unless it turns out to have ended in the meantime."""
    try:
        return _repair(engine, uuid, xml)
    except NatnsError:
        active = ask()
        if active is None or uuid in active:
            raise
    return []


def _repair(engine: Engine, uuid: str, xml: bytes) -> list[str]:
    record = engine.store.networks.get(uuid)
    if record and record.unfinished:
        return []
    up = record is not None and record.runs
    if up and xml_sniff.at_network(xml).untouched:
        # Its end was missed, and what runs now says that it is none of ours.
        engine.hand_back(libvirt_xml.parse_network(xml))
        return [f"{NOT_OURS}: given back to libvirt"]
    # One that is up stays so where only the configuration's scope has changed.
    network = libvirt_xml.parse_network(xml) if up else _network_of_ours(engine, xml)
    if network is None:
        return []
    found = _up(engine, network, xml)
    return found if up else [f"{NO_ROUTER}: it has got one"]


def _up(engine: Engine, network: Network, xml: bytes) -> list[str]:
    """Bring a network up, also where one that is gone has left its namespace behind."""
    try:
        return engine.up(network, xml)
    except ConflictError:
        namespace = names.namespace(network.name)
        owner = engine.kernel.namespace_owner(namespace)
        if not owner or owner == network.uuid or not engine.tidy(owner, namespace):
            raise
    return engine.up(network, xml)


def network_changed(engine: Engine, uuid: str, ask: Callable[[], bytes | None]) -> list[str]:
    """Bring one network to what libvirt says of it; returns what was wrong.

    ``ask`` gets its XML from libvirt, None where it is not active.  It is asked
    after the record was read, as for all of them.
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
    except NatnsError:
        if ask() is None:
            return []
        raise
    guests.cut_since(before)
    return repaired


def _has_just_started(record: NetworkRecord, xml: bytes) -> bool:
    """Whether hooks have told of a network's start, so there is nothing to look after."""
    if record.state != "up" or not record.this_boot or now() - record.since > RECENT:
        return False
    with suppress(NatnsError):
        return libvirt_xml.parse_network(record.document) == libvirt_xml.parse_network(xml)
    return False


def release(engine: Engine, ask: Ask, *, renew: bool) -> Outcome:
    """Give every network back to libvirt, and remove whatever is left of ours.

    ``renew``: libvirt is reloaded afterwards, see ``Engine.hand_back``.  Where
    networks overlap, libvirt's dnsmasq go on without their lease helper.
    """
    records = engine.store.networks.all("preparing", "starting", "up")
    done = [
        _carry_out(engine, _releases(engine, records, ask(), renew)),
        _carry_out(engine, _forgettings(engine)),
        _carry_out(engine, [("host", Engine.ensure_host)]),
        _carry_out(engine, [("dnsmasq", _tidy_trials)]),
    ]
    return _together(done)


def _releases(
    engine: Engine, records: list[NetworkRecord], active: Active | None, renew: bool
) -> Iterator[Repair]:
    recorded = {record.uuid: record for record in records}
    ours = {uuid: record.namespace for uuid, record in recorded.items()} | dict(_leftovers(engine))
    for uuid, namespace in ours.items():
        record = recorded.get(uuid)
        documents = [record.document] if record else []
        if active is not None:
            documents = [active[uuid], *documents] if uuid in active else []
        name = record.name if record else namespace or uuid
        again = renew and record is not None and _alone(record, records)
        yield name, partial(_release, uuid, namespace, documents, again)


def _forgettings(engine: Engine) -> Iterator[Repair]:
    for guest in engine.store.guests.all():
        yield guest.name, partial(_forget, guest.uuid)


def _forget(guest: str, engine: Engine) -> list[str]:
    Guests(engine).forget(guest)
    return []


def _alone(record: NetworkRecord, records: list[NetworkRecord]) -> bool:
    """Whether no other network has the same addresses.

    Of two dnsmasq with one address, libvirt can only start the first.  Those that
    run get along, as the address comes when they are there.
    """
    others = [other for other in records if other.uuid != record.uuid]
    return not any(
        mine.overlaps(theirs)
        for other in others
        for mine in record.subnets
        for theirs in other.subnets
    )


def _release(
    uuid: str, namespace: str | None, documents: list[bytes], renew: bool, engine: Engine
) -> list[str]:
    """Hand a network back by the first document that is acceptable; remove it without one."""
    if not documents:
        engine.down(uuid)
        engine.tidy(uuid, namespace)
        return ["removed"]
    try:
        network = libvirt_xml.parse_network(documents[0])
    except NatnsError:
        if len(documents) == 1:
            raise
        return _release(uuid, namespace, documents[1:], renew, engine)
    engine.hand_back(network, renew=renew)
    return ["given back to libvirt"]
