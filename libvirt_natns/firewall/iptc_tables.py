# SPDX-License-Identifier: LGPL-2.1-or-later
"""Entries of tables, by python-iptables: made, read, deleted, and as text."""

from collections.abc import Iterator
from typing import Any

from libvirt_natns.firewall.iptc_library import (
    IptcChain,
    IptcModule,
    IptcRule,
    IptcTable,
    adapt,
    iptc,
    known_rule,
    rule_class,
)

EntryFields = dict[str, Any]
"""An entry as the request has it: the fields of ``iptables_syntax.ChainEntry``."""


def open_table(family: int, name: str) -> IptcTable:
    """Return a table of a family; all changes until ``commit`` are one transaction."""
    kind = iptc().Table if family == 4 else iptc().Table6
    adapt(family)
    # Otherwise each step would be a transaction of its own.
    return kind(name, autocommit=False)


def chain_of(table: IptcTable, name: str) -> IptcChain:
    """Return a chain of a table."""
    return iptc().Chain(table, name)


def append(table: IptcTable, name: str, entries: list[EntryFields]) -> None:
    """Append entries to a chain."""
    chain = chain_of(table, name)
    for entry in entries:
        chain.append_rule(make_rule(entry, chain))


def make_rule(entry: EntryFields, chain: IptcChain) -> IptcRule:
    """Return an entry of a request as a rule for a chain."""
    rule = rule_class(chain.table)(chain=chain)
    fields = {
        "src": entry["source"],
        "dst": entry["destination"],
        "in_interface": entry["iif"],
        "out_interface": entry["oif"],
        "protocol": entry["protocol"],
    }
    for field, value in fields.items():
        if value:
            setattr(rule, field, value)
    for module, parameters in entry["matches"]:
        _set(rule.create_match(module), parameters)
    name, parameters = entry["target"]
    _set(rule.create_target(name), parameters)
    _compare_whole_names(rule)
    return rule


def _compare_whole_names(rule: IptcRule) -> None:
    """Have the kernel compare all bits of interfaces' names.

    For IPv6, python-iptables 1.0.1 asks for the lowest bit of each letter: "lo" would be
    "virbr10", too.
    """
    for field in ("iniface_mask", "outiface_mask"):
        mask = getattr(rule.get_ip(), field)
        setattr(rule.get_ip(), field, b"\xff" * len(mask))


def _set(module: IptcModule, parameters: dict[str, str | list[str]]) -> None:
    for key, value in parameters.items():
        module.set_parameter(key, value)


def raw_entries(table: IptcTable, chain: str) -> Iterator[Any]:
    """Yield a chain's entries as the kernel holds them."""
    entry = table.first_rule(chain)
    while entry:
        yield entry
        entry = table.next_rule(entry)


def delete_jumps(table: IptcTable, target: str) -> None:
    """Delete every jump to ``target``; all other entries stay exactly as they are."""
    for chain in table.chains:
        entries = list(raw_entries(table, chain.name))
        for index in range(len(entries) - 1, -1, -1):
            if table.get_target(entries[index]) == target.encode():
                _delete(table, chain.name, index)


def _delete(table: IptcTable, chain: str, index: int) -> None:
    # By number: python-iptables deletes by likeness only, and a rule that was
    # taken apart and put together again may be like another rule.
    if not table._iptc.iptc_delete_num_entry(chain.encode(), index, table._handle):
        raise OSError(f"cannot delete rule {index + 1} of {chain}: {table.strerror()}")


def dump(table: IptcTable, note: str) -> str:
    """Return what a table holds, as iptables-save would print it; "" for an empty table."""
    chains = table.chains
    lines = []
    for chain in chains:
        policy = chain.get_policy().name if chain.is_builtin() else "-"
        rules = [rule_text(known_rule(rule, chain)) for rule in raw_entries(table, chain.name)]
        if rules or policy != "ACCEPT":
            lines += [f":{chain.name} {policy}", *(f"-A {chain.name} {rule}" for rule in rules)]
    return "".join(f"{line}\n" for line in [f"*{table.name}{note}", *lines] if lines)


def rule_text(rule: IptcRule) -> str:
    """Return a rule in python-iptables' words."""
    options = {
        "-s": _unless_all(rule.src),
        "-d": _unless_all(rule.dst),
        "-i": rule.in_interface or "",
        "-o": rule.out_interface or "",
        "-p": "" if rule.protocol == "ip" else rule.protocol,
    }
    parts = [f"{option} {value}" for option, value in options.items() if value]
    parts += [_module_text("-m", match) for match in rule.matches]
    return " ".join([*parts, _module_text("-j", rule.target)])


def _unless_all(network: str) -> str:
    return "" if network in ("0.0.0.0/0.0.0.0", "::/0") else network


def _module_text(option: str, module: IptcModule) -> str:
    parameters = module.get_all_parameters().items()
    texts = [f"--{key} {' '.join(value)}".rstrip() for key, value in parameters]
    return " ".join([option, module.name, *texts])
