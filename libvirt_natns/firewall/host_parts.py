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
from collections.abc import Mapping

from libvirt_natns.firewall import host, host_nftables, iptables, nftables
from libvirt_natns.firewall.nfnetlink import fingerprint
from libvirt_natns.firewall.nftables import TABLE
from libvirt_natns.records import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class Part:
    """A network's own: elements by set, accepts in foreign tables, and the ``rest``.

    ``transit`` is the transit bridge that it is on, ``dhcp`` the bridge where it asks a DHCP
    server; "" for none.
    """

    transit: str = ""
    elements: Mapping[str, list[str]] = field(default_factory=dict)
    accepts: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    dhcp: str = ""

    def counts(self) -> Counter[str]:
        """How often it needs each thing that networks have in common."""
        found = Counter({name: len(members) for name, members in self.elements.items()})
        if self.transit:
            found[f"transit {self.transit}"] = 1
            published = sum(found[kind.name] for kind in nftables.MAPS.values()) + len(self.rest)
            found[f"published {self.transit}"] = published
        if self.dhcp:
            found[f"dhcp {self.dhcp}"] = 1
        found["accepts"] = len(self.accepts)
        return +found


def make(policy: host.HostPolicy) -> Part:
    """The part of the only network in ``policy``."""
    own = host.own_rules(policy)
    elements, rest = nftables.looked_up(own)
    return Part(
        transit=policy.transits[0].bridge if policy.transits else "",
        elements={kind.name: members for kind, members in elements.items()},
        accepts=[nftables.statement(rule) for rule in host.own_accepts(policy)],
        rest=[nftables.statement(rule) for rule in rest],
        dhcp=policy.dhcp[0] if policy.dhcp else "",
    )


def load(text: str) -> Part:
    """A part as ``dump`` wrote it; "" is one that has nothing."""
    return Part(**json.loads(text)) if text else Part()


def dump(part: Part) -> str:
    """The part as a line of text."""
    return json.dumps(asdict(part)) if part != Part() else ""


def seen() -> str:
    """The fingerprint of the host's rules as they are; "" where only all of them will do."""
    # With legacy iptables nothing changes alone.
    return "" if iptables.in_use(None) else fingerprint(TABLE, host_nftables.CHAIN)


def script(old: Part, new: Part, parents: list[str]) -> str | None:
    """What makes one of the other; None where that cannot be done alone.

    ``parents`` are the foreign tables that our chain is in.
    """
    if old.rest != new.rest or (parents and set(old.accepts) - set(new.accepts)):
        return None
    lines = []
    for verb, of, without in (("delete", old, new), ("add", new, old)):
        for name, members in of.elements.items():
            some = sorted(set(members) - set(without.elements.get(name, ())))
            if some:
                lines.append(f"{verb} element {TABLE} {name} {{ {', '.join(some)} }}\n")
    lines += [
        f"add rule {parent} {host_nftables.CHAIN} {accept}\n"
        for parent in parents
        for accept in new.accepts
        if accept not in old.accepts
    ]
    return "".join(lines)
