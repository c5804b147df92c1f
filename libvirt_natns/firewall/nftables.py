# SPDX-License-Identifier: LGPL-2.1-or-later
"""The nftables backend: renders rules as one nft script and loads it.

A script declares, deletes and redefines the table ``inet natns``.  The kernel does so in
one transaction: no packet meets half of the table, and a script with an error changes
nothing.  In the namespace of a network the table ``arp natns`` limits ARP requests.  A
kernel without nftables' family arp works without this table.

Limits: ``listing`` shows our tables alone, so a foreign table in the namespace
goes unnoticed.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

from libvirt_natns.addresses import FAMILIES, Family, IPNetwork
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import limits, nfnetlink, nft
from libvirt_natns.firewall.rule import Chain, Rule
from libvirt_natns.kernel import netns
from libvirt_natns.records import dataclass, replace

TABLE = "inet natns"

MAKE_ROOM = f"add table {TABLE}\ndelete table {TABLE}\n"
"""Takes our table out, whether it is there or not."""
MAKE_ROOM_ARP = MAKE_ROOM.replace(TABLE, limits.ARP_TABLE)

MET = re.compile(r"(flags dynamic[^}]*?)\n\t*elements = \{[^}]*\}")
"""What packets put into a set, which is no rule."""
ELEMENTS = re.compile(r"elements = \{([^}]*)\}")
PROTOCOL = re.compile(r"\b(tcp|udp|sctp)\b")
TRANSPORT = re.compile(r"(meta l4proto )(tcp|udp|sctp)\b")
NUMBERS = {"tcp": "6", "udp": "17", "sctp": "132"}

name = "nftables"


@dataclass(frozen=True, slots=True)
class Hook:
    """Where the kernel calls a base chain, and what becomes of the rest."""

    kind: str
    point: str
    priority: str
    policy: str = "accept"
    also: "Hook | None" = None
    """A second place that calls the same rules."""

    def __str__(self) -> str:
        return f"type {self.kind} hook {self.point} priority {self.priority}; policy {self.policy};"


Layout = Mapping[Chain, Hook]

NAMESPACE: Layout = {
    "raw": Hook("filter", "prerouting", "raw"),
    "dstnat": Hook("nat", "prerouting", "dstnat"),
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
}


@dataclass(frozen=True, slots=True)
class Map:
    """A table that is looked up once, whatever it holds; without ``data`` a set."""

    name: str
    key: str
    data: str
    lookup: str
    interval: bool = False
    chain: Chain = "dstnat"
    typeof: str = ""
    also: tuple[tuple[Chain, str], ...] = ()

    def declaration(self, elements: Iterable[str]) -> list[str]:
        """The map with its elements, as lines."""
        flags = ["\t\tflags interval"] if self.interval else []
        return [
            f"\t{'map' if self.data else 'set'} {self.name} {{",
            f"\t\t{self._type}",
            *flags,
            f"\t\telements = {{ {', '.join(elements)} }}",
            "\t}",
        ]

    @property
    def _type(self) -> str:
        if self.typeof:
            return f"typeof {self.typeof}"
        return f"type {self.key} : {self.data}" if self.data else f"type {self.key}"

    @property
    def statements(self) -> Iterator[tuple[Chain, str]]:
        """The rules that look it up, with the chain of each."""
        yield self.chain, f"{self.lookup} map @{self.name}" if self.data else self.lookup
        yield from self.also


IP = {4: "ip", 6: "ip6"}
"""What nft calls the families, in conditions and translations."""


def _map(family: Family, local: bool, interval: bool) -> Map:
    protocol = IP[family]
    address = f"{'ipv4' if family == 4 else 'ipv6'}_addr"
    port = "inet_proto . inet_service"
    # The kernel takes ::1 from no link but lo.
    which = f"{'ip6 daddr != ::1 ' if family == 6 else ''}fib daddr type local " if local else ""
    where = "" if local else f"{protocol} daddr . "
    return Map(
        f"{'local_' if local else ''}{'ranges' if interval else 'ports'}"
        f"{'' if family == 4 else '6'}",
        port if local else f"{address} . {port}",
        address if interval else f"{address} . inet_service",
        f"{which}dnat {protocol} to {where}meta l4proto . th dport",
        interval=interval,
    )


MAPS = {
    (family, local, interval): _map(family, local, interval)
    for family in FAMILIES
    for local in (False, True)
    for interval in (False, True)
}
"""By family, by whether the rule is for any local address, and by whether it leaves a
run of ports as they are: such a run is one element, any other an element a port."""


ZONES = Map(
    "zones", "ifname", "zone", "ct zone set iifname", chain="raw", typeof="iifname : ct zone"
)
"""Bridges whose frames have a zone of conntrack for themselves."""

KEPT = Map(
    "kept",
    "ifname",
    "",
    "iifname @kept dnat ip to ip daddr",
    chain="bridged_in",
    also=(
        ("bridged_in", "iifname @kept dnat ip6 to ip6 daddr"),
        ("bridged_out", "oifname @kept snat ip to ip saddr"),
        ("bridged_out", "oifname @kept snat ip6 to ip6 saddr"),
    ),
)
"""Bridges whose frames no NAT changes: a binding to what is there settles it."""


def _opened(rule: Rule) -> Map:
    """The guests' own addresses and ports that are let in to, between two interfaces."""
    link = f'iifname "{rule.iif}" oifname "{rule.oif}" ct state new'
    key = "ipv6_addr . inet_proto . inet_service"
    lookup = f"{link} ip6 daddr . meta l4proto . th dport @opened accept"
    return Map("opened", key, "", lookup, interval=True, chain="forward")


def looked_up(rules: Iterable[Rule]) -> tuple[dict[Map, list[str]], list[Rule]]:
    """The elements of each map that has some, and the rules that are in none."""
    elements: dict[Map, list[str]] = {kind: [] for kind in (*MAPS.values(), ZONES, KEPT)}
    rest = []
    for rule in rules:
        kind = _map_of(rule)
        if kind is None:
            rest.append(rule)
        else:
            elements.setdefault(kind, []).extend(_elements(rule, kind))
    filled = {kind: list(dict.fromkeys(members)) for kind, members in elements.items() if members}
    return filled, rest


def render(rules: Iterable[Rule], layout: Layout = NAMESPACE) -> str:
    """The whole script that puts ``rules`` in place of what our table held."""
    chains: dict[Chain, list[str]] = {chain: [] for chain in layout}
    filled, rest = looked_up(rules)
    for kind in filled:
        for chain, line in kind.statements:
            chains[chain].append(line)
    asked = ""
    for rule in rest:
        if rule.chain == "arp":
            asked = _set(map(_network, rule.destinations))
        else:
            chains[rule.chain].extend(statements(rule))
    lines = [f"table {TABLE} {{", *_sets(rest)]
    for kind, members in filled.items():
        lines += kind.declaration(members)
    for chain, hook in layout.items():
        if chains[chain] or hook.policy != "accept":
            lines += _chain(chain, hook, chains[chain])
    arp = layout is NAMESPACE
    room = MAKE_ROOM + MAKE_ROOM_ARP if arp else MAKE_ROOM
    return room + "\n".join([*lines, "}", ""]) + (limits.arp_table(asked) if arp else "")


def _sets(rules: Iterable[Rule]) -> Iterator[str]:
    """The declarations of what packets fill."""
    rules = tuple(rules)
    for family in FAMILIES:
        if any(rule.fresh and rule.family == family for rule in rules):
            yield from limits.known_set(family)
    flows = next((rule.flows for rule in rules if rule.flows), None)
    if flows:
        yield from limits.flow_set(flows)


def _chain(chain: str, hook: Hook, statements: Iterable[str]) -> Iterator[str]:
    if hook.also:
        yield from [f"\tchain {chain} {{", *(f"\t\t{line}" for line in statements), "\t}"]
        for place in (hook, hook.also):
            yield from _chain(
                f"{chain}_{place.point}", replace(place, also=None), [f"jump {chain}"]
            )
        return
    yield f"\tchain {chain} {{"
    yield from (f"\t\t{line}" for line in (hook, *statements))
    yield "\t}"


def _map_of(rule: Rule) -> Map | None:
    """The map of a rule about which nothing decides but its destination, or its bridge."""
    if not rule.unique or rule.sources:
        return None
    if rule.action == "zone":
        return ZONES
    if rule.action == "keep":
        return KEPT
    if rule.action == "accept":
        return _opened(rule)
    if rule.to and (rule.local or len(rule.destinations) == 1):
        return MAPS[rule.to.version, rule.local, rule.width > 1 and rule.to_ports is None]
    return None


def _elements(rule: Rule, kind: Map) -> Iterator[str]:
    if kind in (ZONES, KEPT):
        yield f'"{rule.iif or rule.oif}"' + (f" : {rule.zone}" if kind is ZONES else "")
        return
    key = f"{rule.protocol} . "
    if not rule.local:
        key = f"{_network(rule.destinations[0])} . {key}"
    if not kind.data and rule.span:
        yield f"{key}{'-'.join(map(str, dict.fromkeys(rule.span)))}"
        return
    if kind.interval and rule.span:
        yield f"{key}{rule.span[0]}-{rule.span[1]} : {rule.to}"
        return
    for port, to_port in rule.port_pairs:
        yield f"{key}{port} : {rule.to} . {to_port}"


def statements(rule: Rule) -> Iterable[str]:
    """One rule in nft's syntax, without table and chain, as one statement or two."""
    if not rule.fresh or rule.family is None:
        return (statement(rule),)
    field = f"{IP[rule.family]} {'saddr' if rule.fresh == 'source' else 'daddr'}"
    return limits.fresh_statements(rule.family, _condition(rule), field, remembered=rule.remembered)


def statement(rule: Rule) -> str:
    """A rule that is one statement in nft's syntax, without table and chain."""
    comment = f' comment "{rule.comment}"' if rule.comment else ""
    pace = f" {limits.OVER}" if rule.paced else ""
    return f"{_condition(rule)}{pace} {_verdict(rule)}{comment}".lstrip()


def _condition(rule: Rule) -> str:
    parts = [f"meta nfproto ipv{rule.only}"] if rule.only else []
    parts += [*_interfaces(rule), *_addresses(rule), *_protocol(rule)]
    if rule.translated:
        parts.append("ct status dnat")
    if rule.states:
        parts.append(f"ct state {','.join(rule.states)}")
    if rule.flows:
        parts.append(limits.flow_statement(rule.flows))
    return " ".join(parts)


def _interfaces(rule: Rule) -> list[str]:
    # By name, not by index: rules are loaded before all interfaces are there.
    parts = []
    if rule.iif:
        parts.append(f'iifname {"!= " if rule.not_iif else ""}"{rule.iif}"')
    if rule.oif:
        parts.append(f'oifname {"!= " if rule.not_oif else ""}"{rule.oif}"')
    parts += [f'meta iifkind "{rule.iif_kind}"'] if rule.iif_kind else []
    parts += [f'meta oifkind "{rule.oif_kind}"'] if rule.oif_kind else []
    return parts


def _addresses(rule: Rule) -> list[str]:
    parts = []
    for field, networks, negated in (
        ("saddr", rule.sources, rule.not_sources),
        ("daddr", rule.destinations, rule.not_destinations),
    ):
        if networks and networks[0].prefixlen == 0:
            # There is nothing in an address to compare then.
            parts.append(f"meta nfproto ipv{networks[0].version}")
        elif networks:
            protocol = IP[networks[0].version]
            members = _set(map(_network, networks))
            parts.append(f"{protocol} {field} {'!= ' if negated else ''}{members}")
    if rule.hop_limit is not None:
        parts.append(f"ip6 hoplimit {rule.hop_limit}")
    if rule.local:
        parts.append("fib daddr type local")
    return parts


def _protocol(rule: Rule) -> list[str]:
    if rule.span:
        return [f"{rule.protocol} dport {'-'.join(map(str, dict.fromkeys(rule.span)))}"]
    if rule.ports:
        return [f"{rule.protocol} dport {_set(map(str, rule.ports))}"]
    if rule.icmp:
        return [f"{rule.protocol} type {_set(rule.icmp)}"]
    if rule.syn or rule.not_syn:
        return [f"tcp flags & (syn|rst) {'==' if rule.syn else '!='} syn"]
    return [f"meta l4proto {rule.protocol}"] if rule.protocol else []


def _verdict(rule: Rule) -> str:
    if rule.action == "reject":
        return f"reject with {REJECTIONS.get(rule.protocol or '', 'icmpx admin-prohibited')}"
    if rule.to:
        return f"{rule.action} {IP[rule.to.version]} to {_new_destination(rule)}"
    return VERDICTS[rule.action]


def _new_destination(rule: Rule) -> str:
    if rule.to_ports is None:
        return str(rule.to)
    if rule.to_ports[0] == rule.to_ports[1]:
        return f"{f'[{rule.to}]' if rule.family == 6 else rule.to}:{rule.to_ports[0]}"
    pairs = (f"{port} : {rule.to} . {to_port}" for port, to_port in rule.port_pairs)
    return f"{rule.protocol} dport map {{ {', '.join(pairs)} }}"


def _network(network: IPNetwork) -> str:
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
    if not _existing_tables(namespace):
        # Deleting even an empty table makes the kernel wait (10 ms), and a new
        # namespace has none to delete; "create" makes sure of that.
        script = script.replace(MAKE_ROOM, f"create table {TABLE}\n", 1)
        script = script.replace(MAKE_ROOM_ARP, "", 1)
    _run_with_arp(namespace, script)


def clear(namespace: str | None) -> None:
    """Take our tables out of ``namespace``; that one is missing is success."""
    _run_with_arp(namespace, MAKE_ROOM + MAKE_ROOM_ARP)


def _run_with_arp(namespace: str | None, script: str) -> None:
    """Run a script; without its part for ARP where the kernel lacks nftables' family arp."""
    try:
        nft.load(namespace, script)
    except FirewallError:
        without = script.replace(MAKE_ROOM_ARP, "").partition(f"table {limits.ARP_TABLE} {{")[0]
        # With an error of its own where ARP is not to blame.
        nft.load(namespace, without)


def listing(namespace: str | None) -> str:
    """Return our tables as the kernel holds them, without counters; "" without any.

    Raises FirewallError when nft cannot be run, KernelError when the namespace
    is missing.
    """
    # One by one: nft 1.0.6 loads one family for all commands, and misses tables of another.
    return "".join(_listed(namespace, table) for table in _existing_tables(namespace))


def _existing_tables(namespace: str | None) -> list[str]:
    """Return our tables that the kernel has; all of them where only nft can tell.

    Raises KernelError when the namespace is missing.
    """
    with netns.entered(namespace):
        tables = nfnetlink.tables()
    return [table for table in (TABLE, limits.ARP_TABLE) if tables is None or table in tables]


def _listed(namespace: str | None, table: str) -> str:
    done = nft.run(namespace, f"list table {table}", "-s", "-p")
    if done.returncode == 0:
        return canonical(done.stdout)
    if nft.MISSING in done.stderr or table == limits.ARP_TABLE:
        return ""
    raise FirewallError(f"nft cannot list the table {table}", nft.condensed(done.stderr))


def canonical(text: str) -> str:
    """Rules, as a script or as listed with -p, in words that every nft agrees on.

    The kernel keeps elements in an order of its own, and nft wraps them; it names
    protocols where the machine has an /etc/protocols, and numbers them elsewhere.
    nft 1.0.6 knows no name for the priority of a dnat on output, 1.1 writes one.
    """
    text = TRANSPORT.sub(lambda match: f"{match[1]}{NUMBERS[match[2]]}", text)
    return ELEMENTS.sub(_sorted_elements, MET.sub(r"\1", text)).replace(
        "hook output priority dstnat;", "hook output priority -100;"
    )


def _sorted_elements(found: re.Match[str]) -> str:
    numbered = PROTOCOL.sub(lambda match: NUMBERS[match[0]], found[1])
    return f"elements = {{ {', '.join(sorted(' '.join(numbered.split()).split(', ')))} }}"


def require(_family: Family = 4) -> None:
    """Raise FirewallError, with a remedy, where this backend cannot work; with either family."""
    nft.require()


def generation(namespace: str | None) -> str:
    """Return the number of the kernel's ruleset; each change of any table makes another one.

    "" where the kernel does not tell.  Raises KernelError when the namespace is
    missing.
    """
    with netns.entered(namespace):
        return nfnetlink.generation()
