# SPDX-License-Identifier: LGPL-2.1-or-later
"""A rule of the firewall, as data that knows no backend.

``nftables`` and ``iptables`` render the same rules, so the two backends cannot come to differ
in what they let through.  Everything here is pure.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

from libvirt_natns.addresses import Address, Family, IPNetwork, host_network
from libvirt_natns.errors import FirewallError
from libvirt_natns.values import INTERFACE, INTERFACE_EXPECTED, shown

Chain = Literal[
    "arp",
    "raw",
    "bridged_in",
    "marked",
    "helper",
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
"""Where a packet meets a rule, in the order in which a forwarded packet does:

arp      ARP for the machine or namespace itself, where the backend has a place for ARP
raw      on arrival, before conntrack and NAT see the packet
bridged_in   in the host, ahead of all translation on arrival
marked   in the host, on arrival, ahead of routing: packets are marked for a rule of routing
helper   first packet of a flow, on arrival, ahead of its translation: the helper that follows it
dstnat   first packet of a flow, on arrival: its real destination.  In the host, also
         packets that the host itself sends
input    addressed to the machine or namespace itself; a packet that no rule accepts is dropped
clamp    forwarded, ahead of the verdicts: the MSS of TCP is adjusted
forward  forwarded; in a namespace, a packet that no rule accepts is dropped
foreign  in the host, forwarded, in the chains of others
output   in the host, sent by the host itself
bridged_out  in the host, ahead of all translation of sources
srcnat   leaving, first packet of a flow: its source address
guard    leaving, after NAT: the source is the one on the wire
"""

LayoutName = Literal["namespace", "router"]
"""The chains that a rule set has, by the namespace it is for: a network's, or a router's."""

Action = Literal[
    "accept",
    "drop",
    "reject",
    "dnat",
    "snat",
    "masquerade",
    "clamp-mss",
    "zone",
    "keep",
    "mark",
    "helper",
]
Transport = Literal["tcp", "udp", "sctp", "icmp", "icmpv6"]
ConntrackState = Literal["new", "established", "related", "invalid"]
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

COMMENT = re.compile(r"[A-Za-z0-9 .,:;()/'-]{0,80}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule; a field left empty matches everything.

    ``not_iif``, ``not_oif``, ``not_sources`` and ``not_destinations`` turn their match
    round.  ``local`` matches what goes to any address of the machine.
    ``ports`` are destination ports, ``span`` is the first and the last port of a range.
    ``replies_of`` matches replies of flows that were begun to an address of that network.
    ``translated`` matches flows with a destination that a dnat changed.
    ``syn`` matches the first segment of each direction of a TCP connection, ``not_syn``
    any other.  ``only`` limits a rule without addresses to one family.

    A reject answers TCP with a reset, UDP with "port unreachable", and where no protocol is named
    with "administratively prohibited".  A "zone" gives connections a table of their own in
    conntrack, number ``zone``.  A "keep" makes NAT leave the destination (on arrival) or the source
    (on leaving) as it is.  A "mark" gives a packet the mark ``mark``.  ``iif_kind`` and
    ``oif_kind`` are the kernel's names for kinds of links, as "bridge".  A dnat or snat puts the
    address ``to`` in place.  A dnat with ``to_ports`` changes the port, too: the new port is as far
    from the first as in ``span``.  A single port takes all.

    ``fresh`` drops packets from, or to, unknown addresses, where such packets
    are too many.  ``remembered`` makes the address known.  ``flows`` matches the first
    packet of a flow while so many flows exist.  ``paced`` drops packets that come faster than
    new addresses may, from any sender.  ``limits`` has the numbers.

    A "helper" has the conntrack helper of that name follow a flow.

    ``unique`` promises that no other rule of the chain matches the same packet.
    A backend may look such rules up instead of trying one after the other.

    Raises FirewallError for a name or comment that a backend could misread, and for
    combinations that no backend can express.
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
    states: tuple[ConntrackState, ...] = ()
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
    mark: int = 0
    helper: str = ""
    replies_of: IPNetwork | None = None

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
        families: set[Family] = {self.only} if self.only else set()
        families.update(network.version for network in (*self.sources, *self.destinations))
        if self.to is not None:
            families.add(self.to.version)
        if self.replies_of is not None:
            families.add(self.replies_of.version)
        if self.protocol in ICMP:
            families.add(ICMP[self.protocol])
        return families

    @property
    def family(self) -> Family | None:
        """Return the only family that the rule matches; None for a rule of both."""
        return next(iter(self._families), None)

    @property
    def width(self) -> int:
        """Return the number of ports in ``span``."""
        return self.span[1] - self.span[0] + 1 if self.span else 0

    @property
    def port_pairs(self) -> Iterator[tuple[int, int]]:
        """Yield each port of ``span`` with the port that a dnat puts in its place."""
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
    """Return ``name`` if every backend takes the name for exactly one interface.

    The kernel allows nearly any character; a trailing + would be a wildcard to
    iptables, and quotes, spaces or an asterisk mean something to nft.
    Raises FirewallError.
    """
    if INTERFACE.fullmatch(name):
        return name
    fact = f"{shown(name)} cannot be the interface of a firewall rule"
    raise FirewallError(fact, f"rename it to {INTERFACE_EXPECTED}")


def single(address: Address | IPNetwork) -> tuple[IPNetwork, ...]:
    """Return an address, or a network as it is, as the networks of a rule."""
    if isinstance(address, IPv4Address | IPv6Address):
        return (host_network(address),)
    return (address,)


def limited(sources: tuple[IPNetwork, ...]) -> tuple[IPNetwork, ...]:
    """Return clients as the networks of a rule; a list that has all addresses is no match."""
    return () if any(source.prefixlen == 0 for source in sources) else sources
