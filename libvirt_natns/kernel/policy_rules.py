# SPDX-License-Identifier: LGPL-2.1-or-later
"""Policy routing rules (ip-rule(8)) of one namespace: those by source, and those of our marks.

A host with two uplinks has a table for each of its addresses, and a rule "from ADDRESS lookup
TABLE".  Replies by a transit bridge have the address of a namespace while the kernel
routes them.  Marked packets find the same tables by rules of our own.
"""

import errno
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass

from libvirt_natns.addresses import FAMILIES, Family, IPNetwork, network_of, on_link
from libvirt_natns.kernel import netlink
from libvirt_natns.kernel.channel import NetlinkChannel
from libvirt_natns.kernel.link_addresses import LinkAddresses
from libvirt_natns.kernel.netlink import Attrs
from libvirt_natns.kernel.rtnetlink import ip

MARKS = range(0x6E740000, 0x6E750000)
"""Marks of ours, which no other program is known to set."""

MOST_SOURCES = 64
"""Rules by source that replies are marked for."""

SOCKET_FAMILIES: dict[Family, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
NO_LIMIT = 0xFFFFFFFF
"""The value of FRA_SUPPRESS_PREFIXLEN in a rule that takes any route of its table."""

CONDITIONS_KNOWN = {
    netlink.FRA_SRC,
    netlink.FRA_PRIORITY,
    netlink.FRA_TABLE,
    netlink.FRA_REALMS,
    netlink.FRA_PROTOCOL,
    netlink.FRA_SUPPRESS_PREFIXLEN,
    netlink.FRA_SUPPRESS_IFGROUP,
}
"""The attributes of a rule by source.  Any other may be a condition, also of a later kernel."""


@dataclass(frozen=True, slots=True, order=True)
class SourceRule:
    """A rule by which packets from ``source`` ask ``table``, and its place among all rules."""

    priority: int
    source: str
    table: int

    @property
    def network(self) -> IPNetwork:
        """Return the source as a network."""
        return network_of(self.source)


@dataclass(frozen=True, slots=True, order=True)
class MarkRule:
    """A rule of ours: marked packets that come in by a link ask ``table``."""

    family: Family
    priority: int
    link: str
    mark: int
    table: int


class PolicyRules:
    """The policy routing rules of one namespace."""

    __slots__ = ("_channel",)

    def __init__(self, channel: NetlinkChannel) -> None:
        self._channel = channel

    def by_source(self) -> list[SourceRule]:
        """Return the rules with a source as their only condition, in the order of marks."""
        return sorted(rule for family in FAMILIES for rule in self._by_source(family))

    def by_mark(self) -> list[tuple[int, SourceRule]]:
        """Return the rules by source, each with the mark of replies that go by its table.

        Clouds have a rule for each address of a container.  Of many rules, those count that
        are about an address of the host's own.
        """
        rules = self.by_source()
        if len(rules) > MOST_SOURCES:
            own = LinkAddresses(self._channel).beyond_link()
            rules = [rule for rule in rules if any(each in rule.network for each in own)]
        return list(zip(MARKS, rules[:MOST_SOURCES], strict=False))

    def _by_source(self, family: Family) -> list[SourceRule]:
        rules = []
        for body in self._listed(family):
            attributes, length = Attrs.parse(body, netlink.RULE_HEADER.size), body[2]
            source = attributes.get(netlink.FRA_SRC)
            if source is not None and _asks_table(body, attributes):
                priority = attributes.number(netlink.FRA_PRIORITY) or 0
                table = attributes.number(netlink.FRA_TABLE) or body[4]
                whole = on_link(ip(source), length).network
                rules.append(SourceRule(priority, str(whole), table))
        return rules

    def marked(self) -> set[MarkRule]:
        """Return the rules of our marks."""
        rules = set()
        for family in FAMILIES:
            for body in self._listed(family):
                attributes = Attrs.parse(body, netlink.RULE_HEADER.size)
                mark = attributes.number(netlink.FRA_FWMARK)
                if mark is not None and mark in MARKS:
                    rules.add(
                        MarkRule(
                            family,
                            attributes.number(netlink.FRA_PRIORITY) or 0,
                            attributes.text(netlink.FRA_IIFNAME),
                            mark,
                            attributes.number(netlink.FRA_TABLE) or body[4],
                        )
                    )
        return rules

    def replace_marked(self, link: str, wanted: Collection[MarkRule]) -> None:
        """Have exactly these rules of our marks for packets that come in by a link."""
        present = {rule for rule in self.marked() if rule.link == link}
        for verb, rules in (("add", set(wanted) - present), ("del", present - set(wanted))):
            for rule in sorted(rules):
                self._change(verb, rule)

    def _change(self, verb: str, rule: MarkRule) -> None:
        self._channel.change(
            f"a rule for packets with the mark {rule.mark:#x}",
            lambda: self._channel.writer.rule(
                verb,
                family=SOCKET_FAMILIES[rule.family],
                priority=rule.priority,
                iifname=rule.link,
                fwmark=rule.mark,
                table=rule.table,
            ),
        )

    def _listed(self, family: Family) -> list[bytes]:
        return self._channel.listed(f"IPv{family} rules", lambda: self._dump(family))

    def _dump(self, family: Family) -> list[bytes]:
        request = netlink.RULE_HEADER.pack(SOCKET_FAMILIES[family], *[0] * 8)
        try:
            return self._channel.reader.dump(netlink.RTM_GETRULE, request)
        except OSError as error:
            # A kernel that booted with ipv6.disable=1.
            if error.errno != errno.EAFNOSUPPORT:
                raise
            return []


def _asks_table(body: bytes, attributes: Attrs) -> bool:
    """True if a rule leads all packets from its source to a table."""
    tos, action, (flags,) = body[3], body[7], struct.unpack_from("=I", body, 8)
    limits = map(attributes.number, (netlink.FRA_SUPPRESS_PREFIXLEN, netlink.FRA_SUPPRESS_IFGROUP))
    return (
        action == netlink.FR_ACT_TO_TBL
        and not tos
        and not flags & netlink.FIB_RULE_INVERT
        and all(limit in (None, NO_LIMIT) for limit in limits)
        and {kind & netlink.NLA_TYPE for kind, _ in attributes} <= CONDITIONS_KNOWN
    )
