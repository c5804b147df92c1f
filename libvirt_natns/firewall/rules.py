# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a firewall must do, as data that knows no backend.

``ruleset`` turns the policy of one namespace into rules; ``nftables`` and
``iptables`` render these same rules, so the two cannot come to differ in what
they let through.  Everything here is pure.

The namespace behaves as a strong host: what arrives over the upstream counts
only if it is addressed to the upstream address, and what leaves over it bears
that address, whatever a guest sent and whatever conntrack has forgotten.

A published port answers on the upstream address, to whoever asks from either
side: to a client outside, and to a guest behind the same namespace (a hairpin),
be it the very guest that offers the service.  The service sees its client's own
address; a hairpin alone is masqueraded, or the reply would take the short way
past the namespace.  ``sources`` of a forward are the addresses that clients
have here: of a guest behind the same namespace its private address, so
it gets in only if that is among them.

IPv6 is as IPv4 where a subnet is private: it leaves by the upstream address.  Public
subnets pass as they are: out goes all, in comes what is published, and echo requests
and errors, as RFC 4890 asks.  Between neighbours, Neighbour Discovery and MLD pass,
which conntrack does not track; redirects do not, in either direction.  A policy without IPv6 has
no rule about it: the namespace has none then.

Packets between two ports of the private bridge do not pass the namespace within one
subnet: an isolated port would reach its siblings otherwise.  Link-local destinations,
where clouds keep their metadata, are refused unless the upstream allows them.  On a
transit bridge, sibling namespaces reach an upstream address only by the gateway, which
looks at listen addresses and sources.

The neighbour tables and the conntrack hash are the machine's: see ``limits``.

Limits: Expected connections of conntrack
helpers (active FTP and the like) are followed only where an administrator
assigned the helper.  A client outside whose address lies in a private subnet is
not answered: from here, that address is a guest's.  A connection of TCP that conntrack
does not know cannot be gone on with from a public subnet: what has been
published would live on from inside otherwise, when it is published no more.
"""

import re
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import pairwise
from typing import Literal

from libvirt_natns.addresses import (
    FAMILIES,
    Address,
    Family,
    Interface,
    IPNetwork,
    by_family,
    default_route,
    host_network,
)
from libvirt_natns.errors import FirewallError
from libvirt_natns.model.publication import Forward, StaticNat
from libvirt_natns.model.upstream import DEFAULT_MAX_FLOWS
from libvirt_natns.records import dataclass, replace
from libvirt_natns.values import INTERFACE, INTERFACE_EXPECTED, shown

Chain = Literal[
    "arp",
    "raw",
    "bridged_in",
    "dstnat",
    "input",
    "clamp",
    "forward",
    "foreign",
    "output",
    "bridged_out",
    "srcnat",
    "guard",
]
"""Where a packet meets a rule, in the order in which a forwarded one does:

arp      ARP for the machine or namespace itself, where the backend has a place for it
raw      on arrival, before conntrack and NAT see it
bridged_in   in the host, ahead of all translation on arrival
dstnat   first packet of a flow: where it really goes.  On arrival; in the host, also
         what the host itself sends
input    addressed to the machine or namespace itself; what no rule accepts is dropped
clamp    forwarded, ahead of the verdicts: where the MSS of TCP is adjusted
forward  forwarded; in a namespace, what no rule accepts is dropped
foreign  in the host, the same in the chains of others
output   in the host, sent by the host itself
bridged_out  in the host, ahead of all translation of sources
srcnat   leaving, first packet of a flow: which source address it gets
guard    leaving, after NAT: the source is the one that the wire will see
"""

Action = Literal[
    "accept", "drop", "reject", "dnat", "snat", "masquerade", "clamp-mss", "zone", "keep"
]
Transport = Literal["tcp", "udp", "sctp", "icmp", "icmpv6"]
State = Literal["new", "established", "related", "invalid"]
IcmpType = Literal[
    "echo-request",
    "mld-listener-query",
    "mld-listener-report",
    "mld-listener-done",
    "mld2-listener-report",
    "nd-router-solicit",
    "nd-router-advert",
    "nd-neighbor-solicit",
    "nd-neighbor-advert",
    "nd-redirect",
]
"""Types of either ICMP, in nft's words."""

ICMP: dict[Transport | None, Family] = {"icmp": 4, "icmpv6": 6}

LINK_LOCAL = IPv6Network("fe80::/10")
MULTICAST = IPv6Network("ff02::/16")
"""Groups of one link, as routers and neighbours are asked by."""
UNSPECIFIED = IPv6Network("::")
"""The source of who has no address yet."""

LINK_LOCAL4 = IPv4Network("169.254.0.0/16")
METADATA6 = (IPv6Network("fd00:ec2::254"), IPv6Network("fd20:ce::254"))
"""Metadata services of clouds (AWS, Google), outside the link-local prefix.

The kernel itself forwards nothing to ``LINK_LOCAL``."""

BROADCAST = IPv4Network("255.255.255.255/32")

HOP_LIMIT = 255
"""Of Neighbour Discovery: a router would have taken one off."""

NEIGHBOURS: tuple[IcmpType, ...] = ("nd-neighbor-solicit", "nd-neighbor-advert")
LISTENERS: tuple[IcmpType, ...] = (
    "mld-listener-query",
    "mld-listener-report",
    "mld-listener-done",
    "mld2-listener-report",
)

COMMENT = re.compile(r"[A-Za-z0-9 .,:;()/'-]{0,80}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule; a field left empty matches everything.

    ``not_iif``, ``not_oif``, ``not_sources`` and ``not_destinations`` turn their match
    round.  ``local`` matches what goes to any address of the machine.
    ``ports`` are destination ports, ``span`` is the first and the last of a
    run of them.  ``translated`` matches flows whose destination a dnat changed.
    ``syn`` matches the first segment of each direction of a TCP connection, ``not_syn``
    any other.  ``only`` limits to one family what no address does.

    A reject answers TCP with a reset, UDP with "port unreachable", and where no
    protocol is named with "administratively prohibited".  A "zone" gives connections a
    table of their own in conntrack, number ``zone``; a "keep" settles that NAT leaves
    the destination (on arrival) or the source (on leaving) as it is.
    ``iif_kind`` and ``oif_kind`` are the kernel's names for kinds of links, as "bridge".
    A dnat or snat puts the address ``to`` in place; a dnat with ``to_ports`` also a port:
    the one that is as far from the first as in ``span``, or always the same if there is
    one only.

    ``fresh`` drops packets whose source, or destination, is not known, as far as there
    are too many such packets.  It makes the address known if ``remembered``.  ``flows``
    matches the first packet of a flow while so many flows exist.  ``paced`` drops what
    comes faster than new addresses may, whoever sends it.  ``limits`` has the numbers.

    ``unique`` promises that no other rule of the chain matches the same packet,
    so that a backend may look such rules up instead of trying one after the other.

    Raises FirewallError for a name or comment that a backend's syntax could
    read as something else, and for combinations that no backend can express.
    """

    chain: Chain
    action: Action
    comment: str = ""
    iif: str = ""
    oif: str = ""
    iif_kind: str = ""
    oif_kind: str = ""
    not_oif: bool = False
    not_iif: bool = False
    sources: tuple[IPNetwork, ...] = ()
    not_sources: bool = False
    destinations: tuple[IPNetwork, ...] = ()
    not_destinations: bool = False
    protocol: Transport | None = None
    ports: tuple[int, ...] = ()
    icmp: tuple[IcmpType, ...] = ()
    states: tuple[State, ...] = ()
    only: Family | None = None
    hop_limit: int | None = None
    syn: bool = False
    not_syn: bool = False
    local: bool = False
    span: tuple[int, int] | None = None
    translated: bool = False
    fresh: Literal["", "source", "destination"] = ""
    remembered: bool = True
    flows: int | None = None
    paced: bool = False
    to: Address | None = None
    to_ports: tuple[int, int] | None = None
    unique: bool = False
    zone: int = 0

    def __post_init__(self) -> None:
        for name in (self.iif, self.oif):
            if name:
                checked_interface(name)
        if not COMMENT.fullmatch(self.comment):
            raise FirewallError(f"{self.comment!r} cannot be the comment of a firewall rule")
        if (self.ports or self.span) and self.protocol not in ("tcp", "udp", "sctp"):
            raise FirewallError("a firewall rule with ports needs tcp, udp or sctp")
        if self.chain == "guard" and not (self.oif and self.sources):
            raise FirewallError("a guard names an interface and the sources it lets out")
        dropping = self.fresh or self.paced or self.flows is not None
        if (dropping and self.action != "drop") or (self.fresh and not self.family):
            raise FirewallError(
                "a limit of new addresses, or of flows, drops; the first has a family"
            )
        if len(self._families) > 1:
            raise FirewallError("a firewall rule has addresses of one family")
        _check_translation(self)

    @property
    def _families(self) -> set[Family]:
        found: set[Family] = {self.only} if self.only else set()
        for each in (*self.sources, *self.destinations):
            found.add(each.version)
        if self.to is not None:
            found.add(self.to.version)
        if self.protocol in ICMP:
            found.add(ICMP[self.protocol])
        return found

    @property
    def family(self) -> Family | None:
        """The only family that it matches, if it is not for both."""
        return next(iter(self._families), None)

    @property
    def width(self) -> int:
        """How many ports ``span`` has."""
        return self.span[1] - self.span[0] + 1 if self.span else 0

    @property
    def port_pairs(self) -> Iterator[tuple[int, int]]:
        """Each port of ``span`` with the one that a dnat makes of it."""
        first, last = self.span or (1, 0)
        to, to_last = self.to_ports or (first, last)
        for port in range(first, last + 1):
            yield port, to + (port - first if to_last > to else 0)


def _check_translation(rule: Rule) -> None:
    place = {"dnat": "dstnat", "snat": "srcnat"}.get(rule.action)
    if bool(place) != (rule.to is not None) or place not in (None, rule.chain):
        raise FirewallError("a firewall rule translates in its chain, to an address")
    if rule.span and not 0 < rule.span[0] <= rule.span[1] <= 65535:
        raise FirewallError(f"{rule.span[0]}-{rule.span[1]} cannot be the ports of a firewall rule")
    if rule.to_ports:
        first, last = rule.to_ports
        if last - first not in (0, rule.width - 1) or not 0 < first <= last <= 65535:
            raise FirewallError(f"{rule.width} ports cannot be translated to {first}-{last}")


def checked_interface(name: str) -> str:
    """``name``, if every backend takes it for exactly one interface.

    The kernel allows nearly any character; a trailing + would be a wildcard to
    iptables, and quotes, spaces or an asterisk mean something to nft.
    Raises FirewallError.
    """
    if INTERFACE.fullmatch(name):
        return name
    fact = f"{shown(name)} cannot be the interface of a firewall rule"
    raise FirewallError(fact, f"rename it to {INTERFACE_EXPECTED}")


@dataclass(frozen=True, slots=True)
class Policy:
    """What the firewall of one namespace must do.

    ``inner`` is its interface on the private bridge, ``upstream`` the one to the
    outside.  ``subnets`` are all private subnets, routed ones included,
    ``gateways`` the namespace's own addresses on ``inner``, and ``address`` the
    one that it has on ``upstream``, ``address6`` the same in IPv6; it has those of
    ``statics`` besides.  ``public`` are those of the subnets that pass untranslated.
    Each of ``forwards`` listens on one of these addresses, no two on one port; or
    lets in to an address of ``public``, which is its target, too.

    A family without subnets and without an address has no rules.  One without an
    address that is not ``public`` stays inside.
    ``by_dhcp``: a DHCP client of the namespace's own keeps ``address``.

    ``segments`` are the subnets that the namespace has on-link on ``upstream``.
    ``transit`` are the gateway's addresses on a transit bridge, with its subnets: the
    only station there that may ask for published ports.
    ``link_local``: link-local destinations outside are forwarded.  ``max_flows`` is
    about the number of flows tracked at one time.
    """

    inner: str
    upstream: str
    subnets: tuple[IPNetwork, ...]
    gateways: tuple[Address, ...]
    address: Address | None
    forwards: tuple[Forward, ...] = ()
    statics: tuple[StaticNat, ...] = ()
    address6: IPv6Address | None = None
    public: tuple[IPv6Network, ...] = ()
    by_dhcp: bool = False
    segments: tuple[IPNetwork, ...] = ()
    transit: tuple[Interface, ...] = ()
    link_local: bool = False
    max_flows: int = DEFAULT_MAX_FLOWS

    def __post_init__(self) -> None:
        # An empty match would not be "nobody", but "everybody".
        if not (self.inner and self.upstream and self.subnets and self.gateways):
            raise FirewallError("a namespace without interfaces or subnets has no firewall policy")
        addresses = self.addresses
        for forward in self.forwards:
            if forward.address not in addresses and not _lets_in(self, forward):
                raise FirewallError(f"no port of {forward.address} can be published here")
            _check_families(forward)
        for forward, rival in pairwise(sorted(self.forwards, key=by_port)):
            listener = (forward.address, forward.proto)
            if listener == (rival.address, rival.proto) and rival.first <= forward.last:
                raise FirewallError(
                    f"{rival.proto} port {rival.first} of {rival.address} is published twice"
                )

    @property
    def addresses(self) -> frozenset[Address]:
        """All addresses that the namespace answers to on ``upstream``."""
        own = (self.address, self.address6)
        return frozenset(
            (*(each for each in own if each), *(static.address for static in self.statics))
        )


def by_port(forward: Forward) -> tuple[int, int, str, int]:
    """What sorts forwards, whoever asked first."""
    return *by_family(forward.address), forward.proto, forward.first


def _check_families(forward: Forward) -> None:
    family = forward.address.version
    if forward.target.version != family or any(each.version != family for each in forward.sources):
        raise FirewallError(f"{forward.address} and what it forwards to are of two families")


def _lets_in(policy: Policy, forward: Forward) -> bool:
    """Whether a forward publishes a guest's own address, untranslated."""
    return (
        bool(policy.public)
        and forward.address == forward.target
        and (forward.first, forward.last) == (forward.to, forward.to_last)
        and any(forward.address in subnet for subnet in policy.public)
    )


@dataclass(frozen=True, slots=True)
class Half:
    """What a policy says of one family; ``both`` is whether it says something of the other.

    ``address`` is what private subnets leave by, ``own`` are all of the namespace's
    addresses on the upstream, ``public`` the subnets that pass as they are, and
    ``outgoing`` all that may leave.
    """

    family: Family
    both: bool
    policy: Policy
    address: Address | None
    subnets: tuple[IPNetwork, ...]
    gateways: tuple[IPNetwork, ...]
    own: tuple[IPNetwork, ...]
    public: tuple[IPNetwork, ...]
    outgoing: tuple[IPNetwork, ...]

    @property
    def only(self) -> Family | None:
        """What limits a rule without addresses, where that says anything."""
        return self.family if self.both else None

    @property
    def on_link(self) -> tuple[IPNetwork, ...]:
        """All whose addresses the namespace itself asks for by ARP or Neighbour Discovery."""
        segments = self.policy.segments
        return (*self.subnets, *(each for each in segments if each.version == self.family))

    @property
    def outside(self) -> tuple[IPNetwork, ...]:
        """All addresses of ours that the outside may see."""
        return (*self.own, *self.public)


def _halves(policy: Policy) -> tuple[Half, ...]:
    present = [family for family in FAMILIES if _subnets(policy, family) or _own(policy, family)]
    return tuple(_half(policy, family, len(present) > 1) for family in present)


def _half(policy: Policy, family: Family, both: bool) -> Half:
    subnets, public = _subnets(policy, family), policy.public if family == 6 else ()
    address = policy.address if family == 4 else policy.address6
    targets = (host_network(s.target) for s in policy.statics if s.target.version == family)
    return Half(
        family=family,
        both=both,
        policy=policy,
        address=address,
        subnets=subnets,
        gateways=tuple(host_network(each) for each in policy.gateways if each.version == family),
        own=_own(policy, family),
        public=public,
        outgoing=subnets if address else (*public, *targets),
    )


def _subnets(policy: Policy, family: Family) -> tuple[IPNetwork, ...]:
    return tuple(subnet for subnet in policy.subnets if subnet.version == family)


def _own(policy: Policy, family: Family) -> tuple[IPNetwork, ...]:
    own = sorted(policy.addresses, key=by_family)
    return tuple(host_network(address) for address in own if address.version == family)


def ruleset(policy: Policy) -> tuple[Rule, ...]:
    """All rules of one namespace, in an order that keeps each chain's own."""
    halves = _halves(policy)
    return (
        *_published(policy, halves),
        *_edge(policy, halves),
        *_forward(policy, halves),
        *_input(halves),
        *_arp(policy),
    )


def _arp(policy: Policy) -> Iterator[Rule]:
    """Limit new senders of ARP requests for the namespace's own addresses, and of replies."""
    own = [*policy.gateways, *policy.addresses]
    destinations = tuple(
        host_network(each) for each in sorted(own, key=by_family) if each.version == 4
    )
    if destinations:
        yield Rule(chain="arp", destinations=destinations, fresh="source", action="drop")


def single(address: Address | IPNetwork) -> tuple[IPNetwork, ...]:
    """One address, or a network as it is, as the networks of a rule."""
    if isinstance(address, IPv4Address | IPv6Address):
        return (host_network(address),)
    return (address,)


def limited(sources: tuple[IPNetwork, ...]) -> tuple[IPNetwork, ...]:
    """The same clients as the networks of a rule, where everybody is no network at all."""
    return () if any(source.prefixlen == 0 for source in sources) else sources


# -- what is published -----------------------------------------------------------


def _translating(policy: Policy) -> list[Forward]:
    # In an order that does not depend on who asked first.
    return sorted(_translated(policy), key=by_port)


def _translated(policy: Policy) -> Iterator[Forward]:
    return (each for each in policy.forwards if not _lets_in(policy, each))


def _published(policy: Policy, halves: tuple[Half, ...]) -> Iterator[Rule]:
    """Where a published port or address really is, and hairpins' way back."""
    forwards = _translating(policy)
    yield from map(_dnat, forwards)
    for static in sorted(policy.statics, key=_by_address):
        yield from _static(policy, static)
    translated = {each.address.version for each in forwards}
    translated |= {each.address.version for each in policy.statics}
    for half in halves:
        if half.family in translated and half.subnets:
            yield Rule(
                chain="srcnat",
                oif=policy.inner,
                sources=half.subnets,
                translated=True,
                action="masquerade",
                comment="hairpin",
            )


def _by_address(static: StaticNat) -> tuple[int, int]:
    return by_family(static.address)


def _dnat(forward: Forward) -> Rule:
    ports, to_ports = (forward.first, forward.last), (forward.to, forward.to_last)
    return Rule(
        chain="dstnat",
        sources=limited(forward.sources),
        destinations=single(forward.address),
        protocol=forward.proto,
        span=ports,
        action="dnat",
        to=forward.target,
        to_ports=None if ports == to_ports else to_ports,
        unique=True,
    )


def _static(policy: Policy, static: StaticNat) -> Iterator[Rule]:
    """Both directions; what comes in after the forwards, which may take some ports away."""
    own, target = single(static.address), static.target
    for ports in static.ports:
        span = (ports.first, ports.last)
        yield Rule(
            chain="dstnat",
            destinations=own,
            protocol=ports.proto,
            span=span,
            action="dnat",
            to=target,
        )
    if not static.ports:
        yield Rule(chain="dstnat", destinations=own, action="dnat", to=target)
    yield Rule(
        chain="srcnat",
        oif=policy.upstream,
        sources=single(target),
        action="snat",
        to=static.address,
    )


# -- what crosses the upstream ---------------------------------------------------


def _edge(policy: Policy, halves: tuple[Half, ...]) -> Iterator[Rule]:
    """What crosses the upstream bears an upstream address, in both directions."""
    for half in halves:
        yield from _arrival(half)
    yield Rule(chain="clamp", protocol="tcp", syn=True, action="clamp-mss")
    for half in halves:
        yield from _source(policy, half)
        yield from _guard(policy, half)


def _arrival(half: Half) -> Iterator[Rule]:
    # Ahead of conntrack and routing, or a neighbour with a route to the private
    # subnet would still be sent redirects and "time exceeded", and could
    # fill the conntrack table.
    upstream = half.policy.upstream
    if half.family == 6:
        # Conntrack counts those to a flow that it knows: "related" would let them in.
        yield Rule(chain="raw", protocol="icmpv6", icmp=("nd-redirect",), action="drop")
        # In IPv4, the kernel itself takes nobody else's packets for its own.
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
    yield from _refused_lease(half, "raw")
    yield Rule(
        chain="raw",
        iif=upstream,
        destinations=(default_route(half.family),),
        action="drop",
        comment="not addressed to an upstream address",
    )


def _siblings(half: Half) -> Iterator[Rule]:
    """On a transit bridge, only the gateway asks for the upstream addresses.

    Listen addresses and sources of forwards were looked at there.  The gateway
    masquerades what it leads from one namespace to another.
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


def _refused_lease(half: Half, chain: Chain) -> Iterator[Rule]:
    """A server refuses to renew a lease by broadcast, whatever the address is (RFC 2131)."""
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


def _source(policy: Policy, half: Half) -> Iterator[Rule]:
    """Which source address a flow gets that leaves by the upstream."""
    if half.public:
        yield Rule(chain="srcnat", oif=policy.upstream, sources=half.public, action="accept")
    if half.family == 4 and half.address:
        yield Rule(chain="srcnat", oif=policy.upstream, only=half.only, action="masquerade")
    elif half.address:
        # Masquerading would take any address of the link's, that of a guest, too.
        yield Rule(
            chain="srcnat",
            oif=policy.upstream,
            sources=(LINK_LOCAL,),
            not_sources=True,
            action="snat",
            to=half.address,
        )


def _guard(policy: Policy, half: Half) -> Iterator[Rule]:
    if not half.outside:
        everything = (default_route(half.family),)
        yield Rule(chain="guard", oif=policy.upstream, sources=everything, action="drop")
        return
    if half.family == 6:
        yield from _neighbours_out(policy)
    if not half.address and (kept := _kept(half)):
        yield Rule(chain="guard", oif=policy.upstream, sources=kept, action="drop")
    # NAT leaves alone what conntrack calls invalid, and flows that began
    # before its rules were there.
    yield Rule(
        chain="guard",
        oif=policy.upstream,
        sources=half.outside,
        not_sources=True,
        action="drop",
        comment="not translated",
    )


def _neighbours_out(policy: Policy) -> Iterator[Rule]:
    # Conntrack has nothing to do with these, so NAT has not either.
    yield Rule(
        chain="guard",
        oif=policy.upstream,
        sources=(LINK_LOCAL, UNSPECIFIED, *_own(policy, 6)),
        protocol="icmpv6",
        icmp=(*NEIGHBOURS, "nd-router-solicit", *LISTENERS[1:]),
        action="accept",
        comment="neighbours",
    )


def _kept(half: Half) -> tuple[IPNetwork, ...]:
    """The namespace's own addresses that nothing translates: forwarded ones never get here."""
    return tuple(each for each in half.gateways if each not in _public_gateways(half))


def _public_gateways(half: Half) -> list[IPNetwork]:
    return [each for each in half.gateways if any(map(each.overlaps, half.public))]


# -- what is forwarded -----------------------------------------------------------


def _forward(policy: Policy, halves: tuple[Half, ...]) -> Iterator[Rule]:
    """What may pass; the rest is dropped without a word.

    Only forged sources and what conntrack calls invalid come that far.  An answer
    to the first would hit a stranger, one to the second a connection that is well.
    """
    yield Rule(chain="forward", states=("established", "related"), action="accept")
    yield _counted(policy, "forward")
    for half in halves:
        yield from _senders(half, "forward")
        yield from _link_local(policy, half)
    yield from _translated_in(policy, halves)
    for half in halves:
        yield from _across(policy, half)
    for half in halves:
        if half.outgoing:
            yield from _let_out(policy, half)
    yield from _let_in(policy, halves)


def _counted(policy: Policy, chain: Chain) -> Rule:
    return Rule(chain=chain, states=("new",), flows=policy.max_flows, action="drop")


def _link_local(policy: Policy, half: Half) -> Iterator[Rule]:
    """Refuse link-local destinations: a cloud's metadata speak of the host, not of a guest.

    Refused at once: a guest that looks for metadata while it boots would wait otherwise.
    """
    if half.outgoing and not policy.link_local:
        yield Rule(
            chain="forward",
            iif=policy.inner,
            oif=policy.upstream,
            sources=half.outgoing,
            destinations=(LINK_LOCAL4,) if half.family == 4 else METADATA6,
            action="reject",
            comment="link-local",
        )


def _senders(half: Half, chain: Chain) -> Iterator[Rule]:
    """Limit made-up senders: the namespace would ask for each to send it a reply."""
    link = (LINK_LOCAL,) if half.family == 6 and chain == "input" else ()
    if half.on_link:
        yield Rule(chain=chain, sources=(*half.on_link, *link), fresh="source", action="drop")


def _across(policy: Policy, half: Half) -> Iterator[Rule]:
    """Between two subnets of one bridge, as libvirt allows; and where neighbours are asked for.

    Without a state: replies may take another way, and conntrack calls invalid what it
    sees of such a flow.
    """
    several = len(half.subnets) > 1
    for subnet in half.subnets if several else ():
        yield Rule(
            chain="forward",
            iif=policy.inner,
            oif=policy.inner,
            sources=(subnet,),
            destinations=(subnet,),
            action="drop",
            comment="within one subnet",
        )
    if half.on_link:
        # From outside come published ports, whose targets are few, and echo requests.
        yield Rule(
            chain="forward",
            iif=policy.inner,
            destinations=half.on_link,
            fresh="destination",
            action="drop",
        )
    if several:
        yield Rule(
            chain="forward",
            iif=policy.inner,
            oif=policy.inner,
            sources=half.subnets,
            destinations=half.subnets,
            action="accept",
            comment="between private subnets",
        )


def _let_out(policy: Policy, half: Half) -> Iterator[Rule]:
    if half.public:
        # The middle of a connection is none that began here, and the client whose
        # own has been cut must not get on.
        yield Rule(
            chain="forward",
            iif=policy.inner,
            oif=policy.upstream,
            sources=half.public,
            protocol="tcp",
            not_syn=True,
            states=("new",),
            action="reject",
            comment="cut",
        )
    yield Rule(
        chain="forward",
        iif=policy.inner,
        oif=policy.upstream,
        sources=half.outgoing,
        states=("new",),
        action="accept",
    )


def _translated_in(policy: Policy, halves: tuple[Half, ...]) -> Iterator[Rule]:
    """What is published, for clients outside and for guests (hairpins)."""
    families = {each.address.version for each in _translated(policy)}
    families |= {each.address.version for each in policy.statics}
    if not families:
        return
    yield Rule(
        chain="forward",
        iif=policy.upstream,
        oif=policy.inner,
        translated=True,
        states=("new",),
        action="accept",
        comment="published",
    )
    for half in halves:
        if half.family in families and half.subnets:
            yield Rule(
                chain="forward",
                iif=policy.inner,
                oif=policy.inner,
                sources=half.subnets,
                translated=True,
                states=("new",),
                action="accept",
                comment="hairpin",
            )


def _let_in(policy: Policy, halves: tuple[Half, ...]) -> Iterator[Rule]:
    opened = [each for each in policy.forwards if _lets_in(policy, each)]
    for forward in sorted(opened, key=by_port):
        yield _opened(policy, forward)
    for half in halves:
        if half.public:
            pinged = Rule(
                chain="forward",
                iif=policy.upstream,
                oif=policy.inner,
                destinations=half.public,
                protocol="icmpv6",
                icmp=("echo-request",),
                states=("new",),
                action="accept",
            )
            # Anyone outside can name addresses that nobody has.
            yield replace(pinged, action="drop", fresh="destination", remembered=False)
            yield pinged


def _opened(policy: Policy, forward: Forward) -> Rule:
    return Rule(
        chain="forward",
        iif=policy.upstream,
        oif=policy.inner,
        sources=limited(forward.sources),
        destinations=single(forward.target),
        protocol=forward.proto,
        span=(forward.first, forward.last),
        states=("new",),
        action="accept",
        unique=True,
    )


# -- what is for the namespace itself --------------------------------------------


def _input(halves: tuple[Half, ...]) -> Iterator[Rule]:
    yield Rule(chain="input", iif="lo", action="accept")
    yield Rule(chain="input", states=("established", "related"), action="accept")
    for half in halves:
        yield from _neighbours_in(half) if half.family == 6 else ()
        yield from _senders(half, "input")
    if halves:
        yield _counted(halves[0].policy, "input")
    for half in halves:
        yield from _inside(half) if half.subnets else ()
        yield from _ping(half, half.policy.upstream, _pinged(half))
        yield from _refused_lease(half, "input")


def _neighbours_in(half: Half) -> Iterator[Rule]:
    inner, upstream = half.policy.inner, half.policy.upstream
    types: dict[str, tuple[IcmpType, ...]] = {
        inner: (*NEIGHBOURS, "nd-router-solicit"),
        upstream: (*NEIGHBOURS, "nd-router-advert"),
    }
    # Each makes an entry of its sender before anything answers.
    yield Rule(
        chain="input",
        protocol="icmpv6",
        icmp=("nd-neighbor-solicit",),
        fresh="source",
        action="drop",
    )
    # The kernel makes entries of their targets where it accepts untracked ones.
    yield Rule(
        chain="input",
        iif=inner,
        protocol="icmpv6",
        icmp=("nd-neighbor-advert",),
        paced=True,
        action="drop",
    )
    for link in (inner, upstream) if half.outside else (inner,):
        yield Rule(
            chain="input",
            iif=link,
            protocol="icmpv6",
            icmp=types[link],
            hop_limit=HOP_LIMIT,
            action="accept",
        )
    yield Rule(
        chain="input", sources=(LINK_LOCAL,), protocol="icmpv6", icmp=LISTENERS, action="accept"
    )


def _inside(half: Half) -> Iterator[Rule]:
    inner = half.policy.inner
    yield _dhcp(half)
    if half.gateways:
        yield _service(half, "udp", 53, 69)
        yield _service(half, "tcp", 53)
    gateways = half.gateways if half.family == 4 else (*half.gateways, LINK_LOCAL)
    yield from _ping(half, inner, gateways)
    # Told at once, or a guest that tries another port waits for a time-out.
    for protocol in ("tcp", "udp"):
        yield Rule(
            chain="input", iif=inner, sources=half.subnets, protocol=protocol, action="reject"
        )


def _dhcp(half: Half) -> Rule:
    # A client without an address asks from 0.0.0.0, by broadcast; in IPv6 from its
    # address on the link, by multicast, and relays from one of their own.
    return Rule(
        chain="input",
        iif=half.policy.inner,
        only=half.only if half.family == 4 else None,
        sources=() if half.family == 4 else (LINK_LOCAL, *half.subnets),
        protocol="udp",
        ports=(67,) if half.family == 4 else (547,),
        action="accept",
        comment="DHCP",
    )


def _service(half: Half, protocol: Transport, *ports: int) -> Rule:
    """DNS and TFTP, for the private subnets only."""
    return Rule(
        chain="input",
        iif=half.policy.inner,
        sources=half.subnets,
        destinations=half.gateways,
        protocol=protocol,
        ports=ports,
        action="accept",
    )


def _pinged(half: Half) -> tuple[IPNetwork, ...]:
    """The namespace's own addresses that the outside may know."""
    return (*half.own, *_public_gateways(half))


def _ping(half: Half, interface: str, targets: tuple[IPNetwork, ...]) -> Iterator[Rule]:
    if targets:
        yield Rule(
            chain="input",
            iif=interface,
            destinations=targets,
            protocol="icmp" if half.family == 4 else "icmpv6",
            icmp=("echo-request",),
            action="accept",
        )
