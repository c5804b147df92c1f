# SPDX-License-Identifier: LGPL-2.1-or-later
"""The facts of a picture, from the records, the guests' leases, libvirt and the service.

Guests are domains that run, stations with a DHCP lease, and targets of forwards.  Without an
answer of libvirt, the leases and forwards alone tell them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Network

from libvirt_natns.addresses import FAMILIES, bracketed, is_placeholder
from libvirt_natns.cli import forward_list, status
from libvirt_natns.cli.diagram.picture import (
    DrawnForward,
    DrawnGuest,
    DrawnNetwork,
    DrawnUpstream,
    Picture,
    drawable,
)
from libvirt_natns.cli.forward_list import ForwardRow
from libvirt_natns.cli.service_control import ServiceHealth
from libvirt_natns.daemons import lease_file
from libvirt_natns.daemons.lease_file import LeaseEntry
from libvirt_natns.daemons.libvirt import ActiveDomains
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine.engine import Engine
from libvirt_natns.errors import NatnsError
from libvirt_natns.model.network import Domain, Network
from libvirt_natns.spans import span_text
from libvirt_natns.state.leases import Leased
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.upstream import segments


@dataclass(slots=True)
class Station:
    """A guest in a network while its facts are put together."""

    name: str
    addresses: list[str] = field(default_factory=list)

    def add(self, address: str) -> None:
        """Add an address once."""
        if address not in self.addresses:
            self.addresses.append(address)


def collect(
    engine: Engine,
    ask: Callable[[], ActiveDomains | None] = lambda: None,
    service: ServiceHealth | None = None,
) -> Picture:
    """Return the networks that are up; ``ask`` returns the guests that run."""
    records = [record for record in engine.store.networks.all("up") if record.this_boot]
    healths = _healths(engine, records, service or ServiceHealth("absent"))
    domains = _domains(ask()) if records else []
    return Picture(
        tuple(_network(engine, record, domains, healths) for record in records),
        tuple(_upstream(engine, name) for name in sorted({each.upstream for each in records})),
    )


def _healths(
    engine: Engine, records: Iterable[NetworkRecord], service: ServiceHealth
) -> Mapping[str, str]:
    """Return the networks' health by uuid, as ``virt-natns status`` tells it."""
    statuses, _ = status.collect(engine, frozenset(record.uuid for record in records))
    return {each.uuid: each.health for each in status.with_health(statuses, service)}


def _network(
    engine: Engine, record: NetworkRecord, domains: Sequence[Domain], healths: Mapping[str, str]
) -> DrawnNetwork:
    network = libvirt_xml.parse_network(record.document)
    leased = engine.store.leases.of(record.upstream, record.uuid)
    rows = forward_list.collect(engine, record.uuid, published=True)
    known = stations(record, domains, lease_file.current(record.bridge))
    forwards = tuple(forward(row, known) for row in rows)
    return DrawnNetwork(
        name=drawable(record.name),
        bridge=record.bridge,
        namespace=record.namespace,
        upstream=record.upstream,
        gateways=(*(str(each.interface) for each in network.subnets), *_prefix(network, leased)),
        addresses=tuple(str(each) for each in leased.addresses if not is_placeholder(each)),
        health=drawable(healths.get(record.uuid, "?")),
        guests=tuple(
            DrawnGuest(drawable(each.name), tuple(map(drawable, each.addresses)))
            for each in sorted(known.values(), key=lambda each: (each.name, each.addresses))
        ),
        forwards=forwards,
    )


def _prefix(network: Network, leased: Leased) -> list[str]:
    """Return the gateway in the prefix that a network leases, unless its own XML has it."""
    prefix = leased.prefix
    if prefix is None or any(prefix.overlaps(subnet.network) for subnet in network.subnets):
        return []
    return [f"{prefix[1]}/{prefix.prefixlen}"]


# -- guests ------------------------------------------------------------------


def _domains(active: ActiveDomains | None) -> list[Domain]:
    """Return the domains that run, without a domain that libvirt describes in an unknown way."""
    domains = []
    for xml in active.domains.values() if active else ():
        try:
            domains.append(libvirt_xml.parse_domain_nics(xml))
        except NatnsError:
            continue
    return domains


def stations(
    record: NetworkRecord, domains: Iterable[Domain], leases: Iterable[LeaseEntry]
) -> dict[str, Station]:
    """Return the guests of a network by their MAC address."""
    found: dict[str, Station] = {}
    for domain in domains:
        for nic in domain.nics:
            if record.name == nic.network or record.bridge == nic.bridge:
                found[nic.mac.lower()] = Station(domain.name)
    for lease in leases:
        mac = str(lease.get("mac-address", "?")).lower()
        station = found.setdefault(mac, Station(str(lease.get("hostname") or mac)))
        if "ip-address" in lease:
            station.add(str(lease["ip-address"]))
    return found


def forward(row: ForwardRow, known: dict[str, Station]) -> DrawnForward:
    """Return a forward to be drawn; add its target to the stations that are ``known``."""
    station = _target(row, known)
    listen, target = row.address or "*", station.name
    if row.first is not None:
        listen = f"{bracketed(listen)}:{span_text(row.first, row.last or row.first)}"
    if row.target_first is not None:
        place = bracketed(target) if target == row.target else target
        target = f"{place}:{span_text(row.target_first, row.target_last or row.target_first)}"
    return DrawnForward(row.proto, listen, drawable(target), row.state == "waiting")


def _target(row: ForwardRow, known: dict[str, Station]) -> Station:
    """Return the station with a forward's target, which may be of another or of no guest."""
    assert row.target is not None  # a forward in force has its target
    named = [each for each in known.values() if each.name == row.guest]
    owners = [each for each in known.values() if row.target in each.addresses]
    if owners and (row.guest is None or owners[0] in named):
        return owners[0]
    if named:
        station = named[0]
    else:
        station = known.setdefault(f"{row.guest} {row.target}", Station(row.guest or row.target))
    if station.name != row.target:
        station.add(row.target)
    return station


# -- upstreams ---------------------------------------------------------------


def _upstream(engine: Engine, name: str) -> DrawnUpstream:
    upstream = engine.config.upstreams.get(name)
    if upstream is None:
        return DrawnUpstream(name, "?", ("which is no longer configured",))
    how = (f"routed by {upstream.routed_by}",) if upstream.routed_by else ()
    segment = segments.of_upstream(engine.store, upstream)
    if segment is None:
        subnets = (str(each) for each in (upstream.subnet, upstream.subnet6) if each)
        return DrawnUpstream(name, "?", how, (*subnets, *_prefixes(upstream.prefixes6)))
    details: list[str] = []
    for side in map(segment.side, FAMILIES):
        details += [str(side.subnet)] if side.subnet else []
        details += [f"gateway {side.gateway}"] if side.gateway else []
    return DrawnUpstream(
        name,
        segment.bridge,
        (*how, "by macvlan") if upstream.is_macvlan else how,
        (*details, *_prefixes(segment.prefixes6)),
    )


def _prefixes(prefixes: Iterable[IPv6Network]) -> list[str]:
    listed = ", ".join(map(str, prefixes))
    return [f"prefixes {listed}"] if listed else []
