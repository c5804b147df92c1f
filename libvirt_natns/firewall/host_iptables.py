# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's rules in legacy iptables: chains of ours, each with one jump.

With the backend iptables, all of the host's rules are here.  With the backend nftables, only
the accepts are, and only where the host has a legacy filter table.
All tables change under the lock that iptables itself takes.

Limits: a legacy filter table that is in use while python-iptables is missing is
an error: without the library, its rules cannot be read.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any, Literal, NamedTuple

from libvirt_natns.addresses import FAMILIES, Family
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import iptables
from libvirt_natns.firewall.foreign_chains import DOCKER_BRIDGE, PASSED_BY
from libvirt_natns.firewall.iptables_entries import entries
from libvirt_natns.firewall.iptables_syntax import ChainEntry, Match
from libvirt_natns.firewall.rule import Chain, Rule

PREFIX = "NATNS-"

Order = Literal["first", "early", "last"]
"""The place of our jump among a built-in chain's rules.

first   ahead of all rules
early   ahead of rules that accept; rules that refuse may come first
last    behind all rules that decide, or ahead of a rule that refuses everything
"""


class ChainPlace(NamedTuple):
    """A chain of ours: its table, the end of its name, and the built-in chains that jump there."""

    table: str
    suffix: str
    builtins: tuple[str, ...]
    order: Order


PLACES: dict[Chain, ChainPlace] = {
    "bridged_in": ChainPlace("nat", "KEEP", ("PREROUTING",), "first"),
    # An administrator's rules come first: bans, and translations of his own.
    "dstnat": ChainPlace("nat", "DNAT", ("PREROUTING", "OUTPUT"), "last"),
    "bridged_out": ChainPlace("nat", "POSTROUTING", ("POSTROUTING",), "first"),
    "srcnat": ChainPlace("nat", "POSTROUTING", ("POSTROUTING",), "first"),
    "raw": ChainPlace("raw", "PREROUTING", ("PREROUTING",), "early"),
    "helper": ChainPlace("raw", "PREROUTING", ("PREROUTING",), "early"),
    "marked": ChainPlace("mangle", "MARK", ("PREROUTING",), "early"),
    "clamp": ChainPlace("mangle", "GUARD", ("FORWARD",), "early"),
    "forward": ChainPlace("mangle", "GUARD", ("FORWARD",), "early"),
    "output": ChainPlace("mangle", "OUT", ("POSTROUTING",), "early"),
    "foreign": ChainPlace("filter", "FORWARD", ("FORWARD",), "last"),
}
"""The places of our chains, in the order in which tables are committed.

Our rules drop in mangle, as accepts of others in filter do not undo that.  Packets that the
host sends are dropped behind the host's NAT."""

FOREIGN = "filter"
"""The table in which our accepts let packets pass for good."""

RETURN: Match = ("RETURN", {})

name = iptables.name


def ensure(
    own: tuple[Rule, ...], accepts: tuple[Rule, ...], announce: Callable[[], None] = lambda: None
) -> tuple[str, ...]:
    """Bring our chains and jumps to these rules; tables that need nothing stay unread.

    Returns the differences.  Raises FirewallError.
    """
    differing = differences(own, accepts)
    if differing:
        announce()
        _call("own", tables(wanted_chains(own, accepts)))
    return differing


def differences(own: tuple[Rule, ...], accepts: tuple[Rule, ...]) -> tuple[str, ...]:
    """Return what ``ensure`` would change, one line each."""
    wanted = tables(wanted_chains(own, accepts))
    if _concerned(wanted):
        return tuple(_call("compare", wanted).splitlines())
    return ()


def _call(verb: str, wanted: list[dict[str, Any]]) -> str:
    # Something of ours may be left over in a family's tables.
    families = sorted({table["family"] for table in wanted} | set(iptables.used(None)))
    return iptables.call(None, verb, families=families, prefix=PREFIX, tables=wanted)


def remove() -> None:
    """Delete our chains and the jumps to them; success where there are none."""
    ensure((), ())


def _concerned(wanted: list[dict[str, Any]]) -> bool:
    """True if there is something to do, or may be something of ours to delete."""
    if wanted:
        if not iptables.library_found():
            raise FirewallError(
                "the host uses legacy iptables and python-iptables is missing",
                "install python3-iptables",
            )
        return True
    # Without the library, no rule of ours can have got in.
    return bool(iptables.used(None)) and iptables.library_found()


Wanted = dict[Family, tuple[Rule, ...]]


def wanted_chains(own: tuple[Rule, ...], accepts: tuple[Rule, ...]) -> Wanted:
    """Return the rules of each family that is to have some."""
    mine, theirs = iptables.families(own), iptables.families(accepts)
    wanted = {}
    for family in FAMILIES:
        # A transit bridge may have IPv6 from earlier; no network can use that IPv6 now.
        if family == 6 and 6 in (*mine, *theirs) and not iptables.kernel_has(6):
            continue
        # A look into a table would create it, so a table that is not in use is left alone.
        foreign = family in theirs and (
            (own and family in mine) or "filter" in iptables.in_use(None, family)
        )
        rules = (*(own if family in mine else ()), *(accepts if foreign else ()))
        wanted[family] = tuple(rule for rule in rules if rule.family in (None, family))
    return wanted


def tables(wanted: Wanted) -> list[dict[str, Any]]:
    """Return tables with our chains and jumps, as ``iptables_child`` takes them."""
    return [table for family, rules in wanted.items() for table in _tables(rules, family)]


def _tables(rules: Iterable[Rule], family: Family) -> Iterable[dict[str, Any]]:
    chains: dict[Chain, list[ChainEntry]] = {}
    for rule in rules:
        chains.setdefault(rule.chain, []).extend(entries(rule, family))
    made: dict[str, dict[str, Any]] = {}
    empty: dict[str, Any]
    for chain, place in PLACES.items():
        if chain in chains:
            empty = {"family": family, "name": place.table, "chains": {}, "jumps": []}
            table = made.setdefault(place.table, empty)
            content = table["chains"].setdefault(PREFIX + place.suffix, [])
            content += [asdict(_own(entry, place.table)) for entry in chains[chain]]
            table["jumps"] += [jump for jump in _jumps(place) if jump not in table["jumps"]]
    return made.values()


def _jumps(place: ChainPlace) -> Iterator[dict[str, Any]]:
    """Yield the jumps to a chain of ours, as ``iptc_compare`` takes them."""
    for builtin in place.builtins:
        yield {
            "builtin": builtin,
            "entry": asdict(_jump(PREFIX + place.suffix)),
            "order": place.order,
            # Without jumps of these, a chain is an administrator's alone.
            "beside": PASSED_BY if place.table == FOREIGN else (),
            "beside_link": DOCKER_BRIDGE,
        }


def _own(entry: ChainEntry, table: str) -> ChainEntry:
    """Return an entry for our own chain in a table: an accept there ends that chain alone."""
    accepts = entry.target[0] == "ACCEPT" and table != FOREIGN
    return replace(entry, target=RETURN) if accepts else entry


def _jump(target: str) -> ChainEntry:
    return ChainEntry(matches=(("comment", {"comment": "libvirt-natns"}),), target=(target, {}))
