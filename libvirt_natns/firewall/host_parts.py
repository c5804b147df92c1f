# SPDX-License-Identifier: LGPL-2.1-or-later
"""A network's part of the host's rules, so that a network can come and go alone.

With nft a network is elements of our sets.  Where foreign chains must let the network
pass, it is also rules in our chains there.  Rules that all networks have in common look
the sets up.  They stay as they are, unless a network is the first or the last that needs a
rule: ``counts`` tell.

Limits: forwards for certain clients are rules of their own, and so is everything
with iptables.  A rule in a foreign table can be added alone, but not deleted.
Then all rules are compared, which costs some 30 microseconds a network and as much for
each published port.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import (
    foreign_chains,
    host_accepts,
    host_policy,
    host_rules,
    iptables,
    nft_maps,
    nft_statements,
)
from libvirt_natns.firewall.nfnetlink import fingerprint
from libvirt_natns.firewall.nftables import TABLE
from libvirt_natns.firewall.rule import Rule


@dataclass(frozen=True, slots=True)
class HostPart:
    """A network's own: elements by set, accepts in foreign tables, and the ``rest``.

    ``transit`` is the network's transit bridge, "" for none, ``dhcp`` the bridge
    where the network asks a DHCP server.  Foreign tables for IPv4 get ``accepts``, tables for
    IPv6 get ``accepts6``, and tables for both get ``accepts`` and ``only6``.
    ``links6`` are bridges on which neighbours must pass.
    ``public`` are rules for subnets that pass untranslated, and rules that assign conntrack's
    helpers.  ``routes`` lead to these subnets.  ``routes6``: the host must forward IPv6 for
    the network.
    """

    transit: str = ""
    elements: Mapping[str, list[str]] = field(default_factory=dict)
    accepts: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    dhcp: str = ""
    accepts6: list[str] = field(default_factory=list)
    only6: list[str] = field(default_factory=list)
    links6: list[str] = field(default_factory=list)
    public: list[str] = field(default_factory=list)
    routes: list[list[str]] = field(default_factory=list)
    routes6: bool = False

    def counts(self) -> Counter[str]:
        """Return how often the network needs each thing that networks have in common."""
        counts = Counter({name: len(members) for name, members in self.elements.items()})
        if self.transit:
            counts[f"transit {self.transit}"] = 1
            published = sum(
                counts[name] for name in {kind.name for kind in nft_maps.MAPS.values()}
            ) + len(self.rest)
            counts[f"published {self.transit}"] = published
        if self.dhcp:
            counts[f"dhcp {self.dhcp}"] = 1
        counts["accepts"] = len(self.accepts)
        counts["only6"] = len(self.only6)
        counts["routes6"] = int(self.routes6)
        counts.update(f"neighbours {bridge}" for bridge in self.links6)
        return +counts

    def accepts_in(self, parent: str) -> list[str]:
        """Return the network's accepts in a foreign table."""
        word = parent.partition(" ")[0]
        if word == "inet":
            return [*self.accepts, *self.only6]
        return self.accepts6 if word == "ip6" else self.accepts


def make(policy: host_policy.HostPolicy) -> HostPart:
    """Return the part of the only network in ``policy``."""
    own = host_rules.own_rules(policy)
    elements, rest = nft_maps.looked_up(own)
    accepts = host_accepts.own_accepts(policy)
    return HostPart(
        transit=policy.transits[0].bridge if policy.transits else "",
        elements={kind.name: members for kind, members in elements.items()},
        accepts=_statements(foreign_chains.seen_in(accepts, "ip")),
        rest=_statements(rest),
        public=_statements([*host_rules.public_rules(policy), *host_rules.helper_rules(policy)]),
        accepts6=_statements(foreign_chains.seen_in(accepts, "ip6")),
        only6=_statements(rule for rule in accepts if rule.family == 6),
        links6=host_accepts.links6(policy),
        dhcp=policy.dhcp[0] if policy.dhcp else "",
    )


def _statements(rules: Iterable[Rule]) -> list[str]:
    # Rules for both families and rules for IPv6 alone read the same in a table of IPv6.
    return list(dict.fromkeys(nft_statements.statement(rule) for rule in rules))


def load(text: str) -> HostPart:
    """Return a part as ``dump`` wrote it; "" is an empty part.  Raises FirewallError."""
    try:
        return HostPart(**json.loads(text)) if text else HostPart()
    except (ValueError, TypeError) as error:
        raise FirewallError(f"a network's part of the host's rules is damaged ({error})") from error


def dump(part: HostPart) -> str:
    """Return the part as a line of text."""
    return json.dumps(asdict(part)) if part != HostPart() else ""


def seen() -> str:
    """Return the fingerprint of the host's rules; "" where all rules must be compared."""
    # With legacy iptables no network changes alone.
    return "" if iptables.used(None) else fingerprint(TABLE, foreign_chains.CHAIN)


def script(old: HostPart, new: HostPart, parents: list[str]) -> str | None:
    """Return the script from an old part to a new part; None where more must change.

    ``parents`` are the foreign tables that have our chain.
    """
    if (old.rest, old.public) != (new.rest, new.public):
        return None
    if any(set(old.accepts_in(parent)) - set(new.accepts_in(parent)) for parent in parents):
        return None
    lines = []
    for verb, of, without in (("delete", old, new), ("add", new, old)):
        for name, members in of.elements.items():
            some = sorted(set(members) - set(without.elements.get(name, ())))
            if some:
                lines.append(f"{verb} element {TABLE} {name} {{ {', '.join(some)} }}\n")
    lines += [
        f"add rule {parent} {foreign_chains.CHAIN} {accept}\n"
        for parent in parents
        for accept in new.accepts_in(parent)
        if accept not in old.accepts_in(parent)
    ]
    return "".join(lines)
