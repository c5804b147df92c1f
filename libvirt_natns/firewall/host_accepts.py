# SPDX-License-Identifier: LGPL-2.1-or-later
"""Accepts for foreign chains that drop packets they do not know, Docker's above all.

An accept of ours does not undo another chain's drop.  So a chain that libvirt's networks share
gets a jump to a chain of ours: the last rule, or the last ahead of a rule that refuses
everything.  Explicit rules of others decide first.  An administrator's own chains
are never changed: packets that they drop stay dropped (``stopping_chains``).

An accept for a transit bridge asks for no conntrack state: iptables-nft cannot list nft's
way of asking for the state.  Our own rules, which every such packet passes, too, let in
replies alone.

Where bridged frames pass through ip6tables, neighbours must find each other on a bridge to the
outside: link-local addresses and groups pass there.
"""

from collections.abc import Iterator
from ipaddress import IPv4Address

from libvirt_natns.addresses import Family, IPNetwork
from libvirt_natns.firewall.host_policy import HostPolicy, Private, Provider, Transit
from libvirt_natns.firewall.rule import Rule, single
from libvirt_natns.firewall.well_known import LINK_LOCAL, MULTICAST

COMMENT = "libvirt-natns"

DHCP = (IPv4Address("0.0.0.0"), IPv4Address("255.255.255.255"))
"""The source of a client without an address, and the destination of the answers."""


def accepts(policy: HostPolicy) -> tuple[Rule, ...]:
    """Return what a foreign chain must not drop; one address a rule, as iptables lists them."""
    shared = [rule for transit in policy.transits for rule in _transit_accepts(transit)]
    clients = (Provider(bridge, address) for bridge in policy.dhcp for address in DHCP)
    shared += [rule for client in clients for rule in _provider_accepts(client)]
    shared += [rule for bridge in links6(policy) for rule in _neighbours(bridge)]
    return (*shared, *own_accepts(policy))


def links6(policy: HostPolicy) -> list[str]:
    """Return bridges to the outside on which neighbours of IPv6 meet the host's rules."""
    outside = policy.provider if policy.bridge_nf6 else ()
    return sorted({provider.bridge for provider in outside if provider.address.version == 6})


def _neighbours(bridge: str) -> Iterator[Rule]:
    yield _bridged(bridge, sources=(LINK_LOCAL,))
    for destination in (LINK_LOCAL, MULTICAST):
        yield _bridged(bridge, destinations=(destination,))


def own_accepts(policy: HostPolicy) -> list[Rule]:
    """Return the accepts that belong to a single network."""
    own = [rule for private in policy.private for rule in _private(policy, private)]
    for provider in policy.provider:
        filtered = policy.bridge_nf6 if provider.address.version == 6 else policy.bridge_nf
        if provider.routed or filtered:
            own += _provider_accepts(provider)
    own += [rule for public in policy.public for rule in _transit_accepts(public)]
    return list(dict.fromkeys(own))


def _private(policy: HostPolicy, private: Private) -> Iterator[Rule]:
    if policy.bridge_nf:
        yield _bridged(private.bridge)
    if policy.filters_ipv6_of(private):
        yield _bridged(private.bridge, only=6)


def _transit_accepts(behind: Transit | Provider) -> Iterator[Rule]:
    bridge = behind.bridge
    subnet = (behind.subnet,) if isinstance(behind, Transit) else single(behind.address)
    yield Rule(chain="foreign", iif=bridge, sources=subnet, action="accept", comment=COMMENT)
    yield Rule(chain="foreign", oif=bridge, destinations=subnet, action="accept", comment=COMMENT)


def _provider_accepts(provider: Provider) -> Iterator[Rule]:
    bridge, address = provider.bridge, single(provider.address)
    yield _bridged(bridge, sources=address)
    yield _bridged(bridge, destinations=address)


def _bridged(
    bridge: str,
    sources: tuple[IPNetwork, ...] = (),
    destinations: tuple[IPNetwork, ...] = (),
    only: Family | None = None,
) -> Rule:
    return Rule(
        chain="foreign",
        iif=bridge,
        oif=bridge,
        sources=sources,
        destinations=destinations,
        only=only,
        action="accept",
        comment=COMMENT,
    )
