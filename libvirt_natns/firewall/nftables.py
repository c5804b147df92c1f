# SPDX-License-Identifier: LGPL-2.1-or-later
"""The nftables backend: renders rules as one nft script and loads it.

The only caller of the program nft.  A script declares, deletes and redefines
the table ``inet natns``, which the kernel does in one transaction: no packet
meets half of it, and a script with an error changes nothing.

Limits: ``listing`` shows our table alone, so a foreign table in the namespace
goes unnoticed.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network

from libvirt_natns import netns
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall.rules import Chain, Rule

TABLE = "inet natns"

MAKE_ROOM = f"add table {TABLE}\ndelete table {TABLE}\n"
"""Takes our table out, whether it is there or not."""

PROGRAM_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
"""Where programs are looked for besides PATH: libvirt runs hooks with hardly any."""

TIME_LIMIT = 30.0
"""Seconds after which nft counts as stuck."""

MISSING = "No such file or directory"

name = "nftables"


@dataclass(frozen=True, slots=True)
class Hook:
    """Where the kernel calls a base chain, and what becomes of the rest."""

    kind: str
    point: str
    priority: str
    policy: str = "accept"

    def __str__(self) -> str:
        return f"type {self.kind} hook {self.point} priority {self.priority}; policy {self.policy};"


Layout = Mapping[Chain, Hook]

NAMESPACE: Layout = {
    "raw": Hook("filter", "prerouting", "raw"),
    "input": Hook("filter", "input", "filter", "drop"),
    "clamp": Hook("filter", "forward", "mangle"),
    "forward": Hook("filter", "forward", "filter", "drop"),
    "srcnat": Hook("nat", "postrouting", "srcnat"),
    # After every source translation.
    "guard": Hook("filter", "postrouting", "srcnat + 10"),
}

REJECTIONS = {"tcp": "tcp reset", "udp": "icmpx port-unreachable"}

VERDICTS = {
    "accept": "accept",
    "drop": "drop",
    "masquerade": "masquerade",
    "clamp-mss": "tcp option maxseg size set rt mtu",
    "notrack": "notrack",
}


def render(rules: Iterable[Rule], layout: Layout = NAMESPACE) -> str:
    """The whole script that puts ``rules`` in place of what our table held."""
    lines = [f"table {TABLE} {{"]
    chains = _by_chain(rules, layout)
    for chain, hook in layout.items():
        if chains[chain] or hook.policy != "accept":
            lines += [f"\tchain {chain} {{", f"\t\t{hook}"]
            lines += [f"\t\t{statement(rule)}" for rule in chains[chain]]
            lines += ["\t}"]
    return MAKE_ROOM + "\n".join([*lines, "}", ""])


def _by_chain(rules: Iterable[Rule], layout: Layout) -> dict[Chain, list[Rule]]:
    chains: dict[Chain, list[Rule]] = {chain: [] for chain in layout}
    for rule in rules:
        chains[rule.chain].append(rule)
    return chains


def statement(rule: Rule) -> str:
    """One rule in nft's syntax, without table and chain."""
    parts = [*_interfaces(rule), *_addresses(rule), *_protocol(rule)]
    if rule.states:
        parts.append(f"ct state {','.join(rule.states)}")
    parts.append(_verdict(rule))
    if rule.comment:
        parts.append(f'comment "{rule.comment}"')
    return " ".join(parts)


def _interfaces(rule: Rule) -> list[str]:
    # By name, not by index: rules are loaded before all interfaces are there.
    parts = []
    if rule.iif:
        parts.append(f'iifname "{rule.iif}"')
    if rule.oif:
        parts.append(f'oifname {"!= " if rule.not_oif else ""}"{rule.oif}"')
    return parts


def _addresses(rule: Rule) -> list[str]:
    parts = []
    for field, networks, negated in (
        ("saddr", rule.sources, rule.not_sources),
        ("daddr", rule.destinations, rule.not_destinations),
    ):
        if networks:
            parts.append(f"ip {field} {'!= ' if negated else ''}{_set(map(_network, networks))}")
    return parts


def _protocol(rule: Rule) -> list[str]:
    if rule.ports:
        return [f"{rule.protocol} dport {_set(map(str, rule.ports))}"]
    if rule.icmp:
        return [f"icmp type {rule.icmp}"]
    if rule.syn:
        return ["tcp flags & (syn|rst) == syn"]
    return [f"meta l4proto {rule.protocol}"] if rule.protocol else []


def _verdict(rule: Rule) -> str:
    if rule.action == "reject":
        return f"reject with {REJECTIONS.get(rule.protocol or '', 'icmpx admin-prohibited')}"
    return VERDICTS[rule.action]


def _network(network: IPv4Network) -> str:
    return str(network if network.prefixlen < network.max_prefixlen else network.network_address)


def _set(members: Iterable[str]) -> str:
    members = list(dict.fromkeys(members))
    return members[0] if len(members) == 1 else f"{{ {', '.join(members)} }}"


def apply(namespace: str | None, rules: Iterable[Rule]) -> None:
    """Put ``rules`` in place of our table in ``namespace``, at once and whole.

    Raises FirewallError when nft is missing or refuses the script, KernelError
    when the namespace is missing.
    """
    script = render(rules)
    if not listing(namespace):
        # Deleting even an empty table makes the kernel wait (10 ms), and a new
        # namespace has none to delete; "create" makes sure of that.
        script = script.replace(MAKE_ROOM, f"create table {TABLE}\n", 1)
    run(namespace, script)


def clear(namespace: str | None) -> None:
    """Take our table out of ``namespace``; that it is missing is success."""
    run(namespace, MAKE_ROOM)


def listing(namespace: str | None) -> str:
    """Our table as the kernel holds it, without counters; "" when it is missing.

    Raises FirewallError when nft cannot be run, KernelError when the namespace
    is missing.
    """
    done = _nft(namespace, "-s", "list", "table", *TABLE.split())
    if done.returncode == 0:
        return done.stdout
    if MISSING in done.stderr:
        return ""
    raise FirewallError(f"nft cannot list the table {TABLE}", condensed(done.stderr))


def ruleset_json() -> str:
    """Everything that nft knows of the caller's namespace, as its JSON text."""
    done = _nft(None, "-j", "-s", "-t", "list", "ruleset")
    if done.returncode == 0:
        return done.stdout
    raise FirewallError("nft cannot list the rules of the host", condensed(done.stderr))


def list_chain(chain: str) -> str:
    """One chain of the caller's namespace, given as "family table chain", without counters."""
    done = _nft(None, "-s", "list", "chain", *chain.split())
    if done.returncode == 0:
        return done.stdout
    raise FirewallError(f"nft cannot list the chain {chain}", condensed(done.stderr))


def run(namespace: str | None, script: str) -> None:
    """Run one script, all of it or nothing; None is the caller's own namespace."""
    done = _nft(namespace, "-f", "-", script=script)
    if done.returncode != 0:
        raise FirewallError("nft refused the rules", condensed(done.stderr))


def require() -> None:
    """Raise FirewallError, with a remedy, where this backend cannot work."""
    done = _nft(None, "list", "tables")
    if done.returncode != 0:
        raise FirewallError(
            f"nft does not work here ({condensed(done.stderr)})",
            'load the kernel module nf_tables, or set firewall = "iptables"',
        )


def program() -> str | None:
    """The path of nft, or None."""
    search = os.environ.get("PATH", "") + os.pathsep + PROGRAM_PATH
    return shutil.which("nft", path=search)


def condensed(stderr: str) -> str:
    """nft's complaint in one line, without the places in a script nobody sees."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    told = next((line for line in lines if "Error:" in line), lines[0] if lines else "no reason")
    return told.partition("Error:")[2].strip() or told


def _nft(
    namespace: str | None, *arguments: str, script: str = ""
) -> subprocess.CompletedProcess[str]:
    path = program()
    if path is None:
        raise FirewallError(
            "the program nft is missing", 'install nftables, or set firewall = "iptables"'
        )
    try:
        # A child belongs to the namespace of the thread that starts it.
        with netns.entered(namespace):
            return subprocess.run(
                [path, *arguments],
                input=script,
                capture_output=True,
                text=True,
                timeout=TIME_LIMIT,
                env={"PATH": PROGRAM_PATH, "LC_ALL": "C"},
                check=False,
            )
    except (OSError, subprocess.SubprocessError) as error:
        raise FirewallError("cannot run nft", str(error)) from error
