# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's rules in nft: our table, and our chain in foreign tables.

``repairs`` compares what is wanted with what the kernel holds and yields, for
each difference, a line for people and the script that mends it.  ``ensure``
runs all of these scripts as one.

Comparing is by text: rules are written the way nft lists them.

Foreign chains that get a jump are those that libvirt's own networks pass as well:
iptables' FORWARD, and firewalld's unless it keeps its table to itself.  There our jump comes
behind all rules that may refuse something, and ahead of what refuses everything.  Chains of
an administrator's stay as they are; ``obstacles`` names those that may drop our packets.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import nft, nft_listing, nft_statements, nftables
from libvirt_natns.firewall.nftables import MAKE_ROOM, TABLE, BaseChain, Layout
from libvirt_natns.firewall.rule import Rule
from libvirt_natns.records import dataclass, field, replace

CHAIN = "NATNS-FORWARD"
"""Our chain in a foreign table."""

JUMP = f'jump {CHAIN} comment "libvirt-natns"'

WORD = re.compile(r"[A-Za-z_.][A-Za-z0-9_./-]*")

HOST: Layout = {
    # Ahead even of reassembly (-400), which leaves alone what is not tracked:
    # fragments of twins would be put together into one packet.
    "raw": BaseChain("filter", "prerouting", "-450"),
    # The first chain of NAT with a binding decides, whosever the next ones are.
    "bridged_in": BaseChain("nat", "prerouting", "dstnat - 1"),
    "dstnat": BaseChain("nat", "prerouting", "dstnat", also=BaseChain("nat", "output", "-100")),
    "forward": BaseChain("filter", "forward", "filter"),
    "output": BaseChain("filter", "output", "filter"),
    "bridged_out": BaseChain("nat", "postrouting", "srcnat - 1"),
    "srcnat": BaseChain("nat", "postrouting", "srcnat"),
}

IPTABLES = ("ip filter FORWARD", "ip6 filter FORWARD")
FIREWALLD = "inet firewalld filter_FORWARD"
ZONES = "ZONES"
"""The end of the names of firewalld's chains that decide by zones, the default zone included."""

VERDICTS = frozenset({"accept", "drop", "reject", "jump", "goto", "queue", "return"})
SHOWN = 4
"""Rules that a note suggests at most."""

name = nftables.name

Statements = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Repair:
    """A difference, and what mends it."""

    line: str
    script: str


@dataclass(slots=True)
class Base:
    """A foreign chain that the kernel calls for forwarded packets.

    ``chains`` are the rules of its table's other chains, ``owned``: its table may be
    changed by its owner alone.
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
        """Return whether libvirt's own networks pass it, and we may change it."""
        # iptables' own in any case: its policy is another one once Docker is started.
        return str(self) in IPTABLES or (str(self) == FIREWALLD and not self.owned and self.refuses)

    @property
    def refuses(self) -> bool:
        """Return whether it drops what it does not know."""
        return self.drops or any(self._refuses_all(rule["expr"]) for rule in self.rules)

    @property
    def jumps(self) -> list[int]:
        """The handles of the jumps to our chain."""
        return [rule["handle"] for rule in self.rules if _is_jump(rule)]

    @property
    def end(self) -> int | None:
        """The handle of the first rule that leaves nothing to decide; None without one."""
        found = (rule["handle"] for rule in self.rules if self._is_end(rule["expr"]))
        return next(found, None)

    @property
    def has_jump(self) -> bool:
        """Return whether our jump is there once, behind all that may refuse something."""
        places = [i for i, rule in enumerate(self.rules) if _is_jump(rule)]
        if len(places) != 1:
            return False
        ends = (i for i, rule in enumerate(self.rules) if self._is_end(rule["expr"]))
        end = next(ends, len(self.rules))
        behind = self.rules[places[0] + 1 : end]
        return places[0] < end and all(_is_harmless(rule["expr"]) for rule in behind)

    def names(self, links: Iterable[str]) -> bool:
        """Return whether any rule of its table asks for one of these links."""
        told = json.dumps([*(rule["expr"] for rule in self.rules), *self.chains.values()])
        return any(json.dumps(link) in told for link in links)

    def _is_end(self, statements: Statements) -> bool:
        return self._refuses_all(statements) or (
            str(self) == FIREWALLD and any(target.endswith(ZONES) for target in _calls(statements))
        )

    def _refuses_all(self, statements: Statements) -> bool:
        """Return whether a rule refuses each packet, by itself or by a chain of such rules."""
        said = {_word(each) for each in statements} - {"counter", "log", "comment"}
        if said in ({"drop"}, {"reject"}):
            return True
        if said not in ({"jump"}, {"goto"}):
            return False
        inside = [each for target in _calls(statements) for each in self.chains.get(target, [])]
        telling = [each for each in inside if VERDICTS & {_word(word) for word in each}]
        return bool(telling) and self._refuses_all(telling[0])


@dataclass(frozen=True, slots=True)
class Found:
    """What of interest the kernel holds; ``chains`` are tables that have our chain.

    ``translates``: others have a chain of NAT.
    """

    own_table: bool
    chains: frozenset[str]
    bases: tuple[Base, ...]
    translates: bool = False


def _is_jump(rule: dict[str, Any]) -> bool:
    return CHAIN in _calls(rule["expr"])


def _calls(statements: Statements) -> list[str]:
    """The chains that a rule calls."""
    return [
        statement[verb]["target"]
        for statement in statements
        for verb in ("jump", "goto")
        if verb in statement
    ]


def _word(statement: dict[str, Any]) -> str:
    """What a statement is, by iptables' targets and matches their own names."""
    (key,) = statement
    extension = statement[key] if key == "xt" else None
    return str(extension.get("name", key)).lower() if extension else str(key)


def _is_harmless(statements: Statements) -> bool:
    """Return whether a rule refuses nothing."""
    return not {_word(each) for each in statements} & (VERDICTS - {"accept"} | {"nfqueue"})


def parse(text: str) -> Found:
    """What of nft's JSON listing of a whole ruleset matters here."""
    items = json.loads(text)["nftables"]
    tables = [item["table"] for item in items if "table" in item]
    chains = [item["chain"] for item in items if "chain" in item]
    rules = [item["rule"] for item in items if "rule" in item]
    owned = {f"{each['family']} {each['name']}" for each in tables if "owner" in _flags(each)}
    bases = {
        (base.family, base.table, base.chain): base
        for base in (_base(chain) for chain in chains if chain.get("hook") == "forward")
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
    return Found(
        own_table=any(f"{table['family']} {table['name']}" == TABLE for table in tables),
        chains=frozenset(f"{c['family']} {c['table']}" for c in chains if c["name"] == CHAIN),
        bases=tuple(bases.values()),
        translates=any(
            c.get("type") == "nat" and f"{c['family']} {c['table']}" != TABLE for c in chains
        ),
    )


def _flags(table: dict[str, Any]) -> list[str]:
    flags = table.get("flags", [])
    return [flags] if isinstance(flags, str) else flags


def _base(chain: dict[str, Any]) -> Base:
    return Base(chain["family"], chain["table"], chain["name"], chain.get("policy") == "drop")


def repairs(own: tuple[Rule, ...], accepts: tuple[Rule, ...]) -> Iterator[Repair]:
    """Return what is not as ``own`` and ``accepts`` want it, and how to repair it."""
    found = parse(nft.ruleset_json())
    yield from _own_table(found, own if found.translates or _is_backend(own) else ())
    shared = [base for base in found.bases if base.is_shared and _concerns(accepts, base.parent)]
    wanted = {base.parent for base in shared}
    for parent in sorted(wanted):
        yield from _own_chain(parent, parent in found.chains, seen_in(accepts, parent))
    for base in found.bases:
        yield from _jump(base, base in shared)
    for parent in sorted(found.chains - wanted):
        yield Repair(
            f"nftables: chain {CHAIN} in table {parent} is left over",
            f"flush chain {parent} {CHAIN}\ndelete chain {parent} {CHAIN}\n",
        )


def _is_backend(own: Iterable[Rule]) -> bool:
    """Whether all of the host's rules are here; beside iptables it is those against NAT alone."""
    return any(rule.action != "keep" for rule in own)


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
        nft_listing.canonical(script.removeprefix(MAKE_ROOM))
    ):
        yield Repair(f"{place} was altered", script)


def _own_chain(parent: str, exists: bool, accepts: tuple[Rule, ...]) -> Iterator[Repair]:
    wanted = [nft_statements.statement(rule) for rule in accepts]
    place = f"nftables: chain {CHAIN} in table {_checked(parent)}"
    listed = _lines(nft.list_chain(f"{parent} {CHAIN}")) if exists else []
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
    if base.has_jump if wanted else not base.jumps:
        return
    script = "".join(f"delete rule {base} handle {handle}\n" for handle in base.jumps)
    if not wanted:
        yield Repair(f"nftables: our jump in {base} is left over", script)
        return
    _checked(base.parent)
    added = (
        f"add rule {base} {JUMP}\n"
        if base.end is None
        else f"insert rule {base} handle {base.end} {JUMP}\n"
    )
    yield Repair(f"nftables: {base} has not our jump at its end", script + added)


def obstacles(accepts: tuple[Rule, ...]) -> tuple[str, ...]:
    """Chains of an administrator's that may drop what is to pass, and what lets it pass there.

    One line each; a chain whose table speaks of a link of ours is taken to know what it does.
    """
    if not (accepts and nft.program()):
        return ()
    links = {link for rule in accepts for link in (rule.iif, rule.oif) if link}
    foreign = (
        base
        for base in parse(nft.ruleset_json()).bases
        if base.refuses and not base.is_shared and not base.names(links)
    )
    return tuple(
        f"nftables: {base} drops packets of the networks: add to it"
        f" {_lines_for(seen_in(accepts, base.parent))}"
        for base in foreign
        if _concerns(accepts, base.parent)
    )


def _lines_for(accepts: Iterable[Rule]) -> str:
    lines = [nft_statements.statement(replace(rule, comment="")) for rule in accepts]
    more = [f"({len(lines) - SHOWN} more)"] if len(lines) > SHOWN else []
    return "; ".join([*lines[:SHOWN], *more])


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
    to do unless nftables is the backend.  Raises FirewallError.
    """
    if not (_is_backend(own) or nft.program()):
        return ()
    found = tuple(repairs(own, accepts))
    if found:
        announce()
    try:
        _repair(found)
    except FirewallError:
        # Docker and the like may have changed rules since we read them: then the
        # script names what is gone, and as a whole did nothing.
        _repair(repairs(own, accepts))
    return tuple(repair.line for repair in found)


def _repair(found: Iterable[Repair]) -> None:
    script = "".join(repair.script for repair in found)
    if script:
        nft.load(None, script)


def differences(own: tuple[Rule, ...], accepts: tuple[Rule, ...]) -> tuple[str, ...]:
    """What ``ensure`` would mend, one line each."""
    if _is_backend(own) or nft.program():
        return tuple(repair.line for repair in repairs(own, accepts))
    return ()


def remove() -> None:
    """Take out our table, our chains and the jumps to them; nothing there is success."""
    ensure((), ())
