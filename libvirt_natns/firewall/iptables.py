# SPDX-License-Identifier: LGPL-2.1-or-later
"""The iptables backend: legacy iptables, driven through python-iptables.

python-iptables caches tables for the life of a process, so it is loaded only
in a child that is already inside the namespace: see ``iptables_child``, which
gets whole tables as JSON and knows nothing of what they mean.  Here rules
become the entries of these tables.

Each table is replaced in one transaction, NAT first and the filter last: at no
moment is forwarding open while NAT is missing.

Nothing in legacy iptables runs after source NAT, so the guard is expressed by
what conntrack has recorded.  A packet may leave if its connection's recorded
translation gives it an allowed source, or if it is the first of its
connection: then NAT, which comes next, is about to decide.

Limits: IPv4 only.  A table once used stays in the namespace, empty, until the
namespace goes: the kernel cannot drop one.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path

from libvirt_natns import netns
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall.rules import Chain, Rule
from libvirt_natns.records import asdict, dataclass

TABLE_NAMES = Path("/proc/thread-self/net/ip_tables_names")

TIME_LIMIT = 30.0
"""Seconds after which the child counts as stuck; it may wait for iptables' lock."""

CHILD = Path(__file__).with_name("iptables_child.py")

name = "iptables"


@dataclass(frozen=True, slots=True)
class Place:
    """A table's chain; ``policy`` is set where the chain is a built-in one."""

    table: str
    chain: str
    policy: str = "ACCEPT"


Layout = Mapping[Chain, Place]

# In the order in which the tables are committed.
NAMESPACE: Layout = {
    "dstnat": Place("nat", "PREROUTING"),
    "srcnat": Place("nat", "POSTROUTING"),
    "clamp": Place("mangle", "FORWARD"),
    "guard": Place("mangle", "POSTROUTING"),
    "raw": Place("raw", "PREROUTING"),
    "input": Place("filter", "INPUT", "DROP"),
    "forward": Place("filter", "FORWARD", "DROP"),
}

Parameters = dict[str, str | list[str]]

TARGETS: dict[str, tuple[str, Parameters]] = {
    "accept": ("ACCEPT", {}),
    "drop": ("DROP", {}),
    "masquerade": ("MASQUERADE", {}),
    "clamp-mss": ("TCPMSS", {"clamp-mss-to-pmtu": ""}),
    "notrack": ("CT", {"notrack": ""}),
}

REJECTIONS = {"tcp": "tcp-reset", "udp": "icmp-port-unreachable"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry of a chain, in iptables' own words; "!" in front negates a value."""

    source: str = ""
    destination: str = ""
    iif: str = ""
    oif: str = ""
    protocol: str = ""
    matches: tuple[tuple[str, Parameters], ...] = ()
    target: tuple[str, Parameters]

    def __str__(self) -> str:
        parts = [
            _option(option, value)
            for option, value in (
                ("-s", self.source),
                ("-d", self.destination),
                ("-i", self.iif),
                ("-o", self.oif),
                ("-p", self.protocol),
            )
            if value
        ]
        parts += [f"-m {module}{_parameters(values)}" for module, values in self.matches]
        return " ".join([*parts, f"-j {self.target[0]}{_parameters(self.target[1])}"])


def _option(option: str, value: str) -> str:
    return f"! {option} {value[1:]}" if value.startswith("!") else f"{option} {value}".rstrip()


def _parameters(values: Parameters) -> str:
    return "".join(f" {_option(f'--{key}', _word(value))}" for key, value in values.items())


def _word(value: str | list[str]) -> str:
    if isinstance(value, list):
        return " ".join(value)
    return f'"{value}"' if " " in value else value


@dataclass(frozen=True, slots=True)
class Table:
    """What a table's chains hold; ``policies`` of its built-in ones."""

    name: str
    chains: dict[str, list[Entry]]
    policies: dict[str, str]


def tables(rules: Iterable[Rule], layout: Layout = NAMESPACE) -> tuple[Table, ...]:
    """The tables that ``rules`` make, in the order in which they must be committed."""
    made: dict[str, Table] = {}
    for place in layout.values():
        table = made.setdefault(place.table, Table(place.table, {}, {}))
        table.chains[place.chain] = []
        table.policies[place.chain] = place.policy
    for rule in rules:
        place = layout[rule.chain]
        made[place.table].chains[place.chain].extend(entries(rule))
    return tuple(made.values())


def entries(rule: Rule) -> Iterator[Entry]:
    """The entries that one rule makes: one for each pair of source and destination."""
    if rule.chain == "guard":
        yield from _guard(rule)
        return
    for source, destination in product(
        _addresses(rule, "sources"), _addresses(rule, "destinations")
    ):
        yield Entry(
            source=source,
            destination=destination,
            iif=("!" if rule.not_iif else "") + rule.iif,
            oif=("!" if rule.not_oif else "") + rule.oif,
            protocol=rule.protocol or "",
            matches=tuple(_matches(rule)),
            target=_target(rule),
        )


def _addresses(rule: Rule, field: str) -> list[str]:
    networks = getattr(rule, field)
    if not getattr(rule, f"not_{field}"):
        return [str(network) for network in networks] or [""]
    if len(networks) > 1:
        raise FirewallError("iptables cannot turn round a match of several networks")
    return [f"!{network}" for network in networks]


def _matches(rule: Rule) -> Iterator[tuple[str, Parameters]]:
    if rule.syn:
        yield "tcp", {"tcp-flags": ["SYN,RST", "SYN"]}
    if rule.icmp:
        yield "icmp", {"icmp-type": rule.icmp}
    if rule.local:
        yield "addrtype", {"dst-type": "LOCAL"}
    yield from _ports(rule)
    if rule.translated:
        # A state of its own here, and states given together are alternatives.
        yield "conntrack", {"ctstate": "DNAT"}
    if rule.states:
        yield "conntrack", {"ctstate": ",".join(rule.states).upper()}
    if rule.comment:
        yield "comment", {"comment": rule.comment}


def _ports(rule: Rule) -> Iterator[tuple[str, Parameters]]:
    ports = ":".join(map(str, dict.fromkeys(rule.span))) if rule.span else ""
    ports = ports or ",".join(map(str, rule.ports))
    if "," in ports or (ports and rule.protocol == "sctp"):
        # Kernels without a module for SCTP alone have this one.
        yield "multiport", {"dports": ports}
    elif ports:
        yield str(rule.protocol), {"dport": ports}


def _target(rule: Rule) -> tuple[str, Parameters]:
    if rule.action == "reject":
        reason = REJECTIONS.get(rule.protocol or "", "icmp-admin-prohibited")
        return "REJECT", {"reject-with": reason}
    if rule.action == "dnat":
        return "DNAT", {"to-destination": f"{rule.to}{_to_ports(rule)}"}
    if rule.action == "snat":
        return "SNAT", {"to-source": str(rule.to)}
    return TARGETS[rule.action]


def _to_ports(rule: Rule) -> str:
    if rule.span is None or rule.to_ports is None:
        return ""
    first, last = rule.to_ports
    # The number behind the slash is the port that becomes the first one.
    return f":{first}" if first == last else f":{first}-{last}/{rule.span[0]}"


def _guard(rule: Rule) -> Iterator[Entry]:
    def entry(target: str, **values: str | list[str]) -> Entry:
        matches = (("conntrack", dict(values)),) if values else ()
        return Entry(oif=rule.oif, matches=matches, target=(target, {}))

    # NAT leaves both alone.  First: a packet without a connection matches no
    # further condition on one, negated or not.
    yield entry("DROP", ctstate="INVALID,UNTRACKED")
    # The first packet; NAT decides after us.  An early connection that met no NAT
    # rule is confirmed, and caught below.
    yield entry("ACCEPT", ctstatus="!CONFIRMED")
    for network in rule.sources:
        address = str(network.network_address)
        yield entry("ACCEPT", ctrepldst=address, ctdir="ORIGINAL")
        yield entry("ACCEPT", ctorigdst=address, ctdir="REPLY")
    yield entry("DROP")


def render(rules: Iterable[Rule]) -> str:
    """The rules as iptables-save would print them, for people and for tests."""
    lines = []
    for table in tables(rules):
        lines.append(f"*{table.name}")
        lines += [f":{chain} {policy} [0:0]" for chain, policy in table.policies.items()]
        for chain, members in table.chains.items():
            lines += [f"-A {chain} {entry}" for entry in members]
        lines.append("COMMIT")
    return "\n".join([*lines, ""])


def apply(namespace: str | None, rules: Iterable[Rule]) -> None:
    """Put ``rules`` in place of all that the tables of ``namespace`` held.

    Raises FirewallError when python-iptables is missing or the kernel refuses
    a table, KernelError when the namespace is missing.
    """
    call(namespace, "replace", tables=[asdict(table) for table in tables(rules)])


def clear(namespace: str | None) -> None:
    """Empty the tables of ``namespace`` that exist; success where there are none."""
    if in_use(namespace):
        call(namespace, "clear")


def generation(namespace: str | None) -> str:
    """Always "": nothing tells whether the tables were changed but their listing."""
    return ""


def listing(namespace: str | None) -> str:
    """All that the tables of ``namespace`` hold, without counters; "" for nothing.

    A table that is empty is left out, so that looking at one changes nothing.
    Raises FirewallError when python-iptables is missing, KernelError when the
    namespace is missing.
    """
    return call(namespace, "list") if in_use(namespace) else ""


def in_use(namespace: str | None) -> frozenset[str]:
    """The tables that exist in ``namespace``; asking creates none."""
    with netns.entered(namespace):
        try:
            return frozenset(TABLE_NAMES.read_text().split())
        except FileNotFoundError:
            return frozenset()


def require() -> None:
    """Raise FirewallError, with a remedy, where this backend cannot work."""
    if not _kernel_has_legacy():
        raise FirewallError(
            "this kernel has no legacy iptables (ip_tables)",
            'install nftables and set firewall = "nftables"',
        )
    if not library_found():
        raise FirewallError(
            "python-iptables is missing",
            'install python3-iptables, or nftables with firewall = "nftables"',
        )


def library_found() -> bool:
    """Whether the child will find python-iptables."""
    # Hooks see hardly any of the directories that the child does.
    return importlib.util.find_spec("iptc") is not None or bool(call(None, "find"))


def _kernel_has_legacy() -> bool:
    if TABLE_NAMES.exists():
        return True
    # Not loaded yet; python-iptables loads it.
    modules = Path("/lib/modules") / os.uname().release / "modules.dep"
    return modules.exists() and "/ip_tables.ko" in modules.read_text()


def call(namespace: str | None, verb: str, **values: object) -> str:
    """Run one verb of ``iptables_child`` inside ``namespace``; its output.

    Raises FirewallError with what the child says on stderr, KernelError when the
    namespace is missing.
    """
    # The child looks for python-iptables where its own Python does, then where ours does.
    path = [entry for entry in sys.path if Path(entry).is_absolute()]
    request = json.dumps({"verb": verb, "path": path, **values})
    try:
        # A child belongs to the namespace of the thread that starts it.
        with netns.entered(namespace):
            done = subprocess.run(
                [sys.executable, "-I", "-W", "ignore", os.fspath(CHILD)],
                input=request,
                capture_output=True,
                text=True,
                timeout=TIME_LIMIT,
                env=_environment(),
                check=False,
            )
    except (OSError, subprocess.SubprocessError) as error:
        raise FirewallError("cannot run python-iptables", str(error)) from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["no reason"]
        raise FirewallError("iptables refused the rules", said[-1])
    return done.stdout


def _environment() -> dict[str, str]:
    kept = ("IPTABLES_LIBDIR", "XTABLES_LIBDIR", "XTABLES_LOCKFILE")
    own = {key: os.environ[key] for key in kept if key in os.environ}
    return {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "LC_ALL": "C", **own}
