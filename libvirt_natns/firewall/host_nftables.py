# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's rules in nft: our table, and our chain in foreign tables.

``repairs`` compares what is wanted with what the kernel holds and yields, for
each difference, a line for people and the script that mends it.  ``ensure``
runs all of these scripts as one.

Comparing is by text: rules are written the way nft lists them.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import nftables
from libvirt_natns.firewall.nftables import MAKE_ROOM, TABLE, Hook, Layout
from libvirt_natns.firewall.rules import Rule
from libvirt_natns.records import dataclass, field, replace

CHAIN = "NATNS-FORWARD"
"""Our chain in a foreign table."""

JUMP = f'jump {CHAIN} comment "libvirt-natns"'

WORD = re.compile(r"[A-Za-z_.][A-Za-z0-9_./-]*")

HOST: Layout = {
    # Ahead even of reassembly (-400), which leaves alone what is not tracked:
    # fragments of twins would be put together into one packet.
    "raw": Hook("filter", "prerouting", "-450"),
    "dstnat": Hook("nat", "prerouting", "dstnat", also=Hook("nat", "output", "-100")),
    "forward": Hook("filter", "forward", "filter"),
    "srcnat": Hook("nat", "postrouting", "srcnat"),
}

name = nftables.name


@dataclass(frozen=True, slots=True)
class Repair:
    """A difference, and what mends it."""

    line: str
    script: str


@dataclass(slots=True)
class Base:
    """A foreign chain that the kernel calls for forwarded packets."""

    family: str
    table: str
    chain: str
    drops: bool
    rules: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.chain}"

    @property
    def parent(self) -> str:
        return f"{self.family} {self.table}"

    @property
    def blocks(self) -> bool:
        """Whether it may drop what it does not know, now or once Docker is started."""
        return (
            self.drops
            or str(self) in ("ip filter FORWARD", "ip6 filter FORWARD")
            or any(_refuses_all(rule) for rule in self.rules)
        )

    @property
    def jumps(self) -> list[int]:
        """The handles of the jumps to our chain."""
        return [rule["handle"] for rule in self.rules if _is_jump(rule)]

    @property
    def begins_with_jump(self) -> bool:
        return len(self.jumps) == 1 and _is_jump(self.rules[0])


@dataclass(frozen=True, slots=True)
class Found:
    """What of interest the kernel holds; ``chains`` are tables that have our chain."""

    own_table: bool
    chains: frozenset[str]
    bases: tuple[Base, ...]


def _is_jump(rule: dict[str, Any]) -> bool:
    return any(statement.get("jump", {}).get("target") == CHAIN for statement in rule["expr"])


def _refuses_all(rule: dict[str, Any]) -> bool:
    said = {key for statement in rule["expr"] for key in statement}
    return bool(said & {"drop", "reject"}) and said <= {"drop", "reject", "counter", "log"}


def parse(text: str) -> Found:
    """What of nft's JSON listing of a whole ruleset matters here."""
    items = json.loads(text)["nftables"]
    tables = [item["table"] for item in items if "table" in item]
    chains = [item["chain"] for item in items if "chain" in item]
    bases = {
        (base.family, base.table, base.chain): base
        for base in (_base(chain) for chain in chains if chain.get("hook") == "forward")
        if base.family in ("ip", "ip6", "inet") and base.parent != TABLE
    }
    for rule in (item["rule"] for item in items if "rule" in item):
        base = bases.get((rule["family"], rule["table"], rule["chain"]))
        if base:
            base.rules.append(rule)
    return Found(
        own_table=any(f"{table['family']} {table['name']}" == TABLE for table in tables),
        chains=frozenset(f"{c['family']} {c['table']}" for c in chains if c["name"] == CHAIN),
        bases=tuple(bases.values()),
    )


def _base(chain: dict[str, Any]) -> Base:
    return Base(chain["family"], chain["table"], chain["name"], chain.get("policy") == "drop")


def repairs(own: tuple[Rule, ...], accepts: tuple[Rule, ...]) -> Iterator[Repair]:
    """What is not as ``own`` and ``accepts`` want it, and how to mend it."""
    found = parse(nftables.ruleset_json())
    yield from _own_table(found, own)
    blocking = [base for base in found.bases if base.blocks and _concerns(accepts, base.parent)]
    wanted = {base.parent for base in blocking}
    for parent in sorted(wanted):
        yield from _own_chain(parent, parent in found.chains, seen_in(accepts, parent))
    for base in found.bases:
        yield from _jump(base, base in blocking)
    for parent in sorted(found.chains - wanted):
        yield Repair(
            f"nftables: chain {CHAIN} in table {parent} is left over",
            f"flush chain {parent} {CHAIN}\ndelete chain {parent} {CHAIN}\n",
        )


def seen_in(accepts: Iterable[Rule], parent: str) -> tuple[Rule, ...]:
    """Those of the accepts that a foreign table sees packets for, in its own words."""
    word = parent.partition(" ")[0]
    if word == "inet":
        return tuple(accepts)
    family = 6 if word == "ip6" else 4
    fitting = (rule for rule in accepts if rule.family in (None, family))
    # Such a table needs no telling what it is for.
    return tuple(replace(rule, only=None) if rule.only else rule for rule in fitting)


def _concerns(accepts: tuple[Rule, ...], parent: str) -> bool:
    """Whether a table could drop what is to pass; one of IPv6 alone only where there is some."""
    return any(rule.family == 6 or not parent.startswith("ip6 ") for rule in accepts)


def _own_table(found: Found, own: tuple[Rule, ...]) -> Iterator[Repair]:
    place = f"nftables: table {TABLE}"
    if not own:
        if found.own_table:
            yield Repair(f"{place} is left over", f"delete table {TABLE}\n")
        return
    script = nftables.render(own, HOST)
    if not found.own_table:
        yield Repair(f"{place} is missing", script)
    elif _lines(nftables.listing(None)) != _lines(
        nftables.canonical(script.removeprefix(MAKE_ROOM))
    ):
        yield Repair(f"{place} was altered", script)


def _own_chain(parent: str, exists: bool, accepts: tuple[Rule, ...]) -> Iterator[Repair]:
    wanted = [nftables.statement(rule) for rule in accepts]
    place = f"nftables: chain {CHAIN} in table {_checked(parent)}"
    listed = _lines(nftables.list_chain(f"{parent} {CHAIN}")) if exists else []
    present = listed[2:-2]
    # In any order: they all accept, and networks come one after the other.
    if exists and sorted(present) == sorted(set(wanted)):
        return
    known = set(wanted)
    kept = [statement for statement in present if statement in known]
    statements = dict.fromkeys([*kept, *wanted])
    yield Repair(
        f"{place} {'was altered' if exists else 'is missing'}",
        f"add chain {parent} {CHAIN}\nflush chain {parent} {CHAIN}\n"
        + "".join(f"add rule {parent} {CHAIN} {statement}\n" for statement in statements),
    )


def _jump(base: Base, wanted: bool) -> Iterator[Repair]:
    if base.begins_with_jump if wanted else not base.jumps:
        return
    script = "".join(f"delete rule {base} handle {handle}\n" for handle in base.jumps)
    if wanted:
        line = f"nftables: {base} does not begin with our jump"
        yield Repair(line, f"{script}insert rule {base} {JUMP}\n")
    else:
        yield Repair(f"nftables: our jump in {base} is left over", script)


def _checked(parent: str) -> str:
    if all(WORD.fullmatch(word) for word in parent.split(" ")):
        return parent
    raise FirewallError(f"the firewall table {parent!r} has a name that nft cannot take")


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def ensure(
    own: tuple[Rule, ...], accepts: tuple[Rule, ...], announce: Callable[[], None] = lambda: None
) -> tuple[str, ...]:
    """Mend every difference in one transaction; returns what differed.

    ``announce`` is called ahead of it.  Without the program nft there is nothing
    to do unless ``own`` asks for it.  Raises FirewallError.
    """
    if not (own or nftables.program()):
        return ()
    found = tuple(repairs(own, accepts))
    if found:
        announce()
    try:
        _mend(found)
    except FirewallError:
        # Docker and the like may have changed rules since we read them: then the
        # script names what is gone, and as a whole did nothing.
        _mend(repairs(own, accepts))
    return tuple(repair.line for repair in found)


def _mend(found: Iterable[Repair]) -> None:
    script = "".join(repair.script for repair in found)
    if script:
        nftables.run(None, script)


def differences(own: tuple[Rule, ...], accepts: tuple[Rule, ...]) -> tuple[str, ...]:
    """What ``ensure`` would mend, one line each."""
    if own or nftables.program():
        return tuple(repair.line for repair in repairs(own, accepts))
    return ()


def remove() -> None:
    """Take out our table, our chains and the jumps to them; nothing there is success."""
    ensure((), ())
