# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands check and sync: compare what was set up with the kernel, and repair it."""

import argparse
import sys
from collections.abc import Sequence

from libvirt_natns.cli import access, json_text, unhandled
from libvirt_natns.documents import config
from libvirt_natns.engine import rebuild
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.reconcile import obstacles
from libvirt_natns.engine.reconcile.active import AskNetworks, Finding
from libvirt_natns.engine.reconcile.comparison import (
    guest_differences,
    host_differences,
    missed,
    network_differences,
)
from libvirt_natns.engine.reconcile.obstacles import Obstacles
from libvirt_natns.engine.reconcile.sync import sync_all
from libvirt_natns.errors import NatnsError
from libvirt_natns.state.networks import NetworkRecord


def check(options: argparse.Namespace) -> int:
    """Print each difference, and each obstacle on the way out; 1 if there is any."""
    with access.engine(look_only=True) as engine:
        ask = access.network_asker()
        findings, found = _findings(engine, options.network, ask)
        # A network that starts or ends during the comparison differs for a moment only.
        again = set(_findings(engine, options.network, ask)[0]) if findings else set()
    lasting = [finding for finding in findings if finding in again]
    notes = [*found.stops, *found.notes]
    if options.json:
        print(_as_json(lasting, notes))
    else:
        for name, what in lasting:
            print(f"{name}: {what}")
        for note in notes:
            print(f"note: {note}")
    return 1 if lasting else 0


def _as_json(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    """Return the differences and notes for programs."""
    listed = [{"name": name, "difference": what} for name, what in findings]
    return json_text.dumped({"differences": listed, "notes": list(notes)})


def _findings(
    engine: Engine, named: str | None, ask: AskNetworks
) -> tuple[list[Finding], Obstacles]:
    """Return all differences and sure obstacles, or those of one network and the host."""
    records = networks_up(engine, named)
    findings = [(r.name, what) for r in records for what in network_differences(engine, r)]
    findings += [("host", what) for what in host_differences(engine)]
    damaged = {name for name, _ in findings}
    found = obstacles.find(engine, records)
    for record in records:
        # Names are served through the host's part as well.
        own = found.of(record.uuid, damaged=bool({record.name, "host"} & damaged))
        findings += [(record.name, each.reason) for each in own if each.sure]
    if not named:
        findings += missed(engine, ask)
        findings += guest_differences(engine, access.active_guests)
    return findings, found


def networks_up(engine: Engine, named: str | None) -> list[NetworkRecord]:
    """Return the networks that are up, or the network of that name or uuid.

    Raises NatnsError where the named network is not up.
    """
    records = [record for record in engine.store.networks.all("up") if record.this_boot]
    if named is None:
        return records
    matching = [record for record in records if named in (record.name, record.uuid)]
    if not matching:
        raise unhandled.why_no_router(named, engine.config)
    return matching


def sync(options: argparse.Namespace) -> int:
    """Repair each difference.  Raises NatnsError for differences that stay.

    With --dry-run, print each difference alone.
    """
    if options.dry_run:
        # No other command needs it.
        from libvirt_natns.engine.reconcile import dry_run

        with access.engine(look_only=True) as engine:
            findings = dry_run.foresee(engine, access.network_asker(), access.active_guests)
        for name, what in findings:
            print(f"{name}: {what}")
        return 0
    rebuild_state()
    with access.engine() as engine:
        return repair(engine)


def rebuild_state() -> None:
    """Rebuild a damaged state database from what runs; an error there ends nothing."""
    access.require_root()
    outcome = rebuild.rebuild(config.load(), access.network_asker(), access.active_guests)
    for name, what in outcome.found:
        print(f"{name}: {what}")
    for error in outcome.errors:
        print(f"virt-natns: {error}", file=sys.stderr)


def repair(engine: Engine) -> int:
    """Repair each difference and print it.  Raises NatnsError for differences that stay."""
    outcome = sync_all(engine, access.network_asker(), access.active_guests)
    for name, what in outcome.repaired:
        print(f"{name}: {what}")
    if outcome.errors:
        raise NatnsError("; ".join(outcome.errors))
    return 0
