# SPDX-License-Identifier: LGPL-2.1-or-later
"""The iptables backend: legacy iptables, driven through python-iptables.

python-iptables caches tables for the life of a process.  So python-iptables opens tables only
in a process that is already inside the namespace: see ``iptables_server`` and
``iptables_child``, which get whole tables as JSON.  Here rules become these tables.

Each table is replaced in one transaction, NAT first and the filter last: at no
moment is forwarding open while NAT is missing.

IPv6 has tables of its own, which ip6tables knows.  They are made where a rule asks for
IPv6, and kept from then on: packets of IPv6 that no rule is about must not pass there.

Limits: A table once used stays in the namespace until the namespace goes: the kernel cannot
drop a table.
"""

import importlib.util
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.addresses import FAMILIES, Family
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import iptables_server
from libvirt_natns.firewall.iptables_entries import entries
from libvirt_natns.firewall.iptables_syntax import ChainEntry
from libvirt_natns.firewall.rule import Chain, LayoutName, Rule
from libvirt_natns.kernel import netns

TABLE_NAMES: dict[Family, Path] = {
    4: Path("/proc/thread-self/net/ip_tables_names"),
    6: Path("/proc/thread-self/net/ip6_tables_names"),
}
MODULES: dict[Family, str] = {4: "ip_tables", 6: "ip6_tables"}

name = "iptables"


@dataclass(frozen=True, slots=True)
class Place:
    """A table's chain; ``policy`` is the policy of a built-in chain."""

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
    "helper": Place("raw", "PREROUTING"),
    "raw": Place("raw", "PREROUTING"),
    "input": Place("filter", "INPUT", "DROP"),
    "forward": Place("filter", "FORWARD", "DROP"),
}

ROUTER: Layout = {
    "dstnat": Place("nat", "PREROUTING"),
    "srcnat": Place("nat", "POSTROUTING"),
    "clamp": Place("mangle", "FORWARD"),
    "helper": Place("raw", "PREROUTING"),
    "forward": Place("filter", "FORWARD"),
}

LAYOUTS: Mapping[LayoutName, Layout] = {"namespace": NAMESPACE, "router": ROUTER}


@dataclass(frozen=True, slots=True)
class Table:
    """The entries of a table's chains, and ``policies`` of its built-in chains."""

    name: str
    chains: dict[str, list[ChainEntry]]
    policies: dict[str, str]
    family: Family = 4


def families(rules: Iterable[Rule]) -> tuple[Family, ...]:
    """Return the families of the tables that the rules need."""
    return FAMILIES if any(rule.family == 6 for rule in rules) else FAMILIES[:1]


def tables(
    rules: Iterable[Rule], layout: Layout = NAMESPACE, *, ipv6: bool = False
) -> tuple[Table, ...]:
    """Return the tables that ``rules`` make, in the order in which they must be committed.

    The tables of IPv6 are among them where a rule is about IPv6, or with ``ipv6``.
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


def render(rules: Iterable[Rule], layout: LayoutName = "namespace") -> str:
    """Return the rules as iptables-save, then ip6tables-save, would print them."""
    lines = []
    for table in tables(rules, LAYOUTS[layout]):
        lines.append(f"*{table.name}" if table.family == 4 else f"*{table.name} # IPv6")
        lines += [f":{chain} {policy} [0:0]" for chain, policy in table.policies.items()]
        for chain, members in table.chains.items():
            lines += [f"-A {chain} {entry}" for entry in members]
        lines.append("COMMIT")
    return "\n".join([*lines, ""])


def apply(namespace: str | None, rules: Iterable[Rule], layout: LayoutName = "namespace") -> None:
    """Put ``rules`` in place of all content of the tables of ``namespace``.

    Raises FirewallError when python-iptables is missing or the kernel refuses
    a table, KernelError when the namespace is missing.
    """
    ipv6 = bool(in_use(namespace, 6))
    wanted = tables(rules, LAYOUTS[layout], ipv6=ipv6)
    concerned = sorted({table.family for table in wanted})
    call(namespace, "replace", families=concerned, tables=[asdict(table) for table in wanted])


def clear(namespace: str | None) -> None:
    """Empty the tables of ``namespace`` that exist; success where none exists."""
    families_in_use = used(namespace)
    if families_in_use:
        call(namespace, "clear", families=families_in_use)


def generation(namespace: str | None) -> str:
    """Return "": only a listing tells whether the tables were changed."""
    return ""


def listing(namespace: str | None) -> str:
    """Return all that the tables of ``namespace`` hold, without counters; "" for nothing.

    An empty table is left out, so that a look at a table changes nothing.
    Raises FirewallError when python-iptables is missing, KernelError when the
    namespace is missing.
    """
    families_in_use = used(namespace)
    return call(namespace, "list", families=families_in_use) if families_in_use else ""


def digest(namespace: str | None) -> str:
    """Return a digest of ``listing``; "" for nothing.  Raises as ``listing`` does."""
    text = listing(namespace)
    return names.digest(text, names.WHOLE_DIGEST) if text else ""


def in_use(namespace: str | None, family: Family = 4) -> frozenset[str]:
    """Return the tables of a family that exist in ``namespace``, without creating any."""
    with netns.entered(namespace):
        try:
            return frozenset(TABLE_NAMES[family].read_text().split())
        except FileNotFoundError:
            return frozenset()


def used(namespace: str | None) -> list[Family]:
    """Return the families that have a table in ``namespace``."""
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
    """True if the child will find python-iptables."""
    # A hook sees hardly any of the child's directories.
    return importlib.util.find_spec("iptc") is not None or bool(call(None, "find"))


def kernel_has(family: Family) -> bool:
    """True if the kernel has legacy tables of that family, or a module with them."""
    if TABLE_NAMES[family].exists():
        return True
    # Not loaded yet; python-iptables loads it.
    modules = Path("/lib/modules") / os.uname().release / "modules.dep"
    return modules.exists() and f"/{MODULES[family]}.ko" in modules.read_text()


def call(
    namespace: str | None, verb: str, *, families: Iterable[Family] = (4,), **values: object
) -> str:
    """Run a verb of ``iptables_child`` inside ``namespace``, a family after the other.

    Returns what the verb says in all families.  Raises FirewallError with the reason of the
    first family that fails, KernelError when the namespace is missing.
    """
    request = {"verb": verb, "path": iptables_server.search_path(), **values}
    said = []
    with netns.entered(namespace):
        for family in families:
            answer = iptables_server.ask({**request, "family": family})
            if answer["complaint"]:
                raise FirewallError("iptables refused the rules", answer["complaint"])
            said.append(answer["said"])
    return "".join(said)
