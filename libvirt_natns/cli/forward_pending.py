# SPDX-License-Identifier: LGPL-2.1-or-later
"""Forwards that are configured and not in force, each with the reason.

They stand in the metadata of a guest or network that is off, or in a running guest's definition
for its next start.  A running guest's metadata may have them as well, without being applied.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from libvirt_natns.addresses import Address, is_placeholder
from libvirt_natns.cli.forward_list import ForwardRow, ForwardState, allowed_ports
from libvirt_natns.cli.libvirt_view import Definition, JudgedGuest, JudgedNetwork, LibvirtView
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.publication.choices import selector
from libvirt_natns.engine.publication.dhcp_hosts import known_addresses
from libvirt_natns.engine.publication.port_spans import spans
from libvirt_natns.errors import UpstreamError
from libvirt_natns.model.metadata import AddressRequest, PortForward
from libvirt_natns.model.network import Domain, Network, Nic
from libvirt_natns.state.chosen_ports import PortKey
from libvirt_natns.upstream import selection
from libvirt_natns.values import quoted

OFF = "the guest is off: its start publishes it"
LATER = "only the guest's definition has it: its next start publishes it"
MISSING = "the running guest's metadata has it, and it is not in force: virt-natns sync"
NO_NIC = "the guest has no NIC in a network of libvirt"
NETWORK_OFF = "the network is off: its start publishes it"
NO_LEASE = "(no lease)"


@dataclass(frozen=True, slots=True)
class Site:
    """A handled network in which something is to be published, by a NIC of a guest, or by none.

    ``upstream`` is "" where the network names an upstream that is not configured.
    """

    network: Network
    runs: bool
    upstream: str
    shares_addresses: bool
    mac: str = ""


@dataclass(frozen=True, slots=True)
class Publisher:
    """The owner of a forward: a guest, or a network (``name`` None).

    ``elsewhere`` and ``why_not`` are for a guest without a NIC in a handled network: the network
    where it has a NIC, and why it publishes nothing there.
    """

    uuid: str
    name: str | None
    state: ForwardState
    reason: str
    elsewhere: str = "-"
    why_not: str = NO_NIC


def collect(engine: Engine, view: LibvirtView, live: Sequence[ForwardRow]) -> list[ForwardRow]:
    """Return the configured forwards that are not among the ``live`` rows."""
    finder = _Finder(engine, view)
    wanted = [row for guest in view.guests for row in finder.of_guest(guest)]
    wanted += [row for each in view.handled.values() for row in finder.of_network(each)]
    present: dict[RowKey, list[ForwardRow]] = {}
    for row in live:
        present.setdefault(_key(row), []).append(row)
    missing: list[ForwardRow] = []
    for row in wanted:
        alike = present.setdefault(_key(row), [])
        if not any(_is_same(row, other) for other in alike):
            missing.append(row)
            alike.append(row)
    return missing


RowKey = tuple[str | None, str, str]
"""Guest, network and protocol of a row."""


def _key(row: ForwardRow) -> RowKey:
    return row.guest_uuid, row.network, row.proto


def _is_same(row: ForwardRow, other: ForwardRow) -> bool:
    """True if two rows of one key agree in all that is known: ports, target, address."""
    if row.proto == "address":
        return row.address in (NO_LEASE, other.address)
    ends = (row.target_first, row.target_last) == (other.target_first, other.target_last)
    return ends and (row.first is None or (row.first, row.last) == (other.first, other.last))


class _Finder:
    """Finds the rows of guests and networks."""

    def __init__(self, engine: Engine, view: LibvirtView) -> None:
        self._engine = engine
        self._view = view

    # -- guests ------------------------------------------------------------

    def of_guest(self, guest: JudgedGuest) -> Iterator[ForwardRow]:
        """Yield the rows of a guest, those of its running XML first."""
        uuid, name = guest.listed.uuid, guest.listed.name
        if guest.live is None:
            if guest.definition is not None:
                yield from self._defined(guest.definition, Publisher(uuid, name, "off", OFF))
            return
        yield from self._defined(guest.live, Publisher(uuid, name, "missing", MISSING))
        if guest.definition is not None:
            yield from self._defined(guest.definition, Publisher(uuid, name, "later", LATER))

    def _defined(self, definition: Definition, owner: Publisher) -> Iterator[ForwardRow]:
        domain = definition.domain
        if domain.nat is None:
            return
        sites = [site for nic in domain.nics for site in self._sites(nic)]
        for wanted in domain.nat.forwards:
            yield from self._forwards(
                self._able(owner, domain, wanted.network), wanted, _selected(sites, wanted)
            )
        for request in domain.nat.addresses:
            yield self._static(
                self._able(owner, domain, request.network), request, _selected(sites, request)
            )

    def _able(self, owner: Publisher, domain: Domain, network: str | None) -> Publisher:
        """Return the publisher with the network that a forward would be in, handled or not."""
        named = network or next((nic.network for nic in domain.nics if nic.network), None)
        judged = next((each for each in self._view.networks if each.listed.name == named), None)
        why = NO_NIC
        if judged is not None:
            why = f"network {quoted(judged.listed.name)} gets no router ({judged.reason})"
        elif named is not None:
            why = f"libvirt has no network {quoted(named)}"
        return replace(owner, elsewhere=named or "-", why_not=why)

    def _sites(self, nic: Nic) -> Iterator[Site]:
        found = self._view.network_of(nic)
        if found is not None:
            yield from self._site(found, nic.mac)

    def _site(self, judged: JudgedNetwork, mac: str = "") -> Iterator[Site]:
        network = judged.network
        if network is None:
            return
        record = self._engine.store.networks.get(network.uuid)
        runs = record is not None and record.runs
        try:
            upstream = selection.upstream_of(
                network, self._engine.config, record.upstream if record else None
            )
        except UpstreamError:
            yield Site(network, runs, "", False, mac)
            return
        yield Site(network, runs, upstream.name, upstream.shares_addresses, mac)

    # -- networks ----------------------------------------------------------

    def of_network(self, judged: JudgedNetwork) -> Iterator[ForwardRow]:
        """Yield the rows of a network's own metadata."""
        for site in self._site(judged):
            owner = Publisher(site.network.uuid, None, "missing", MISSING)
            for wanted in site.network.nat.forwards if site.network.nat else ():
                yield from self._forwards(owner, wanted, site)

    # -- rows --------------------------------------------------------------

    def _forwards(
        self, owner: Publisher, wanted: PortForward, site: Site | None
    ) -> Iterator[ForwardRow]:
        target = self._target(owner, site, wanted.guest_address, wanted.family)
        row = replace(
            self._row(owner, site, wanted.proto, target),
            address=self._listens(site, wanted.address, wanted.family),
            sources=tuple(map(str, wanted.sources)),
        )
        for first, last, to, to_last in spans(wanted):
            yield replace(row, first=first, last=last, target_first=to, target_last=to_last)
        for each in wanted.ranges:
            if each.auto:
                port = self._chosen(owner, wanted, site, each.to)
                yield replace(row, first=port, last=port, target_first=each.to, target_last=each.to)

    def _static(self, owner: Publisher, request: AddressRequest, site: Site | None) -> ForwardRow:
        family = None if request.address is None else request.address.version
        row = self._row(owner, site, "address", self._target(owner, site, None, family))
        key = f"{owner.uuid}/{site.mac}" if site else ""
        leased = self._engine.store.leases.of(site.upstream, key).addresses if site else ()
        addresses = (request.address,) if request.address else leased
        return replace(
            row,
            address=str(addresses[0]) if addresses else NO_LEASE,
            allowed=allowed_ports(request.ports),
        )

    def _row(
        self, owner: Publisher, site: Site | None, proto: str, target: str | None
    ) -> ForwardRow:
        state, reason = owner.state, owner.reason
        if site is None:
            state, reason = "impossible", owner.why_not
        elif state == "missing" and not site.runs:
            state, reason = "off", NETWORK_OFF
        return ForwardRow(
            guest=owner.name,
            guest_uuid=owner.uuid if owner.name is not None else None,
            network=site.network.name if site else owner.elsewhere,
            proto=proto,
            address=None,
            first=None,
            last=None,
            target=target,
            target_first=None,
            target_last=None,
            sources=(),
            allowed=(),
            state=state,
            reason=reason,
        )

    def _listens(
        self, site: Site | None, address: Address | None, family: int | None
    ) -> str | None:
        """Return the address on which a forward is to listen; None for all of the host's."""
        if address is not None:
            return str(address) if int(address) else None
        if site is None:
            return NO_LEASE
        if site.shares_addresses:
            return None
        leased = self._engine.store.leases.of(site.upstream, site.network.uuid).addresses
        known = [each for each in leased if not is_placeholder(each)]
        return next(iter(_of_family(known, family)), NO_LEASE)

    def _target(
        self, owner: Publisher, site: Site | None, given: Address | None, family: int | None
    ) -> str | None:
        """Return the guest's address; None where DHCP has not given any yet."""
        if given is not None:
            return str(given)
        if site is None or not site.mac:
            return None
        known = known_addresses(self._engine.store, site.network, site.mac, owner.name or "")
        ordered = sorted(known, key=lambda each: (each.version, int(each)))
        return next(iter(_of_family(ordered, family)), None)

    def _chosen(
        self, owner: Publisher, wanted: PortForward, site: Site | None, to: int
    ) -> int | None:
        if site is None:
            return None
        key = PortKey(owner.uuid, site.network.uuid, wanted.proto, str(selector(wanted)), to)
        return self._engine.store.chosen_ports.get(key)


def _of_family(addresses: Iterable[Address], family: int | None) -> list[str]:
    return [str(each) for each in addresses if family in (None, each.version)]


def _selected(sites: Sequence[Site], wanted: PortForward | AddressRequest) -> Site | None:
    """Return the NIC that metadata names, else the first NIC; None where there is none."""
    for site in sites:
        if wanted.network in (None, site.network.name) and wanted.mac in (None, site.mac):
            return site
    return None
