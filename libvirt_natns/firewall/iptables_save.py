# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules as iptables-save prints them, as rules for ``verdicts``.

nft lists a match of iptables by its name alone.  The program iptables-save, of the same kind as
the iptables that made the rules, prints the whole.  Source: iptables-extensions(8).
"""

import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_network

from libvirt_natns.addresses import Address, Family
from libvirt_natns.firewall.sample_packets import SamplePacket
from libvirt_natns.firewall.verdicts import Condition, FilterRule, RuleEnd
from libvirt_natns.kernel import processes

TIME_LIMIT = 10.0
"""Seconds after which iptables-save counts as stuck."""

PROGRAMS: dict[Family, str] = {4: "iptables", 6: "ip6tables"}

WORDS = {
    "ACCEPT": "accept",
    "DROP": "drop",
    "REJECT": "reject",
    "RETURN": "return",
    "NFQUEUE": "queue",
    "DNAT": "dnat",
    "REDIRECT": "redirect",
}
HARMLESS = ("comment", "limit", "tcp", "udp", "sctp", "state", "conntrack", "multiport", "addrtype")
"""Matches that say nothing by themselves: their options do."""
IGNORED = ("--comment", "--limit", "--limit-burst")


@dataclass(slots=True)
class SavedTable:
    """A table: its chains' rules, the policies of its built-in chains, and the whole ``text``."""

    chains: dict[str, list[FilterRule]] = field(default_factory=dict)
    policies: dict[str, str] = field(default_factory=dict)
    text: str = ""


def saved(kind: str, family: Family, table: str = "filter") -> SavedTable | None:
    """Return a table of iptables of a kind, "nft" or "legacy"; None where it is not told.

    The caller knows that the table exists: legacy iptables would make the table.
    """
    program = processes.program(f"{PROGRAMS[family]}-{kind}-save")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "-t", table],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=TIME_LIMIT,
            env={"PATH": processes.PATH, "LC_ALL": "C"},
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    # A table of another program's making is told of in a comment.
    return parse(done.stdout) if done.returncode == 0 and f"\n*{table}\n" in done.stdout else None


def parse(text: str) -> SavedTable:
    """Return the table in the output of iptables-save -t."""
    table = SavedTable(text=text)
    names = [line[1:].split()[:2] for line in text.splitlines() if line.startswith(":")]
    for name, policy in names:
        table.chains[name] = []
        table.policies[name] = policy.lower()
    for line in text.splitlines():
        if line.startswith("-A "):
            _, chain, *words = shlex.split(line)
            table.chains.setdefault(chain, []).append(_rule(words, table.chains))
    return table


def _rule(words: Sequence[str], chains: dict[str, list[FilterRule]]) -> FilterRule:
    conditions: list[Condition] = []
    end = RuleEnd()
    for option, values, negated in _options(words):
        if option in ("-j", "-g"):
            (target, *_) = values
            calls = "goto" if option == "-g" else "jump"
            end = RuleEnd(calls, target) if target in chains else RuleEnd(WORDS.get(target, ""))
            break
        condition = _condition(option, values)
        if condition is not None:
            conditions.append(partial(_negated, condition) if negated else condition)
    return FilterRule(tuple(conditions), end)


def _options(words: Sequence[str]) -> Iterator[tuple[str, list[str], bool]]:
    """Yield each option with its values, and whether a "!" stands ahead of the option."""
    option, negated, pending = "", False, False
    values: list[str] = []
    for word in words:
        if word == "!":
            pending = True
        elif word.startswith("-") and len(word) > 1:
            if option:
                yield option, values, negated
            option, values, negated, pending = word, [], pending, False
        else:
            values.append(word)
    if option:
        yield option, values, negated


def _negated(condition: Condition, packet: SamplePacket) -> bool | None:
    fits = condition(packet)
    return None if fits is None else not fits


def _condition(option: str, values: Sequence[str]) -> Condition | None:
    if option in IGNORED or (option == "-m" and values[0] in HARMLESS):
        return None
    known = {
        "-s": _source,
        "-d": _destination,
        "-i": _comes_by,
        "-o": _goes_by,
        "-p": _protocol,
        "--state": _state,
        "--ctstate": _state,
        "--dport": _to_port,
        "--dports": _to_port,
        "--sport": _from_port,
        "--sports": _from_port,
        "--dst-type": _is_local,
    }
    if option in known and values:
        return partial(known[option], values[0])
    return _unknown


def _unknown(_packet: SamplePacket) -> None:
    return None


def _source(network: str, packet: SamplePacket) -> bool | None:
    return _is_in(network, packet.source)


def _destination(network: str, packet: SamplePacket) -> bool | None:
    return _is_in(network, packet.destination)


def _is_in(network: str, address: Address | None) -> bool | None:
    if address is None:
        return None
    try:
        return address in ip_network(network, strict=False)
    except ValueError:
        # iptables knows masks with gaps, as 10.0.0.1/255.0.0.255.
        return None


def _comes_by(link: str, packet: SamplePacket) -> bool | None:
    return _is_link(link, packet.iif)


def _goes_by(link: str, packet: SamplePacket) -> bool | None:
    return _is_link(link, packet.oif)


def _is_link(wanted: str, link: str | None) -> bool | None:
    if link is None:
        return None
    return link.startswith(wanted[:-1]) if wanted.endswith("+") else link == wanted


def _protocol(protocol: str, packet: SamplePacket) -> bool:
    return protocol in (packet.protocol, "all")


def _state(states: str, packet: SamplePacket) -> bool | None:
    wanted = {state.lower() for state in states.split(",")}
    if "dnat" in wanted and packet.translated:
        return True
    return packet.state in wanted


def _is_local(kind: str, packet: SamplePacket) -> bool | None:
    return packet.local if kind == "LOCAL" else None


def _to_port(ports: str, packet: SamplePacket) -> bool:
    return _lies_in(ports, packet.dport)


def _from_port(ports: str, packet: SamplePacket) -> bool:
    return _lies_in(ports, packet.sport)


def _lies_in(ports: str, port: int) -> bool:
    for span in ports.split(","):
        first, _, last = span.partition(":")
        if int(first or 0) <= port <= int(last or first or 65535):
            return True
    return False
