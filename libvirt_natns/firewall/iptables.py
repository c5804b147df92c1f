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

IPv6 has tables of its own, which ip6tables knows.  They are made where a rule asks for
IPv6, and kept from then on: what no rule is about must not pass there.

New addresses are remembered by xt_recent, 100 of them, and flows are counted by samples:
see ``limits``.

Limits: ARP is not limited, nor are the senders of IPv4 packets: xt_recent would forget
guests of a large network.  A table once used stays in the namespace until the
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

from libvirt_natns.addresses import FAMILIES, Family
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import limits
from libvirt_natns.firewall.rule import Chain, IcmpType, Rule
from libvirt_natns.kernel import netns
from libvirt_natns.records import asdict, dataclass, replace

TABLE_NAMES: dict[Family, Path] = {
    4: Path("/proc/thread-self/net/ip_tables_names"),
    6: Path("/proc/thread-self/net/ip6_tables_names"),
}
MODULES: dict[Family, str] = {4: "ip_tables", 6: "ip6_tables"}

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
}

REJECTIONS: dict[Family, dict[str, str]] = {
    4: {"tcp": "tcp-reset", "udp": "icmp-port-unreachable", "": "icmp-admin-prohibited"},
    6: {"tcp": "tcp-reset", "udp": "icmp6-port-unreachable", "": "icmp6-adm-prohibited"},
}

ICMPV6: dict[IcmpType, int] = {
    "echo-request": 128,
    "mld-listener-query": 130,
    "mld-listener-report": 131,
    "mld-listener-done": 132,
    "nd-router-solicit": 133,
    "nd-router-advert": 134,
    "nd-neighbor-solicit": 135,
    "nd-neighbor-advert": 136,
    "nd-redirect": 137,
    "mld2-listener-report": 143,
}
"""ip6tables has no names for some of them."""


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
    return (
        f"! {option} {value[1:].lstrip()}".rstrip()
        if value.startswith("!")
        else f"{option} {value}".rstrip()
    )


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
    family: Family = 4


def families(rules: Iterable[Rule]) -> tuple[Family, ...]:
    """The families whose tables rules need."""
    return FAMILIES if any(rule.family == 6 for rule in rules) else FAMILIES[:1]


def tables(
    rules: Iterable[Rule], layout: Layout = NAMESPACE, *, ipv6: bool = False
) -> tuple[Table, ...]:
    """The tables that ``rules`` make, in the order in which they must be committed.

    Those of IPv6 where a rule is about it, or with ``ipv6``.
    """
    rules = tuple(rules)
    wanted = FAMILIES if ipv6 else families(rules)
    return tuple(table for family in wanted for table in _tables(rules, layout, family))


def _tables(rules: Iterable[Rule], layout: Layout, family: Family) -> Iterable[Table]:
    made: dict[str, Table] = {}
    for place in layout.values():
        table = made.setdefault(place.table, Table(place.table, {}, {}, family))
        table.chains[place.chain] = []
        table.policies[place.chain] = place.policy
    for rule in rules:
        # iptables does not see ARP.
        if rule.family in (None, family) and rule.chain != "arp":
            place = layout[rule.chain]
            made[place.table].chains[place.chain].extend(entries(rule, family))
    return made.values()


def entries(rule: Rule, family: Family = 4) -> Iterator[Entry]:
    """The entries that one rule makes: for each source, destination and type of ICMP."""
    if rule.iif_kind or rule.oif_kind:
        raise FirewallError("iptables cannot tell the kinds of links")
    if rule.chain == "guard" and rule.not_sources:
        yield from _guard(rule)
        return
    if rule.flows:
        yield from _counted(rule, family)
        return
    if rule.fresh == "source" and not rule.icmp:
        return
    for source, destination, icmp in product(
        _addresses(rule, "sources"), _addresses(rule, "destinations"), rule.icmp or (None,)
    ):
        entry = Entry(
            source=source,
            destination=destination,
            iif=("!" if rule.not_iif else "") + rule.iif,
            oif=("!" if rule.not_oif else "") + rule.oif,
            protocol=rule.protocol or "",
            matches=tuple(_matches(rule, icmp)),
            target=_target(rule, family),
        )
        yield from _fresh(rule, entry, family) if rule.fresh else (entry,)


def _fresh(rule: Rule, entry: Entry, family: Family) -> Iterator[Entry]:
    """Drop new addresses over the limit, then remember those that are left."""
    side = "rsource" if rule.fresh == "source" else "rdest"
    # A list has the mask of the rule that makes it: one of IPv4 compares 32 bits.
    name: Parameters = {"name": f"natns-{side}{family}", side: ""}
    seconds = str(limits.REMEMBERED)
    new: tuple[str, Parameters] = ("recent", {"rcheck": "!", "seconds": seconds, **name})
    # Echo requests from outside must not use up what guests may do.
    over = _over(f"natns-{side if rule.remembered else 'pinged'}{family}")
    yield replace(entry, matches=(*entry.matches, new, over))
    if not rule.remembered:
        return
    remembered: tuple[str, Parameters] = ("recent", {"set": "", **name})
    # A target is needed; this one changes nothing and goes on.
    going_on: tuple[str, Parameters] = ("MARK", {"set-xmark": "0x0/0x0"})
    yield replace(entry, matches=(*entry.matches, remembered), target=going_on)


def _over(name: str) -> tuple[str, Parameters]:
    """The match of packets that come faster than new addresses may."""
    return (
        "hashlimit",
        {
            "hashlimit-above": f"{limits.RATE}/sec",
            "hashlimit-burst": str(limits.BURST),
            "hashlimit-name": name,
            # python-iptables leaves 0 otherwise, which the kernel refuses.
            "hashlimit-htable-expire": "10000",
        },
    )


def _counted(rule: Rule, family: Family) -> Iterator[Entry]:
    """Refuse new flows for a while when a sample of the flows has too many."""
    assert rule.flows
    # One entry for everybody: no bit of the address counts.
    name: Parameters = {"name": "natns-full", "mask": "0.0.0.0" if family == 4 else "::"}
    new: tuple[str, Parameters] = ("conntrack", {"ctstate": "NEW"})
    first: tuple[str, Parameters] = ("conntrack", {"ctstatus": "!CONFIRMED"})
    sample: tuple[str, Parameters] = (
        "statistic",
        {"mode": "nth", "every": str(limits.SAMPLE), "packet": "0"},
    )
    most = str(max(1, rule.flows // limits.SAMPLE))
    many: tuple[str, Parameters] = (
        "connlimit",
        {"connlimit-above": most, "connlimit-mask": "0"},
    )
    full: tuple[str, Parameters] = ("recent", {"set": "", **name})
    closed: tuple[str, Parameters] = (
        "recent",
        {"rcheck": "", "seconds": str(limits.PAUSE), **name},
    )
    yield Entry(matches=(new, first, sample, many, full), target=("DROP", {}))
    yield Entry(matches=(new, closed), target=("DROP", {}))


def _addresses(rule: Rule, field: str) -> list[str]:
    networks = getattr(rule, field)
    if not getattr(rule, f"not_{field}"):
        return [str(network) for network in networks] or [""]
    if len(networks) > 1:
        raise FirewallError("iptables cannot turn round a match of several networks")
    return [f"!{network}" for network in networks]


def _matches(rule: Rule, icmp: IcmpType | None) -> Iterator[tuple[str, Parameters]]:
    if rule.syn or rule.not_syn:
        yield "tcp", {"tcp-flags": [*([] if rule.syn else ["!"]), "SYN,RST", "SYN"]}
    if icmp and rule.protocol == "icmpv6":
        yield "icmp6", {"icmpv6-type": str(ICMPV6[icmp])}
    elif icmp:
        yield "icmp", {"icmp-type": icmp}
    if rule.paced:
        yield _over(f"natns-{icmp}"[:15])
    if rule.hop_limit is not None:
        yield "hl", {"hl-eq": str(rule.hop_limit)}
    if rule.local:
        yield "addrtype", {"dst-type": "LOCAL"}
    yield from _ports(rule)
    yield from _states(rule)
    if rule.comment:
        yield "comment", {"comment": rule.comment}


def _states(rule: Rule) -> Iterator[tuple[str, Parameters]]:
    if rule.translated:
        # A state of its own here, and states given together are alternatives.
        yield "conntrack", {"ctstate": "DNAT"}
    if rule.states:
        yield "conntrack", {"ctstate": ",".join(rule.states).upper()}


def _ports(rule: Rule) -> Iterator[tuple[str, Parameters]]:
    ports = ":".join(map(str, dict.fromkeys(rule.span))) if rule.span else ""
    ports = ports or ",".join(map(str, rule.ports))
    if "," in ports or (ports and rule.protocol == "sctp"):
        # Kernels without a module for SCTP alone have this one.
        yield "multiport", {"dports": ports}
    elif ports:
        yield str(rule.protocol), {"dport": ports}


def _target(rule: Rule, family: Family) -> tuple[str, Parameters]:
    if rule.action == "reject":
        reasons = REJECTIONS[family]
        return "REJECT", {"reject-with": reasons.get(rule.protocol or "", reasons[""])}
    if rule.action == "dnat":
        ports = _to_ports(rule)
        to = f"[{rule.to}]" if ports and family == 6 else rule.to
        return "DNAT", {"to-destination": f"{to}{ports}"}
    if rule.action == "snat":
        return "SNAT", {"to-source": str(rule.to)}
    if rule.action == "zone":
        return "CT", {"zone": str(rule.zone)}
    if rule.action == "keep":
        # A prefix of no bits: all of the address stays.
        return "NETMAP", {"to": "0.0.0.0/0" if family == 4 else "::/0"}
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
        alone = network.prefixlen == network.max_prefixlen
        address = str(network.network_address if alone else network)
        yield entry("ACCEPT", ctrepldst=address, ctdir="ORIGINAL")
        yield entry("ACCEPT", ctorigdst=address, ctdir="REPLY")
    yield entry("DROP")


def render(rules: Iterable[Rule]) -> str:
    """The rules as iptables-save would print them, then ip6tables-save, for people and tests."""
    lines = []
    for table in tables(rules):
        lines.append(f"*{table.name}" if table.family == 4 else f"*{table.name} # IPv6")
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
    ipv6 = bool(in_use(namespace, 6))
    wanted = tables(rules, ipv6=ipv6)
    concerned = sorted({table.family for table in wanted})
    call(namespace, "replace", families=concerned, tables=[asdict(table) for table in wanted])


def clear(namespace: str | None) -> None:
    """Empty the tables of ``namespace`` that exist; success where there are none."""
    found = used(namespace)
    if found:
        call(namespace, "clear", families=found)


def generation(namespace: str | None) -> str:
    """Always "": nothing tells whether the tables were changed but their listing."""
    return ""


def listing(namespace: str | None) -> str:
    """All that the tables of ``namespace`` hold, without counters; "" for nothing.

    A table that is empty is left out, so that looking at one changes nothing.
    Raises FirewallError when python-iptables is missing, KernelError when the
    namespace is missing.
    """
    found = used(namespace)
    return call(namespace, "list", families=found) if found else ""


def in_use(namespace: str | None, family: Family = 4) -> frozenset[str]:
    """The tables of a family that exist in ``namespace``; asking creates none."""
    with netns.entered(namespace):
        try:
            return frozenset(TABLE_NAMES[family].read_text().split())
        except FileNotFoundError:
            return frozenset()


def used(namespace: str | None) -> list[Family]:
    """The families that have a table in ``namespace``."""
    return [family for family in FAMILIES if in_use(namespace, family)]


def require(family: Family = 4) -> None:
    """Raise FirewallError, with a remedy, where this backend cannot work with that family."""
    if not kernel_has(family):
        what = "iptables" if family == 4 else "ip6tables"
        raise FirewallError(
            f"this kernel has no legacy {what} ({MODULES[family]})",
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


def kernel_has(family: Family) -> bool:
    """Whether the kernel has legacy tables of that family, or a module with them."""
    if TABLE_NAMES[family].exists():
        return True
    # Not loaded yet; python-iptables loads it.
    modules = Path("/lib/modules") / os.uname().release / "modules.dep"
    return modules.exists() and f"/{MODULES[family]}.ko" in modules.read_text()


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
