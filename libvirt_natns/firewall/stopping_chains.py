# SPDX-License-Identifier: LGPL-2.1-or-later
"""Chains of others that stop the networks' packets, found by following sample packets.

A chain of an administrator's own is never changed, and what the chain drops stays dropped.
So a network that the chain stops is stopped, and ``find`` says which chain, and the lines
that let the network pass.

Limits: marks, rates, and matches of iptables without a meaning here are not judged.  A rule
with one of these counts as ``verdicts`` says.  Chains for bridges and NICs (families bridge and
netdev) are not looked at, nor the chains in which the host's own programs get packets.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from libvirt_natns.addresses import FAMILIES, Family
from libvirt_natns.firewall import iptables, iptables_save, nft, nft_statements, sample_packets
from libvirt_natns.firewall.foreign_chains import (
    CHAIN,
    FIREWALLD,
    IPTABLES,
    is_others_chain,
    parse,
    seen_in,
)
from libvirt_natns.firewall.host_policy import HostForward
from libvirt_natns.firewall.iptables_entries import entries
from libvirt_natns.firewall.nft_conditions import SEEN, RuleReader
from libvirt_natns.firewall.nftables import TABLE
from libvirt_natns.firewall.rule import Rule
from libvirt_natns.firewall.sample_packets import SamplePacket, WaysOut
from libvirt_natns.firewall.verdicts import Chains, Stop, stop_of

SHOWN = 4
"""Rules that a note suggests at most."""

HOOKS = ("prerouting", "forward", "postrouting")
"""Places at which a chain of type filter sees forwarded packets."""

Need = Rule | HostForward
"""A rule that a foreign chain must not undo, or a published port."""


@dataclass(frozen=True, slots=True)
class StoppingChain:
    """A chain that stops packets.

    ``place`` is the chain with its table and family, ``how`` the kinds of its rules that do so.
    ``needs`` are those that are stopped, and ``remedy`` says which lines let them pass.  Unless
    ``sure``, a rule that cannot be judged may let them pass already.
    """

    place: str
    how: str
    sure: bool
    needs: frozenset[Need]
    remedy: str

    def __str__(self) -> str:
        verb = "stops" if self.sure else "may stop"
        return f"{self.place} ({self.how}) {verb} packets of the networks: {self.remedy}"


@dataclass(frozen=True, slots=True)
class FilterBase:
    """A base chain of others, with all chains of its table."""

    framework: str
    family: str
    table: str
    chain: str
    hook: str
    policy: str
    chains: Chains

    @property
    def parent(self) -> str:
        return f"{self.family} {self.table}"

    def __str__(self) -> str:
        if self.framework == "nftables":
            return f"nftables: {self.parent} {self.chain}"
        return f"{self.framework}: {self.table} {self.chain}"

    def stop(self, packet: SamplePacket) -> Stop | None:
        """Return how the chain stops a packet; None if the packet passes, or is not seen."""
        if packet.family not in SEEN[self.family]:
            return None
        return stop_of(self.chains, self.chain, self.policy, packet.at(self.hook))


def find(
    accepts: Sequence[Rule], forwards: Sequence[HostForward], ways: WaysOut
) -> tuple[StoppingChain, ...]:
    """Return the chains of others that stop what must pass, in both frameworks.

    ``ways`` are the links by which guests' packets leave the host.  Raises FirewallError.
    """
    if not accepts:
        return ()
    samples: list[tuple[Need, SamplePacket]] = [
        (accept, packet) for accept in accepts for packet in sample_packets.of_accept(accept, ways)
    ]
    samples += [
        (forward, packet)
        for forward in forwards
        for packet in sample_packets.of_forward(forward, ways)
    ]
    return tuple(
        found
        for base in (*_nft_bases(), *_legacy_bases())
        if (found := _stopping(base, accepts, samples)) is not None
    )


def _stopping(
    base: FilterBase, accepts: Sequence[Rule], samples: Iterable[tuple[Need, SamplePacket]]
) -> StoppingChain | None:
    stops = [
        (need, packet, stop) for need, packet in samples if (stop := base.stop(packet)) is not None
    ]
    if not stops:
        return None
    needs = frozenset(need for need, _, _ in stops)
    how = dict.fromkeys(_in_words(base, stop) for _, _, stop in stops)
    # A published port passes by the rule for packets to its network.
    stopped = [
        accept
        for accept in accepts
        if accept in needs
        or any(_leads_to(accept, need) for need in needs if isinstance(need, HostForward))
    ]
    return StoppingChain(
        str(base),
        ", ".join(how),
        any(stop.sure for _, _, stop in stops),
        needs,
        _remedy(base, stopped, by_policy=all(stop.how == "policy drop" for _, _, stop in stops)),
    )


def _in_words(base: FilterBase, stop: Stop) -> str:
    return stop.how if stop.chain == base.chain else f"{stop.how} in {stop.chain}"


def _leads_to(accept: Rule, forward: HostForward) -> bool:
    return accept.oif == forward.bridge and any(
        forward.target in subnet for subnet in accept.destinations
    )


# -- remedies ----------------------------------------------------------------


def _remedy(base: FilterBase, accepts: Sequence[Rule], *, by_policy: bool) -> str:
    """Return the commands, or lines, that let packets pass, by the means of the chain's owner."""
    if any(name.startswith("ufw-") for name in base.chains):
        links = dict.fromkeys(
            f"{way} on {link}"
            for accept in accepts
            for way, link in (("in", accept.iif), ("out", accept.oif))
            if link
        )
        return "; ".join(f"ufw route allow {link}" for link in links)
    if f"{base.parent} {base.chain}" in IPTABLES:
        family: Family = 6 if base.family == "ip6" else 4
        chain = "DOCKER-USER" if "DOCKER-USER" in base.chains else base.chain
        insert = f"{iptables_save.PROGRAMS[family]} -I {chain}"
        lines = [
            f"{insert} {entry}"
            for accept in seen_in(accepts, base.parent)
            for entry in entries(replace(accept, comment=""), family)
        ]
        return _few(lines)
    lines = [
        nft_statements.statement(replace(accept, comment=""))
        for accept in seen_in(accepts, base.parent)
    ]
    return f"{'add to it' if by_policy else 'insert at its beginning'} {_few(lines)}"


def _few(lines: Sequence[str]) -> str:
    more = [f"({len(lines) - SHOWN} more)"] if len(lines) > SHOWN else []
    return "; ".join([*lines[:SHOWN], *more])


# -- the chains of others ----------------------------------------------------


def _nft_bases() -> Iterator[FilterBase]:
    if not nft.works():
        return
    text = nft.ruleset_json()
    lacking = {str(base) for base in parse(text).bases if base.is_shared and not base.has_jump}
    listed = json.loads(text)["nftables"]
    by_table: dict[str, dict[str, list[Any]]] = {}
    for item in listed:
        if rule := item.get("rule"):
            chains = by_table.setdefault(f"{rule['family']} {rule['table']}", {})
            chains.setdefault(rule["chain"], []).append(rule["expr"])
    for item in listed:
        chain = item.get("chain", {})
        if chain.get("type") != "filter" or chain.get("hook") not in HOOKS:
            continue
        family, table, name = chain["family"], chain["table"], chain["name"]
        parent = f"{family} {table}"
        # firewalld has a zone for our packets (``engine.host.zone``), which tells its faults.
        if family not in SEEN or parent == TABLE or table == FIREWALLD:
            continue
        # A missing jump of ours is a difference, which names the chain itself.
        if f"{parent} {name}" in lacking:
            continue
        rules = by_table.get(parent, {})
        whole = _whole_chains(parent, rules)
        yield FilterBase(
            "nftables", family, table, name, chain["hook"], chain.get("policy", "accept"), whole
        )


def _whole_chains(parent: str, rules: dict[str, list[Any]]) -> Chains:
    """Return a table's rules; those of iptables in iptables' own words, which say more."""
    statements = (each for chain in rules.values() for rule in chain for each in rule)
    is_extended = any("xt" in statement for statement in statements)
    if is_extended and parent in ("ip filter", "ip6 filter"):
        saved = iptables_save.saved("nft", 6 if parent.startswith("ip6") else 4)
        if saved is not None:
            return saved.chains
    reader = RuleReader(cache(lambda name: nft.elements(f"{parent} {name}")))
    return {name: [reader.rule(expr) for expr in chain] for name, chain in rules.items()}


def _legacy_bases() -> Iterator[FilterBase]:
    for family in FAMILIES:
        if "filter" not in iptables.in_use(None, family):
            continue
        saved = iptables_save.saved("legacy", family)
        if saved is None:
            continue
        called = [rule.end.target for rule in saved.chains.get("FORWARD", ())]
        if any(map(is_others_chain, called)) and CHAIN not in called:
            # As in nft: the missing jump is a difference.
            continue
        word = "ip" if family == 4 else "ip6"
        yield FilterBase(
            iptables_save.PROGRAMS[family],
            word,
            "filter",
            "FORWARD",
            "forward",
            saved.policies.get("FORWARD", "accept"),
            saved.chains,
        )
