# SPDX-License-Identifier: LGPL-2.1-or-later
"""The edge of a namespace: packets that cross the upstream, in both directions.

The namespace behaves as a strong host.  A packet that arrives over the upstream counts only if it
is addressed to an upstream address.  A packet that leaves over the upstream bears an upstream
address, even after a guest's forgery or a lost entry of conntrack.

IPv6 is as IPv4 where a subnet is private: the subnet leaves by the upstream address.  Public
subnets pass as they are.  Between neighbours, Neighbour Discovery and MLD pass,
which conntrack does not track; redirects do not, in either direction.

On a transit bridge, sibling namespaces reach an upstream address only by the gateway, which
looks at listen addresses and sources.
"""

from collections.abc import Iterator

from libvirt_natns.addresses import IPNetwork, default_route
from libvirt_natns.firewall.namespace_policy import FamilyPolicy, Policy
from libvirt_natns.firewall.rule import Chain, Rule, single
from libvirt_natns.firewall.well_known import (
    BROADCAST,
    LINK_LOCAL,
    LISTENERS,
    MULTICAST,
    NEIGHBOURS,
    UNSPECIFIED,
)


def edge(policy: Policy, halves: tuple[FamilyPolicy, ...]) -> Iterator[Rule]:
    """Yield rules by which packets that cross the upstream bear an upstream address."""
    for half in halves:
        yield from _arrival(half)
    yield Rule(chain="clamp", protocol="tcp", syn=True, action="clamp-mss")
    for half in halves:
        yield from _source(half)
        yield from _guard(half)


def _arrival(half: FamilyPolicy) -> Iterator[Rule]:
    # Ahead of conntrack and routing, or a neighbour with a route to the private
    # subnet would still be sent redirects and "time exceeded", and could
    # fill the conntrack table.
    upstream = half.policy.upstream
    if half.family == 6:
        # Conntrack counts redirects to a flow that it knows: "related" would let them in.
        yield Rule(chain="raw", protocol="icmpv6", icmp=("nd-redirect",), action="drop")
        # In IPv4, the kernel itself refuses packets that bear an address of its own.
        forged = (*half.gateways, *half.own)
        yield Rule(chain="raw", iif=half.policy.inner, sources=forged, action="drop")
    yield from _siblings(half)
    if half.outside:
        yield Rule(chain="raw", iif=upstream, destinations=half.outside, action="accept")
    if half.outside and half.family == 6:
        yield Rule(
            chain="raw",
            iif=upstream,
            destinations=(LINK_LOCAL, MULTICAST),
            protocol="icmpv6",
            action="accept",
            comment="neighbours",
        )
    yield from refused_lease(half, "raw")
    yield Rule(
        chain="raw",
        iif=upstream,
        destinations=(default_route(half.family),),
        action="drop",
        comment="not addressed to an upstream address",
    )


def _siblings(half: FamilyPolicy) -> Iterator[Rule]:
    """Let only the gateway of a transit bridge ask for the upstream addresses.

    The gateway has looked at listen addresses and sources of forwards.  It
    masquerades flows that it leads from one namespace to another.
    """
    policy = half.policy
    for gateway in policy.transit:
        if gateway.version != half.family or not half.own:
            continue
        yield Rule(
            chain="raw",
            iif=policy.upstream,
            sources=single(gateway.ip),
            destinations=half.outside,
            action="accept",
        )
        siblings: tuple[tuple[str, tuple[IPNetwork, ...]], ...] = (
            (policy.upstream, (gateway.network,)),
            (policy.inner, ()),
        )
        for link, sources in siblings:
            yield Rule(
                chain="raw",
                iif=link,
                sources=sources,
                destinations=half.own,
                action="drop",
                comment="not by the gateway",
            )


def refused_lease(half: FamilyPolicy, chain: Chain) -> Iterator[Rule]:
    """Accept broadcasts of a DHCP server: it refuses to renew a lease by broadcast (RFC 2131)."""
    policy = half.policy
    if policy.by_dhcp and half.family == 4:
        yield Rule(
            chain=chain,
            iif=policy.upstream,
            destinations=(BROADCAST,),
            protocol="udp",
            ports=(68,),
            action="accept",
            comment="DHCP",
        )


def _source(half: FamilyPolicy) -> Iterator[Rule]:
    """Yield the source address of a flow that leaves by the upstream."""
    upstream = half.policy.upstream
    if half.public:
        yield Rule(chain="srcnat", oif=upstream, sources=half.public, action="accept")
    if half.family == 4 and half.address:
        yield Rule(chain="srcnat", oif=upstream, only=half.only, action="masquerade")
    elif half.address:
        # Masquerading would take any address of the link, also the address of a guest.
        yield Rule(
            chain="srcnat",
            oif=upstream,
            sources=(LINK_LOCAL,),
            not_sources=True,
            action="snat",
            to=half.address,
        )


def _guard(half: FamilyPolicy) -> Iterator[Rule]:
    """Drop packets that leave without an upstream address, translated or not."""
    upstream = half.policy.upstream
    if not half.outside:
        everything = (default_route(half.family),)
        yield Rule(chain="guard", oif=upstream, sources=everything, action="drop")
        return
    if half.family == 6:
        yield from _neighbours_out(half)
    # The namespace's own addresses are not translated; forwarded packets never bear them.
    own = tuple(gateway for gateway in half.gateways if gateway not in half.public_gateways)
    if own and not half.address:
        yield Rule(chain="guard", oif=upstream, sources=own, action="drop")
    # NAT leaves alone what conntrack calls invalid, and flows that began
    # before its rules were there.
    yield Rule(
        chain="guard",
        oif=upstream,
        sources=half.outside,
        not_sources=True,
        action="drop",
        comment="not translated",
    )


def _neighbours_out(half: FamilyPolicy) -> Iterator[Rule]:
    # Conntrack has nothing to do with these, so NAT has not either.
    yield Rule(
        chain="guard",
        oif=half.policy.upstream,
        sources=(LINK_LOCAL, UNSPECIFIED, *half.own),
        protocol="icmpv6",
        icmp=(*NEIGHBOURS, "nd-router-solicit", *LISTENERS[1:]),
        action="accept",
        comment="neighbours",
    )
