# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules for a bug report: ours whole, and of others the chains that forwarded packets meet.

A listing of nft or iptables-save is cut into chains.  Chains of others that no forwarded packet
meets are left out, as are sets and comments of others: both are an administrator's own.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

OURS = re.compile(r"natns", re.IGNORECASE)
"""In the name of a table or chain of ours."""

HOOKS = ("prerouting", "forward", "postrouting")
BUILT_IN = tuple(hook.upper() for hook in HOOKS)

NOTE = re.compile(r"[(]|Error|\w+: |\S*/nft: ")
"""A line that is no rule: an error, or a note about the output."""

TABLE = re.compile(r"table (\S+ \S+) \{.*")
BLOCK = re.compile(r"\t(\w+) (\S+) \{.*")
HOOK = re.compile(rf"\s*type \w+ hook ({'|'.join(HOOKS)}) ")
JUMP = re.compile(r"(?:\b(?:jump|goto) |: (?:jump|goto) |-[jg] )([\w.+-]+)")
COMMENT = re.compile(r"((?:--|(?<!-m ))\bcomment )(?:\"(?:[^\"\\]|\\.)*\"|[^\s\"]+)")
ENTRY = re.compile(r"(?:-A |:)(\S+)")


@dataclass(slots=True)
class ListedTable:
    """A table as it was listed: the lines of each chain, by its name."""

    head: str
    chains: dict[str, list[str]] = field(default_factory=dict)
    begins: list[str] = field(default_factory=list)
    """The chains in which the kernel begins."""
    others: list[str] = field(default_factory=list)
    """Lines outside of chains: sets, maps and helpers."""


def of_nft(listing: str) -> str:
    """Return the part of nft's listing of all tables that concerns us, and lines about nft."""
    all_lines = listing.splitlines()
    lines = [line for line in all_lines if NOTE.match(line)]
    for table in _nft_tables(line for line in all_lines if not NOTE.match(line)):
        if OURS.search(table.head):
            shown = [*table.others, *_all(table.chains)]
        else:
            shown = list(_met(table))
        if shown:
            lines += [f"table {table.head} {{", *shown, "}"]
    return "\n".join(lines)


def _nft_tables(lines: Iterable[str]) -> Iterator[ListedTable]:
    table, into = None, list[str]()
    for line in lines:
        if found := TABLE.fullmatch(line):
            table = ListedTable(found[1])
            into = table.others
        elif line == "}" or table is None:
            if table is not None:
                yield table
            table = None
        elif found := BLOCK.fullmatch(line):
            is_chain = found[1] == "chain"
            into = table.chains.setdefault(found[2], []) if is_chain else table.others
            into.append(line)
        else:
            into.append(line)
            if HOOK.match(line):
                table.begins.append(next(reversed(table.chains)))
    # A listing that was cut has no end.
    if table is not None:
        yield table


def of_iptables(listing: str) -> str:
    """Return the part of iptables-save's listing that concerns us, and lines about the program."""
    lines = [line for line in listing.splitlines() if NOTE.match(line)]
    for table in _iptables_tables(listing.splitlines()):
        shown = list(_met(table))
        if shown:
            lines += [table.head, *shown]
    return "\n".join(lines)


def _iptables_tables(lines: Iterable[str]) -> Iterator[ListedTable]:
    table = None
    for line in lines:
        if line.startswith("*"):
            table = ListedTable(line)
        elif table is not None and (found := ENTRY.match(line)):
            table.chains.setdefault(found[1], []).append(line)
            if found[1] in BUILT_IN and line.startswith(":"):
                table.begins.append(found[1])
        elif line == "COMMIT" and table is not None:
            yield table
            table = None
    if table is not None:
        yield table


def _met(table: ListedTable) -> Iterator[str]:
    """Yield the lines of chains that forwarded packets meet, and of ours, without comments."""
    waiting = [*table.begins, *(name for name in table.chains if OURS.search(name))]
    seen = set[str]()
    while waiting:
        name = waiting.pop(0)
        if name in seen or name not in table.chains:
            continue
        seen.add(name)
        for line in table.chains[name]:
            yield line if OURS.search(line) else COMMENT.sub(r"\1(left out)", line)
            waiting += JUMP.findall(line)


def _all(chains: Mapping[str, list[str]]) -> Iterator[str]:
    for lines in chains.values():
        yield from lines
