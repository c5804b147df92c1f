# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one network adds to the host's rules, so that it can come and go alone.

With nft a network is elements of our sets and, where foreign chains must let it
pass, rules in our chains there.  What all networks have in common (the rules
that look the sets up) stays as it is, unless a network is the first or the last
to need some of it: ``counts`` tell.

Limits: forwards for certain clients are rules of their own, and so is everything
with iptables; a rule in a foreign table can be added alone, but not taken out:
then all is compared, which costs some 30 microseconds a network and as much for
each published port.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping

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
from libvirt_natns.records import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class Part:
    """A network's own: elements by set, accepts in foreign tables, and the ``rest``.

    ``transit`` is the transit bridge that it is on, "" for none, ``dhcp`` the bridge
    where it asks a DHCP server.  ``accepts`` are what
    foreign tables for IPv4 get, ``accepts6`` those for IPv6; those for both get
    the first, and ``only6``.  ``links6`` are bridges on which neighbours must pass.
    ``public`` are rules for subnets that pass untranslated, ``routes`` the routes to
    them, and ``routes6`` tells whether the host must forward IPv6 for it.
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
        """How often it needs each thing that networks have in common."""
        found = Counter({name: len(members) for name, members in self.elements.items()})
        if self.transit:
            found[f"transit {self.transit}"] = 1
            published = sum(found[kind.name] for kind in nft_maps.MAPS.values()) + len(self.rest)
            found[f"published {self.transit}"] = published
        if self.dhcp:
            found[f"dhcp {self.dhcp}"] = 1
        found["accepts"] = len(self.accepts)
        found["only6"] = len(self.only6)
        found["routes6"] = int(self.routes6)
        found.update(f"neighbours {bridge}" for bridge in self.links6)
        return +found

    def accepts_in(self, parent: str) -> list[str]:
        """Its accepts in a foreign table."""
        word = parent.partition(" ")[0]
        if word == "inet":
            return [*self.accepts, *self.only6]
        return self.accepts6 if word == "ip6" else self.accepts


def make(policy: host_policy.HostPolicy) -> Part:
    """The part of the only network in ``policy``."""
    own = host_rules.own_rules(policy)
    elements, rest = nft_maps.looked_up(own)
    accepts = host_accepts.own_accepts(policy)
    return Part(
        transit=policy.transits[0].bridge if policy.transits else "",
        elements={kind.name: members for kind, members in elements.items()},
        accepts=_statements(foreign_chains.seen_in(accepts, "ip")),
        rest=_statements(rest),
        public=_statements(host_rules.public_rules(policy)),
        accepts6=_statements(foreign_chains.seen_in(accepts, "ip6")),
        only6=_statements(rule for rule in accepts if rule.family == 6),
        links6=host_accepts.links6(policy),
        dhcp=policy.dhcp[0] if policy.dhcp else "",
    )


def _statements(rules: Iterable[Rule]) -> list[str]:
    # What is for both families and what is for IPv6 alone read the same in a table of that.
    return list(dict.fromkeys(nft_statements.statement(rule) for rule in rules))


def load(text: str) -> Part:
    """A part as ``dump`` wrote it; "" is one that has nothing."""
    return Part(**json.loads(text)) if text else Part()


def dump(part: Part) -> str:
    """The part as a line of text."""
    return json.dumps(asdict(part)) if part != Part() else ""


def seen() -> str:
    """The fingerprint of the host's rules as they are; "" where only all of them will do."""
    # With legacy iptables nothing changes alone.
    return "" if iptables.used(None) else fingerprint(TABLE, foreign_chains.CHAIN)


def script(old: Part, new: Part, parents: list[str]) -> str | None:
    """What makes one of the other; None where that cannot be done alone.

    ``parents`` are the foreign tables that our chain is in.
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
