# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``virt-natns status`` shows: every known network, and how it is."""

import json
from collections.abc import Collection, Mapping

from libvirt_natns.addresses import unless_placeholder
from libvirt_natns.cli import forward_list
from libvirt_natns.daemons import lease_file
from libvirt_natns.engine import reconcile
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.reconcile import Finding
from libvirt_natns.records import asdict, dataclass
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.upstream import dhcp

HEADINGS = ("NETWORK", "NAMESPACE", "SUBNET", "UPSTREAM", "ADDRESS", "LEASES", "HEALTH")
NONE = "no network has been handled yet: start one (virsh net-start), or virt-natns plan NETWORK"


@dataclass(frozen=True, slots=True)
class Status:
    """One network.

    ``state`` is "up", "preparing" and "starting" on the way there, or "down";
    ``prefix`` is what it leases of what is routed to its upstream;
    ``leases`` counts its guests' DHCP leases that have not expired; ``health``
    is "ok", "damaged (N)" or "given up (WHY)" for one that is up, and its state
    for any other;
    ``forwards`` are those in force.  ``lease_seconds`` is for how many seconds the DHCP lease
    of ``address`` still holds; None where there is none, or it never ends.
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
    forwards: tuple[forward_list.Row, ...] = ()
    address6: str | None = None
    prefix: str | None = None
    lease_seconds: int | None = None


def collect(
    engine: Engine, known: Collection[str] | None, named: str | None = None
) -> list[Status]:
    """The status of all networks that were handled, or of the one called ``named``.

    ``known`` are the uuids of the networks that libvirt has: others that are
    down (transient ones, of which there may be thousands) are left out unless
    they are named.
    """
    records = [r for r in engine.store.networks.all() if named in (None, r.name, r.uuid)]
    if known is not None and named is None:
        records = [r for r in records if r.runs or r.uuid in known]
    # Of a network that was defined anew only the newest counts.
    newest = {record.name: record for record in sorted(records, key=_age)}
    return [_status(engine, record) for record in sorted(newest.values(), key=lambda r: r.name)]


def _age(record: NetworkRecord) -> tuple[bool, bool, float]:
    return record.runs, record.this_boot, record.since


def _status(engine: Engine, record: NetworkRecord) -> Status:
    state = record.state if record.runs else "down"
    found = tuple(reconcile.differences(engine, record)) if state == "up" else ()
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
        health=_health(state, found),
        differences=found,
        forwards=tuple(forward_list.collect(engine.store, record.uuid, published=True)),
        lease_seconds=dhcp.remaining(record.uuid) if state == "up" else None,
    )


def _health(state: str, found: tuple[str, ...]) -> str:
    if state != "up":
        return state
    return f"damaged ({len(found)})" if found else "ok"


def text(
    statuses: list[Status],
    host: list[str],
    missed: list[Finding],
    guests: list[Finding],
    service: str = "",
) -> str:
    """The statuses as a table, each difference below its network, the rest below it.

    ``host`` is what differs there, ``missed`` what no hook told of; ``guests`` are
    those whose metadata says something else than is published; ``service`` says
    how the resident service is.
    """
    lines = table(statuses) if statuses else [NONE]
    others = [("host", what) for what in host] + missed + guests
    lines += [f"  ! {name}: {what}" for name, what in others]
    if others or any(status.differences for status in statuses):
        lines.append('"virt-natns sync" repairs what is marked with "!".')
    if service:
        lines.append(f"service: {service}")
    return "\n".join(lines)


def table(statuses: list[Status]) -> list[str]:
    """Lines of aligned columns; what a network publishes, and each difference, below it."""
    rows = [HEADINGS, *map(_row, statuses)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = []
    for row, status in zip(rows, [None, *statuses], strict=True):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
        if status:
            lines += [f"  > {told}" for told in forward_list.compact(status.forwards)]
            lines += [f"  ! {what}" for what in status.differences]
    return lines


def _row(status: Status) -> tuple[str, ...]:
    up = status.state == "up"
    return (
        status.network,
        status.namespace if up else "-",
        ", ".join(_subnets(status)) or "-",
        status.upstream,
        ", ".join(each for each in (_address(status), status.address6) if each) or "-",
        str(status.leases) if up else "-",
        status.health,
    )


def _address(status: Status) -> str | None:
    """The upstream address, and for how long a DHCP server has leased it."""
    left = f" ({_duration(status.lease_seconds)} left)" if status.lease_seconds is not None else ""
    return f"{status.address}{left}" if status.address else None


def _duration(seconds: int) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        # From the double on: "90 min" says more than "1 h".
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _subnets(status: Status) -> tuple[str, ...]:
    """Its own, and the prefix that it leases."""
    leased = [status.prefix] if status.prefix and status.prefix not in status.subnets else []
    return (*status.subnets, *leased)


def as_json(
    statuses: list[Status],
    host: list[str],
    missed: list[Finding],
    guests: list[Finding],
    service: Mapping[str, object] | None = None,
) -> str:
    """The same for programs: an object with "networks", "host", "missed", "guests", "service"."""
    document = {
        "networks": [asdict(status) for status in statuses],
        "host": host,
        "missed": [{"network": name, "difference": what} for name, what in missed],
        "guests": [{"guest": name, "difference": what} for name, what in guests],
        "service": service,
    }
    return json.dumps(document, indent=2)
