# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``virt-natns status`` shows: every known network, and how it is."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from libvirt_natns import reconcile
from libvirt_natns.dnsmasq import LIBVIRT_DIRECTORY
from libvirt_natns.engine import Engine
from libvirt_natns.store import Record

HEADINGS = ("NETWORK", "NAMESPACE", "SUBNET", "UPSTREAM", "ADDRESS", "LEASES", "HEALTH")


@dataclass(frozen=True, slots=True)
class Status:
    """One network.  ``leases`` counts its guests' DHCP leases that have not expired."""

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


def collect(engine: Engine, name: str | None = None) -> list[Status]:
    """The status of all networks that were seen, or of the one called ``name``."""
    records = [r for r in engine.store.networks() if name in (None, r.name, r.uuid)]
    # Of a network that was defined anew only the newest counts.
    newest = {record.name: record for record in sorted(records, key=_age)}
    return [_status(engine, record) for record in sorted(newest.values(), key=lambda r: r.name)]


def _age(record: Record) -> tuple[bool, float]:
    return record.state != "down", record.since


def _status(engine: Engine, record: Record) -> Status:
    found = tuple(reconcile.differences(engine, record))
    address = engine.store.lease(record.upstream, record.uuid)
    return Status(
        network=record.name,
        uuid=record.uuid,
        state=record.state,
        namespace=record.namespace,
        bridge=record.bridge,
        subnets=tuple(map(str, record.subnets)),
        upstream=record.upstream,
        address=str(address) if address else None,
        leases=dhcp_leases(record.bridge) if record.state == "up" else 0,
        health=_health(record, found),
        differences=found,
    )


def _health(record: Record, found: tuple[str, ...]) -> str:
    if record.state != "up":
        return record.state
    return f"damaged ({len(found)})" if found else "ok"


def dhcp_leases(bridge: str) -> int:
    """How many DHCP leases libvirt's helper has on file for a bridge."""
    file = Path(LIBVIRT_DIRECTORY, f"{bridge}.status")
    try:
        entries = json.loads(file.read_text() or "[]")
    except (OSError, ValueError):
        return 0
    # An infinite lease expires at 0.
    times = [entry.get("expiry-time", 0) for entry in entries]
    return sum(expiry == 0 or expiry > time.time() for expiry in times)


def table(statuses: list[Status]) -> str:
    """The statuses as aligned columns, with each difference below its network."""
    rows = [HEADINGS, *map(_row, statuses)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = []
    for row, status in zip(rows, [None, *statuses], strict=True):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
        lines += [f"  ! {what}" for what in (status.differences if status else ())]
    return "\n".join(lines)


def _row(status: Status) -> tuple[str, ...]:
    return (
        status.network,
        status.namespace if status.state == "up" else "-",
        ", ".join(status.subnets) or "-",
        status.upstream,
        status.address or "-",
        str(status.leases),
        status.health,
    )


def as_json(statuses: list[Status], host: list[str]) -> str:
    """The statuses for programs: an object with "networks" and the host's "host"."""
    document = {"networks": [asdict(status) for status in statuses], "host": host}
    return json.dumps(document, indent=2)
