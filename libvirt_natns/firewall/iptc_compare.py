# SPDX-License-Identifier: LGPL-2.1-or-later
"""Our chains in the host's tables, and the jumps to them: differences, and their repair."""

from collections.abc import Iterator
from typing import Any

from libvirt_natns.firewall.iptc_library import IptcChain, IptcTable, known_rule
from libvirt_natns.firewall.iptc_tables import (
    EntryFields,
    append,
    chain_of,
    delete_jumps,
    make_rule,
    raw_entries,
    rule_text,
)

TableRequest = dict[str, Any]

PROGRAMS = {4: "iptables", 6: "ip6tables"}
"""The program that changes a family's tables by hand."""

REFUSALS = ("DROP", "REJECT")
ACCEPTING = (b"ACCEPT", b"RETURN")
HARMLESS = {"filter": (b"ACCEPT", b"LOG", b""), "nat": (b"LOG", b"")}
"""Targets behind our jump that take nothing from an administrator, by table."""

PLACES = {
    "first": "at its beginning",
    "early": "ahead of rules that accept",
    "last": "at its end",
}
"""Words for the place of a jump, by its order."""


def _ours(table: IptcTable, prefix: str) -> list[str]:
    return [chain.name for chain in table.chains if chain.name.startswith(prefix)]


def _here(table: IptcTable, wanted: TableRequest) -> TableRequest:
    """Return what is wanted of a table, without jumps beside which none of others is needed.

    A chain without jumps goes as well.
    """
    jumps = [jump for jump in wanted["jumps"] if _is_needed(table, jump)]
    missing = {_target(jump) for jump in wanted["jumps"]} - {_target(jump) for jump in jumps}
    chains = {name: held for name, held in wanted["chains"].items() if name not in missing}
    return {**wanted, "jumps": jumps, "chains": chains}


def _is_needed(table: IptcTable, jump: TableRequest) -> bool:
    beside = tuple(name.encode() for name in jump["beside"])
    targets = _targets(table, jump["builtin"]) if beside else ()
    if not beside or any(target.startswith(beside) for target in targets):
        return True
    chain = chain_of(table, jump["builtin"])
    rules = (known_rule(entry, chain) for entry in raw_entries(table, chain.name))
    return any(jump["beside_link"] in (rule.in_interface, rule.out_interface) for rule in rules)


def _target(jump: TableRequest) -> str:
    return str(jump["entry"]["target"][0])


def _targets(table: IptcTable, chain: str) -> list[bytes]:
    return [table.get_target(entry) for entry in raw_entries(table, chain)]


def rebuild(table: IptcTable, wanted: TableRequest, prefix: str) -> None:
    """Bring our chains in a table, and the jumps to them, to what is wanted."""
    wanted = _here(table, wanted)
    ours = _ours(table, prefix)
    for name in ours:
        delete_jumps(table, name)
        table.flush_entries(name)
    for name in set(ours) - set(wanted["chains"]):
        table.delete_chain(name)
    for name, entries in wanted["chains"].items():
        if name not in ours:
            table.create_chain(name)
        append(table, name, entries)
    for jump in wanted["jumps"]:
        chain = chain_of(table, jump["builtin"])
        place = _end(table, jump["builtin"]) if jump["order"] == "last" else 0
        chain.insert_rule(make_rule(jump["entry"], chain), place)


def differences(table: IptcTable, wanted: TableRequest, request: TableRequest) -> Iterator[str]:
    """Yield what ``rebuild`` would change, one line each."""
    wanted = _here(table, wanted)
    ours = _ours(table, request["prefix"])
    program = PROGRAMS[request["family"]]
    for name in ours:
        if name not in wanted["chains"]:
            yield f"{program}: chain {name} in table {table.name} is left over"
    for name, entries in wanted["chains"].items():
        place = f"{program}: chain {name} in table {table.name}"
        if name not in ours:
            yield f"{place} is missing"
        elif not _holds(chain_of(table, name), entries):
            yield f"{place} was altered"
    for jump in wanted["jumps"]:
        if not _is_in_place(table, jump):
            place = PLACES[jump["order"]]
            yield f"{program}: {jump['builtin']} in table {table.name} lacks our jump {place}"


def _is_in_place(table: IptcTable, jump: TableRequest) -> bool:
    """True if a jump of ours is there once, where its order wants it."""
    own, targets = _target(jump).encode(), _targets(table, jump["builtin"])
    if targets.count(own) != 1:
        return False
    place = targets.index(own)
    if jump["order"] == "last":
        return _is_behind(table, jump["builtin"], place)
    # Others may want to come first as well, and would put theirs ahead again and again.
    ahead = targets[:place]
    return not (ahead if jump["order"] == "first" else set(ahead) & set(ACCEPTING))


def _end(table: IptcTable, builtin: str) -> int:
    """Return the number of rules ahead of the first rule that refuses everything."""
    entries = list(raw_entries(table, builtin))
    refusing = (i for i, entry in enumerate(entries) if _refuses_all(table, builtin, entry))
    return next(refusing, len(entries))


def _is_behind(table: IptcTable, builtin: str, place: int) -> bool:
    """True if no rule that may refuse something stands between a place and the end."""
    end = _end(table, builtin)
    entries = list(raw_entries(table, builtin))[place + 1 : end]
    return place <= end and all(
        table.get_target(entry) in HARMLESS[table.name] for entry in entries
    )


def _refuses_all(table: IptcTable, chain: str, entry: Any) -> bool:  # noqa: ANN401
    """True if a rule refuses each packet, by itself or by a chain of such rules."""
    rule = known_rule(entry, chain_of(table, chain))
    target = table.get_target(entry).decode()
    matches = [match for match in rule.matches if match.name != "comment"]
    if matches or not rule_text(rule).startswith(("-j ", "-m comment")):
        return False
    if target in REFUSALS:
        return True
    inside = (
        list(raw_entries(table, target)) if target in {inner.name for inner in table.chains} else []
    )
    deciding = [inner for inner in inside if table.get_target(inner) != b"LOG"]
    return bool(deciding) and _refuses_all(table, target, deciding[0])


def _holds(chain: IptcChain, entries: list[EntryFields]) -> bool:
    # Both sides are in the words of the same library.
    present = [
        rule_text(known_rule(entry, chain)) for entry in raw_entries(chain.table, chain.name)
    ]
    return present == [rule_text(make_rule(entry, chain)) for entry in entries]
