# SPDX-License-Identifier: LGPL-2.1-or-later
"""Maps and sets of nft: rules that differ in a key alone become elements, looked up once.

Published ports, the ports that are let in, and bridges with a conntrack zone are such rules.
A lookup takes as long for thousands of elements as for one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from libvirt_natns.addresses import FAMILIES, Family
from libvirt_natns.firewall.nft_statements import IP, network_text
from libvirt_natns.firewall.rule import Chain, Rule


@dataclass(frozen=True, slots=True)
class Map:
    """A table of nft that packets are looked up in; without ``data`` a set."""

    name: str
    key: str
    data: str
    lookup: str
    interval: bool = False
    chain: Chain = "dstnat"
    typeof: str = ""
    also: tuple[tuple[Chain, str], ...] = ()

    def declaration(self, elements: Iterable[str]) -> list[str]:
        """Return the map with its elements, as lines."""
        flags = ["\t\tflags interval"] if self.interval else []
        return [
            f"\t{'map' if self.data else 'set'} {self.name} {{",
            f"\t\t{self._type}",
            *flags,
            f"\t\telements = {{ {', '.join(elements)} }}",
            "\t}",
        ]

    @property
    def _type(self) -> str:
        if self.typeof:
            return f"typeof {self.typeof}"
        return f"type {self.key} : {self.data}" if self.data else f"type {self.key}"

    @property
    def statements(self) -> Iterator[tuple[Chain, str]]:
        """Yield the statements that look the map up, with the chain of each."""
        yield self.chain, f"{self.lookup} map @{self.name}" if self.data else self.lookup
        yield from self.also


Listening = Literal["given", "own", "any"]
"""A given address, a given address while the machine has it, or any address of the machine."""


def _map(family: Family, listening: Listening, interval: bool) -> Map:
    protocol = IP[family]
    address = f"{'ipv4' if family == 4 else 'ipv6'}_addr"
    port = "inet_proto . inet_service"
    everywhere = listening == "any"
    # The kernel takes ::1 from no link but lo.
    which = "ip6 daddr != ::1 " if everywhere and family == 6 else ""
    which += "" if listening == "given" else "fib daddr type local "
    where = "" if everywhere else f"{protocol} daddr . "
    return Map(
        f"{'local_' if everywhere else ''}{'ranges' if interval else 'ports'}"
        f"{'' if family == 4 else '6'}",
        port if everywhere else f"{address} . {port}",
        address if interval else f"{address} . inet_service",
        f"{which}dnat {protocol} to {where}meta l4proto . th dport",
        interval=interval,
    )


MAPS = {
    (family, listening, interval): _map(family, listening, interval)
    for family in FAMILIES
    for listening in get_args(Listening)
    for interval in (False, True)
}
"""By family, by the address that the rule is for, and by whether the rule leaves a range
of ports as it is.  A range that stays as it is takes one element, another range an element for
each port."""

ZONES = Map(
    "zones", "ifname", "zone", "ct zone set iifname", chain="raw", typeof="iifname : ct zone"
)
"""Bridges that have a zone of conntrack for their frames."""

KEPT = Map(
    "kept",
    "ifname",
    "",
    "iifname @kept dnat ip to ip daddr",
    chain="bridged_in",
    also=(
        ("bridged_in", "iifname @kept dnat ip6 to ip6 daddr"),
        ("bridged_out", "oifname @kept snat ip to ip saddr"),
        ("bridged_out", "oifname @kept snat ip6 to ip6 saddr"),
    ),
)
"""Bridges that NAT leaves alone: their frames are bound to the present addresses."""


def _opened(rule: Rule) -> Map:
    """Return the set of guest addresses and ports that are open between two links."""
    link = f'iifname "{rule.iif}" oifname "{rule.oif}" ct state new'
    key = "ipv6_addr . inet_proto . inet_service"
    lookup = f"{link} ip6 daddr . meta l4proto . th dport @opened accept"
    return Map("opened", key, "", lookup, interval=True, chain="forward")


def looked_up(rules: Iterable[Rule]) -> tuple[dict[Map, list[str]], list[Rule]]:
    """Return the elements of each map that has some, and the rules that are in no map."""
    elements: dict[Map, list[str]] = {nft_map: [] for nft_map in (*MAPS.values(), ZONES, KEPT)}
    rest = []
    for rule in rules:
        nft_map = _map_of(rule)
        if nft_map is None:
            rest.append(rule)
        else:
            elements.setdefault(nft_map, []).extend(_elements(rule, nft_map))
    filled = {
        nft_map: list(dict.fromkeys(members)) for nft_map, members in elements.items() if members
    }
    return filled, rest


def _map_of(rule: Rule) -> Map | None:
    """Return the map of a rule that only its destination, or its bridge, decides about."""
    if not rule.unique or rule.sources:
        return None
    if rule.action == "zone":
        return ZONES
    if rule.action == "keep":
        return KEPT
    if rule.action == "accept":
        return _opened(rule)
    if rule.to and (rule.local or len(rule.destinations) == 1):
        return MAPS[rule.to.version, _listening(rule), rule.width > 1 and rule.to_ports is None]
    return None


def _listening(rule: Rule) -> Listening:
    if not rule.local:
        return "given"
    return "own" if rule.destinations and not rule.not_destinations else "any"


def _elements(rule: Rule, nft_map: Map) -> Iterator[str]:
    if nft_map in (ZONES, KEPT):
        yield f'"{rule.iif or rule.oif}"' + (f" : {rule.zone}" if nft_map is ZONES else "")
        return
    key = f"{rule.protocol} . "
    if _listening(rule) != "any":
        key = f"{network_text(rule.destinations[0])} . {key}"
    if not nft_map.data and rule.span:
        yield f"{key}{'-'.join(map(str, dict.fromkeys(rule.span)))}"
        return
    if nft_map.interval and rule.span:
        yield f"{key}{rule.span[0]}-{rule.span[1]} : {rule.to}"
        return
    for port, to_port in rule.port_pairs:
        yield f"{key}{port} : {rule.to} . {to_port}"
