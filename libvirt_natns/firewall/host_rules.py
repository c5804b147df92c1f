# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's own rules: translations, and flows into and out of a transit bridge.

A client's own address is kept where the reply finds back.  A service sees the host's address
on the transit bridge in place of a namespace's: two namespaces on one bridge would answer
each other directly.  It sees that address in place of 127.0.0.1, too.

127.0.0.1 reaches a published port only where route_localnet is 1 for that bridge.  Then the
kernel accepts loopback addresses that come from there, so they are dropped on arrival.
Packets for loopback addresses from any other side are dropped, too, ahead of translation.

IPv6 is the same with a transit bridge that has a private subnet of IPv6, too.  The kernel
takes ::1 from no link but lo and routes it nowhere.  So a published port is not reached
there, and a service of the host on that address is left alone.

Bridged frames pass through iptables where bridge-nf-call-iptables is 1, which is never written
here.  Then private frames have a conntrack zone for each bridge, or twins with one address
would be one flow.  The host's NAT leaves these frames alone.
"""

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network

from libvirt_natns.addresses import IPNetwork
from libvirt_natns.firewall import boundary, nftables, zones
from libvirt_natns.firewall.helpers import following
from libvirt_natns.firewall.host_policy import HostForward, HostPolicy, Provider, Transit
from libvirt_natns.firewall.rule import Rule, Transport, limited, single
from libvirt_natns.model.transit_segment import RELAY_PORT

LOOPBACK = (IPv4Network("127.0.0.0/8"),)
LOOPBACK6 = (IPv6Network("::1"),)
RELAYED: tuple[Transport, ...] = ("udp", "tcp")
"""The protocols of DNS."""


def rules(policy: HostPolicy, backend_name: str = nftables.name) -> tuple[Rule, ...]:
    """Return the host's own rules, for a backend."""
    bridges: dict[str, list[Transit]] = {}
    for transit in policy.transits:
        bridges.setdefault(transit.bridge, []).append(transit)
    kinds = backend_name == nftables.name
    shared = [
        rule
        for bridge, transits in bridges.items()
        for rule in _transit(policy, bridge, transits, kinds=kinds)
    ]
    if policy.ways is not None and policy.ways.closed6:
        routed = (provider for provider in policy.provider if provider.routed)
        shared += [rule for provider in routed for rule in _passing(provider)]
    shared += boundary.closed(policy.ways, kinds=kinds)
    return (*dnats(policy.forwards), *shared, *helper_rules(policy), *zone_rules(policy))


def own_rules(policy: HostPolicy) -> tuple[Rule, ...]:
    """Return the rules that belong to a single network."""
    return (*dnats(policy.forwards), *zone_rules(policy))


def helper_rules(policy: HostPolicy) -> list[Rule]:
    """Return the rules by which conntrack's helpers follow flows of networks."""
    return [
        rule
        for each in policy.followed
        for rule in following(each.bridge, each.helpers, single(each.address))
    ]


def public_rules(policy: HostPolicy) -> list[Rule]:
    """Return the rules that let a single network's subnets pass untranslated."""
    routed = (provider for provider in policy.provider if provider.routed)
    return [rule for passing in (*policy.public, *routed) for rule in _passing(passing)]


def _passing(public: Provider) -> list[Rule]:
    """Return the rules that let a subnet behind a bridge pass untranslated."""
    bridge, subnet = public.bridge, single(public.address)
    return [
        Rule(chain="forward", iif=bridge, sources=subnet, action="accept"),
        Rule(chain="forward", oif=bridge, destinations=subnet, action="accept"),
    ]


def dnats(forwards: Iterable[HostForward]) -> list[Rule]:
    """Return the rules that translate the published ports of the host."""
    rules: list[Rule] = []
    for forward in forwards:
        rules += dnat(forward, LOOPBACK6 if forward.target.version == 6 else ())
    return rules


def zone_rules(policy: HostPolicy) -> list[Rule]:
    """Return the rules for bridged frames of private bridges, which no NAT changes."""
    # A rule for both families is a single element: only bridged frames come from there.
    return [
        rule
        for private in policy.private
        if policy.bridge_nf or policy.filters_ipv6_of(private)
        for rule in _apart(private.bridge, private.zone or zones.preferred(private.bridge))
    ]


def _apart(bridge: str, zone: int) -> Iterator[Rule]:
    """Give a bridge connections of its own, which no NAT of the host changes."""
    yield Rule(chain="raw", iif=bridge, action="zone", zone=zone, unique=True)
    yield Rule(chain="bridged_in", iif=bridge, action="keep", unique=True)
    yield Rule(chain="bridged_out", oif=bridge, action="keep", unique=True)


def dnat(forward: HostForward, excluded: tuple[IPNetwork, ...] = ()) -> Iterator[Rule]:
    """Yield the rules that translate published ports.

    Of ports of all own addresses, those of ``excluded`` addresses stay as they are.  An address
    counts while it is the machine's: it may come later, or belong to another machine by now.
    """
    excluded = excluded if forward.address is None else ()
    # A rule for each source, since nft lists several sources in its own order, and merged.
    for source in limited(forward.sources) or (None,):
        yield Rule(
            chain="dstnat",
            sources=(source,) if source else (),
            destinations=single(forward.address) if forward.address else excluded,
            not_destinations=bool(excluded),
            local=True,
            protocol=forward.proto,
            span=(forward.first, forward.last),
            action="dnat",
            to=forward.target,
            unique=True,
        )


def _transit(
    policy: HostPolicy, bridge: str, transits: list[Transit], *, kinds: bool
) -> Iterator[Rule]:
    published = {forward.target.version for forward in policy.forwards if forward.bridge == bridge}
    yield from _loopback(bridge)
    # The kernel routes replies before it translates their source back to the host's address.
    for to, mark in policy.ways.marks if policy.ways else ():
        if to.version in published:
            yield Rule(chain="marked", iif=bridge, replies_of=to, action="mark", mark=mark)
    # By the MTU of the host's way out, or of the way back, whichever is less: a tunnel's may be.
    yield Rule(chain="clamp", iif=bridge, protocol="tcp", syn=True, action="clamp-mss")
    yield Rule(chain="clamp", oif=bridge, protocol="tcp", syn=True, action="clamp-mss")
    for transit in transits:
        yield from _relay(transit)
        yield from _sources(transit, transit.subnet.version in published)
    behind: list[boundary.Subnets] = [(transit.subnet,) for transit in transits]
    public = [single(subnet.address) for subnet in policy.public if subnet.bridge == bridge]
    behind += public
    yield from boundary.outward(bridge, behind, policy.ways, kinds=kinds)
    for subnet in public:
        yield Rule(chain="forward", oif=bridge, destinations=subnet, action="accept")
    yield Rule(chain="forward", oif=bridge, states=("established", "related"), action="accept")
    if published:
        yield Rule(chain="forward", oif=bridge, translated=True, states=("new",), action="accept")
    yield Rule(chain="forward", oif=bridge, action="drop")
    yield from boundary.from_host(bridge, [(transit.subnet,) for transit in transits])


def _loopback(bridge: str) -> Iterator[Rule]:
    # From anywhere: the kernel drops such packets, too, but only after their translation.
    yield Rule(chain="raw", iif="lo", not_iif=True, destinations=LOOPBACK, action="drop")
    yield Rule(chain="raw", iif=bridge, sources=LOOPBACK, action="drop")


def _relay(transit: Transit) -> Iterator[Rule]:
    """Let the DNS relay be asked from the transit bridge alone.

    Neither a neighbour that routes the bridge's address to the host nor the host asks it.
    """
    for protocol in RELAYED:
        yield Rule(
            chain="raw",
            iif=transit.bridge,
            not_iif=True,
            destinations=single(transit.subnet[1]),
            protocol=protocol,
            ports=(RELAY_PORT,),
            action="drop",
        )


def _sources(transit: Transit, published: bool) -> Iterator[Rule]:
    """Yield the translations of sources: as a service sees them, and as the outside sees them."""
    bridge, subnet = transit.bridge, (transit.subnet,)
    seen = (subnet, LOOPBACK) if transit.subnet.version == 4 else (subnet,)
    for sources in seen if published else ():
        yield Rule(
            chain="srcnat", oif=bridge, sources=sources, translated=True, action="masquerade"
        )
    yield Rule(chain="srcnat", oif=bridge, not_oif=True, sources=subnet, action="masquerade")
