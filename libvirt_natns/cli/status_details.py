# SPDX-License-Identifier: LGPL-2.1-or-later
"""The parts of ``status --json`` about libvirt: guests, networks not of ours, pools, all forwards.

The table for people leaves them out, so only programs wait for them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from libvirt_natns.addresses import FAMILIES, Address
from libvirt_natns.cli import forward_list, forward_pending
from libvirt_natns.cli.forward_list import ForwardRow
from libvirt_natns.cli.libvirt_view import JudgedGuest, LibvirtView
from libvirt_natns.cli.status_report import Status
from libvirt_natns.daemons.lease_file import GuestLease
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.publication.dhcp_hosts import fixed_address
from libvirt_natns.model.network import Nic
from libvirt_natns.service import census

LeasesByNic = Mapping[tuple[str, str], Sequence[GuestLease]]
"""The DHCP leases of a NIC that have not expired, by the network's name and the MAC address."""


@dataclass(frozen=True, slots=True)
class NicEntry:
    """A guest's NIC in a handled network.

    ``addresses`` are those of its DHCP leases.  ``reserved`` are the addresses that DHCP always
    gives the NIC.
    """

    network: str
    mac: str
    addresses: tuple[str, ...]
    reserved: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GuestEntry:
    """A guest with a NIC in a handled network, or with metadata of ours.

    ``error`` says why its metadata is refused; None for metadata that is well.
    """

    name: str
    uuid: str
    running: bool
    nics: tuple[NicEntry, ...]
    error: str | None


@dataclass(frozen=True, slots=True)
class PoolEntry:
    """A pool of an upstream: ``kind`` is "ipv4", "ipv6" or "prefix".

    ``size`` is None where it is unknown.  ``leased`` counts leases of networks that are off, too,
    ``used`` those of networks and guests that run.
    """

    kind: str
    size: int | None
    leased: int
    used: int


@dataclass(frozen=True, slots=True)
class UpstreamEntry:
    """An upstream; ``kind`` is None for one that is leased from and not configured any more."""

    name: str
    kind: str | None
    default: bool
    pools: tuple[PoolEntry, ...]


@dataclass(frozen=True, slots=True)
class NetworkEntry:
    """A network of libvirt's, and whether it is ``handled``, with the reason in words."""

    name: str
    uuid: str
    active: bool
    persistent: bool
    autostart: bool
    handled: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Details:
    """The parts; ``domains`` and ``libvirt_networks`` are None where libvirt does not answer."""

    domains: tuple[GuestEntry, ...] | None
    forwards: tuple[ForwardRow, ...]
    upstreams: tuple[UpstreamEntry, ...]
    libvirt_networks: tuple[NetworkEntry, ...] | None


def collect(
    engine: Engine, view: LibvirtView, statuses: Sequence[Status], named: str | None = None
) -> Details:
    """Return the parts, or those of the network with that name or uuid."""
    rows = forward_list.collect(engine)
    rows = forward_list.ordered([*rows, *forward_pending.collect(engine, view, rows)])
    shown = {status.network for status in statuses} if named else None
    guests = tuple(_guests(engine, view, _leases(statuses)))
    return Details(
        domains=None if view.silent else tuple(g for g in guests if _is_in(g, shown)),
        forwards=tuple(row for row in rows if shown is None or row.network in shown),
        upstreams=tuple(_upstreams(engine)),
        libvirt_networks=None if view.silent else tuple(_networks(view, named)),
    )


def _is_in(guest: GuestEntry, shown: set[str] | None) -> bool:
    return shown is None or any(nic.network in shown for nic in guest.nics)


def _networks(view: LibvirtView, named: str | None) -> Iterable[NetworkEntry]:
    for each in view.networks:
        listed = each.listed
        if named in (None, listed.name, listed.uuid):
            yield NetworkEntry(
                listed.name,
                listed.uuid,
                listed.active,
                listed.persistent,
                listed.autostart,
                each.network is not None,
                each.reason,
            )


# -- guests and leases -------------------------------------------------------


def with_guests(statuses: Iterable[Status], details: Details) -> list[Status]:
    """Return the statuses; each DHCP lease has the name of the guest that holds it, if known."""
    names = {
        (nic.network, nic.mac): guest.name for guest in details.domains or () for nic in guest.nics
    }
    return [
        replace(
            status,
            dhcp_leases=tuple(
                replace(lease, guest=names.get((status.network, lease.mac)))
                for lease in status.dhcp_leases
            ),
        )
        for status in statuses
    ]


def _leases(statuses: Iterable[Status]) -> LeasesByNic:
    found: dict[tuple[str, str], list[GuestLease]] = {}
    for status in statuses:
        for lease in status.dhcp_leases:
            found.setdefault((status.network, lease.mac), []).append(lease)
    return found


def _guests(engine: Engine, view: LibvirtView, leases: LeasesByNic) -> Iterable[GuestEntry]:
    for guest in view.guests:
        present = guest.present
        if present is None:
            continue
        nics = tuple(
            entry for nic in present.domain.nics for entry in _nic(engine, view, guest, nic, leases)
        )
        if nics or present.error or present.domain.nat is not None:
            yield GuestEntry(
                guest.listed.name, guest.listed.uuid, guest.listed.running, nics, present.error
            )


def _nic(
    engine: Engine, view: LibvirtView, guest: JudgedGuest, nic: Nic, leases: LeasesByNic
) -> Iterable[NicEntry]:
    judged = view.network_of(nic)
    network = judged.network if judged else None
    if network is None:
        return
    reserved: list[Address] = [
        address
        for family in FAMILIES
        if (
            address := fixed_address(network, nic.mac, family, guest.listed.name)
            or engine.store.reservations.get(network.uuid, nic.mac, family)
        )
    ]
    yield NicEntry(
        network.name,
        nic.mac,
        tuple(lease.address for lease in leases.get((network.name, nic.mac), ())),
        tuple(map(str, reserved)),
    )


# -- upstreams ---------------------------------------------------------------


def _upstreams(engine: Engine) -> Iterable[UpstreamEntry]:
    config = engine.config
    pools: dict[str, list[PoolEntry]] = {name: [] for name in config.upstreams}
    for (name, kind), counted in census.pools(config, engine.store).items():
        entry = PoolEntry(kind, counted.size, counted.leased, counted.in_use)
        pools.setdefault(name, []).append(entry)
    for name, entries in sorted(pools.items()):
        upstream = config.upstreams.get(name)
        yield UpstreamEntry(
            name,
            upstream.kind if upstream else None,
            name == config.upstream,
            tuple(entries),
        )
