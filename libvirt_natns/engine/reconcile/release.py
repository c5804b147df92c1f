# SPDX-License-Identifier: LGPL-2.1-or-later
"""The end of libvirt-natns on a host: each network is given back to libvirt."""

from collections.abc import Iterator
from functools import partial

from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine.down import tidy
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.guests.guest_engine import Guests
from libvirt_natns.engine.reconcile.active import Active, AskNetworks, leftovers
from libvirt_natns.engine.reconcile.repairs import NamedRepair, Outcome, repair_all, together
from libvirt_natns.engine.reconcile.sync import tidy_trials
from libvirt_natns.errors import NatnsError
from libvirt_natns.state.networks import NetworkRecord


def release_all(engine: Engine, ask: AskNetworks, *, renew: bool) -> Outcome:
    """Give every network back to libvirt, and remove all that is left of ours.

    ``renew``: libvirt is reloaded afterwards, see ``hand_back``.  Where networks
    overlap, libvirt's dnsmasq go on without their lease helper.
    """
    records = engine.store.networks.all("preparing", "starting", "up")
    done = [
        repair_all(engine, _releases(engine, records, ask(), renew)),
        repair_all(
            engine,
            ((guest.name, partial(_forget, guest.uuid)) for guest in engine.store.guests.all()),
        ),
        repair_all(engine, [("host", Engine.ensure_host)]),
        repair_all(engine, [("dnsmasq", tidy_trials)]),
    ]
    return together(done)


def _releases(
    engine: Engine, records: list[NetworkRecord], active: Active | None, renew: bool
) -> Iterator[NamedRepair]:
    recorded = {record.uuid: record for record in records}
    ours = {uuid: record.namespace for uuid, record in recorded.items()} | dict(leftovers(engine))
    for uuid, namespace in ours.items():
        record = recorded.get(uuid)
        documents = [record.document] if record else []
        if active is not None:
            documents = [active[uuid], *documents] if uuid in active else []
        name = record.name if record else namespace or uuid
        again = renew and record is not None and _alone(record, records)
        yield name, partial(_release, uuid, namespace, documents, again)


def _forget(guest: str, engine: Engine) -> list[str]:
    Guests(engine).forget(guest)
    return []


def _alone(record: NetworkRecord, records: list[NetworkRecord]) -> bool:
    """True if no other network has addresses of this network's subnets.

    Of two dnsmasq with one address, libvirt can start only the first.  Two that run
    already stay, as their bridges get the address afterwards.
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
    """Give a network back by its first acceptable document; remove it without a document."""
    if not documents:
        engine.down(uuid)
        tidy(engine, uuid, namespace)
        return ["removed"]
    try:
        network = libvirt_xml.parse_any_network(documents[0])
    except NatnsError:
        if len(documents) == 1:
            raise
        return _release(uuid, namespace, documents[1:], renew, engine)
    engine.hand_back(network, renew=renew)
    return ["given back to libvirt"]
