# SPDX-License-Identifier: LGPL-2.1-or-later
"""A look at all that ``sync`` would do: ``virt-natns sync --dry-run``.

The caller hands over a way to ask libvirt, as for ``sync``.

Limits: a network that moves is one line.  Its move changes the host's part and its guests'
forwards, so their differences are not listed then.  Repairs that follow from other repairs are
not foreseen.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from libvirt_natns.documents import libvirt_xml, xml_sniff
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.guests.guest_engine import Guests
from libvirt_natns.engine.guests.nics import has_nic
from libvirt_natns.engine.network_record import move_in_words
from libvirt_natns.engine.reconcile import comparison
from libvirt_natns.engine.reconcile.active import AskGuests, AskNetworks, Finding, is_active
from libvirt_natns.engine.reconcile.sync import NOT_OURS
from libvirt_natns.errors import NatnsError
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.upstream import selection


def foresee(engine: Engine, ask: AskNetworks, ask_guests: AskGuests) -> list[Finding]:
    """Return the differences that ``sync`` would repair, and the networks that would move."""
    records = [record for record in engine.store.networks.all("up") if record.this_boot]
    active = ask()
    running = [record for record in records if is_active(engine, record, active)]
    documents = {r.uuid: active[r.uuid] if active is not None else r.document for r in running}
    moves = {r.uuid: move for r in running if (move := _move(engine, r, documents[r.uuid]))}
    findings: list[Finding] = []
    for record in running:
        if record.uuid in moves:
            findings.append((record.name, moves[record.uuid]))
            continue
        lines = _differences(engine, record, documents[record.uuid])
        findings += ((record.name, what) for what in lines)
    if not moves:
        findings += (("host", what) for what in comparison.host_differences(engine))
    findings += comparison.missed(engine, ask)
    moved = [record for record in running if record.uuid in moves]
    return findings + _of_guests(engine, ask_guests, moved)


def _move(engine: Engine, record: NetworkRecord, xml: bytes) -> str | None:
    """Return in words to which upstream a network moves; None if it stays."""
    if xml_sniff.at_network(xml).untouched:
        return None
    with suppress(NatnsError):
        upstream = selection.upstream_of(libvirt_xml.parse_network(xml), engine.config)
        return move_in_words(record, upstream.name, upstream.kind)
    return None


def _differences(engine: Engine, record: NetworkRecord, xml: bytes) -> list[str]:
    """Return what ``sync`` would repair in a network that stays on its upstream."""
    if xml_sniff.at_network(xml).untouched:
        return [f"{NOT_OURS}: given back to libvirt"]
    return comparison.network_differences(engine, replace(record, document=xml))


def _of_guests(engine: Engine, ask: AskGuests, moved: Iterable[NetworkRecord]) -> list[Finding]:
    """Return the differences of guests, without guests in networks that move."""
    away = {
        guest.name
        for network in moved
        for guest in Guests(engine).store.guests.all()
        if has_nic(guest, network)
    }
    findings = comparison.guest_differences(engine, ask)
    return [(name, what) for name, what in findings if name not in away]
