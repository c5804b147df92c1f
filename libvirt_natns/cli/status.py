# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command status: every network that was handled, and its health."""

import argparse
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from libvirt_natns import names
from libvirt_natns.addresses import unless_placeholder
from libvirt_natns.cli import access, forward_list, service_control, status_report, unhandled
from libvirt_natns.cli.status_report import Status, StatusReport
from libvirt_natns.cli.unhandled import Unhandled
from libvirt_natns.daemons import lease_file, libvirt
from libvirt_natns.engine import late_starts, names_health
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.late_starts import LateStart
from libvirt_natns.engine.reconcile import comparison, obstacles
from libvirt_natns.engine.reconcile.active import Finding
from libvirt_natns.engine.reconcile.obstacles import Obstacle, Obstacles
from libvirt_natns.errors import LibvirtError
from libvirt_natns.model.configuration import Config
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.upstream import dhcp


def run(options: argparse.Namespace) -> int:
    """Print the status of all networks, or of one, as a table or for programs."""
    access.require_root()
    health = service_control.ask()
    named = options.network
    with access.engine(look_only=True) as engine:
        statuses, found = collect(engine, _defined(), named)
        statuses = with_health(statuses, health)
        statuses = with_unhandled(statuses, _active(), engine.config, named)
        late = waiting(late_starts.waiting(engine), named)
        if named and not statuses and not late:
            raise unhandled.why_no_router(named, engine.config)
        host = comparison.host_differences(engine) + service_control.of_host(health)
        missed = [] if named else comparison.missed(engine, access.network_asker())
        guests = [] if named else comparison.guest_differences(engine, access.active_guests)
        notes = (*found.notes, *names_health.notes())
    report = StatusReport(statuses, host, missed, guests, health, late, found.stops, notes)
    print(status_report.as_json(report) if options.json else status_report.text(report))
    return 0


def _defined() -> frozenset[str] | None:
    """Return the uuids of all networks that are defined; None where libvirt does not answer."""
    try:
        return frozenset(libvirt.uuids())
    except LibvirtError:
        return None


def _active() -> Mapping[str, bytes]:
    """Return the XML of all active networks, by uuid; none where libvirt does not answer."""
    try:
        return libvirt.active_networks()
    except LibvirtError:
        return {}


# -- facts -------------------------------------------------------------------


def collect(
    engine: Engine, known: Collection[str] | None, named: str | None = None
) -> tuple[list[Status], Obstacles]:
    """Return the status of all networks that were handled, or of the network ``named``.

    Returns the obstacles of the networks that are up as well.

    ``known`` are the uuids of the networks that libvirt has.  Others that are down are left
    out unless they are named: there may be thousands of transient networks.
    """
    records = [r for r in engine.store.networks.all() if named in (None, r.name, r.uuid)]
    if known is not None and named is None:
        records = [r for r in records if r.runs or r.uuid in known]
    # A network that was defined anew has several records, and the newest counts.
    records.sort(key=lambda r: (r.runs, r.this_boot, r.since))
    newest = {record.name: record for record in records}
    latest = sorted(newest.values(), key=lambda r: r.name)
    found = obstacles.find(engine, [r for r in latest if r.runs and r.state == "up"])
    return [_status(engine, record, found) for record in latest], found


def _status(engine: Engine, record: NetworkRecord, found: Obstacles) -> Status:
    """Return the status of a recorded network."""
    state = record.state if record.runs else "down"
    differences = tuple(comparison.network_differences(engine, record)) if state == "up" else ()
    own = found.of(record.uuid, damaged=bool(differences))
    leased = engine.store.leases.of(record.upstream, record.uuid)
    address = unless_placeholder(leased.address)
    return Status(
        network=record.name,
        uuid=record.uuid,
        state=state,
        namespace=record.namespace,
        bridge=record.bridge,
        subnets=tuple(map(str, record.subnets)),
        upstream=record.upstream,
        address=str(address) if address else None,
        address6=str(leased.address6) if leased.address6 else None,
        prefix=str(leased.prefix) if leased.prefix else None,
        leases=len(lease_file.current(record.bridge)) if state == "up" else 0,
        health=_health(state, differences, own),
        differences=differences,
        forwards=tuple(forward_list.collect(engine, record.uuid, published=True)),
        lease_seconds=dhcp.remaining(record.uuid) if state == "up" else None,
        obstacles=own,
    )


def _health(state: str, differences: tuple[str, ...], own: tuple[Obstacle, ...]) -> str:
    if state != "up":
        return state
    if differences:
        return f"damaged ({len(differences)})"
    return own[0].brief if own else "ok"


def with_health(statuses: Sequence[Status], health: service_control.ServiceHealth) -> list[Status]:
    """Return the statuses; a network that the service has given up is shown as such."""
    return [
        replace(status, health=service_control.given_up(health.given_up[status.uuid]))
        if status.uuid in health.given_up
        else status
        for status in statuses
    ]


def with_unhandled(
    statuses: Sequence[Status], active: Mapping[str, bytes], config: Config, named: str | None
) -> list[Status]:
    """Return the statuses, with the networks that are active in libvirt without a router.

    A network that was never handled is listed if its metadata says enabled="no", or if it is
    ``named`` and has no ``<forward>``.
    """
    by_name = {status.network: status for status in statuses}
    running = [status.uuid for status in statuses if status.state != "down"]
    for each in unhandled.unhandled(active, running, config):
        recorded = by_name.get(each.name)
        isolated = each.network is not None and each.network.forward_mode is None
        if recorded is not None and recorded.state == "down":
            state = "down" if each.health == unhandled.NO_ROUTER else "isolated"
            by_name[each.name] = replace(recorded, state=state, uuid=each.uuid, health=each.health)
        elif recorded is None and isolated and _is_listed(each, named):
            by_name[each.name] = _never_handled(each)
    return [by_name[name] for name in sorted(by_name)]


def waiting(late: Iterable[LateStart], named: str | None) -> tuple[Finding, ...]:
    """Return the networks that wait for their upstream, or the one of that name or uuid."""
    return tuple(
        (each.name, each.fault or "its upstream is there by now")
        for each in late
        if named in (None, each.name, each.uuid)
    )


def _is_listed(network: Unhandled, named: str | None) -> bool:
    return network.asked if named is None else named in (network.name, network.uuid)


def _never_handled(unhandled: Unhandled) -> Status:
    network = unhandled.network
    return Status(
        network=unhandled.name,
        uuid=unhandled.uuid,
        state="isolated",
        namespace=names.namespace(unhandled.name),
        bridge=(network.bridge if network else None) or "",
        subnets=tuple(str(subnet.network) for subnet in network.subnets) if network else (),
        upstream="-",
        address=None,
        leases=0,
        health=unhandled.health,
        differences=(),
    )
