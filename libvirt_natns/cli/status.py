# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command status: every network that was handled, and its health."""

import argparse
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial

from libvirt_natns import names
from libvirt_natns.addresses import unless_placeholder
from libvirt_natns.cli import (
    access,
    forward_list,
    libvirt_view,
    service_control,
    status_report,
    unhandled,
)
from libvirt_natns.cli.libvirt_view import LibvirtView
from libvirt_natns.cli.service_control import ServiceHealth
from libvirt_natns.cli.status_report import Status, StatusReport
from libvirt_natns.cli.unhandled import Unhandled
from libvirt_natns.daemons import lease_file
from libvirt_natns.engine import late_starts, names_health
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.late_starts import LateStart
from libvirt_natns.engine.reconcile import comparison, obstacles
from libvirt_natns.engine.reconcile.active import Finding
from libvirt_natns.engine.reconcile.obstacles import Obstacle, Obstacles
from libvirt_natns.model.configuration import Config
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.upstream import dhcp


def run(options: argparse.Namespace) -> int:
    """Print the status of all networks, or of one, as a table or for programs."""
    if options.json:
        print(as_json(options.network))
    else:
        print(status_report.text(report(options.network)))
    return 0


def report(named: str | None) -> StatusReport:
    """Return the status of all networks, or of one, and of all that they share."""
    with _asked() as (engine, health):
        view = libvirt_view.view(engine.config, guests=False)
        return _report(engine, view, health, named)


def as_json(named: str | None = None, *, wake: bool = True) -> str:
    """Return the status for programs, with guests, upstreams and all networks of libvirt.

    ``wake`` False starts no daemon of libvirt that sleeps.
    """
    # People read the table, so these modules need not be loaded for it.
    from libvirt_natns.cli import status_details

    with _asked() as (engine, health):
        view = libvirt_view.view(engine.config, wake=wake)
        found = _report(engine, view, health, named, wake=wake)
        details = status_details.collect(engine, view, found.statuses, named)
    found = replace(found, statuses=status_details.with_guests(found.statuses, details))
    return status_report.as_json(found, asdict(details))


@contextmanager
def _asked() -> Iterator[tuple[Engine, ServiceHealth]]:
    access.require_root()
    health = service_control.ask()
    with access.engine(look_only=True) as engine:
        yield engine, health


def _report(
    engine: Engine,
    view: LibvirtView,
    health: ServiceHealth,
    named: str | None,
    *,
    wake: bool = True,
) -> StatusReport:
    listed = [each.listed for each in view.networks]
    known = None if view.silent else frozenset(each.uuid for each in listed)
    statuses, found = collect(engine, known, named)
    active = {each.uuid: each.xml for each in listed if each.active}
    statuses = with_unhandled(with_health(statuses, health), active, engine.config, named)
    late = waiting(late_starts.waiting(engine), named)
    if named and not statuses and not late:
        raise unhandled.why_no_router(named, engine.config)
    host = comparison.host_differences(engine) + service_control.of_host(health)
    missed = [] if named else comparison.missed(engine, access.network_asker(wake=wake))
    ask_guests = partial(access.active_guests, wake=wake)
    guests = [] if named else comparison.guest_differences(engine, ask_guests)
    notes = (*found.notes, *names_health.notes())
    return StatusReport(statuses, host, missed, guests, health, late, found.stops, notes)


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
    leases = lease_file.leases(record.bridge) if state == "up" else []
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
        leases=len(leases),
        health=_health(state, differences, own),
        differences=differences,
        forwards=tuple(forward_list.collect(engine, record.uuid, published=True)),
        lease_seconds=dhcp.remaining(record.uuid) if state == "up" else None,
        obstacles=own,
        dhcp_leases=tuple(leases),
    )


def _health(state: str, differences: tuple[str, ...], own: tuple[Obstacle, ...]) -> str:
    if state != "up":
        return state
    if differences:
        return f"damaged ({len(differences)})"
    return own[0].brief if own else "ok"


def with_health(statuses: Sequence[Status], health: ServiceHealth) -> list[Status]:
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
