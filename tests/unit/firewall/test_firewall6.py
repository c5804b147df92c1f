# SPDX-License-Identifier: LGPL-2.1-or-later
"""The firewall in IPv6, as text; what is the same in both families is in ``test_firewall``."""

import difflib
import json
import struct
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

import pytest

from libvirt_natns.addresses import network_of, parsed
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import (
    backends,
    foreign_chains,
    host_accepts,
    host_iptables,
    host_nftables,
    host_parts,
    host_policy,
    host_rules,
    iptables,
    iptables_entries,
    nft_statements,
    nftables,
)
from libvirt_natns.firewall.namespace_policy import Policy
from libvirt_natns.firewall.namespace_rules import ruleset
from libvirt_natns.firewall.rule import Rule
from libvirt_natns.kernel import conntrack
from libvirt_natns.model.publication import Forward, PortProtocol, StaticNat

PRIVATE, PUBLIC = IPv6Network("fd00:10::/64"), IPv6Network("2001:db8:100::/64")
NAT = "2001:db8:77::100"
ONLY4 = Policy(
    inner="virbr10",
    upstream="upstream",
    subnets=(IPv4Network("10.0.0.0/24"),),
    gateways=(IPv4Address("10.0.0.1"),),
    address=IPv4Address("192.168.0.100"),
)
BOTH = replace(
    ONLY4,
    subnets=(*ONLY4.subnets, PRIVATE, PUBLIC),
    gateways=(*ONLY4.gateways, PRIVATE[1], PUBLIC[1]),
    address6=IPv6Address(NAT),
    public=(PUBLIC,),
)

NFTABLES = """\
add table inet natns
delete table inet natns
add table arp natns
delete table arp natns
table inet natns {
	set known {
		type ipv4_addr
		size 256
		flags dynamic,timeout
		timeout 5m
	}
	set known6 {
		type ipv6_addr
		size 256
		flags dynamic,timeout
		timeout 5m
	}
	set flows {
		type mark
		size 512
		flags dynamic
	}
	chain raw {
		type filter hook prerouting priority raw; policy accept;
		iifname "upstream" ip daddr 192.168.0.100 accept
		iifname "upstream" meta nfproto ipv4 drop comment "not addressed to an upstream address"
		icmpv6 type nd-redirect drop
		iifname "virbr10" ip6 saddr { fd00:10::1, 2001:db8:100::1, 2001:db8:77::100 } drop
		iifname "upstream" ip6 daddr { 2001:db8:77::100, 2001:db8:100::/64 } accept
		iifname "upstream" ip6 daddr { fe80::/10, ff02::/16 } meta l4proto icmpv6 accept comment "neighbours"
		iifname "upstream" meta nfproto ipv6 drop comment "not addressed to an upstream address"
	}
	chain input {
		type filter hook input priority filter; policy drop;
		iifname "lo" accept
		ct state established,related accept
		ip saddr 10.0.0.0/24 ip saddr != @known limit rate over 10/second burst 50 packets drop
		ip saddr 10.0.0.0/24 update @known { ip saddr }
		icmpv6 type nd-neighbor-solicit ip6 saddr != @known6 limit rate over 10/second burst 50 packets drop
		icmpv6 type nd-neighbor-solicit update @known6 { ip6 saddr }
		iifname "virbr10" icmpv6 type nd-neighbor-advert limit rate over 10/second burst 50 packets drop
		iifname "virbr10" ip6 hoplimit 255 icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit } accept
		iifname "upstream" ip6 hoplimit 255 icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert } accept
		ip6 saddr fe80::/10 icmpv6 type { mld-listener-query, mld-listener-report, mld-listener-done, mld2-listener-report } accept
		ip6 saddr { fd00:10::/64, 2001:db8:100::/64, fe80::/10 } ip6 saddr != @known6 limit rate over 10/second burst 50 packets drop
		ip6 saddr { fd00:10::/64, 2001:db8:100::/64, fe80::/10 } update @known6 { ip6 saddr }
		ct state new ct status & confirmed == 0 add @flows { numgen inc mod 512 ct count over 64 } drop
		meta nfproto ipv4 iifname "virbr10" udp dport 67 accept comment "DHCP"
		iifname "virbr10" ip saddr 10.0.0.0/24 ip daddr 10.0.0.1 udp dport { 53, 69 } accept
		iifname "virbr10" ip saddr 10.0.0.0/24 ip daddr 10.0.0.1 tcp dport 53 accept
		iifname "virbr10" ip daddr 10.0.0.1 icmp type echo-request accept
		iifname "virbr10" ip saddr 10.0.0.0/24 meta l4proto tcp reject with tcp reset
		iifname "virbr10" ip saddr 10.0.0.0/24 meta l4proto udp reject with icmpx port-unreachable
		iifname "upstream" ip daddr 192.168.0.100 icmp type echo-request accept
		iifname "virbr10" ip6 saddr { fe80::/10, fd00:10::/64, 2001:db8:100::/64 } udp dport 547 accept comment "DHCP"
		iifname "virbr10" ip6 saddr { fd00:10::/64, 2001:db8:100::/64 } ip6 daddr { fd00:10::1, 2001:db8:100::1 } udp dport { 53, 69 } accept
		iifname "virbr10" ip6 saddr { fd00:10::/64, 2001:db8:100::/64 } ip6 daddr { fd00:10::1, 2001:db8:100::1 } tcp dport 53 accept
		iifname "virbr10" ip6 daddr { fd00:10::1, 2001:db8:100::1, fe80::/10 } icmpv6 type echo-request accept
		iifname "virbr10" ip6 saddr { fd00:10::/64, 2001:db8:100::/64 } meta l4proto tcp reject with tcp reset
		iifname "virbr10" ip6 saddr { fd00:10::/64, 2001:db8:100::/64 } meta l4proto udp reject with icmpx port-unreachable
		iifname "upstream" ip6 daddr { 2001:db8:77::100, 2001:db8:100::1 } icmpv6 type echo-request accept
	}
	chain clamp {
		type filter hook forward priority mangle; policy accept;
		tcp flags & (syn|rst) == syn tcp option maxseg size set rt mtu
	}
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state established,related accept
		ct state new ct status & confirmed == 0 add @flows { numgen inc mod 512 ct count over 64 } drop
		ip saddr 10.0.0.0/24 ip saddr != @known limit rate over 10/second burst 50 packets drop
		ip saddr 10.0.0.0/24 update @known { ip saddr }
		iifname "virbr10" oifname "upstream" ip saddr 10.0.0.0/24 ip daddr 169.254.0.0/16 reject with icmpx admin-prohibited comment "link-local"
		ip6 saddr { fd00:10::/64, 2001:db8:100::/64 } ip6 saddr != @known6 limit rate over 10/second burst 50 packets drop
		ip6 saddr { fd00:10::/64, 2001:db8:100::/64 } update @known6 { ip6 saddr }
		iifname "virbr10" oifname "upstream" ip6 saddr { fd00:10::/64, 2001:db8:100::/64 } ip6 daddr { fd00:ec2::254, fd20:ce::254 } reject with icmpx admin-prohibited comment "link-local"
		iifname "virbr10" ip daddr 10.0.0.0/24 ip daddr != @known limit rate over 10/second burst 50 packets drop
		iifname "virbr10" ip daddr 10.0.0.0/24 update @known { ip daddr }
		iifname "virbr10" oifname "virbr10" ip6 saddr fd00:10::/64 ip6 daddr fd00:10::/64 drop comment "within one subnet"
		iifname "virbr10" oifname "virbr10" ip6 saddr 2001:db8:100::/64 ip6 daddr 2001:db8:100::/64 drop comment "within one subnet"
		iifname "virbr10" ip6 daddr { fd00:10::/64, 2001:db8:100::/64 } ip6 daddr != @known6 limit rate over 10/second burst 50 packets drop
		iifname "virbr10" ip6 daddr { fd00:10::/64, 2001:db8:100::/64 } update @known6 { ip6 daddr }
		iifname "virbr10" oifname "virbr10" ip6 saddr { fd00:10::/64, 2001:db8:100::/64 } ip6 daddr { fd00:10::/64, 2001:db8:100::/64 } accept comment "between private subnets"
		iifname "virbr10" oifname "upstream" ip saddr 10.0.0.0/24 ct state new accept
		iifname "virbr10" oifname "upstream" ip6 saddr 2001:db8:100::/64 tcp flags & (syn|rst) != syn ct state new reject with tcp reset comment "cut"
		iifname "virbr10" oifname "upstream" ip6 saddr { fd00:10::/64, 2001:db8:100::/64 } ct state new accept
		iifname "upstream" oifname "virbr10" ip6 daddr 2001:db8:100::/64 icmpv6 type echo-request ct state new ip6 daddr != @known6 limit rate over 10/second burst 50 packets drop
		iifname "upstream" oifname "virbr10" ip6 daddr 2001:db8:100::/64 icmpv6 type echo-request ct state new accept
	}
	chain srcnat {
		type nat hook postrouting priority srcnat; policy accept;
		meta nfproto ipv4 oifname "upstream" masquerade
		oifname "upstream" ip6 saddr 2001:db8:100::/64 accept
		oifname "upstream" ip6 saddr != fe80::/10 snat ip6 to 2001:db8:77::100
	}
	chain guard {
		type filter hook postrouting priority srcnat + 10; policy accept;
		oifname "upstream" ip saddr != 192.168.0.100 drop comment "not translated"
		oifname "upstream" ip6 saddr { fe80::/10, ::, 2001:db8:77::100 } icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld-listener-report, mld-listener-done, mld2-listener-report } accept comment "neighbours"
		oifname "upstream" ip6 saddr != { 2001:db8:77::100, 2001:db8:100::/64 } drop comment "not translated"
	}
}
table arp natns {
	set known {
		type ipv4_addr
		size 256
		flags dynamic,timeout
		timeout 5m
	}
	chain input {
		type filter hook input priority filter; policy accept;
		arp operation request arp daddr ip { 10.0.0.1, 192.168.0.100 } arp saddr ip != @known limit rate over 10/second burst 50 packets drop
		arp operation request arp daddr ip { 10.0.0.1, 192.168.0.100 } update @known { arp saddr ip }
		arp operation reply arp saddr ip != @known limit rate over 10/second burst 50 packets drop
		arp operation reply update @known { arp saddr ip }
	}
}
"""  # noqa: E501 - as nft lists it

PUBLISHED_NFTABLES = """\
	map ports {
		type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
		elements = { 192.168.0.100 . tcp . 2222 : 10.0.0.5 . 22 }
	map ports6 {
		type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service
		elements = { 2001:db8:77::100 . tcp . 2222 : fd00:10::5 . 22 }
	map ranges6 {
		type ipv6_addr . inet_proto . inet_service : ipv6_addr
		flags interval
		elements = { 2001:db8:77::100 . udp . 8000-8010 : fd00:10::5 }
	set opened {
		type ipv6_addr . inet_proto . inet_service
		flags interval
		elements = { 2001:db8:100::5 . tcp . 80-81 }
		iifname "virbr10" ip6 saddr { fd00:10::1, 2001:db8:100::1, 2001:db8:77::100, 2001:db8:77::110 } drop
		iifname "upstream" ip6 daddr { 2001:db8:77::100, 2001:db8:77::110, 2001:db8:100::/64 } accept
	chain dstnat {
		type nat hook prerouting priority dstnat; policy accept;
		dnat ip to ip daddr . meta l4proto . th dport map @ports
		dnat ip6 to ip6 daddr . meta l4proto . th dport map @ports6
		dnat ip6 to ip6 daddr . meta l4proto . th dport map @ranges6
		ip6 saddr 2001:db8::/32 ip6 daddr 2001:db8:77::100 tcp dport 3000-3001 dnat ip6 to tcp dport map { 3000 : fd00:10::5 . 22, 3001 : fd00:10::5 . 23 }
		ip6 daddr 2001:db8:77::110 dnat ip6 to fd00:10::6
		iifname "upstream" ip6 daddr { 2001:db8:77::100, 2001:db8:77::110, 2001:db8:100::1 } icmpv6 type echo-request accept
		iifname "upstream" oifname "virbr10" ct state new ip6 daddr . meta l4proto . th dport @opened accept
		iifname "upstream" oifname "virbr10" ct status dnat ct state new accept comment "published"
		iifname "virbr10" oifname "virbr10" ip saddr 10.0.0.0/24 ct status dnat ct state new accept comment "hairpin"
		iifname "virbr10" oifname "virbr10" ip6 saddr { fd00:10::/64, 2001:db8:100::/64 } ct status dnat ct state new accept comment "hairpin"
		iifname "upstream" oifname "virbr10" ip6 saddr 2001:db8:77::/64 ip6 daddr 2001:db8:100::5 tcp dport 443 ct state new accept
		oifname "upstream" ip6 saddr fd00:10::6 snat ip6 to 2001:db8:77::110
		oifname "virbr10" ip saddr 10.0.0.0/24 ct status dnat masquerade comment "hairpin"
		oifname "virbr10" ip6 saddr { fd00:10::/64, 2001:db8:100::/64 } ct status dnat masquerade comment "hairpin"
		oifname "upstream" ip6 saddr { fe80::/10, ::, 2001:db8:77::100, 2001:db8:77::110 } icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld-listener-report, mld-listener-done, mld2-listener-report } accept comment "neighbours"
		oifname "upstream" ip6 saddr != { 2001:db8:77::100, 2001:db8:77::110, 2001:db8:100::/64 } drop comment "not translated"
"""  # noqa: E501 - as nft lists it

PUBLISHED_IPTABLES = """\
-A PREROUTING -d 192.168.0.100/32 -p tcp -m tcp --dport 2222 -j DNAT --to-destination 10.0.0.5:22
-A POSTROUTING -s 10.0.0.0/24 -o virbr10 -m conntrack --ctstate DNAT -m comment --comment hairpin -j MASQUERADE
-A FORWARD -i upstream -o virbr10 -m conntrack --ctstate DNAT -m conntrack --ctstate NEW -m comment --comment published -j ACCEPT
-A FORWARD -s 10.0.0.0/24 -i virbr10 -o virbr10 -m conntrack --ctstate DNAT -m conntrack --ctstate NEW -m comment --comment hairpin -j ACCEPT
-A PREROUTING -d 2001:db8:77::100/128 -p tcp -m tcp --dport 2222 -j DNAT --to-destination [fd00:10::5]:22
-A PREROUTING -s 2001:db8::/32 -d 2001:db8:77::100/128 -p tcp -m tcp --dport 3000:3001 -j DNAT --to-destination [fd00:10::5]:22-23/3000
-A PREROUTING -d 2001:db8:77::100/128 -p udp -m udp --dport 8000:8010 -j DNAT --to-destination fd00:10::5
-A PREROUTING -d 2001:db8:77::110/128 -j DNAT --to-destination fd00:10::6
-A POSTROUTING -s fd00:10::6/128 -o upstream -j SNAT --to-source 2001:db8:77::110
-A POSTROUTING -s fd00:10::/64 -o virbr10 -m conntrack --ctstate DNAT -m comment --comment hairpin -j MASQUERADE
-A POSTROUTING -s 2001:db8:100::/64 -o virbr10 -m conntrack --ctstate DNAT -m comment --comment hairpin -j MASQUERADE
-A POSTROUTING -o upstream -m conntrack --ctrepldst 2001:db8:77::110 --ctdir ORIGINAL -j ACCEPT
-A POSTROUTING -o upstream -m conntrack --ctorigdst 2001:db8:77::110 --ctdir REPLY -j ACCEPT
-A PREROUTING -s 2001:db8:77::110/128 -i virbr10 -j DROP
-A PREROUTING -d 2001:db8:77::110/128 -i upstream -j ACCEPT
-A INPUT -d 2001:db8:77::110/128 -i upstream -p icmpv6 -m icmp6 --icmpv6-type 128 -j ACCEPT
-A FORWARD -i upstream -o virbr10 -m conntrack --ctstate DNAT -m conntrack --ctstate NEW -m comment --comment published -j ACCEPT
-A FORWARD -s fd00:10::/64 -i virbr10 -o virbr10 -m conntrack --ctstate DNAT -m conntrack --ctstate NEW -m comment --comment hairpin -j ACCEPT
-A FORWARD -s 2001:db8:100::/64 -i virbr10 -o virbr10 -m conntrack --ctstate DNAT -m conntrack --ctstate NEW -m comment --comment hairpin -j ACCEPT
-A FORWARD -d 2001:db8:100::5/128 -i upstream -o virbr10 -p tcp -m tcp --dport 80:81 -m conntrack --ctstate NEW -j ACCEPT
-A FORWARD -s 2001:db8:77::/64 -d 2001:db8:100::5/128 -i upstream -o virbr10 -p tcp -m tcp --dport 443 -m conntrack --ctstate NEW -j ACCEPT
"""  # noqa: E501 - as ip6tables-save prints it

HOST_TABLE = """\
add table inet natns
delete table inet natns
table inet natns {
	map local_ports6 {
		type inet_proto . inet_service : ipv6_addr . inet_service
		elements = { tcp . 2222 : fd00:20::2 . 2222 }
	}
	chain raw {
		type filter hook prerouting priority -450; policy accept;
		iifname != "lo" ip daddr 127.0.0.0/8 drop
		iifname "natns-host" ip saddr 127.0.0.0/8 drop
		iifname != "natns-host" ip daddr 192.168.150.1 udp dport 305 drop
		iifname != "natns-host" ip daddr 192.168.150.1 tcp dport 305 drop
		iifname != "natns-host" ip6 daddr fd00:20::1 udp dport 305 drop
		iifname != "natns-host" ip6 daddr fd00:20::1 tcp dport 305 drop
	}
	chain dstnat {
		ip6 daddr != ::1 fib daddr type local dnat ip6 to meta l4proto . th dport map @local_ports6
	}
	chain dstnat_prerouting {
		type nat hook prerouting priority -85; policy accept;
		jump dstnat
	}
	chain dstnat_output {
		type nat hook output priority -85; policy accept;
		jump dstnat
	}
	chain clamp {
		type filter hook forward priority mangle; policy accept;
		iifname "natns-host" tcp flags & (syn|rst) == syn tcp option maxseg size set rt mtu
		oifname "natns-host" tcp flags & (syn|rst) == syn tcp option maxseg size set rt mtu
	}
	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname "natns-host" ip saddr 192.168.150.0/24 accept
		iifname "natns-host" ip6 saddr fd00:20::/64 accept
		iifname "natns-host" drop
		oifname "natns-host" ct state established,related accept
		oifname "natns-host" ct status dnat ct state new accept
		oifname "natns-host" drop
	}
	chain output {
		type filter hook output priority filter; policy accept;
		oifname "natns-host" ct status dnat accept
		oifname "natns-host" ct state established,related accept
		oifname "natns-host" ip daddr 192.168.150.0/24 meta l4proto tcp drop
		oifname "natns-host" ip daddr 192.168.150.0/24 meta l4proto udp drop
		oifname "natns-host" ip daddr 192.168.150.0/24 meta l4proto sctp drop
		oifname "natns-host" ip6 daddr fd00:20::/64 meta l4proto tcp drop
		oifname "natns-host" ip6 daddr fd00:20::/64 meta l4proto udp drop
		oifname "natns-host" ip6 daddr fd00:20::/64 meta l4proto sctp drop
	}
	chain srcnat {
		type nat hook postrouting priority srcnat; policy accept;
		oifname != "natns-host" ip saddr 192.168.150.0/24 masquerade
		oifname "natns-host" ip6 saddr fd00:20::/64 ct status dnat masquerade
		oifname != "natns-host" ip6 saddr fd00:20::/64 masquerade
	}
}
"""


def forward(
    proto: PortProtocol, listen: str, ports: tuple[int, int], to: str, there: int, *sources: str
) -> Forward:
    last = there + ports[1] - ports[0]
    limits = tuple(map(network_of, sources))
    own = "uuid", "guest web", "net"
    return Forward(*own, proto, parsed(listen), *ports, parsed(to), there, last, limits)


OPEN = "2001:db8:100::5"
FORWARDS = (
    forward("tcp", NAT, (2222, 2222), "fd00:10::5", 22),
    forward("udp", NAT, (8000, 8010), "fd00:10::5", 8000),
    forward("tcp", NAT, (3000, 3001), "fd00:10::5", 22, "2001:db8::/32"),
    forward("tcp", "192.168.0.100", (2222, 2222), "10.0.0.5", 22),
    forward("tcp", OPEN, (80, 81), OPEN, 80),
    forward("tcp", OPEN, (443, 443), OPEN, 443, "2001:db8:77::/64"),
)
STATIC = StaticNat("", "", "", IPv6Address("2001:db8:77::110"), IPv6Address("fd00:10::6"))
PUBLISHING = replace(BOTH, forwards=FORWARDS, statics=(STATIC,))


def added(before: str, after: str) -> str:
    """The lines that a text has more than another one, without the ends of blocks."""
    old, new = ([line for line in text.splitlines() if line != "\t}"] for text in (before, after))
    lines = difflib.ndiff(old, new)
    return "".join(f"{line[2:]}\n" for line in lines if line[0] == "+")


def test_nftables_script() -> None:
    assert nftables.render(ruleset(BOTH)) == NFTABLES


def test_what_published_ports_and_addresses_add() -> None:
    before, after = (nftables.render(ruleset(policy)) for policy in (BOTH, PUBLISHING))
    assert added(before, after) == PUBLISHED_NFTABLES
    before, after = (iptables.render(ruleset(policy)) for policy in (BOTH, PUBLISHING))
    lines = added(before, after).splitlines(keepends=True)
    assert "".join(line for line in lines if "neighbours" not in line) == PUBLISHED_IPTABLES


def test_nothing_of_ipv6_without_it() -> None:
    for name in ("nftables", "iptables"):
        text = backends.named(name).render(ruleset(ONLY4))
        assert not any(word in text for word in ("ip6", "ipv6", "icmp6", "known6", "::"))
        assert "nfproto" not in text.replace("meta nfproto ipv4 drop", "")
    assert {table.family for table in iptables.tables(ruleset(ONLY4))} == {4}
    assert {table.family for table in iptables.tables(ruleset(BOTH))} == {4, 6}


def test_each_family_has_its_own_tables() -> None:
    """A rule that names an address is in one of them; those for both are in both."""
    for table in iptables.tables(ruleset(PUBLISHING)):
        for entry in (entry for chain in table.chains.values() for entry in chain):
            words = f"{entry.source} {entry.destination} {entry.target}"
            assert not ("10.0.0" in words if table.family == 6 else "fd00" in words)
            assert table.family == 6 or "icmpv6" not in entry.protocol
    policies = [
        table.policies for table in iptables.tables(ruleset(BOTH)) if table.name == "filter"
    ]
    assert policies == [{"INPUT": "DROP", "FORWARD": "DROP"}] * 2


def test_tables_that_are_there_stay_closed() -> None:
    """A network that has lost its IPv6 leaves tables, which the kernel cannot drop."""
    tables = iptables.tables(ruleset(ONLY4), ipv6=True)
    (filters,) = (table for table in tables if (table.family, table.name) == (6, "filter"))
    assert filters.policies == {"INPUT": "DROP", "FORWARD": "DROP"}
    assert [str(entry) for entry in filters.chains["FORWARD"]] == [
        "-m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
        # The limit of flows, which accepts nothing.
        *map(str, iptables_entries.entries(next(rule for rule in ruleset(ONLY4) if rule.flows), 6)),
    ]


@pytest.mark.parametrize("name", ["nftables", "iptables"])
def test_ipv6_alone(name: str) -> None:
    alone = replace(BOTH, subnets=BOTH.subnets[1:], gateways=BOTH.gateways[1:], address=None)
    text = backends.named(name).render(ruleset(alone))
    assert NAT in text
    assert not any(word in text for word in ("10.0.0", "192.168", "MASQUERADE", "masquerade"))


@pytest.mark.parametrize("family", [4, 6])
def test_a_family_without_an_address_stays_inside(family: int) -> None:
    """Its packets go nowhere, and nobody outside is heard."""
    inside = replace(BOTH, address=None) if family == 4 else replace(BOTH, address6=None, public=())
    rules = [rule for rule in ruleset(inside) if rule.family == family]
    upstream = [rule for rule in rules if "upstream" in (rule.iif, rule.oif)]
    assert {(rule.chain, rule.action) for rule in upstream} == {("raw", "drop"), ("guard", "drop")}
    assert any(rule.ports == (53,) for rule in rules)


def test_public_subnets_alone_leave() -> None:
    """Without an address to translate to, the private one stays inside."""
    rules = ruleset(replace(BOTH, address6=None))
    passing = [r for r in rules if r.chain == "forward" and r.oif == "upstream" and r.states]
    assert [r.sources for r in passing] == [ONLY4.subnets, (PUBLIC,), (PUBLIC,)]
    assert not any(rule.action == "snat" for rule in rules)
    (kept,) = (r for r in rules if r.chain == "guard" and r.sources == (IPv6Network("fd00:10::1"),))
    assert kept.action == "drop"


@pytest.mark.parametrize(
    "wrong",
    [
        forward("tcp", NAT, (80, 80), "10.0.0.5", 80),
        forward("tcp", "192.168.0.100", (80, 80), "fd00:10::5", 80),
        forward("tcp", NAT, (80, 80), "fd00:10::5", 80, "10.0.0.0/8"),
        # Of a guest's own address only what is left as it is.
        forward("tcp", OPEN, (80, 80), OPEN, 8080),
        forward("tcp", OPEN, (80, 80), "2001:db8:100::6", 80),
        forward("tcp", "fd00:10::5", (80, 80), "fd00:10::5", 80),
    ],
)
def test_forwards_that_cannot_be_are_refused(wrong: Forward) -> None:
    with pytest.raises(FirewallError):
        replace(BOTH, forwards=(wrong,))


def test_rules_of_two_families_are_refused() -> None:
    mixed: tuple[Any, ...] = (*ONLY4.subnets, PRIVATE)
    with pytest.raises(FirewallError, match="one family"):
        Rule(chain="forward", action="accept", sources=mixed)
    with pytest.raises(FirewallError, match="one family"):
        Rule(chain="forward", action="accept", sources=(PRIVATE,), protocol="icmp")


def test_a_limit_to_everybody_is_none() -> None:
    limits = ((network_of("::/0"), PRIVATE), ())
    first, second = (
        ruleset(replace(BOTH, forwards=(replace(FORWARDS[0], sources=limit),))) for limit in limits
    )
    assert first == second


# -- a kernel that cannot --------------------------------------------------------


def test_ip6_tables_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "ip_tables_names"
    there.touch()
    monkeypatch.setattr(iptables, "TABLE_NAMES", {4: there, 6: tmp_path / "ip6_tables_names"})
    monkeypatch.setattr(iptables, "library_found", lambda: True)
    monkeypatch.setattr("os.uname", lambda: type("Uname", (), {"release": "none"}))
    iptables.require()
    assert backends.choose("iptables").name == "iptables"
    with pytest.raises(FirewallError, match="no legacy ip6tables"):
        backends.choose("iptables", ipv6=True)


# -- the host --------------------------------------------------------------------

TRANSITS = (
    host_policy.Transit("natns-host", IPv4Network("192.168.150.0/24")),
    host_policy.Transit("natns-host", IPv6Network("fd00:20::/64")),
)
HOST_FORWARD = host_policy.HostForward(
    "tcp", None, 2222, 2222, IPv6Address("fd00:20::2"), "natns-host"
)
HOST_POLICY = host_policy.HostPolicy(transits=TRANSITS, forwards=(HOST_FORWARD,))
BRIDGED = host_policy.HostPolicy(
    private=(host_policy.Private("virbr10", (PRIVATE,)), host_policy.Private("virbr11")),
    provider=(host_policy.Provider("br0", IPv6Address(NAT)), host_policy.Provider("br0", PUBLIC)),
    bridge_nf6=True,
)


def test_host_table() -> None:
    assert nftables.script(host_rules.rules(HOST_POLICY), host_nftables.HOST) == HOST_TABLE


def test_certain_clients_of_a_published_port() -> None:
    limited = replace(HOST_FORWARD, sources=(IPv6Network("2001:db8:77::/64"),))
    rules = host_rules.own_rules(replace(HOST_POLICY, forwards=(limited,)))
    assert [nft_statements.statement(rule) for rule in rules] == [
        "ip6 saddr 2001:db8:77::/64 ip6 daddr != ::1 fib daddr type local tcp dport 2222"
        " dnat ip6 to fd00:20::2"
    ]
    assert [str(entry) for rule in rules for entry in iptables_entries.entries(rule, 6)] == [
        "-s 2001:db8:77::/64 ! -d ::1/128 -p tcp -m addrtype --dst-type LOCAL"
        " -m tcp --dport 2222 -j DNAT --to-destination fd00:20::2"
    ]


def statements(policy: host_policy.HostPolicy, parent: str) -> list[str]:
    rules = foreign_chains.seen_in(host_accepts.accepts(policy), parent)
    return [
        nft_statements.statement(rule).removesuffix(' comment "libvirt-natns"') for rule in rules
    ]


def test_each_foreign_table_gets_what_it_can_see() -> None:
    four = ["ip saddr 192.168.150.0/24", "ip daddr 192.168.150.0/24"]
    six = ["ip6 saddr fd00:20::/64", "ip6 daddr fd00:20::/64"]
    for parent, expected in (
        ("ip filter", four),
        ("ip6 filter", six),
        ("inet x", four + six),
    ):
        found = [
            line.split(" ", 2)[2].removesuffix(" accept")
            for line in statements(HOST_POLICY, parent)
        ]
        assert found == expected


def test_bridged_frames_of_ipv6() -> None:
    link = 'iifname "br0" oifname "br0"'
    assert statements(BRIDGED, "ip6 filter") == [
        f"{link} ip6 saddr fe80::/10 accept",
        f"{link} ip6 daddr fe80::/10 accept",
        f"{link} ip6 daddr ff02::/16 accept",
        'iifname "virbr10" oifname "virbr10" accept',
        f"{link} ip6 saddr {NAT} accept",
        f"{link} ip6 daddr {NAT} accept",
        f"{link} ip6 saddr {PUBLIC} accept",
        f"{link} ip6 daddr {PUBLIC} accept",
    ]
    assert statements(BRIDGED, "ip filter") == []
    assert {rule.iif or rule.oif for rule in host_rules.rules(BRIDGED)} == {"virbr10"}


def test_each_family_has_its_own_chains_in_legacy_iptables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(iptables, "kernel_has", lambda _: True)
    held: dict[int, frozenset[str]] = {4: frozenset(), 6: frozenset({"filter"})}
    monkeypatch.setattr(iptables, "in_use", lambda _, family=4: held[family])
    wanted = host_iptables.wanted_chains(
        host_rules.rules(HOST_POLICY), host_accepts.accepts(HOST_POLICY)
    )
    tables = {(t["family"], t["name"]): t["chains"] for t in host_iptables.tables(wanted)}
    assert list(tables) == [
        (4, "nat"),
        (4, "raw"),
        (4, "mangle"),
        (4, "filter"),
        (6, "nat"),
        (6, "raw"),
        (6, "mangle"),
        (6, "filter"),
    ]
    (dnat,) = tables[6, "nat"]["NATNS-DNAT"]
    assert dnat["target"] == ("DNAT", {"to-destination": "fd00:20::2"})
    # A kernel without ip6_tables has networks of IPv4.
    monkeypatch.setattr(iptables, "kernel_has", lambda family: family == 4)
    wanted = host_iptables.wanted_chains(
        host_rules.rules(HOST_POLICY), host_accepts.accepts(HOST_POLICY)
    )
    assert {table["family"] for table in host_iptables.tables(wanted)} == {4}
    monkeypatch.setattr(iptables, "kernel_has", lambda _: True)
    # With nftables, only what others drop in legacy tables is a matter of these.
    wanted = host_iptables.wanted_chains((), host_accepts.accepts(HOST_POLICY))
    assert {table["family"] for table in host_iptables.tables(wanted)} == {6}


def test_what_a_network_adds_to_foreign_tables() -> None:
    part = host_parts.make(BRIDGED)
    assert part.accepts == []
    assert part.links6 == ["br0"]
    assert len(part.accepts_in("ip6 filter")) == len(part.accepts_in("inet x")) == 5
    assert part.counts()["neighbours br0"] == 1
    assert host_parts.load(host_parts.dump(part)) == part
    # A part of an earlier version says nothing of it.
    assert host_parts.load(json.dumps({"transit": "natns-host"})).accepts_in("ip6 filter") == []


# -- flows -----------------------------------------------------------------------


def test_flows_of_ipv6_are_read() -> None:
    def attribute(kind: int, value: bytes) -> bytes:
        return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)

    def direction(kind: int, source: str, target: str) -> bytes:
        pair = attribute(3, parsed(source).packed) + attribute(4, parsed(target).packed)
        proto = attribute(1, bytes([6])) + attribute(3, struct.pack("!H", 2222))
        return attribute(kind, attribute(1, pair) + attribute(2, proto))

    client = "2001:db8:203::9"
    entry = conntrack.parse_entry(direction(1, client, NAT) + direction(2, "fd00:10::5", client))
    assert (entry.protocol, entry.asked, entry.port) == (6, parsed(NAT), 2222)
    assert entry.answered == (parsed("fd00:10::5"), parsed(client))
    claim = replace(FORWARDS[0], target=parsed("fd00:10::5"))
    assert conntrack.concerns(claim, entry, frozenset())
    assert not conntrack.concerns(FORWARDS[3], entry, frozenset())


def test_flows_to_a_guests_own_address() -> None:
    published = FORWARDS[4]
    client = parsed("2001:db8:203::9")
    own = conntrack.ConntrackEntry(
        protocol=6, client=client, asked=parsed(OPEN), port=80,
        answered=(parsed(OPEN), client), answering_port=80, assured=False, zone=0, name=b"",
    )  # fmt: skip
    assert conntrack.concerns(published, own, frozenset())
    for other in (
        replace(own, port=82),
        # The guest's own flow to a port 80 elsewhere.
        replace(own, client=parsed(OPEN), asked=client, answered=(client, parsed(OPEN))),
    ):
        assert not conntrack.concerns(published, other, frozenset())
