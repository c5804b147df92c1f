# SPDX-License-Identifier: LGPL-2.1-or-later
"""The record of our part of the host, in a file of the run-time directory."""

import json
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.addresses import FAMILIES
from libvirt_natns.engine.host.needs import Needs
from libvirt_natns.firewall import zones
from libvirt_natns.firewall.sample_packets import OUTSIDE
from libvirt_natns.kernel.route_lookup import link_towards
from libvirt_natns.operations.addressing import Route


@dataclass(slots=True)
class HostRecord:
    """Our part of the host.

    ``zones`` are the conntrack zones of private bridges.  ``ways`` are the facts about
    links that lead out, as the rules were made by them.  ``policy`` is "" without rules
    of ours.  ``seen`` is the rules' fingerprint from a moment when they held all parts
    that the database has; "" while that is unsure.  ``counts`` count the networks that
    need each shared part.  ``parents`` are the foreign tables that have a chain of ours.
    ``routes`` lead to networks' prefixes, each as destination, gateway and link.
    ``settings`` are the former values of IPv6 sysctls that we changed.
    ``zones_of`` tells which rules of firewalld's have the bridges in a zone, "" for unsure.
    """

    bridges: list[str] = field(default_factory=list)
    forwarding: list[str] = field(default_factory=list)
    policy: str = ""
    seen: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    parents: list[str] = field(default_factory=list)
    routes: list[list[str]] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    zones: dict[str, int] = field(default_factory=dict)
    ways: dict[str, object] = field(default_factory=dict)
    zones_of: str = ""


def _file() -> Path:
    return names.RUN_DIRECTORY / "host.json"


def _open() -> Path:
    """Return the mark by which the network hook knows that our rules forbid nothing.

    A shell tests for a file in no time.  Without the mark, hook.py reads the record.
    """
    return names.RUN_DIRECTORY / "host.open"


def _routed() -> Path:
    return names.RUN_DIRECTORY / "host.routed"


def note_way_out() -> None:
    """Note it if the host has a way out while networks need it.

    The caller holds the host's lock, or the mark could outlive the record.
    """
    if had_way_out() or not _file().exists():
        return
    if any(link_towards(OUTSIDE[family]) for family in FAMILIES):
        # A full disk stops no network for the sake of the mark.
        with suppress(OSError):
            _routed().touch()


def had_way_out() -> bool:
    """True if the host has had a way out since networks need it, as far as it was looked at."""
    return _routed().exists()


def load() -> HostRecord:
    """Return the record; an empty one if there is none, or if it cannot be read."""
    try:
        return HostRecord(**json.loads(_file().read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return HostRecord()


def save(record: HostRecord) -> None:
    """Write the record down; an empty record has no file.  Raises OSError."""
    if record == HostRecord():
        for file in (_open(), _routed(), _file()):
            file.unlink(missing_ok=True)
        return
    forbids = record.ways.get("closed") or record.ways.get("closed6")
    if forbids:
        # Ahead of the record: a hook must not end an event by the former mark.
        _open().unlink(missing_ok=True)
    # Without asdict's copies of all zones: each start saves the record.
    held = {each.name: getattr(record, each.name) for each in fields(record)}
    text, fresh = json.dumps(held), _file().with_suffix(".new")
    try:
        fresh.write_text(text)
    except OSError:
        fresh.unlink(missing_ok=True)
        # Without room for a second file, a network that ends must still be noted.
        with _file().open("r+") as present:
            present.write(text)
            present.truncate()
        return
    fresh.replace(_file())
    if not forbids:
        with suppress(OSError):
            _open().touch()


def words(route: Route) -> list[str]:
    """Return a route as the record has it: destination, gateway and link."""
    return [str(route.destination), str(route.gateway or ""), route.link]


def stray_routes(needs: Needs, record: HostRecord) -> list[list[str]]:
    """Return recorded routes that no network needs."""
    needed = [words(route) for route in needs.routes]
    return [route for route in record.routes if route not in needed]


def unneeded_bridges(needs: Needs, record: HostRecord) -> list[str]:
    """Return recorded transit bridges that no network needs."""
    needed = {segment.bridge for segment in needs.transits}
    return [bridge for bridge in record.bridges if bridge not in needed]


def assign_zones(needs: Needs, record: HostRecord) -> None:
    """Assign conntrack zones to the bridges of one network, beside all others'."""
    assigned = zones.assigned({each.bridge for each in needs.private}, record.zones)
    record.zones = {**record.zones, **assigned}
