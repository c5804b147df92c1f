# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules chain by chain, so that snapshots compare what the order of chains does not change.

A restored table has its chains in another order, and the empty ones that iptables
always has.
"""

from collections.abc import Iterable, Iterator

from lab_snapshot import Snapshot

BUILTIN = frozenset({"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"})

Chains = dict[tuple[str, str], list[str]]
"""The lines of each chain, by its table and name."""


def by_chain(found: Snapshot, *, ours: bool) -> Snapshot:
    """The same with chains in the order of their names; what is ours only where asked for."""
    sections = dict(found.sections)
    for name, chains in (
        ("nftables", _of_nft(found["nftables"])),
        ("iptables", _of_iptables(found["iptables"])),
    ):
        sections[name] = tuple(_lines(chains, ours=ours))
    return Snapshot(sections)


def _lines(chains: Chains, *, ours: bool) -> Iterator[str]:
    for (table, name), lines in sorted(chains.items()):
        if not ours and (name.startswith("NATNS-") or table == "inet natns"):
            continue
        kept = [line for line in lines if ours or "NATNS-" not in line]
        if name in BUILTIN and len(kept) == 1 and "accept" in kept[0].lower():
            continue
        yield from (f"{table} {name}: {line}" for line in kept or [""])


def _of_nft(lines: Iterable[str]) -> Chains:
    """Sets and maps count as chains."""
    chains: Chains = {}
    table, current = "", [""]
    for line in lines:
        words = line.split()
        if line.startswith("table "):
            table = " ".join(words[1:3])
        elif line.startswith("\t") and line[1] != "\t" and line.endswith("{"):
            current = chains.setdefault((table, words[1]), [])
        elif words and words[0] not in ("}", "#"):
            current.append(line.strip())
    return chains


def _of_iptables(lines: Iterable[str]) -> Chains:
    """Tables of IPv6 come behind those of IPv4."""
    chains: Chains = {}
    tables: set[str] = set()
    table = ""
    for line in lines:
        if line.startswith("*"):
            table = f"{'ip6' if 'ip' + line in tables else 'ip'}{line}"
            tables.add(table)
        elif line.startswith(":"):
            name, policy = line[1:].split()[:2]
            chains[table, name] = [policy]
        elif line.startswith("-A "):
            chains[table, line.split()[1]].append(line)
    return chains
