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

Limits: IPv4 only.  Nothing in the namespace speaks IPv6 yet, so a rule without
an address says nothing about the family.  Expected connections of conntrack
helpers (active FTP and the like) are followed only where an administrator
assigned the helper.  A client outside whose address lies in a private subnet is
not answered: from here, that address is a guest's.
"""

import re
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Address, IPv6Network
from itertools import pairwise
from operator import attrgetter
from typing import Literal

from libvirt_natns.addresses import Address, IPNetwork, by_family, host_network
from libvirt_natns.errors import FirewallError
from libvirt_natns.model import Forward, StaticNat
from libvirt_natns.names import IFNAMSIZ
from libvirt_natns.records import dataclass

Chain = Literal["raw", "dstnat", "input", "clamp", "forward", "srcnat", "guard"]
"""Where a packet meets a rule, in the order in which a forwarded one does:

raw      on arrival, before conntrack and NAT see it
dstnat   first packet of a flow: where it really goes.  On arrival; in the host, also
         what the host itself sends
input    addressed to the machine or namespace itself; what no rule accepts is dropped
clamp    forwarded, ahead of the verdicts: where the MSS of TCP is adjusted
forward  forwarded; in a namespace, what no rule accepts is dropped
srcnat   leaving, first packet of a flow: which source address it gets
guard    leaving, after NAT: the source is the one that the wire will see
"""

Action = Literal["accept", "drop", "reject", "dnat", "snat", "masquerade", "clamp-mss", "notrack"]
Transport = Literal["tcp", "udp", "sctp", "icmp"]
State = Literal["new", "established", "related", "invalid"]

EVERYWHERE = IPv4Network("0.0.0.0/0")
"""All of IPv4, and nothing else."""

BY_PORT = attrgetter("address", "proto", "first")

INTERFACE = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.:@=+,-]*")
COMMENT = re.compile(r"[A-Za-z0-9 .,:;()/'-]{0,80}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule; a field left empty matches everything.

    ``not_iif``, ``not_oif``, ``not_sources`` and ``not_destinations`` turn their match
    round.  ``local`` matches what goes to any address of the machine.
    ``ports`` are destination ports, ``span`` is the first and the last of a
    run of them.  ``translated`` matches flows whose destination a dnat changed.
    ``syn`` matches the first segment of each direction of a TCP connection.

    A reject answers TCP with a reset, UDP with "port unreachable", and where no
    protocol is named with "administratively prohibited".  A dnat or snat puts the
    address ``to`` in place; a dnat with ``to_ports`` also a port: the one that
    is as far from the first as in ``span``, or always the same if there is one only.

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
    not_oif: bool = False
    not_iif: bool = False
    sources: tuple[IPNetwork, ...] = ()
    not_sources: bool = False
    destinations: tuple[IPNetwork, ...] = ()
    not_destinations: bool = False
    protocol: Transport | None = None
    ports: tuple[int, ...] = ()
    icmp: Literal["", "echo-request"] = ""
    states: tuple[State, ...] = ()
    syn: bool = False
    local: bool = False
    span: tuple[int, int] | None = None
    translated: bool = False
    to: Address | None = None
    to_ports: tuple[int, int] | None = None
    unique: bool = False

    def __post_init__(self) -> None:
        for name in (self.iif, self.oif):
            if name:
                checked_interface(name)
        if not COMMENT.fullmatch(self.comment):
            raise FirewallError(f"{self.comment!r} cannot be the comment of a firewall rule")
        if (self.ports or self.span) and self.protocol not in ("tcp", "udp", "sctp"):
            raise FirewallError("a firewall rule with ports needs tcp, udp or sctp")
        if self.chain == "guard" and not (self.oif and self.sources and self.not_sources):
            raise FirewallError("a guard names an interface and the sources it lets out")
        _check_translation(self)

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
    if INTERFACE.fullmatch(name) and len(name) <= IFNAMSIZ and not name.endswith("+"):
        return name
    raise FirewallError(f"{name!r} cannot be the interface of a firewall rule", "rename it")


@dataclass(frozen=True, slots=True)
class Policy:
    """What the firewall of one namespace must do.

    ``inner`` is its interface on the private bridge, ``upstream`` the one to the
    outside.  ``subnets`` are all private subnets, routed ones included,
    ``gateways`` the namespace's own addresses on ``inner``, and ``address`` the
    one that it has on ``upstream``, ``address6`` the same in IPv6; it has those of
    ``statics`` besides.  ``public`` are those of the subnets that pass untranslated.
    Each of ``forwards`` listens on one of these addresses, no two on one port.
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

    def __post_init__(self) -> None:
        # An empty match would not be "nobody", but "everybody".
        if not (self.inner and self.upstream and self.subnets and self.gateways):
            raise FirewallError("a namespace without interfaces or subnets has no firewall policy")
        for forward in self.forwards:
            if forward.address not in self.addresses:
                raise FirewallError(f"no port of {forward.address} can be published here")
        for forward, rival in pairwise(sorted(self.forwards, key=BY_PORT)):
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


def ruleset(policy: Policy) -> tuple[Rule, ...]:
    """All rules of one namespace, in an order that keeps each chain's own."""
    return (*_published(policy), *_edge(policy), *_forward(policy), *_input(policy))


def single(address: Address) -> tuple[IPNetwork, ...]:
    """One address as the networks of a rule."""
    return (host_network(address),)


def limited(sources: tuple[IPNetwork, ...]) -> tuple[IPNetwork, ...]:
    """The same clients as the networks of a rule, where everybody is no network at all."""
    return () if EVERYWHERE in sources else sources


def _own(policy: Policy) -> tuple[IPNetwork, ...]:
    return tuple(map(host_network, sorted(policy.addresses, key=by_family)))


def _published(policy: Policy) -> Iterator[Rule]:
    """Where a published port or address really is, and hairpins' way back."""
    # In an order that does not depend on who asked first.
    yield from map(_dnat, sorted(policy.forwards, key=BY_PORT))
    for static in sorted(policy.statics, key=attrgetter("address")):
        yield from _static(policy, static)
    if policy.forwards or policy.statics:
        yield Rule(
            chain="srcnat",
            oif=policy.inner,
            sources=policy.subnets,
            translated=True,
            action="masquerade",
            comment="hairpin",
        )


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


def _edge(policy: Policy) -> tuple[Rule, ...]:
    """What crosses the upstream bears an upstream address, in both directions."""
    own = _own(policy)
    return (
        # Ahead of conntrack and routing, or a neighbour with a route to the private
        # subnet would still be sent redirects and "time exceeded", and could
        # fill the conntrack table.
        Rule(chain="raw", iif=policy.upstream, destinations=own, action="accept"),
        Rule(
            chain="raw",
            iif=policy.upstream,
            destinations=(EVERYWHERE,),
            action="drop",
            comment="not addressed to an upstream address",
        ),
        Rule(chain="clamp", protocol="tcp", syn=True, action="clamp-mss"),
        Rule(chain="srcnat", oif=policy.upstream, action="masquerade"),
        # NAT leaves alone what conntrack calls invalid, and flows that began
        # before its rules were there.
        Rule(
            chain="guard",
            oif=policy.upstream,
            sources=own,
            not_sources=True,
            action="drop",
            comment="not translated",
        ),
    )


def _forward(policy: Policy) -> tuple[Rule, ...]:
    """What may pass; the rest is dropped without a word.

    Only forged sources and what conntrack calls invalid come that far.  An answer
    to the first would hit a stranger, one to the second a connection that is well.
    """
    subnets = policy.subnets
    return (
        # Between two subnets of one bridge, as libvirt allows.  Ahead of the states:
        # replies may take another way, and conntrack calls what it sees of
        # such a flow invalid.
        Rule(
            chain="forward",
            iif=policy.inner,
            oif=policy.inner,
            sources=subnets,
            destinations=subnets,
            action="accept",
            comment="between private subnets",
        ),
        Rule(chain="forward", states=("established", "related"), action="accept"),
        Rule(
            chain="forward",
            iif=policy.inner,
            oif=policy.upstream,
            sources=subnets,
            states=("new",),
            action="accept",
        ),
        *_let_in(policy),
    )


def _let_in(policy: Policy) -> Iterator[Rule]:
    # Hairpins pass as what they then are: packets between private subnets.
    if policy.forwards or policy.statics:
        yield Rule(
            chain="forward",
            iif=policy.upstream,
            oif=policy.inner,
            translated=True,
            states=("new",),
            action="accept",
            comment="published",
        )


def _input(policy: Policy) -> tuple[Rule, ...]:
    inner = policy.inner
    return (
        Rule(chain="input", iif="lo", action="accept"),
        Rule(chain="input", states=("established", "related"), action="accept"),
        # A client without an address asks from 0.0.0.0, by broadcast.
        Rule(
            chain="input", iif=inner, protocol="udp", ports=(67,), action="accept", comment="DHCP"
        ),
        _service(policy, "udp", 53, 69),
        _service(policy, "tcp", 53),
        _ping(inner, _gateways(policy)),
        # Told at once, or a guest that tries another port waits for a time-out.
        Rule(chain="input", iif=inner, sources=policy.subnets, protocol="tcp", action="reject"),
        Rule(chain="input", iif=inner, sources=policy.subnets, protocol="udp", action="reject"),
        _ping(policy.upstream, _own(policy)),
    )


def _gateways(policy: Policy) -> tuple[IPNetwork, ...]:
    return tuple(host_network(gateway) for gateway in policy.gateways)


def _service(policy: Policy, protocol: Transport, *ports: int) -> Rule:
    """DNS and TFTP, for the private subnets only."""
    return Rule(
        chain="input",
        iif=policy.inner,
        sources=policy.subnets,
        destinations=_gateways(policy),
        protocol=protocol,
        ports=ports,
        action="accept",
    )


def _ping(interface: str, targets: tuple[IPNetwork, ...]) -> Rule:
    return Rule(
        chain="input",
        iif=interface,
        destinations=targets,
        protocol="icmp",
        icmp="echo-request",
        action="accept",
    )
