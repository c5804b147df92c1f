# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits on new addresses and flows as entries of iptables.

New addresses are remembered by xt_recent, 100 of them, and flows are counted by samples:
see ``limits``.

Limits: senders of IPv4 packets are not limited: xt_recent would forget guests of a large
network.
"""

from collections.abc import Iterator
from dataclasses import replace

from libvirt_natns.addresses import Family
from libvirt_natns.firewall import limits
from libvirt_natns.firewall.iptables_syntax import ChainEntry, Match, Parameters
from libvirt_natns.firewall.rule import Rule


def fresh(rule: Rule, entry: ChainEntry, family: Family) -> Iterator[ChainEntry]:
    """Drop new addresses over the limit, then remember the addresses that are left."""
    side = "rsource" if rule.fresh == "source" else "rdest"
    # A list has the mask of the rule that makes it: one of IPv4 compares 32 bits.
    name: Parameters = {"name": f"natns-{side}{family}", side: ""}
    seconds = str(limits.REMEMBERED)
    new: Match = ("recent", {"rcheck": "!", "seconds": seconds, **name})
    # Echo requests from outside must not use up what guests may do.
    too_fast = over(f"natns-{side if rule.remembered else 'pinged'}{family}")
    yield replace(entry, matches=(*entry.matches, new, too_fast))
    if not rule.remembered:
        return
    remembered: Match = ("recent", {"set": "", **name})
    # An entry must have a target; MARK with these bits changes nothing and goes on.
    going_on: Match = ("MARK", {"set-xmark": "0x0/0x0"})
    yield replace(entry, matches=(*entry.matches, remembered), target=going_on)


def over(name: str) -> Match:
    """Return the match of packets that come faster than new addresses may."""
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


def counted(rule: Rule, family: Family) -> Iterator[ChainEntry]:
    """Refuse new flows for a while when a sample of the flows has too many."""
    assert rule.flows
    # An entry for all packets: no bit of the address counts.
    name: Parameters = {"name": "natns-full", "mask": "0.0.0.0" if family == 4 else "::"}
    new: Match = ("conntrack", {"ctstate": "NEW"})
    first: Match = ("conntrack", {"ctstatus": "!CONFIRMED"})
    sample: Match = (
        "statistic",
        {"mode": "nth", "every": str(limits.SAMPLE), "packet": "0"},
    )
    most = str(max(1, rule.flows // limits.SAMPLE))
    many: Match = (
        "connlimit",
        {"connlimit-above": most, "connlimit-mask": "0"},
    )
    full: Match = ("recent", {"set": "", **name})
    closed: Match = (
        "recent",
        {"rcheck": "", "seconds": str(limits.PAUSE), **name},
    )
    yield ChainEntry(matches=(new, first, sample, many, full), target=("DROP", {}))
    yield ChainEntry(matches=(new, closed), target=("DROP", {}))
