# SPDX-License-Identifier: LGPL-2.1-or-later
"""Adopting networks and guests that run without a record, as the state database was lost.

libvirt lists the active networks and guests.  The kernel shows their state.  A namespace's
addresses become leases again.  Its rules show chosen ports and static NAT, and its dnsmasq's hosts
file shows reservations.  Running networks are not changed, and ``up`` then finds no difference.

Limit: networks and guests that do not run have left nothing in the kernel.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

from libvirt_natns import names
from libvirt_natns.addresses import FAMILIES, Address, Family, Interface
from libvirt_natns.daemons import dnsmasq_files
from libvirt_natns.documents import libvirt_xml, xml_sniff
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.guests.guest_engine import Guests
from libvirt_natns.engine.network_record import new_record
from libvirt_natns.engine.network_run import NetworkRun
from libvirt_natns.engine.publication.allocation import Allocation
from libvirt_natns.engine.publication.choices_in_force import ChoicesInForce
from libvirt_natns.engine.publication.dhcp_hosts import fixed_address
from libvirt_natns.engine.publication.resolve import of_network, resolve
from libvirt_natns.engine.publication.scopes import scopes
from libvirt_natns.errors import ConflictError, NatnsError, named
from libvirt_natns.firewall import translations
from libvirt_natns.firewall.translations import Translations
from libvirt_natns.kernel.locks import locked
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import DhcpSegment, Segment
from libvirt_natns.model.upstream import HostUpstream
from libvirt_natns.state import applicants
from libvirt_natns.state.leases import Leasable
from libvirt_natns.upstream import dhcp, selection, transit
from libvirt_natns.values import quoted

ADOPTED = "runs without a record: adopted as it is"


@dataclass(frozen=True, slots=True)
class Adopted:
    """Networks and guests that were adopted, and the errors of those that could not be."""

    found: list[tuple[str, str]]
    errors: list[str]


def adopt(engine: Engine, active: Mapping[str, bytes], domains: Mapping[str, bytes]) -> Adopted:
    """Record active networks with an unrecorded namespace, and active guests in them.

    Both by uuid, as libvirt describes them.
    """
    outcome = Adopted([], [])
    adopted: set[str] = set()
    unrecorded = {uuid: xml for uuid, xml in active.items() if _runs_unrecorded(engine, uuid, xml)}
    if unrecorded:
        _adopt_transits(engine)
    for uuid, xml in unrecorded.items():
        name = xml_sniff.at_network(xml).name
        with _noting(outcome, name), locked(names.network_directory(uuid)):
            engine.kernel.distrust()
            if _runs_unrecorded(engine, uuid, xml):
                _adopt_network(engine, xml, domains)
                adopted.add(uuid)
                outcome.found.append((name, ADOPTED))
    for xml in domains.values() if adopted else ():
        name = xml_sniff.at_domain(xml).name
        with _noting(outcome, name):
            if _adopt_guest(engine, xml, adopted):
                outcome.found.append((name, ADOPTED))
    return outcome


@contextmanager
def _noting(outcome: Adopted, name: str) -> Iterator[None]:
    """Note an error of the body, instead of raising it."""
    try:
        yield
    except Exception as error:  # an error must not keep the other networks and guests
        outcome.errors.append(named(name, error))


# -- networks ------------------------------------------------------------------


def _runs_unrecorded(engine: Engine, uuid: str, xml: bytes) -> bool:
    """Return whether an active network has a namespace of ours, and no record that says so."""
    record = engine.store.networks.get(uuid)
    if record is not None and record.runs:
        return False
    namespace = names.namespace(xml_sniff.at_network(xml).name)
    return engine.kernel.namespace_owner(namespace) == uuid


def _adopt_transits(engine: Engine) -> None:
    """Choose again the transit subnets that the host's transit bridges have."""
    for upstream in engine.config.upstreams.values():
        bridge = names.transit_bridge(upstream.name)
        if not isinstance(upstream, HostUpstream) or engine.kernel.host.links.get(bridge) is None:
            continue
        for interface in engine.kernel.host.addresses.of(bridge):
            subnet = interface.network
            if isinstance(subnet, IPv4Network) and upstream.subnet is None:
                engine.store.transit.choose_subnet(upstream.name, [subnet], None)
            elif isinstance(subnet, IPv6Network) and subnet.subnet_of(transit.PREFIXES6):
                engine.store.transit.choose_prefix(upstream.name, subnet)


def _adopt_network(engine: Engine, xml: bytes, domains: Mapping[str, bytes]) -> None:
    """Record a network with its leases, reservations and own forwards."""
    network = libvirt_xml.parse_network(xml)
    # Ahead of the leases: a transit subnet that is in use is not chosen anew.
    upstream = selection.upstream_of(network, engine.config)
    record = new_record(network, xml, upstream, "up")
    engine.store.networks.put(record)
    segment = engine.planner.complete(network, upstream)
    rules = translations.of_namespace(names.namespace(network.name))
    for lease in _leases(engine, network, segment, rules):
        _lease(engine, segment, network.uuid, f"network {quoted(network.name)}", lease)
    _adopt_reservations(engine, network, domains)
    if network.nat is None or not network.nat.forwards:
        return
    choices = ChoicesInForce(Allocation(engine.config, engine.store, engine.kernel), rules)
    leased = engine.store.leases.of(segment.name, network.uuid)
    run = NetworkRun(network, xml, record, segment, leased)
    claims = of_network(run.whole, segment, run.outside, choices)
    engine.store.claims.put(claims, scopes(engine.store, [network.uuid]), published=True)


def _lease(engine: Engine, segment: Segment, key: str, who: str, leased: Leasable) -> None:
    if not engine.store.leases.reserve(segment.name, segment.bridge, key, leased):
        raise ConflictError(
            f"{who}: {leased} of upstream {segment.name} is leased to another network or guest"
        )


def _leases(
    engine: Engine, network: Network, segment: Segment, rules: Translations
) -> Iterator[Leasable]:
    """Yield a network's leases, by the addresses in its namespace."""
    namespace = names.namespace(network.name)
    if isinstance(segment, DhcpSegment):
        yield dhcp.settle(engine.store, network, segment)
    outer = engine.kernel.at(namespace).addresses.of(names.UPSTREAM_LINK)
    for family in FAMILIES:
        if segment.side(family).by_dhcp:
            continue
        address = _own(outer, family, rules)
        if address is not None and applicants.can_keep(address, segment):
            yield address
    prefix = _prefix(engine, network, segment)
    if prefix is not None:
        yield prefix


def _own(interfaces: Iterable[Interface], family: Family, rules: Translations) -> Address | None:
    """Return the network's own among a namespace's upstream addresses, which guests have too."""
    guests = set(rules.own.values())
    mine = [each for each in interfaces if each.version == family and each.ip not in guests]
    mine = [each for each in mine if not each.ip.is_link_local]
    # Addresses of guests have no prefix.
    return min(mine, key=lambda each: each.network.prefixlen).ip if mine else None


def _prefix(engine: Engine, network: Network, segment: Segment) -> IPv6Network | None:
    """Return the prefix that is routed to a network, by its namespace's address in the prefix."""
    if not selection.leases_prefix(network, segment):
        return None
    wanted = selection.wanted_prefix(network, segment)
    if wanted is not None:
        return wanted
    inner = engine.kernel.at(names.namespace(network.name)).addresses.of(network.bridge)
    for interface in inner:
        subnet = interface.network
        if isinstance(subnet, IPv6Network) and any(map(subnet.subnet_of, segment.prefixes6)):
            return subnet
    return None


def _adopt_reservations(engine: Engine, network: Network, domains: Mapping[str, bytes]) -> None:
    """Keep the DHCP addresses that the namespace's dnsmasq has for guests' NICs."""
    text = dnsmasq_files.present(network.uuid).hosts
    owners = _owners(domains)
    for mac, address in dnsmasq_files.reserved(text):
        family: Family = 4 if address.version == 4 else 6
        if fixed_address(network, mac, family) is None:
            engine.store.reservations.reserve(
                network.uuid, mac, owners.get(mac, ""), [address], lambda _: False, family
            )


def _owners(domains: Mapping[str, bytes]) -> dict[str, str]:
    """Return the uuids of running guests, by the MAC addresses of their NICs."""
    owners: dict[str, str] = {}
    for xml in domains.values():
        with suppress(NatnsError):
            plain = libvirt_xml.parse_domain_nics(xml)
            owners |= {nic.mac: plain.uuid for nic in plain.nics}
    return owners


# -- guests --------------------------------------------------------------------


def _adopt_guest(engine: Engine, xml: bytes, networks: set[str]) -> bool:
    """Adopt a running guest's claims in these networks; return whether there are any."""
    plain = libvirt_xml.parse_domain_nics(xml)
    if not xml_sniff.at_domain(xml).annotated or engine.store.guests.get(plain.uuid) is not None:
        return False
    guests = Guests(engine)
    attachments = guests.attachments(plain)
    if not any(each.network.uuid in networks for each in attachments):
        return False
    domain = libvirt_xml.parse_domain(xml)
    if domain.nat is None:
        return False
    rules = [translations.of_namespace(names.namespace(each.network.name)) for each in attachments]
    choices = ChoicesInForce(Allocation(engine.config, engine.store, engine.kernel), *rules)
    with locked(names.guest_directory(domain.uuid)):
        claims = resolve(domain, attachments, choices)
        where = scopes(engine.store, {each.network.uuid for each in attachments})
        engine.store.claims.put(claims, where, published=True)
        engine.store.guests.put(domain.uuid, domain.name, xml, published=True)
    return True
