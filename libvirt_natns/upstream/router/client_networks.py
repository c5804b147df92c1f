# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks on a router: their transit bridge is in its namespace, their forwards are its rules.

A network's upstream patch ends in the router namespace, so the network's packets never pass
through the host.  The router chooses the transit subnet when it comes up.  Without its
router, a network cannot start.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address
from socket import AF_INET6

from libvirt_natns import names
from libvirt_natns.addresses import Address
from libvirt_natns.errors import ConflictError, DocumentError, NatnsError, UpstreamError
from libvirt_natns.firewall.host_policy import Followed, HostForward, host_forward
from libvirt_natns.firewall.loaded import RuleSet
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.publication import Forward
from libvirt_natns.model.transit_segment import RouterSegment
from libvirt_natns.model.upstream import RouterUpstream
from libvirt_natns.state.host_records import User
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import followed_flows
from libvirt_natns.upstream.router import downstream, journal, link_config, nat_rules, router_files
from libvirt_natns.upstream.router.downstream import RouterNeeds
from libvirt_natns.upstream.router.journal import RouterRecord
from libvirt_natns.upstream.router.target import Target

Repair = Callable[[NetworkRecord], list[str]]
"""Brings a network to its record, unless it is down or changed by now."""


def record_of(upstream: str) -> RouterRecord | None:
    """Return the record of a router that is up, or None."""
    record = journal.load(upstream)
    return record if record is not None and record.is_whole else None


def complete(upstream: RouterUpstream) -> RouterSegment:
    """Return the segment of a router: its transit bridge and subnets.

    Raises UpstreamError where its router is not up.
    """
    record = record_of(upstream.name)
    if record is None:
        raise UpstreamError(
            f"upstream {upstream.name}: its router is not up",
            f"virt-natns router up {upstream.name}",
        )
    target = record.target
    return RouterSegment.of(
        upstream,
        names.ROUTER_TRANSIT,
        IPv4Network(target.transit),
        IPv6Network(target.transit6) if target.transit6 else None,
        IPv6Network(target.subnet6) if target.subnet6 else None,
    )


def neighbours(upstream: str) -> set[Address]:
    """Return the known stations on the link of a router's NIC, with the host and the router."""
    record = record_of(upstream)
    if record is None:
        return set()
    routes = (route for route in record.before.routes if route.family == AF_INET6)
    stations = {*record.target.addresses6, *(address.ip for address in record.before.ipv6)}
    stations |= {route.gateway for route in routes if route.gateway}
    stations |= {record.target.own6} if record.target.own6 else set()
    return {ip_address(station) for station in stations}


def needs(store: Store, config: Config, target: Target) -> RouterNeeds:
    """Return the needs of the networks that run on a router."""
    users = {user.uuid: user for user in store.host.users() if user.upstream == target.name}
    forwards = (_published(forward, users) for forward in store.claims.forwards())
    return RouterNeeds(
        tuple(forward for forward in forwards if forward),
        tuple(each for user in users.values() for each in _prefixes(target, user)),
        tuple(each for user in users.values() for each in _followed(config, target, user)),
    )


def _prefixes(target: Target, user: User) -> tuple[tuple[str, str], ...]:
    """Return the prefixes of a network that the outside knows, with its namespace's address."""
    own = tuple(subnet for subnet in user.subnets if isinstance(subnet, IPv6Network))
    gateway = user.leased.address6
    if not (own and gateway and target.transit6):
        return ()
    return downstream.prefixes(target, own, user.leased.prefix, str(gateway))


def _followed(config: Config, target: Target, user: User) -> tuple[Followed, ...]:
    upstream = config.routers.get(target.name)
    if upstream is None:
        return ()
    bridge = names.ROUTER_TRANSIT
    return followed_flows.of_user(user, upstream, bridge, user.leased, lambda: target.backend)


def users(store: Store, upstream: str) -> list[str]:
    """Return the names of the networks that run on a router."""
    running = [user.uuid for user in store.host.users() if user.upstream == upstream]
    return sorted(record.name for uuid in running if (record := store.networks.get(uuid)))


def _published(forward: Forward, users: Mapping[str, User]) -> HostForward | None:
    """Return the router's part of a forward; None for a forward to a guest's own address."""
    user = users.get(forward.network)
    leased = user.leased if user else None
    address = leased.of(forward.target.version) if leased else None
    if address is None or forward.own:
        return None
    return host_forward(forward, address, names.ROUTER_TRANSIT)


def reattach(store: Store, repair: Repair, upstream: str) -> list[str]:
    """Attach the networks that are up to a router that was made anew.

    Returns in words what differed, and why a network cannot be attached.
    """
    differing = []
    for record in store.networks.all("up"):
        if record.this_boot and record.upstream == upstream:
            try:
                changed = repair(record)
            except NatnsError as error:
                changed = [str(error)]
            differing += [f"{record.name}: {what}" for what in changed]
    return differing


# -- rules -------------------------------------------------------------------


def ensure(store: Store, config: Config, announce: Callable[[str], None]) -> list[str]:
    """Bring the rules of all routers to what their networks publish; returns what differed.

    Only the record of what was loaded is compared, not the kernel.  Raises FirewallError.
    """
    differing = []
    for record in journal.load_all():
        if not record.is_whole:
            continue
        wanted = needs(store, config, record.target)
        if not _rule_set(record.target, wanted).was_loaded_last():
            differing += _load(store, config, record.target.name, announce)
    return differing


def _load(store: Store, config: Config, name: str, announce: Callable[[str], None]) -> list[str]:
    with router_files.lock():
        # Before the lock, router, host_ports and forwards may have changed.
        latest = record_of(name)
        if latest is None:
            return []
        now = needs(store, config, latest.target)
        rule_set = _rule_set(latest.target, now)
        if rule_set.was_loaded_last():
            return []
        announce(f"load the rules of router {name}")
        # Routes come first: where the rules are current, the routes are not compared.
        link_config.configure(downstream.transit(latest.target, now))
        rule_set.load()
    return [f"rules of router {name} differed from the forwards of its networks"]


def _rule_set(target: Target, wanted: RouterNeeds) -> RuleSet:
    return nat_rules.firewall(target, nat_rules.rules(target, wanted)).rule_set


# -- claims ------------------------------------------------------------------


def check_claims(claims: Iterable[Forward], routers: Mapping[str, str]) -> None:
    """Refuse forwards that a router cannot serve.  Raises a NatnsError.

    A forward cannot have a port of the host (``host_ports``), or listen on an address that
    the router does not have.  ``routers`` are the routers' names by network.
    """
    by_router: defaultdict[str, list[Forward]] = defaultdict(list)
    for forward in claims:
        if forward.network in routers:
            by_router[routers[forward.network]].append(forward)
    for name, listed in by_router.items():
        record = record_of(name)
        for forward in listed if record else ():
            assert record is not None
            _check(forward, record)


def _check(forward: Forward, record: RouterRecord) -> None:
    target = record.target
    taken = _port_of_host(forward, target)
    if taken is not None:
        raise ConflictError(
            f"{forward.owner_name}: {forward.proto} port {taken} of router {target.name}"
            " belongs to the host (host_ports)",
            "choose another port, or start='auto'",
        )
    if int(forward.address) and not forward.own and not _listens(record, forward.address):
        raise DocumentError(
            f"{forward.owner_name}: <natns:portForward address='{forward.address}'> is not an"
            f" address of router {target.name}",
            "leave address out to listen on all addresses",
        )


def _listens(record: RouterRecord, address: Address) -> bool:
    """True if a router has an address; a leased router may have any IPv4 address."""
    target, before = record.target, record.before
    if address.version == 4:
        return target.leased or str(address) in {address.ip for address in before.ipv4}
    kept = {address.ip for address in before.ipv6} - set(target.addresses6)
    return str(address) in kept | {target.own6}


def _port_of_host(forward: Forward, target: Target) -> int | None:
    """Return a port of a forward that leads to the host, or None.

    In IPv6 the host has addresses of its own, and shares no ports.
    """
    if forward.target.version != 4:
        return None
    for protocol, first, last in target.ports:
        if protocol == forward.proto and first <= forward.last and forward.first <= last:
            return max(first, forward.first)
    return None


def ports_of_host(upstream: str, protocol: str) -> set[int]:
    """Return the ports of a router that lead to the host."""
    record = record_of(upstream)
    return {
        port
        for proto, first, last in (record.target.ports if record else ())
        if proto == protocol
        for port in range(first, last + 1)
    }
