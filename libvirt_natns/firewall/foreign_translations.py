# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports of the host that rules of others lead elsewhere: hostPorts of a cluster, containers.

No program listens on such a port, so only the rules tell.  Rules of both frameworks are read
once, and only where a port is about to be published.  Where no rule of others translates, the
kernel says so in a fraction of a millisecond, and no program is started.

Limits: a rule that cannot be judged (``verdicts``) is taken for a rule about other packets.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache

from libvirt_natns.addresses import FAMILIES, Address, Family
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import host_iptables, iptables, iptables_save, nfnetlink, nft
from libvirt_natns.firewall.nft_conditions import SEEN, Json, RuleReader
from libvirt_natns.firewall.nftables import TABLE
from libvirt_natns.firewall.sample_packets import OUTSIDE, SamplePacket
from libvirt_natns.firewall.verdicts import TRANSLATES, Chains, stop_of
from libvirt_natns.kernel.route_lookup import link_towards
from libvirt_natns.model.publication import PortProtocol

ELSEWHERE = "outside"
"""Stands for the link of a client, on a host without a way out."""


@dataclass(frozen=True, slots=True)
class TranslatingBase:
    """A base chain of others that translates destinations of incoming packets.

    ``numbers`` are all numbers in the rules of its table: at no other port can its answer change.
    """

    name: str
    chain: str
    families: tuple[Family, ...]
    chains: Chains
    numbers: frozenset[int]

    def place(self, packet: SamplePacket) -> str:
        """Return the chain that translates a packet, in words; "" if none does."""
        if packet.family not in self.families:
            return ""
        stop = stop_of(self.chains, self.chain, "accept", packet)
        return f"{self.name} {stop.chain}" if stop and stop.how in TRANSLATES else ""


@dataclass(slots=True)
class ForeignTranslations:
    """The translations of others, read when they are asked for the first time.

    ``own`` returns the addresses of the host.
    """

    own: Callable[[], Iterable[Address]]
    _bases: list[TranslatingBase] | None = None
    _ways: dict[Family, str] = field(default_factory=dict)

    def taken(
        self, proto: PortProtocol, listens: Address, first: int, last: int
    ) -> tuple[int, str] | None:
        """Return the first port of a span that is translated on an address, and where.

        An unspecified address stands for all addresses of the host.  The place names framework,
        table and chain.  None if there is no such port.
        """
        if self._bases is None:
            self._bases = list(_bases())
        for base in self._bases:
            edges = {first, *base.numbers, *(number + 1 for number in base.numbers)}
            for port in sorted(edge for edge in edges if first <= edge <= last):
                for address in self._reached(listens):
                    place = base.place(self._packet(proto, address, port))
                    if place:
                        return port, place
        return None

    def _reached(self, listens: Address) -> Iterator[Address]:
        """Yield the addresses at which clients outside reach a port."""
        for address in self.own() if listens.is_unspecified else (listens,):
            # The host alone reaches 127.0.0.1, and no packet of its own arrives.
            if address.version == listens.version and not address.is_loopback:
                yield address

    def _packet(self, proto: PortProtocol, address: Address, port: int) -> SamplePacket:
        family: Family = 4 if address.version == 4 else 6
        if family not in self._ways:
            self._ways[family] = link_towards(OUTSIDE[family]) or ELSEWHERE
        way, client = self._ways[family], OUTSIDE[family]
        return SamplePacket(
            family, way, None, client, address, protocol=proto, dport=port, local=True
        )


def _bases() -> Iterator[TranslatingBase]:
    tables = nfnetlink.translating(TABLE)
    if tables != [] and nft.program() is not None:
        for table in tables or [""]:
            with suppress(FirewallError):
                yield from _nft_bases(table)
    for family in FAMILIES:
        if "nat" in iptables.in_use(None, family):
            saved = iptables_save.saved("legacy", family, "nat")
            if saved is not None:
                yield _saved_base(f"{iptables_save.PROGRAMS[family]}: nat", family, saved)


def _saved_base(name: str, family: Family, saved: iptables_save.SavedTable) -> TranslatingBase:
    others = {
        chain: rules
        for chain, rules in saved.chains.items()
        if not chain.startswith(host_iptables.PREFIX)
    }
    return TranslatingBase(name, "PREROUTING", (family,), others, _numbers(saved.text))


def _nft_bases(table: str) -> Iterator[TranslatingBase]:
    listed = json.loads(nft.ruleset_json(table))["nftables"]
    by_table: dict[str, dict[str, list[Json]]] = {}
    for item in listed:
        if rule := item.get("rule"):
            chains = by_table.setdefault(f"{rule['family']} {rule['table']}", {})
            chains.setdefault(rule["chain"], []).append(rule["expr"])
    for item in listed:
        chain = item.get("chain", {})
        parent = f"{chain.get('family')} {chain.get('table')}"
        if (chain.get("type"), chain.get("hook")) != ("nat", "prerouting"):
            continue
        if parent != TABLE and chain["family"] in SEEN:
            yield _nft_base(parent, chain, by_table.get(parent, {}))


def _nft_base(parent: str, chain: Json, rules: dict[str, list[Json]]) -> TranslatingBase:
    family = SEEN[chain["family"]]
    name = f"nftables: {parent}"
    if "xt" in json.dumps(rules) and parent in ("ip nat", "ip6 nat"):
        saved = iptables_save.saved("nft", family[0], "nat")
        if saved is not None:
            return _saved_base(name, family[0], saved)
    seen: list[object] = [rules]

    @cache
    def elements(name: str) -> list[Json] | None:
        held = nft.elements(f"{parent} {name}")
        seen.append(held)
        return held

    reader = RuleReader(elements)
    chains = {name: [reader.rule(expr) for expr in each] for name, each in rules.items()}
    for reference in set(re.findall(r'"@([^"]+)"', json.dumps(rules))):
        elements(reference)
    return TranslatingBase(name, chain["name"], family, chains, _numbers(json.dumps(seen)))


def _numbers(text: str) -> frozenset[int]:
    return frozenset(int(number) for number in re.findall(r"\b\d{1,5}\b", text))
