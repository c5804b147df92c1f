# SPDX-License-Identifier: LGPL-2.1-or-later
"""The nftables backend: renders rules as one nft script and loads it.

A script declares, deletes and redefines the table ``inet natns``.  The kernel does so in
one transaction: no packet meets half of the table, and a script with an error changes
nothing.  In the namespace of a network the table ``arp natns`` limits ARP requests.  A
kernel without nftables' family arp works without this table.

Limits: ``listing`` shows our tables alone, so a foreign table in the namespace
goes unnoticed.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from libvirt_natns.addresses import FAMILIES, Family
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import limits, nfnetlink, nft, nft_digest
from libvirt_natns.firewall.nft_listing import block, canonical
from libvirt_natns.firewall.nft_maps import looked_up
from libvirt_natns.firewall.nft_statements import network_text, set_text, statements
from libvirt_natns.firewall.rule import Chain, LayoutName, Rule
from libvirt_natns.kernel import netns

TABLE = "inet natns"

MAKE_ROOM = f"add table {TABLE}\ndelete table {TABLE}\n"
"""Deletes our table, whether the table exists or not."""
MAKE_ROOM_ARP = MAKE_ROOM.replace(TABLE, limits.ARP_TABLE)

TRY_ARP = "".join(f"{verb} table {limits.ARP_TABLE}-trial\n" for verb in ("create", "delete"))
"""Succeeds, and changes nothing, where the kernel has nftables' family arp."""

name = "nftables"


@dataclass(frozen=True, slots=True)
class BaseChain:
    """Where the kernel calls a base chain, and its policy for packets that no rule judges."""

    kind: str
    point: str
    priority: str
    policy: str = "accept"
    also: "BaseChain | None" = None
    """A second place that calls the same rules."""

    def __str__(self) -> str:
        return f"type {self.kind} hook {self.point} priority {self.priority}; policy {self.policy};"


Layout = Mapping[Chain, BaseChain]

# Behind conntrack, which makes the flow, and ahead of NAT: a flow that has its helper by then is
# prepared for announcements that change their length.
HELPER = BaseChain("filter", "prerouting", "mangle")

NAMESPACE: Layout = {
    "raw": BaseChain("filter", "prerouting", "raw"),
    "helper": HELPER,
    "dstnat": BaseChain("nat", "prerouting", "dstnat"),
    "input": BaseChain("filter", "input", "filter", "drop"),
    "clamp": BaseChain("filter", "forward", "mangle"),
    "forward": BaseChain("filter", "forward", "filter", "drop"),
    "srcnat": BaseChain("nat", "postrouting", "srcnat"),
    # After every source translation.
    "guard": BaseChain("filter", "postrouting", "srcnat + 10"),
}

ROUTER: Layout = {
    "helper": HELPER,
    "dstnat": BaseChain("nat", "prerouting", "dstnat"),
    "clamp": BaseChain("filter", "forward", "mangle"),
    "forward": BaseChain("filter", "forward", "filter"),
    "srcnat": BaseChain("nat", "postrouting", "srcnat"),
}

LAYOUTS: Mapping[LayoutName, Layout] = {"namespace": NAMESPACE, "router": ROUTER}


def render(rules: Iterable[Rule], layout: LayoutName = "namespace") -> str:
    """Return the whole script that puts ``rules`` in place of our tables' content."""
    return script(rules, LAYOUTS[layout])


def script(rules: Iterable[Rule], layout: Layout) -> str:
    """Return the whole script for rules with a layout of chains."""
    chains: dict[Chain, list[str]] = {chain: [] for chain in layout}
    filled, rest = looked_up(rules)
    for nft_map in filled:
        for chain, line in nft_map.statements:
            chains[chain].append(line)
    arp_targets = ""
    for rule in rest:
        if rule.chain == "arp":
            arp_targets = set_text(map(network_text, rule.destinations))
        else:
            chains[rule.chain].extend(statements(rule))
    lines = [f"table {TABLE} {{", *_helpers(rest), *_sets(rest)]
    for nft_map, members in filled.items():
        lines += nft_map.declaration(members)
    for chain, base in layout.items():
        if chains[chain] or base.policy != "accept":
            lines += _chain(chain, base, chains[chain])
    arp = layout is NAMESPACE
    room = MAKE_ROOM + MAKE_ROOM_ARP if arp else MAKE_ROOM
    return room + "\n".join([*lines, "}", ""]) + (limits.arp_table(arp_targets) if arp else "")


def _helpers(rules: Iterable[Rule]) -> Iterator[str]:
    """Yield the declarations of helpers, each once, as nft lists them."""
    for name, protocol in sorted({(rule.helper, rule.protocol) for rule in rules if rule.helper}):
        yield from [
            f"\tct helper {name} {{",
            f'\t\ttype "{name}" protocol {protocol}',
            "\t\tl3proto inet",
            "\t}",
        ]


def _sets(rules: Iterable[Rule]) -> Iterator[str]:
    """Yield the declarations of sets that packets fill."""
    rules = tuple(rules)
    for family in FAMILIES:
        if any(rule.fresh and rule.family == family for rule in rules):
            yield from limits.known_set(family)
    flows = next((rule.flows for rule in rules if rule.flows), None)
    if flows:
        yield from limits.flow_set(flows)


def _chain(chain: str, base: BaseChain, content: Iterable[str]) -> Iterator[str]:
    if base.also:
        yield from [f"\tchain {chain} {{", *(f"\t\t{line}" for line in content), "\t}"]
        for place in (base, base.also):
            yield from _chain(
                f"{chain}_{place.point}", replace(place, also=None), [f"jump {chain}"]
            )
        return
    yield f"\tchain {chain} {{"
    yield from (f"\t\t{line}" for line in (base, *content))
    yield "\t}"


def apply(namespace: str | None, rules: Iterable[Rule], layout: LayoutName = "namespace") -> None:
    """Put ``rules`` in place of our table in ``namespace``, at once and whole.

    Raises FirewallError when nft is missing or refuses the script, KernelError
    when the namespace is missing.
    """
    text = render(rules, layout)
    _run_with_arp(namespace, text if _existing_tables(namespace) else first(text))


def first(text: str) -> str:
    """Return a script without the deletion of tables that do not exist.

    Deleting even an empty table makes the kernel wait (10 ms).  "create" makes sure that the
    table does not exist.
    """
    return text.replace(MAKE_ROOM, f"create table {TABLE}\n", 1).replace(MAKE_ROOM_ARP, "", 1)


def clear(namespace: str | None) -> None:
    """Delete our tables in ``namespace``; success where they are missing."""
    _run_with_arp(namespace, MAKE_ROOM + MAKE_ROOM_ARP)


def _run_with_arp(namespace: str | None, text: str) -> None:
    """Load a script; without its part for ARP where the kernel lacks nftables' family arp."""
    try:
        nft.load(namespace, text)
    except FirewallError:
        # A failure that passes must not cost the limits of ARP for good.
        if nft.run(namespace, TRY_ARP).returncode == 0:
            raise
        without = text.replace(MAKE_ROOM_ARP, "").partition(f"table {limits.ARP_TABLE} {{")[0]
        nft.load(namespace, without)


def listing(namespace: str | None) -> str:
    """Return our tables as the kernel holds them, without counters; "" without any.

    Raises FirewallError when nft cannot be run, KernelError when the namespace
    is missing.
    """
    tables = _existing_tables(namespace)
    if namespace is not None and len(tables) > 1:
        # Together, which saves a start of nft.  The host's ruleset may have many foreign tables.
        done = nft.run(namespace, "list ruleset", "-s", "-p")
        if done.returncode == 0:
            return "".join(canonical(block(done.stdout, table)) for table in tables)
    # Table by table: nft 1.0.6 loads one family for all commands, and misses tables of another.
    return "".join(_listed(namespace, table) for table in tables)


def _existing_tables(namespace: str | None) -> list[str]:
    """Return our tables that the kernel has; all of them where only nft can tell.

    Raises KernelError when the namespace is missing.
    """
    try:
        with netns.entered(namespace):
            tables = nfnetlink.tables()
    except OSError:
        tables = None
    return [table for table in (TABLE, limits.ARP_TABLE) if tables is None or table in tables]


def _listed(namespace: str | None, table: str) -> str:
    done = nft.run(namespace, f"list table {table}", "-s", "-p")
    if done.returncode == 0:
        return canonical(done.stdout)
    if nft.MISSING in done.stderr or table == limits.ARP_TABLE:
        return ""
    raise FirewallError(f"nft cannot list the table {table}", nft.condensed(done.stderr))


def digest(namespace: str | None) -> str:
    """Return a digest of our tables as the kernel holds them; "" without the table ``TABLE``.

    Raises FirewallError where the kernel does not tell, KernelError where the namespace is
    missing.
    """
    with netns.entered(namespace):
        try:
            return nft_digest.digest(TABLE, limits.ARP_TABLE)
        except OSError as error:
            raise FirewallError("the kernel does not hand out the rules", str(error)) from error


def require(_family: Family = 4) -> None:
    """Raise FirewallError, with a remedy, where this backend cannot work; nft has both families."""
    nft.require()


def generation(namespace: str | None) -> str:
    """Return the number of the kernel's ruleset; each change of any table makes another one.

    "" where the kernel does not tell.  Raises KernelError when the namespace is
    missing.
    """
    try:
        with netns.entered(namespace):
            return nfnetlink.generation()
    except OSError:
        return ""
