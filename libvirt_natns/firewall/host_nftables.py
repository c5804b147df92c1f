# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's rules in nft: our table, and our chain in foreign tables.

``repairs`` compares the wanted rules with the rules that the kernel holds.  Each difference
has a line for people and a script that fixes the difference.  ``ensure`` runs all scripts as
one.

Comparing is by text: rules are written the way nft lists them.

Our jump in a foreign chain comes behind all rules that may refuse something, and ahead of a
rule that refuses everything.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import nft, nft_listing, nft_statements, nftables
from libvirt_natns.firewall.foreign_chains import (
    CHAIN,
    ForeignChain,
    NftState,
    concerns,
    parse,
    seen_in,
)
from libvirt_natns.firewall.nftables import MAKE_ROOM, TABLE, BaseChain, Layout
from libvirt_natns.firewall.rule import Rule

JUMP = f'jump {CHAIN} comment "libvirt-natns"'

WORD = re.compile(r"[A-Za-z_.][A-Za-z0-9_./-]*")

HOST: Layout = {
    # Ahead even of reassembly (-400), which leaves alone what is not tracked:
    # fragments of twins would be put together into one packet.
    "raw": BaseChain("filter", "prerouting", "-450"),
    # The first chain of NAT with a binding decides, and chains of others do not.
    "bridged_in": BaseChain("nat", "prerouting", "dstnat - 1"),
    "marked": BaseChain("filter", "prerouting", "mangle"),
    "helper": nftables.HELPER,
    # Behind the chains of others, so that their rules decide first.  A number this far from
    # dstnat (-100) has no name, and each nft lists it alike.
    "dstnat": BaseChain("nat", "prerouting", "-85", also=BaseChain("nat", "output", "-85")),
    "clamp": BaseChain("filter", "forward", "mangle"),
    "forward": BaseChain("filter", "forward", "filter"),
    "output": BaseChain("filter", "output", "filter"),
    "bridged_out": BaseChain("nat", "postrouting", "srcnat - 1"),
    "srcnat": BaseChain("nat", "postrouting", "srcnat"),
}

name = nftables.name


@dataclass(frozen=True, slots=True)
class ScriptedRepair:
    """A difference, and the script that fixes the difference."""

    line: str
    script: str


def repairs(own: tuple[Rule, ...], accepts: tuple[Rule, ...]) -> Iterator[ScriptedRepair]:
    """Yield the differences from ``own`` and ``accepts``, with their repair."""
    state = parse(nft.ruleset_json())
    yield from _own_table(state, own if state.translates or _is_backend(own) else ())
    shared = [base for base in state.bases if base.is_shared and concerns(accepts, base.parent)]
    wanted = {base.parent for base in shared}
    for parent in sorted(wanted):
        yield from _own_chain(parent, parent in state.chains, seen_in(accepts, parent))
    for base in state.bases:
        yield from _jump(base, base in shared)
    for parent in sorted(state.chains - wanted):
        yield ScriptedRepair(
            f"nftables: chain {CHAIN} in table {parent} is left over",
            f"flush chain {parent} {CHAIN}\ndelete chain {parent} {CHAIN}\n",
        )


def _is_backend(own: Iterable[Rule]) -> bool:
    """True if all of the host's rules are here; beside iptables only rules against NAT are."""
    return any(rule.action != "keep" for rule in own)


def _own_table(state: NftState, own: tuple[Rule, ...]) -> Iterator[ScriptedRepair]:
    place = f"nftables: table {TABLE}"
    if not own:
        if state.own_table:
            yield ScriptedRepair(f"{place} is left over", f"delete table {TABLE}\n")
        return
    script = nftables.script(own, HOST)
    if not state.own_table:
        yield ScriptedRepair(f"{place} is missing", nftables.first(script))
    elif _lines(nftables.listing(None)) != _lines(
        nft_listing.canonical(script.removeprefix(MAKE_ROOM))
    ):
        yield ScriptedRepair(f"{place} was altered", script)


def _own_chain(parent: str, exists: bool, accepts: tuple[Rule, ...]) -> Iterator[ScriptedRepair]:
    wanted = [nft_statements.statement(rule) for rule in accepts]
    place = f"nftables: chain {CHAIN} in table {_checked(parent)}"
    listed = _lines(nft.list_chain(f"{parent} {CHAIN}")) if exists else []
    present = listed[2:-2]
    # In any order: all rules accept, and networks come one after the other.
    if exists and sorted(present) == sorted(set(wanted)):
        return
    lasting = set(wanted)
    kept = [statement for statement in present if statement in lasting]
    statements = dict.fromkeys([*kept, *wanted])
    yield ScriptedRepair(
        f"{place} {'was altered' if exists else 'is missing'}",
        f"add chain {parent} {CHAIN}\nflush chain {parent} {CHAIN}\n"
        + "".join(f"add rule {parent} {CHAIN} {statement}\n" for statement in statements),
    )


def _jump(base: ForeignChain, wanted: bool) -> Iterator[ScriptedRepair]:
    if base.owned or (base.has_jump if wanted else not base.jumps):
        return
    script = "".join(f"delete rule {base} handle {handle}\n" for handle in base.jumps)
    if not wanted:
        yield ScriptedRepair(f"nftables: our jump in {base} is left over", script)
        return
    _checked(base.parent)
    added = (
        f"add rule {base} {JUMP}\n"
        if base.end is None
        else f"insert rule {base} handle {base.end} {JUMP}\n"
    )
    yield ScriptedRepair(f"nftables: {base} lacks our jump at its end", script + added)


def _checked(parent: str) -> str:
    if all(WORD.fullmatch(word) for word in parent.split(" ")):
        return parent
    raise FirewallError(f"the firewall table {parent!r} has a name that nft refuses")


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def ensure(
    own: tuple[Rule, ...], accepts: tuple[Rule, ...], announce: Callable[[], None] = lambda: None
) -> tuple[str, ...]:
    """Fix every difference in one transaction and return the differences.

    ``announce`` is called ahead of the transaction.  Without the program nft, or nftables in the
    kernel, there is nothing to do unless nftables is the backend.  Raises FirewallError.
    """
    if not (_is_backend(own) or nft.works()):
        return ()
    needed = tuple(repairs(own, accepts))
    if needed:
        announce()
    try:
        _repair(needed)
    except FirewallError:
        # Docker and the like may have changed rules since we read them: then the
        # script names rules that are gone, and as a whole did nothing.
        _repair(repairs(own, accepts))
    return tuple(repair.line for repair in needed)


def _repair(needed: Iterable[ScriptedRepair]) -> None:
    script = "".join(repair.script for repair in needed)
    if script:
        nft.load(None, script)


def differences(own: tuple[Rule, ...], accepts: tuple[Rule, ...]) -> tuple[str, ...]:
    """Return what ``ensure`` would fix, one line each."""
    if _is_backend(own) or nft.works():
        return tuple(repair.line for repair in repairs(own, accepts))
    return ()


def remove() -> None:
    """Delete our table, our chains and the jumps to them; success where there are none."""
    ensure((), ())
