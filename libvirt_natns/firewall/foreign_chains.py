# SPDX-License-Identifier: LGPL-2.1-or-later
"""Chains of others in nft that see forwarded packets, and which of them get a jump of ours.

Few foreign chains get a jump.  iptables' FORWARD gets one where libvirt or Docker has jumps
there: libvirt's own networks pass by these, or Docker closes the chain.  All other chains are an
administrator's and stay as they are; ``stopping_chains`` names those that stop our packets.

firewalld's own tables, and tables that only their owner may change, are left alone, too.
firewalld lets our packets pass by a zone of ours (``engine.host.zone``).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain as joined
from typing import Any

from libvirt_natns.firewall.nftables import TABLE
from libvirt_natns.firewall.rule import Rule

CHAIN = "NATNS-FORWARD"
"""Our chain in a foreign table."""

IPTABLES = ("ip filter FORWARD", "ip6 filter FORWARD")
FIREWALLD = "firewalld"
"""The name of firewalld's tables, in each family."""

PASSED_BY = ("LIBVIRT_", "DOCKER")
"""The beginnings of names of chains that libvirt and Docker have in iptables' FORWARD."""
DOCKER_BRIDGE = "docker0"
"""The link in rules that Docker has in FORWARD itself."""

VERDICTS = frozenset({"accept", "drop", "reject", "jump", "goto", "queue", "return"})

Statements = list[dict[str, Any]]


@dataclass(slots=True)
class ForeignChain:
    """A foreign chain that the kernel calls for forwarded packets.

    ``chains`` are the rules of its table's other chains.  ``owned``: only the table's owner
    may change the table.
    """

    family: str
    table: str
    chain: str
    drops: bool
    rules: list[dict[str, Any]] = field(default_factory=list)
    chains: dict[str, list[Statements]] = field(default_factory=dict)
    owned: bool = False

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.chain}"

    @property
    def parent(self) -> str:
        return f"{self.family} {self.table}"

    @property
    def is_shared(self) -> bool:
        """True if packets of libvirt's own networks pass the chain, and we may change the chain."""
        if str(self) not in IPTABLES or self.owned:
            return False
        # The policy does not count: it changes once Docker is started.
        rules = [rule["expr"] for rule in self.rules]
        return any(map(is_others_chain, joined.from_iterable(map(_calls, rules)))) or (
            json.dumps(DOCKER_BRIDGE) in json.dumps(rules)
        )

    @property
    def refuses(self) -> bool:
        """True if the chain drops packets that it does not know."""
        return self.drops or any(self._refuses_all(rule["expr"]) for rule in self.rules)

    @property
    def jumps(self) -> list[int]:
        """Return the handles of the jumps to our chain."""
        return [rule["handle"] for rule in self.rules if _is_jump(rule)]

    @property
    def end(self) -> int | None:
        """Return the handle of the first rule that decides about all packets; None without any."""
        handles = (rule["handle"] for rule in self.rules if self._refuses_all(rule["expr"]))
        return next(handles, None)

    @property
    def has_jump(self) -> bool:
        """True if our jump is there once, behind all rules that may refuse something."""
        places = [i for i, rule in enumerate(self.rules) if _is_jump(rule)]
        if len(places) != 1:
            return False
        ends = (i for i, rule in enumerate(self.rules) if self._refuses_all(rule["expr"]))
        end = next(ends, len(self.rules))
        behind = self.rules[places[0] + 1 : end]
        return places[0] < end and all(_is_harmless(rule["expr"]) for rule in behind)

    def _refuses_all(self, statements: Statements) -> bool:
        """True if a rule refuses each packet, by itself or by a chain of such rules."""
        words = {_word(statement) for statement in statements} - {"counter", "log", "comment"}
        if words in ({"drop"}, {"reject"}):
            return True
        if words not in ({"jump"}, {"goto"}):
            return False
        inside = [rule for target in _calls(statements) for rule in self.chains.get(target, [])]
        deciding = [rule for rule in inside if VERDICTS & {_word(statement) for statement in rule}]
        return bool(deciding) and self._refuses_all(deciding[0])


@dataclass(frozen=True, slots=True)
class NftState:
    """The content of the kernel's nftables that matters to us.

    ``chains`` are tables that have our chain.  ``translates``: others have a chain of NAT.
    """

    own_table: bool
    chains: frozenset[str]
    bases: tuple[ForeignChain, ...]
    translates: bool = False


def is_others_chain(name: str) -> bool:
    """True for a chain of libvirt's or Docker's in iptables' tables.

    A FORWARD that calls none of these is an administrator's alone, and stops libvirt's networks
    as well.
    """
    return name.startswith(PASSED_BY)


def _is_jump(rule: dict[str, Any]) -> bool:
    return CHAIN in _calls(rule["expr"])


def _calls(statements: Statements) -> list[str]:
    """Return the chains that a rule calls."""
    return [
        statement[verb]["target"]
        for statement in statements
        for verb in ("jump", "goto")
        if verb in statement
    ]


def _word(statement: dict[str, Any]) -> str:
    """Return the word of a statement; iptables' targets and matches have their own names."""
    (key,) = statement
    extension = statement[key] if key == "xt" else None
    return str(extension.get("name", key)).lower() if extension else str(key)


def _is_harmless(statements: Statements) -> bool:
    """True if a rule refuses no packet."""
    return not {_word(statement) for statement in statements} & (
        VERDICTS - {"accept"} | {"nfqueue"}
    )


def parse(text: str) -> NftState:
    """Return what matters here of nft's JSON listing of a whole ruleset."""
    items = json.loads(text)["nftables"]
    tables = [item["table"] for item in items if "table" in item]
    chains = [item["chain"] for item in items if "chain" in item]
    rules = [item["rule"] for item in items if "rule" in item]
    owned = {f"{table['family']} {table['name']}" for table in tables if "owner" in _flags(table)}
    bases = {
        (base.family, base.table, base.chain): base
        for base in (_foreign_chain(chain) for chain in chains if chain.get("hook") == "forward")
        if base.family in ("ip", "ip6", "inet") and base.parent != TABLE
    }
    called: dict[str, dict[str, list[Statements]]] = {}
    for rule in rules:
        base = bases.get((rule["family"], rule["table"], rule["chain"]))
        if base:
            base.rules.append(rule)
        beside = called.setdefault(f"{rule['family']} {rule['table']}", {})
        beside.setdefault(rule["chain"], []).append(rule["expr"])
    for base in bases.values():
        base.owned = base.parent in owned
        base.chains = called.get(base.parent, {})
    return NftState(
        own_table=any(f"{table['family']} {table['name']}" == TABLE for table in tables),
        chains=frozenset(f"{c['family']} {c['table']}" for c in chains if c["name"] == CHAIN)
        - owned,
        # A jump in firewalld's table is one of an earlier version's.
        bases=tuple(b for b in bases.values() if b.table != FIREWALLD or (b.jumps and not b.owned)),
        translates=any(
            c.get("type") == "nat" and f"{c['family']} {c['table']}" != TABLE for c in chains
        ),
    )


def _flags(table: dict[str, Any]) -> list[str]:
    flags = table.get("flags", [])
    return [flags] if isinstance(flags, str) else flags


def _foreign_chain(chain: dict[str, Any]) -> ForeignChain:
    return ForeignChain(
        chain["family"], chain["table"], chain["name"], chain.get("policy") == "drop"
    )


def seen_in(accepts: Iterable[Rule], parent: str) -> tuple[Rule, ...]:
    """Return the accepts for packets that a foreign table sees, in the table's own words."""
    word = parent.partition(" ")[0]
    if word == "inet":
        return tuple(accepts)
    family = 6 if word == "ip6" else 4
    fitting = (rule for rule in accepts if rule.family in (None, family))
    # The table is for one family, so its rules do not name the family.
    return tuple(replace(rule, only=None) if rule.only else rule for rule in fitting)


def concerns(accepts: tuple[Rule, ...], parent: str) -> bool:
    """True if a table could drop accepted packets; a table of IPv6 only where IPv6 is accepted."""
    return any(rule.family == 6 or not parent.startswith("ip6 ") for rule in accepts)
