# SPDX-License-Identifier: LGPL-2.1-or-later
"""Decides which networks are handled, by which upstream, and refuses impossible ones.

Decisions here are pure: they need the network's XML and the configuration alone.  Decisions
that depend on the machine are in the room ``engine``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv6Network

from libvirt_natns import names
from libvirt_natns.addresses import (
    FAMILIES,
    Address,
    Family,
    IPNetwork,
    by_family,
    host_network,
)
from libvirt_natns.errors import DocumentError, UpstreamError
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.network import LibvirtNetwork, Network
from libvirt_natns.model.segment import Segment
from libvirt_natns.model.upstream import AnyUpstream, Helper, Upstream
from libvirt_natns.state import applicants
from libvirt_natns.values import quoted

LINK_LOCAL = IPv6Network("fe80::/10")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The network if it is handled, else None; with the reason."""

    network: Network | None
    reason: str

    @property
    def handled(self) -> bool:
        """True for a handled network."""
        return self.network is not None


def verdict(network: LibvirtNetwork, config: Config) -> Verdict:
    """Return whether we handle a network.

    Raises DocumentError for a network that asks to be handled and cannot be.
    """
    if network.forward_mode is not None:
        return Verdict(None, f"has <forward mode='{network.forward_mode}'>")
    if network.nat is not None and not network.nat.enabled:
        return Verdict(None, "its metadata says enabled='no'")
    if config.scope == "annotated" and network.nat is None:
        return Verdict(None, "scope is 'annotated' and its metadata has no <natns:nat>")
    if not network.subnets:
        if network.nat is None:
            return Verdict(None, "has no address")
        raise DocumentError(
            f"network {quoted(network.name)} has neither <ip> nor <natns:ip>",
            "add <ip> or <natns:ip>, or remove <natns:nat> from its metadata",
        )
    if not isinstance(network, Network):
        return Verdict(None, "has no bridge")
    return Verdict(network, "isolated" if network.nat is None else "annotated")


def named_upstream(network: Network) -> str | None:
    """Return the upstream that a network's own metadata names; None without one."""
    return network.nat.upstream if network.nat else None


def upstream_of(network: Network, config: Config, present: str | None = None) -> Upstream:
    """Return the upstream that a network uses.

    A network that names none stays on ``present`` while that upstream is configured.
    Raises UpstreamError for an upstream that is not configured.
    """
    stays = present if present in config.upstreams else None
    name = named_upstream(network) or stays or config.upstream
    upstream = config.upstreams.get(name)
    if upstream is None:
        raise UpstreamError(
            f"network {quoted(network.name)}: there is no upstream {name}",
            f"add [upstreams.{name}] to {names.CONFIG_FILE}, or name one of "
            + ", ".join(sorted(config.upstreams)),
        )
    return upstream


def helpers(network: LibvirtNetwork, upstream: AnyUpstream) -> tuple[Helper, ...]:
    """Return the helpers that follow a network's flows: its own choice, or the upstream's."""
    own = network.nat.helpers if network.nat else None
    return upstream.helpers if own is None else own


# -- how subnets leave ---------------------------------------------------------


def wanted_prefix(network: Network, segment: Segment) -> IPv6Network | None:
    """Return the prefix that a network's XML takes from prefixes routed to the upstream."""
    for subnet in _subnets6(network):
        if any(subnet.subnet_of(prefix) for prefix in segment.prefixes6):
            return subnet if subnet.prefixlen <= 64 else subnet.supernet(new_prefix=64)
    return None


def routed(network: Network, segment: Segment) -> tuple[IPv6Network, ...]:
    """Return a network's own subnets that are routed to it."""
    return tuple(
        subnet
        for subnet in _subnets6(network)
        if any(subnet.subnet_of(prefix) for prefix in segment.prefixes6)
    )


def proxied(network: Network, segment: Segment) -> tuple[IPv6Network, ...]:
    """Return a network's subnets within the upstream's own subnet; we answer for each address."""
    own = segment.own6
    return tuple(subnet for subnet in _subnets6(network) if own and subnet.subnet_of(own))


def leases_prefix(network: Network, segment: Segment) -> bool:
    """True if a network leases a prefix from those routed to the upstream.

    It leases the prefix that its XML names.  Without one, a network with IPv6 that the
    outside does not know leases any prefix.
    """
    if not segment.prefixes6 or not has_family(network, 6):
        return False
    return wanted_prefix(network, segment) is not None or not proxied(network, segment)


def has_family(network: Network, family: Family) -> bool:
    """True if a network has a subnet of that family."""
    return any(subnet.network.version == family for subnet in network.subnets)


def leases_address(network: Network, segment: Segment, family: Family) -> bool:
    """True if a network leases an address of that family on its upstream."""
    if not has_family(network, family):
        return False
    side = segment.side(family)
    return (
        side.by_dhcp or bool(side.ranges) or applicants.wanted_address(network, family) is not None
    )


def families(network: Network, segment: Segment) -> tuple[Family, ...]:
    """Return the families in which a network reaches the outside."""
    public = routed(network, segment) or proxied(network, segment)
    six = bool(public) or leases_prefix(network, segment)
    ways: tuple[tuple[Family, bool], ...] = (
        (4, leases_address(network, segment, 4)),
        (6, six or leases_address(network, segment, 6)),
    )
    return tuple(family for family, way in ways if way)


def _subnets6(network: Network) -> list[IPv6Network]:
    own = (subnet.network for subnet in network.subnets)
    return [subnet for subnet in own if isinstance(subnet, IPv6Network)]


def check_addresses(network: Network, segment: Segment) -> None:
    """Refuse a network with addresses that can never work with an upstream.

    Raises DocumentError for private subnets and routes that overlap the upstream's subnets,
    as the namespace could not tell the two sides apart.  An IPv6 subnet that is a part of
    the upstream's is not private.  A bridge cannot have the name of another link of the
    namespace.
    """
    if network.bridge in (names.UPSTREAM_LINK, "lo"):
        raise DocumentError(
            f"network {quoted(network.name)}: a bridge cannot be called {network.bridge}",
            "choose another name in <bridge name='...'/>",
        )
    _check_own(network)
    public = {*routed(network, segment), *proxied(network, segment)}
    private = [subnet.network for subnet in network.subnets if subnet.network not in public]
    private += [route.destination for route in network.routes if route.destination not in public]
    for subnet in private:
        for outside in _outside(segment):
            if subnet.overlaps(outside):
                raise DocumentError(
                    f"network {quoted(network.name)}: its subnet {subnet} overlaps {outside}"
                    f" of upstream {segment.name}",
                    "give one of them another subnet",
                )
    _check_routed(network, segment)


def _check_own(network: Network) -> None:
    """Refuse addresses and routes that libvirt accepts, and the kernel or dnsmasq does not.

    Raises DocumentError.
    """
    for subnet in network.subnets:
        gateway = subnet.gateway
        if gateway.is_unspecified or (gateway.version == 6 and gateway.ipv4_mapped):
            raise DocumentError(
                f"network {quoted(network.name)}: no host can have its address {gateway}",
                "choose another address in <ip address='...'/>",
            )
    for route in network.routes:
        if route.destination.version == 6 and route.destination.overlaps(LINK_LOCAL):
            raise DocumentError(
                f"network {quoted(network.name)}: no <route> can lead to link-local addresses"
                f" ({route.destination})",
                "remove the route",
            )
        for subnet in network.subnets:
            if subnet.network.version == 4 and route.gateway == subnet.network.broadcast_address:
                raise DocumentError(
                    f"network {quoted(network.name)}: the gateway {route.gateway} of its <route> is"
                    f" the broadcast address of {subnet.network}",
                    "name the address of a guest",
                )


def _outside(segment: Segment) -> list[IPNetwork]:
    """Return the subnets and single stations on the upstream's side, and prefixes routed to it."""
    subnets = (segment.subnet, segment.subnet6, segment.own6, *segment.prefixes6)
    outside: list[IPNetwork] = [subnet for subnet in subnets if subnet is not None]
    for side in map(segment.side, FAMILIES):
        if side.subnet is None:
            outside += (net for span in side.ranges for net in span.networks)
        if side.gateway is not None and side.is_off_link and side.gateway not in LINK_LOCAL:
            outside.append(host_network(side.gateway))
    return outside


def _check_routed(network: Network, segment: Segment) -> None:
    """Refuse more routed prefixes than a network can lease.

    Raises DocumentError.
    """
    subnets = routed(network, segment)
    if any(subnet.prefixlen < 64 for subnet in subnets):
        raise DocumentError(
            f"network {quoted(network.name)}: its subnet {subnets[0]} is more than a /64 of"
            f" prefixes6 of upstream {segment.name}",
            "give the network a /64",
        )
    if len(subnets) > 1:
        raise DocumentError(
            f"network {quoted(network.name)}: both {subnets[0]} and {subnets[1]} are in prefixes6"
            f" of upstream {segment.name}",
            "keep a single subnet of prefixes6 in the network",
        )


def check_resolvers(network: Network, segment: Segment, servers: Iterable[Address]) -> None:
    """Refuse a network with private subnets that hide all resolvers of its guests.

    ``servers`` are asked through the upstream.  A server with an address in a private subnet can
    never be reached.  Raises DocumentError unless a server is left.
    """
    if network.dns is None or any(f.domain is None for f in network.dns.forwarders):
        # No server is asked, or the network's own XML names the servers.
        return
    asked = list(servers)
    # A server in a part of the provider's own subnet is known to be outside.
    outside = proxied(network, segment)
    private = [subnet.network for subnet in network.subnets if subnet.network not in outside]
    hidden = {server for server in asked for subnet in private if server in subnet}
    if hidden and hidden.issuperset(asked):
        raise DocumentError(
            f"network {quoted(network.name)}: the DNS server {min(hidden, key=by_family)}"
            f" of upstream {segment.name} is in its own subnet",
            f"set 'dns' in [upstreams.{segment.name}] of {names.CONFIG_FILE},"
            " or give the network another subnet",
        )


def can_keep_prefix(prefix: IPv6Network, network: Network, segment: Segment) -> bool:
    """True if a network can keep the prefix that it has leased."""
    wanted = wanted_prefix(network, segment)
    return wanted == prefix or (
        wanted is None and any(prefix.subnet_of(each) for each in segment.prefixes6)
    )
