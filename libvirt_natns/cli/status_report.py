# SPDX-License-Identifier: LGPL-2.1-or-later
"""The status of networks as a table for people, and as JSON for programs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from libvirt_natns.cli import columns, forward_list, json_text
from libvirt_natns.cli.service_control import ServiceHealth, as_object
from libvirt_natns.daemons.lease_file import GuestLease
from libvirt_natns.engine.reconcile.active import Finding
from libvirt_natns.engine.reconcile.obstacles import Obstacle

HEADINGS = ("NETWORK", "NAMESPACE", "SUBNET", "UPSTREAM", "ADDRESS", "LEASES", "HEALTH")
NONE = (
    "no network has been handled yet: start a network (virsh net-start), or virt-natns plan NETWORK"
)


@dataclass(frozen=True, slots=True)
class Status:
    """The status of a network.

    ``state`` is "up", "preparing" and "starting" on the way there, "down", or "isolated": active
    in libvirt without a router.
    ``prefix`` is its lease from the prefixes that are routed to its upstream.
    ``leases`` counts its guests' DHCP leases that have not expired, and ``dhcp_leases`` has them.
    ``health`` is "ok",
    "damaged (N)", "no way out", "no names", "stopped by CHAIN" or "given up (WHY)" for a network
    that is up, "isolated (WHY)" or another reason for a network without a router, and else its
    state.  ``obstacles`` keep its guests from the outside or from names, and ``sync`` cannot
    change that.
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
    obstacles: tuple[Obstacle, ...] = ()
    dhcp_leases: tuple[GuestLease, ...] = ()


@dataclass(frozen=True, slots=True)
class StatusReport:
    """All that the command status tells.

    ``host`` are differences of the host.  ``missed`` are events that no hook reported.
    ``guests`` are guests that publish something else than their metadata says.  ``late`` are
    networks that the service starts when their upstream comes.  ``stops`` are chains of others
    that stop networks, and ``notes`` are about the host.
    """

    statuses: list[Status]
    host: list[str]
    missed: list[Finding]
    guests: list[Finding]
    service: ServiceHealth | None = None
    late: tuple[Finding, ...] = ()
    stops: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def text(report: StatusReport) -> str:
    """Return the statuses as a table, with the differences of each network below it."""
    statuses = report.statuses
    lines = table(statuses) if statuses else [] if report.late else [NONE]
    lines += [f"  > {name}: waits to be started: {what}" for name, what in report.late]
    others = [("host", what) for what in report.host] + report.missed + report.guests
    lines += [f"  ! {name}: {what}" for name, what in others]
    if others or any(status.differences for status in statuses):
        lines.append('"virt-natns sync" repairs the differences marked with "!".')
    lines += [f"  # {note}" for note in (*report.stops, *report.notes)]
    if report.service:
        lines.append(f"service: {report.service}")
    return "\n".join(lines)


def table(statuses: list[Status]) -> list[str]:
    """Return lines of aligned columns, each followed by forwards and differences of the network."""
    heading, *aligned = columns.aligned([HEADINGS, *map(_row, statuses)])
    lines = [heading]
    for line, status in zip(aligned, statuses, strict=True):
        lines.append(line)
        lines += [f"  > {forwards}" for forwards in forward_list.compact(status.forwards)]
        lines += [f"  ! {what}" for what in status.differences]
        reasons = (each.reason for each in status.obstacles)
        lines += [f"  - {reason}" for reason in reasons if reason != status.health]
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


def as_object_of(report: StatusReport) -> dict[str, Any]:
    """Return an object with a list or object for each part of the report."""
    return {
        "networks": [asdict(status) for status in report.statuses],
        "host": report.host,
        "missed": [{"network": name, "difference": what} for name, what in report.missed],
        "guests": [{"guest": name, "difference": what} for name, what in report.guests],
        "service": as_object(report.service) if report.service else None,
        "waiting": [{"network": name, "reason": what} for name, what in report.late],
        "stops": list(report.stops),
        "notes": list(report.notes),
    }


def as_json(report: StatusReport, more: Mapping[str, Any] | None = None) -> str:
    """Return the report for programs; ``more`` are further parts."""
    return json_text.dumped({**as_object_of(report), **(more or {})})


def report_of(state: Mapping[str, Any], named: str | None = None) -> StatusReport:
    """Return the report in an object of ``status --json``; with ``named``, of one network."""
    service = state["service"]
    networks = [
        entry for entry in state["networks"] if named in (None, entry["network"], entry["uuid"])
    ]
    return StatusReport(
        statuses=[_status_of(entry) for entry in networks],
        host=list(state["host"]),
        missed=[] if named else [(each["network"], each["difference"]) for each in state["missed"]],
        guests=[] if named else [(each["guest"], each["difference"]) for each in state["guests"]],
        service=ServiceHealth(**service) if service else None,
        late=tuple(
            (each["network"], each["reason"])
            for each in state["waiting"]
            if named in (None, each["network"])
        ),
        stops=tuple(state["stops"]),
        notes=tuple(state["notes"]),
    )


def _status_of(entry: Mapping[str, Any]) -> Status:
    lists = {
        "subnets": entry["subnets"],
        "differences": entry["differences"],
        "forwards": [forward_list.row_of(row) for row in entry["forwards"]],
        "obstacles": [Obstacle(**obstacle) for obstacle in entry["obstacles"]],
        "dhcp_leases": [GuestLease(**lease) for lease in entry["dhcp_leases"]],
    }
    return Status(**{**entry, **{key: tuple(values) for key, values in lists.items()}})
