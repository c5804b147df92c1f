# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command status: every network that was handled, and its health."""

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from libvirt_natns.addresses import unless_placeholder
from libvirt_natns.cli import access, columns, forward_list, service_control
from libvirt_natns.daemons import lease_file, libvirt
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.host import zone
from libvirt_natns.engine.reconcile import comparison
from libvirt_natns.engine.reconcile.active import Finding
from libvirt_natns.errors import LibvirtError, NatnsError
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.upstream import dhcp

HEADINGS = ("NETWORK", "NAMESPACE", "SUBNET", "UPSTREAM", "ADDRESS", "LEASES", "HEALTH")
NONE = (
    "no network has been handled yet: start a network (virsh net-start), or virt-natns plan NETWORK"
)


@dataclass(frozen=True, slots=True)
class Status:
    """The status of a network.

    ``state`` is "up", "preparing" and "starting" on the way there, or "down".
    ``prefix`` is its lease from the prefixes that are routed to its upstream.
    ``leases`` counts its guests' DHCP leases that have not expired.  ``health`` is "ok",
    "damaged (N)" or "given up (WHY)" for a network that is up, and else its state.
    ``forwards`` are the forwards in force.  ``lease_seconds`` is the
    time left of the DHCP lease of ``address``; None without a lease, or for a lease
    without end.
    """

    network: str
    uuid: str
    state: str
    namespace: str
    bridge: str
    subnets: tuple[str, ...]
    upstream: str
    address: str | None
    leases: int
    health: str
    differences: tuple[str, ...]
    forwards: tuple[forward_list.ForwardRow, ...] = ()
    address6: str | None = None
    prefix: str | None = None
    lease_seconds: int | None = None


def run(options: argparse.Namespace) -> int:
    """Print the status of all networks, or of one, as a table or for programs."""
    access.require_root()
    health = service_control.ask()
    named = options.network
    with access.engine(look_only=True) as engine:
        statuses = with_health(collect(engine, _defined(), named), health)
        if named and not statuses:
            raise NatnsError(f"network {named} was never handled", "see virt-natns status")
        host = comparison.host_differences(engine) + service_control.of_host(health)
        missed = [] if named else comparison.missed(engine, access.network_asker())
        guests = [] if named else comparison.guest_differences(engine, access.active_guests)
        stops = zone.notes()
    if options.json:
        service = service_control.as_object(health)
        print(as_json(statuses, host, missed, guests, service, stops))
    else:
        print(text(statuses, host, missed, guests, str(health), stops))
    return 0


def _defined() -> frozenset[str] | None:
    """Return the uuids of all networks that are defined; None where libvirt does not answer."""
    try:
        return frozenset(libvirt.uuids())
    except LibvirtError:
        return None


# -- facts -------------------------------------------------------------------


def collect(
    engine: Engine, known: Collection[str] | None, named: str | None = None
) -> list[Status]:
    """Return the status of all networks that were handled, or of the network ``named``.

    ``known`` are the uuids of the networks that libvirt has.  Others that are down are left
    out unless they are named: there may be thousands of transient networks.
    """
    records = [r for r in engine.store.networks.all() if named in (None, r.name, r.uuid)]
    if known is not None and named is None:
        records = [r for r in records if r.runs or r.uuid in known]
    # A network that was defined anew has several records, and the newest counts.
    records.sort(key=lambda r: (r.runs, r.this_boot, r.since))
    newest = {record.name: record for record in records}
    return [_status(engine, record) for record in sorted(newest.values(), key=lambda r: r.name)]


def _status(engine: Engine, record: NetworkRecord) -> Status:
    """Return the status of a recorded network."""
    state = record.state if record.runs else "down"
    differences = tuple(comparison.network_differences(engine, record)) if state == "up" else ()
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
        health=_health(state, differences),
        differences=differences,
        forwards=tuple(forward_list.collect(engine.store, record.uuid, published=True)),
        lease_seconds=dhcp.remaining(record.uuid) if state == "up" else None,
    )


def _health(state: str, differences: tuple[str, ...]) -> str:
    if state != "up":
        return state
    return f"damaged ({len(differences)})" if differences else "ok"


def with_health(statuses: Sequence[Status], health: service_control.ServiceHealth) -> list[Status]:
    """Return the statuses; a network that the service has given up is shown as such."""
    return [
        replace(status, health=service_control.given_up(health.given_up[status.uuid]))
        if status.uuid in health.given_up
        else status
        for status in statuses
    ]


# -- text --------------------------------------------------------------------


def text(
    statuses: list[Status],
    host: list[str],
    missed: list[Finding],
    guests: list[Finding],
    service: str = "",
    stops: Sequence[str] = (),
) -> str:
    """Return the statuses as a table, with the differences of each network below it.

    ``host`` are differences of the host.  ``missed`` are events that no hook reported.
    ``guests`` are guests that publish something else than their metadata says.  All three
    follow the table.  ``service`` is the health of the resident service, and ``stops`` are
    chains of others that stop networks.
    """
    lines = table(statuses) if statuses else [NONE]
    others = [("host", what) for what in host] + missed + guests
    lines += [f"  ! {name}: {what}" for name, what in others]
    if others or any(status.differences for status in statuses):
        lines.append('"virt-natns sync" repairs the differences marked with "!".')
    lines += [f"  # {stop}" for stop in stops]
    if service:
        lines.append(f"service: {service}")
    return "\n".join(lines)


def table(statuses: list[Status]) -> list[str]:
    """Return lines of aligned columns, each followed by forwards and differences of the network."""
    heading, *aligned = columns.aligned([HEADINGS, *map(_row, statuses)])
    lines = [heading]
    for line, status in zip(aligned, statuses, strict=True):
        lines.append(line)
        lines += [f"  > {forwards}" for forwards in forward_list.compact(status.forwards)]
        lines += [f"  ! {what}" for what in status.differences]
    return lines


def _row(status: Status) -> tuple[str, ...]:
    up = status.state == "up"
    return (
        status.network,
        status.namespace if up else "-",
        ", ".join(_subnets(status)) or "-",
        status.upstream,
        ", ".join(filter(None, (_address(status), status.address6))) or "-",
        str(status.leases) if up else "-",
        status.health,
    )


def _address(status: Status) -> str | None:
    """Return the upstream address, with the time left of its DHCP lease."""
    left = f" ({_duration(status.lease_seconds)} left)" if status.lease_seconds is not None else ""
    return f"{status.address}{left}" if status.address else None


def _duration(seconds: int) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        # A unit is used from twice its length on: "90 min" says more than "1 h".
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _subnets(status: Status) -> tuple[str, ...]:
    """Return the network's own subnets, and the prefix that it leases."""
    leased = [status.prefix] if status.prefix and status.prefix not in status.subnets else []
    return (*status.subnets, *leased)


def as_json(
    statuses: list[Status],
    host: list[str],
    missed: list[Finding],
    guests: list[Finding],
    service: Mapping[str, object] | None = None,
    stops: Sequence[str] = (),
) -> str:
    """Return an object with "networks", "host", "missed", "guests", "service" and "stops"."""
    document = {
        "networks": [asdict(status) for status in statuses],
        "host": host,
        "missed": [{"network": name, "difference": what} for name, what in missed],
        "guests": [{"guest": name, "difference": what} for name, what in guests],
        "service": service,
        "stops": list(stops),
    }
    return json.dumps(document, indent=2)
