# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which networks are handled, and whether one can be: pure decisions.

All that is decidable from the network's XML and the configuration alone; what
depends on the machine is ``engine``'s.
"""

from collections.abc import Iterable
from ipaddress import IPv4Address

from libvirt_natns import names
from libvirt_natns.addresses import Address
from libvirt_natns.errors import ConfigError, DocumentError, LeaseError, UpstreamError
from libvirt_natns.model import Config, Network, Upstream
from libvirt_natns.records import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a network is handled, and why (not)."""

    handled: bool
    reason: str


def verdict(network: Network, config: Config) -> Verdict:
    """Whether a network is ours to handle.

    Raises DocumentError for one that asks to be handled and cannot be.
    """
    if network.forward_mode is not None:
        return Verdict(False, f"has <forward mode='{network.forward_mode}'>")
    if network.nat is not None and not network.nat.enabled:
        return Verdict(False, "its metadata says enabled='no'")
    if config.scope == "annotated" and network.nat is None:
        return Verdict(False, "scope is 'annotated' and its metadata has no <natns:nat>")
    if not network.subnets:
        if network.nat is None:
            return Verdict(False, "has no IPv4 address")
        raise DocumentError(
            f"network {network.name} has neither <ip> nor <natns:ip>",
            "give it one, or remove <natns:nat> from its metadata",
        )
    if network.bridge is None:
        return Verdict(False, "has no bridge")
    return Verdict(True, "isolated" if network.nat is None else "annotated")


def upstream_of(network: Network, config: Config) -> Upstream:
    """The upstream that a network uses.

    Raises UpstreamError for one that is not configured, or of a kind that this
    version does not serve.
    """
    name = (network.nat.upstream if network.nat else None) or config.upstream
    upstream = config.upstreams.get(name)
    if upstream is None:
        raise UpstreamError(
            f"network {network.name}: there is no upstream {name}",
            f"add [upstreams.{name}] to {names.CONFIG_FILE}, or name one of "
            + ", ".join(sorted(config.upstreams)),
        )
    check_served(upstream)
    return upstream


def check_served(upstream: Upstream) -> None:
    """Refuse an upstream of a kind that this version does not serve.

    Raises UpstreamError or ConfigError.
    """
    name = upstream.name
    if upstream.kind == "router":
        raise UpstreamError(
            f"upstream {name}: kind 'router' is not served by this version",
            "use an upstream of kind 'bridge' or 'host'",
        )
    if upstream.pool == "dhcp":
        raise ConfigError(
            f"upstream {name}: pool 'dhcp' is not served by this version",
            "give a range of addresses",
        )


def check_addresses(network: Network, upstream: Upstream) -> None:
    """Refuse what could never work between a network and a completed upstream.

    Raises DocumentError for private subnets, and routes to further ones, that
    overlap the upstream's (the namespace could not tell the two sides apart),
    and for a bridge named like the namespace's other interfaces.
    """
    assert upstream.subnet is not None
    if network.bridge in (names.UPSTREAM_LINK, "lo"):
        raise DocumentError(
            f"network {network.name}: a bridge cannot be called {network.bridge}",
            "give it another name in <bridge name='...'/>",
        )
    private = [subnet.network for subnet in network.subnets]
    private += [route.destination for route in network.routes]
    for subnet in private:
        if subnet.overlaps(upstream.subnet):
            raise DocumentError(
                f"network {network.name}: its subnet {subnet} overlaps {upstream.subnet}"
                f" of upstream {upstream.name}",
                "give one of them another subnet",
            )


def check_resolvers(network: Network, upstream: Upstream, servers: Iterable[Address]) -> None:
    """Refuse a network that hides the resolvers its guests depend on.

    ``servers`` are asked through the upstream; one whose address is in a private
    subnet can never be reached.  Raises DocumentError unless one is left.
    """
    if network.dns is None or any(f.domain is None for f in network.dns.forwarders):
        # Nobody is asked, or those that the network's own XML names.
        return
    asked = list(servers)
    private = [subnet.network for subnet in network.subnets]
    hidden = {server for server in asked for subnet in private if server in subnet}
    if hidden and hidden.issuperset(asked):
        raise DocumentError(
            f"network {network.name}: the DNS server {min(hidden)} of upstream {upstream.name}"
            " is in its own subnet",
            f"set 'dns' in [upstreams.{upstream.name}] of {names.CONFIG_FILE},"
            " or give the network another subnet",
        )


@dataclass(frozen=True, slots=True)
class Applicant:
    """Whoever leases an upstream address: a network, or a guest for one of its own.

    ``key`` is what the lease is filed under, ``who`` says it in messages;
    ``element`` is where the ``wanted`` address stands.
    """

    key: str
    who: str
    wanted: Address | None = None
    element: str = "natns:upstream"


def applicant(network: Network) -> Applicant:
    """A network, as one that leases its upstream address."""
    wanted = network.nat.address if network.nat else None
    return Applicant(network.uuid, f"network {network.name}", wanted)


def check_wanted(who: Applicant, upstream: Upstream, wanted: Address) -> None:
    """Refuse an upstream address that somebody asks for and cannot have.

    Raises LeaseError.
    """
    assert upstream.subnet is not None
    reserved = reserved_addresses(upstream)
    if wanted not in upstream.subnet:
        problem = f"is not in its subnet {upstream.subnet}"
    elif wanted in reserved:
        problem = f"is its {reserved[wanted]}"
    else:
        return
    raise LeaseError(
        f"{who.who}: the wanted address {wanted} of upstream {upstream.name} {problem}",
        f"choose another in <{who.element} address='...'/>",
    )


def can_keep(address: Address, upstream: Upstream) -> bool:
    """Whether a network that runs can keep its address, whatever the pool is today."""
    inside = upstream.subnet is not None and address in upstream.subnet
    return inside and address not in reserved_addresses(upstream)


def reserved_addresses(upstream: Upstream) -> dict[Address, str]:
    """Addresses of an upstream's subnet that no network may have, and what they are."""
    subnet = upstream.subnet
    assert subnet is not None
    reserved: dict[Address, str] = {}
    if subnet.prefixlen < 31:
        reserved[subnet.network_address] = "network address"
        reserved[subnet.broadcast_address] = "broadcast address"
    for server in upstream.dns:
        if isinstance(server, IPv4Address):
            reserved[server] = "DNS server"
    if upstream.gateway is not None:
        reserved[upstream.gateway] = "gateway"
    return reserved
