# SPDX-License-Identifier: LGPL-2.1-or-later
"""The firewall as text: what an administrator would read, and no root needed."""

import difflib
import json
import os
import subprocess
import sys
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import (
    backends,
    foreign_chains,
    host_accepts,
    host_firewall,
    host_iptables,
    host_nftables,
    host_policy,
    host_rules,
    iptables,
    iptables_entries,
    iptables_save,
    iptables_syntax,
    nfnetlink,
    nft,
    nft_listing,
    nft_statements,
    nftables,
    sample_packets,
    stopping_chains,
)
from libvirt_natns.firewall.namespace_policy import Policy
from libvirt_natns.firewall.namespace_rules import ruleset
from libvirt_natns.firewall.rule import Rule
from libvirt_natns.model.publication import Forward, PortProtocol, PortSet, StaticNat

GUEST = IPv4Address("10.0.0.5")

ADDRESS = IPv4Address("192.168.0.100")

POLICY = Policy(
    inner="virbr10",
    upstream="upstream",
    subnets=(IPv4Network("10.0.0.0/24"), IPv4Network("10.9.0.0/16")),
    gateways=(IPv4Address("10.0.0.1"),),
    address=ADDRESS,
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
	set flows {
		type mark
		size 512
		flags dynamic
	}
	chain raw {
		type filter hook prerouting priority raw; policy accept;
		iifname "upstream" ip daddr 192.168.0.100 accept
		iifname "upstream" meta nfproto ipv4 drop comment "not addressed to an upstream address"
	}
	chain input {
		type filter hook input priority filter; policy drop;
		iifname "lo" accept
		ct state established,related accept
		ip saddr { 10.0.0.0/24, 10.9.0.0/16 } ip saddr != @known limit rate over 10/second burst 50 packets drop
		ip saddr { 10.0.0.0/24, 10.9.0.0/16 } update @known { ip saddr }
		ct state new ct status & confirmed == 0 add @flows { numgen inc mod 512 ct count over 64 } drop
		iifname "virbr10" udp dport 67 accept comment "DHCP"
		iifname "virbr10" ip saddr { 10.0.0.0/24, 10.9.0.0/16 } ip daddr 10.0.0.1 udp dport { 53, 69 } accept
		iifname "virbr10" ip saddr { 10.0.0.0/24, 10.9.0.0/16 } ip daddr 10.0.0.1 tcp dport 53 accept
		iifname "virbr10" ip daddr 10.0.0.1 icmp type echo-request accept
		iifname "virbr10" ip saddr { 10.0.0.0/24, 10.9.0.0/16 } meta l4proto tcp reject with tcp reset
		iifname "virbr10" ip saddr { 10.0.0.0/24, 10.9.0.0/16 } meta l4proto udp reject with icmpx port-unreachable
		iifname "upstream" ip daddr 192.168.0.100 icmp type echo-request accept
	}
	chain clamp {
		type filter hook forward priority mangle; policy accept;
		tcp flags & (syn|rst) == syn tcp option maxseg size set rt mtu
	}
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state established,related accept
		ct state new ct status & confirmed == 0 add @flows { numgen inc mod 512 ct count over 64 } drop
		ip saddr { 10.0.0.0/24, 10.9.0.0/16 } ip saddr != @known limit rate over 10/second burst 50 packets drop
		ip saddr { 10.0.0.0/24, 10.9.0.0/16 } update @known { ip saddr }
		iifname "virbr10" oifname "upstream" ip saddr { 10.0.0.0/24, 10.9.0.0/16 } ip daddr 169.254.0.0/16 reject with icmpx admin-prohibited comment "link-local"
		iifname "virbr10" oifname "virbr10" ip saddr 10.0.0.0/24 ip daddr 10.0.0.0/24 drop comment "within one subnet"
		iifname "virbr10" oifname "virbr10" ip saddr 10.9.0.0/16 ip daddr 10.9.0.0/16 drop comment "within one subnet"
		iifname "virbr10" ip daddr { 10.0.0.0/24, 10.9.0.0/16 } ip daddr != @known limit rate over 10/second burst 50 packets drop
		iifname "virbr10" ip daddr { 10.0.0.0/24, 10.9.0.0/16 } update @known { ip daddr }
		iifname "virbr10" oifname "virbr10" ip saddr { 10.0.0.0/24, 10.9.0.0/16 } ip daddr { 10.0.0.0/24, 10.9.0.0/16 } accept comment "between private subnets"
		iifname "virbr10" oifname "upstream" ip saddr { 10.0.0.0/24, 10.9.0.0/16 } ct state new accept
	}
	chain srcnat {
		type nat hook postrouting priority srcnat; policy accept;
		oifname "upstream" masquerade
	}
	chain guard {
		type filter hook postrouting priority srcnat + 10; policy accept;
		oifname "upstream" ip saddr != 192.168.0.100 drop comment "not translated"
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

IPTABLES = """\
*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
-A POSTROUTING -o upstream -j MASQUERADE
COMMIT
*mangle
:FORWARD ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
-A FORWARD -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
-A POSTROUTING -o upstream -m conntrack --ctstate INVALID,UNTRACKED -j DROP
-A POSTROUTING -o upstream -m conntrack ! --ctstatus CONFIRMED -j ACCEPT
-A POSTROUTING -o upstream -m conntrack --ctrepldst 192.168.0.100 --ctdir ORIGINAL -j ACCEPT
-A POSTROUTING -o upstream -m conntrack --ctorigdst 192.168.0.100 --ctdir REPLY -j ACCEPT
-A POSTROUTING -o upstream -j DROP
COMMIT
*raw
:PREROUTING ACCEPT [0:0]
-A PREROUTING -d 192.168.0.100/32 -i upstream -j ACCEPT
-A PREROUTING -d 0.0.0.0/0 -i upstream -m comment --comment "not addressed to an upstream address" -j DROP
COMMIT
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A INPUT -m conntrack --ctstate NEW -m conntrack ! --ctstatus CONFIRMED -m statistic --mode nth --every 64 --packet 0 -m connlimit --connlimit-above 512 --connlimit-mask 0 -m recent --set --name natns-full --mask 0.0.0.0 -j DROP
-A INPUT -m conntrack --ctstate NEW -m recent --rcheck --seconds 30 --name natns-full --mask 0.0.0.0 -j DROP
-A INPUT -i virbr10 -p udp -m udp --dport 67 -m comment --comment DHCP -j ACCEPT
-A INPUT -s 10.0.0.0/24 -d 10.0.0.1/32 -i virbr10 -p udp -m multiport --dports 53,69 -j ACCEPT
-A INPUT -s 10.0.0.0/24 -d 10.0.0.1/32 -i virbr10 -p tcp -m tcp --dport 53 -j ACCEPT
-A INPUT -d 10.0.0.1/32 -i virbr10 -p icmp -m icmp --icmp-type echo-request -j ACCEPT
-A INPUT -s 10.0.0.0/24 -i virbr10 -p tcp -j REJECT --reject-with tcp-reset
-A INPUT -s 10.0.0.0/24 -i virbr10 -p udp -j REJECT --reject-with icmp-port-unreachable
-A INPUT -d 192.168.0.100/32 -i upstream -p icmp -m icmp --icmp-type echo-request -j ACCEPT
-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A FORWARD -m conntrack --ctstate NEW -m conntrack ! --ctstatus CONFIRMED -m statistic --mode nth --every 64 --packet 0 -m connlimit --connlimit-above 512 --connlimit-mask 0 -m recent --set --name natns-full --mask 0.0.0.0 -j DROP
-A FORWARD -m conntrack --ctstate NEW -m recent --rcheck --seconds 30 --name natns-full --mask 0.0.0.0 -j DROP
-A FORWARD -s 10.0.0.0/24 -d 169.254.0.0/16 -i virbr10 -o upstream -m comment --comment link-local -j REJECT --reject-with icmp-admin-prohibited
-A FORWARD -d 10.0.0.0/24 -i virbr10 -m recent ! --rcheck --seconds 300 --name natns-rdest4 --rdest -m hashlimit --hashlimit-above 10/sec --hashlimit-burst 50 --hashlimit-name natns-rdest4 --hashlimit-htable-expire 10000 -j DROP
-A FORWARD -d 10.0.0.0/24 -i virbr10 -m recent --set --name natns-rdest4 --rdest -j MARK --set-xmark 0x0/0x0
-A FORWARD -s 10.0.0.0/24 -i virbr10 -o upstream -m conntrack --ctstate NEW -j ACCEPT
COMMIT
"""  # noqa: E501 - as iptables-save prints it


def forward(
    proto: PortProtocol, ports: tuple[int, int], to: tuple[int, int], *sources: str
) -> Forward:
    """Ports of the policy's address, to 10.0.0.5."""
    limits = tuple(map(IPv4Network, sources))
    own = "uuid", "guest web", "net"
    return Forward(*own, proto, ADDRESS, *ports, GUEST, *to, limits)


def static(address: str, target: str, *ports: PortSet) -> StaticNat:
    own = IPv4Address(address), IPv4Address(target)
    return StaticNat("uuid", "guest web", "net", *own, ports)


FORWARDS = (
    forward("udp", (8000, 8010), (8000, 8010)),
    forward("tcp", (9000, 9002), (7000, 7002)),
    forward("tcp", (3000, 3001), (22, 23), "192.168.0.0/24", "10.0.0.6"),
    forward("sctp", (9100, 9101), (80, 80)),
    forward("tcp", (2222, 2222), (22, 22)),
)
STATICS = (
    static("192.168.0.111", "10.0.0.7", PortSet("tcp", 80, 80), PortSet("udp", 5000, 5010)),
    static("192.168.0.110", "10.0.0.6"),
)

PUBLISHED_NFTABLES = """\
	map ports {
		type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
		elements = { 192.168.0.100 . sctp . 9100 : 10.0.0.5 . 80, 192.168.0.100 . sctp . 9101 : 10.0.0.5 . 80, 192.168.0.100 . tcp . 2222 : 10.0.0.5 . 22, 192.168.0.100 . tcp . 9000 : 10.0.0.5 . 7000, 192.168.0.100 . tcp . 9001 : 10.0.0.5 . 7001, 192.168.0.100 . tcp . 9002 : 10.0.0.5 . 7002 }
	map ranges {
		type ipv4_addr . inet_proto . inet_service : ipv4_addr
		flags interval
		elements = { 192.168.0.100 . udp . 8000-8010 : 10.0.0.5 }
		iifname "upstream" ip daddr { 192.168.0.100, 192.168.0.110, 192.168.0.111 } accept
	chain dstnat {
		type nat hook prerouting priority dstnat; policy accept;
		dnat ip to ip daddr . meta l4proto . th dport map @ports
		dnat ip to ip daddr . meta l4proto . th dport map @ranges
		ip saddr { 192.168.0.0/24, 10.0.0.6 } ip daddr 192.168.0.100 tcp dport 3000-3001 dnat ip to tcp dport map { 3000 : 10.0.0.5 . 22, 3001 : 10.0.0.5 . 23 }
		ip daddr 192.168.0.110 dnat ip to 10.0.0.6
		ip daddr 192.168.0.111 tcp dport 80 dnat ip to 10.0.0.7
		ip daddr 192.168.0.111 udp dport 5000-5010 dnat ip to 10.0.0.7
		iifname "upstream" ip daddr { 192.168.0.100, 192.168.0.110, 192.168.0.111 } icmp type echo-request accept
		iifname "upstream" oifname "virbr10" ct status dnat ct state new accept comment "published"
		iifname "virbr10" oifname "virbr10" ip saddr 10.0.0.0/24 ct status dnat ct state new accept comment "hairpin"
		oifname "upstream" ip saddr 10.0.0.6 snat ip to 192.168.0.110
		oifname "upstream" ip saddr 10.0.0.7 snat ip to 192.168.0.111
		oifname "virbr10" ip saddr 10.0.0.0/24 ct status dnat masquerade comment "hairpin"
		oifname "upstream" ip saddr != { 192.168.0.100, 192.168.0.110, 192.168.0.111 } drop comment "not translated"
		arp operation request arp daddr ip { 10.0.0.1, 192.168.0.100, 192.168.0.110, 192.168.0.111 } arp saddr ip != @known limit rate over 10/second burst 50 packets drop
		arp operation request arp daddr ip { 10.0.0.1, 192.168.0.100, 192.168.0.110, 192.168.0.111 } update @known { arp saddr ip }
"""  # noqa: E501 - as nft lists it

PUBLISHED_IPTABLES = """\
-A PREROUTING -d 192.168.0.100/32 -p sctp -m multiport --dports 9100:9101 -j DNAT --to-destination 10.0.0.5:80
-A PREROUTING -d 192.168.0.100/32 -p tcp -m tcp --dport 2222 -j DNAT --to-destination 10.0.0.5:22
-A PREROUTING -s 192.168.0.0/24 -d 192.168.0.100/32 -p tcp -m tcp --dport 3000:3001 -j DNAT --to-destination 10.0.0.5:22-23/3000
-A PREROUTING -s 10.0.0.6/32 -d 192.168.0.100/32 -p tcp -m tcp --dport 3000:3001 -j DNAT --to-destination 10.0.0.5:22-23/3000
-A PREROUTING -d 192.168.0.100/32 -p tcp -m tcp --dport 9000:9002 -j DNAT --to-destination 10.0.0.5:7000-7002/9000
-A PREROUTING -d 192.168.0.100/32 -p udp -m udp --dport 8000:8010 -j DNAT --to-destination 10.0.0.5
-A PREROUTING -d 192.168.0.110/32 -j DNAT --to-destination 10.0.0.6
-A PREROUTING -d 192.168.0.111/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.7
-A PREROUTING -d 192.168.0.111/32 -p udp -m udp --dport 5000:5010 -j DNAT --to-destination 10.0.0.7
-A POSTROUTING -s 10.0.0.6/32 -o upstream -j SNAT --to-source 192.168.0.110
-A POSTROUTING -s 10.0.0.7/32 -o upstream -j SNAT --to-source 192.168.0.111
-A POSTROUTING -s 10.0.0.0/24 -o virbr10 -m conntrack --ctstate DNAT -m comment --comment hairpin -j MASQUERADE
-A POSTROUTING -o upstream -m conntrack --ctrepldst 192.168.0.110 --ctdir ORIGINAL -j ACCEPT
-A POSTROUTING -o upstream -m conntrack --ctorigdst 192.168.0.110 --ctdir REPLY -j ACCEPT
-A POSTROUTING -o upstream -m conntrack --ctrepldst 192.168.0.111 --ctdir ORIGINAL -j ACCEPT
-A POSTROUTING -o upstream -m conntrack --ctorigdst 192.168.0.111 --ctdir REPLY -j ACCEPT
-A PREROUTING -d 192.168.0.110/32 -i upstream -j ACCEPT
-A PREROUTING -d 192.168.0.111/32 -i upstream -j ACCEPT
-A INPUT -d 192.168.0.110/32 -i upstream -p icmp -m icmp --icmp-type echo-request -j ACCEPT
-A INPUT -d 192.168.0.111/32 -i upstream -p icmp -m icmp --icmp-type echo-request -j ACCEPT
-A FORWARD -i upstream -o virbr10 -m conntrack --ctstate DNAT -m conntrack --ctstate NEW -m comment --comment published -j ACCEPT
-A FORWARD -s 10.0.0.0/24 -i virbr10 -o virbr10 -m conntrack --ctstate DNAT -m conntrack --ctstate NEW -m comment --comment hairpin -j ACCEPT
"""  # noqa: E501 - as iptables-save prints it

HOST_POLICY = host_policy.HostPolicy(
    transits=(host_policy.Transit("natns-host", IPv4Network("192.168.150.0/24")),),
    private=(host_policy.Private("virbr10"), host_policy.Private("virbr11")),
    provider=(host_policy.Provider("br0", IPv4Address("192.168.0.100")),),
    bridge_nf=True,
)

HOST_TABLE = """\
add table inet natns
delete table inet natns
table inet natns {
	map zones {
		typeof iifname : ct zone
		elements = { "virbr10" : 59098, "virbr11" : 58188 }
	}
	set kept {
		type ifname
		elements = { "virbr10", "virbr11" }
	}
	chain raw {
		type filter hook prerouting priority -450; policy accept;
		ct zone set iifname map @zones
		iifname != "lo" ip daddr 127.0.0.0/8 drop
		iifname "natns-host" ip saddr 127.0.0.0/8 drop
		iifname != "natns-host" ip daddr 192.168.150.1 udp dport 305 drop
		iifname != "natns-host" ip daddr 192.168.150.1 tcp dport 305 drop
	}
	chain bridged_in {
		type nat hook prerouting priority dstnat - 1; policy accept;
		iifname @kept dnat ip to ip daddr
		iifname @kept dnat ip6 to ip6 daddr
	}
	chain clamp {
		type filter hook forward priority mangle; policy accept;
		iifname "natns-host" tcp flags & (syn|rst) == syn tcp option maxseg size set rt mtu
		oifname "natns-host" tcp flags & (syn|rst) == syn tcp option maxseg size set rt mtu
	}
	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname "natns-host" ip saddr 192.168.150.0/24 accept
		iifname "natns-host" drop
		oifname "natns-host" ct state established,related accept
		oifname "natns-host" drop
	}
	chain output {
		type filter hook output priority filter; policy accept;
		oifname "natns-host" ct status dnat accept
		oifname "natns-host" ct state established,related accept
		oifname "natns-host" ip daddr 192.168.150.0/24 meta l4proto tcp drop
		oifname "natns-host" ip daddr 192.168.150.0/24 meta l4proto udp drop
		oifname "natns-host" ip daddr 192.168.150.0/24 meta l4proto sctp drop
	}
	chain bridged_out {
		type nat hook postrouting priority srcnat - 1; policy accept;
		oifname @kept snat ip to ip saddr
		oifname @kept snat ip6 to ip6 saddr
	}
	chain srcnat {
		type nat hook postrouting priority srcnat; policy accept;
		oifname != "natns-host" ip saddr 192.168.150.0/24 masquerade
	}
}
"""
NEW_TABLE = HOST_TABLE.replace(
    "add table inet natns\ndelete table inet natns", "create table inet natns"
)
"""As it is loaded where the host has no such table."""

HOST_FORWARDS = (
    host_policy.HostForward("tcp", None, 2222, 2222, IPv4Address("192.168.150.2"), "natns-host"),
    host_policy.HostForward("udp", None, 80, 90, IPv4Address("192.168.150.2"), "natns-host"),
    host_policy.HostForward(
        "sctp", IPv4Address("192.168.0.2"), 80, 80, IPv4Address("192.168.150.3"), "natns-host"
    ),
    host_policy.HostForward(
        "tcp",
        IPv4Address("192.168.0.2"),
        443,
        444,
        IPv4Address("192.168.150.3"),
        "natns-host",
        (IPv4Network("192.168.0.0/24"), IPv4Network("10.0.0.6")),
    ),
)

GIVEN = "ip daddr 192.168.0.2 fib daddr type local"
HOST_PUBLISHED = f"""\
	map ports {{
		type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
		elements = {{ 192.168.0.2 . sctp . 80 : 192.168.150.3 . 80 }}
	map local_ports {{
		type inet_proto . inet_service : ipv4_addr . inet_service
		elements = {{ tcp . 2222 : 192.168.150.2 . 2222 }}
	map local_ranges {{
		type inet_proto . inet_service : ipv4_addr
		flags interval
		elements = {{ udp . 80-90 : 192.168.150.2 }}
	chain dstnat {{
		fib daddr type local dnat ip to ip daddr . meta l4proto . th dport map @ports
		fib daddr type local dnat ip to meta l4proto . th dport map @local_ports
		fib daddr type local dnat ip to meta l4proto . th dport map @local_ranges
		ip saddr 192.168.0.0/24 {GIVEN} tcp dport 443-444 dnat ip to 192.168.150.3
		ip saddr 10.0.0.6 {GIVEN} tcp dport 443-444 dnat ip to 192.168.150.3
	chain dstnat_prerouting {{
		type nat hook prerouting priority -85; policy accept;
		jump dstnat
	chain dstnat_output {{
		type nat hook output priority -85; policy accept;
		jump dstnat
		oifname "natns-host" ct status dnat ct state new accept
		oifname "natns-host" ip saddr 192.168.150.0/24 ct status dnat masquerade
		oifname "natns-host" ip saddr 127.0.0.0/8 ct status dnat masquerade
"""

ACCEPTS = """\
iifname "natns-host" ip saddr 192.168.150.0/24 accept comment "libvirt-natns"
oifname "natns-host" ip daddr 192.168.150.0/24 accept comment "libvirt-natns"
iifname "virbr10" oifname "virbr10" accept comment "libvirt-natns"
iifname "virbr11" oifname "virbr11" accept comment "libvirt-natns"
iifname "br0" oifname "br0" ip saddr 192.168.0.100 accept comment "libvirt-natns"
iifname "br0" oifname "br0" ip daddr 192.168.0.100 accept comment "libvirt-natns"
"""


def one_subnet() -> Policy:
    return Policy(
        POLICY.inner, POLICY.upstream, POLICY.subnets[:1], POLICY.gateways, POLICY.address
    )


def test_nftables_script() -> None:
    assert nftables.render(ruleset(POLICY)) == NFTABLES


def test_iptables_tables() -> None:
    assert iptables.render(ruleset(one_subnet())) == IPTABLES


def added(before: str, after: str) -> str:
    """The lines that a text has more than another one, without the ends of blocks."""
    old, new = ([line for line in text.splitlines() if line != "\t}"] for text in (before, after))
    lines = difflib.ndiff(old, new)
    return "".join(f"{line[2:]}\n" for line in lines if line[0] == "+")


def publishing() -> Policy:
    return replace(one_subnet(), forwards=FORWARDS, statics=STATICS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("nftables", PUBLISHED_NFTABLES), ("iptables", PUBLISHED_IPTABLES)],
    ids=["nftables", "iptables"],
)
def test_what_published_ports_and_addresses_add(name: str, expected: str) -> None:
    render = backends.named(name).render
    text = render(ruleset(publishing()))
    assert added(render(ruleset(one_subnet())), text) == expected
    # Whoever asks first does not matter.
    turned = replace(publishing(), forwards=FORWARDS[::-1], statics=STATICS[::-1])
    assert render(ruleset(turned)) == text


def test_a_limit_to_everybody_is_none() -> None:
    everybody = forward("tcp", (1, 1), (2, 2), "0.0.0.0/0", "10.0.0.6")
    nobody_else = forward("tcp", (1, 1), (2, 2))
    policies = (replace(POLICY, forwards=(limit,)) for limit in (everybody, nobody_else))
    first, second = (ruleset(policy) for policy in policies)
    assert first == second


@pytest.mark.parametrize(
    "wrong",
    [
        forward("tcp", (9000, 9002), (7000, 7001)),
        forward("tcp", (9000, 9002), (65534, 65536)),
        forward("tcp", (0, 1), (0, 1)),
        forward("tcp", (2, 1), (2, 1)),
        replace(FORWARDS[0], address=IPv4Address("192.168.0.199")),
    ],
)
def test_forwards_that_no_backend_could_express_are_refused(wrong: Forward) -> None:
    with pytest.raises(FirewallError):
        ruleset(replace(POLICY, forwards=(wrong,)))


@pytest.mark.parametrize("rival", [(8000, 8000), (8010, 8020), (7000, 9000)])
def test_a_port_published_twice_is_refused(rival: tuple[int, int]) -> None:
    with pytest.raises(FirewallError, match="published twice"):
        replace(POLICY, forwards=(FORWARDS[0], forward("udp", rival, rival)))
    for other in (forward("tcp", rival, rival), forward("udp", (8011, 8020), (8011, 8020))):
        assert replace(POLICY, forwards=(FORWARDS[0], other)).forwards


def test_iptables_writes_a_rule_for_each_pair_of_networks() -> None:
    text = iptables.render(ruleset(POLICY))
    for source in POLICY.subnets:
        for destination in POLICY.subnets:
            assert f"-A FORWARD -s {source} -d {destination} -i virbr10 -o virbr10" in text


def test_nat_is_committed_before_forwarding_opens() -> None:
    order = [table.name for table in iptables.tables(ruleset(POLICY))]
    assert order[0] == "nat"
    assert order[-1] == "filter"


def test_replies_are_marked_by_the_address_that_was_asked_for() -> None:
    """A host with two uplinks leads marked packets by the table of that address."""
    to = IPv4Network("198.51.100.60/32")
    rule = Rule(chain="marked", iif="natns-host", replies_of=to, action="mark", mark=0x6E740001)
    assert nft_statements.statement(rule) == (
        'iifname "natns-host" ct direction reply ct original ip daddr 198.51.100.60'
        " meta mark set 0x6e740001"
    )
    (entry,) = iptables_entries.entries(rule, 4)
    assert entry.matches == (("conntrack", {"ctdir": "REPLY", "ctorigdst": str(to)}),)
    assert entry.target == ("MARK", {"set-xmark": "0x6e740001/0xffffffff"})
    forward = host_policy.HostForward(
        "tcp", None, 80, 80, IPv4Address("192.168.150.2"), "natns-host"
    )
    policy = host_policy.HostPolicy(
        transits=(host_policy.Transit("natns-host", IPv4Network("192.168.150.0/24")),),
        ways=host_policy.Ways(marks=((to, 0x6E740001), (IPv6Network("fd00::/64"), 0x6E740002))),
    )
    assert rule not in host_rules.rules(policy)
    published = replace(policy, forwards=(forward,))
    assert [each for each in host_rules.rules(published) if each.chain == "marked"] == [rule]


@pytest.mark.parametrize("name", ["nftables", "iptables"])
def test_nothing_but_named_interfaces_and_states_is_accepted(name: str) -> None:
    """No rule accepts forwarded packets whatever their origin and state."""
    rendered = backends.named(name).render(ruleset(POLICY))
    for rule in ruleset(POLICY):
        if rule.action == "accept":
            assert rule.iif or rule.states
    assert "policy drop" in rendered or "FORWARD DROP" in rendered


@pytest.mark.parametrize(
    "name",
    ['a"b', "a b", "a\nb", "a;b", "a{b", "$a", "a*", "virbr+", "a:b", "a,b", "!a", "-a", "a" * 16],
)
def test_interfaces_that_syntax_could_misread_are_refused(name: str) -> None:
    with pytest.raises(FirewallError, match="cannot be the interface"):
        Rule(chain="forward", iif=name, action="accept")
    with pytest.raises(FirewallError, match="cannot be the interface"):
        host_policy.HostPolicy(provider=(host_policy.Provider(name, IPv4Address("10.0.0.1")),))


@pytest.mark.parametrize(
    "name", ["virbr10", "br-0123456789ab", "eth0.100", "br~0", "=x", "+br", "br+x", "br@x"]
)
def test_usual_interfaces_are_taken(name: str) -> None:
    assert Rule(chain="forward", iif=name, action="accept").iif == name


@pytest.mark.parametrize("comment", ['a"b', "a\nb", "x" * 81, "a\\b"])
def test_comments_that_syntax_could_misread_are_refused(comment: str) -> None:
    with pytest.raises(FirewallError, match="cannot be the comment"):
        Rule(chain="forward", action="accept", comment=comment)


def test_rules_that_make_no_sense_are_refused() -> None:
    with pytest.raises(FirewallError, match="ports"):
        Rule(chain="input", action="accept", ports=(53,))
    with pytest.raises(FirewallError, match="guard"):
        Rule(chain="guard", action="drop", oif="upstream")
    with pytest.raises(FirewallError, match="translates"):
        Rule(chain="forward", action="dnat", to=GUEST)
    with pytest.raises(FirewallError, match="translates"):
        Rule(chain="srcnat", action="snat")
    with pytest.raises(FirewallError, match="translates"):
        Rule(chain="forward", action="accept", to=GUEST)
    two = Rule(chain="raw", sources=POLICY.subnets, not_sources=True, action="drop")
    with pytest.raises(FirewallError, match="negate"):
        list(iptables_entries.entries(two))


@pytest.mark.parametrize("field", ["inner", "upstream", "subnets", "gateways"])
def test_a_policy_without_limits_is_refused(field: str) -> None:
    values: dict[str, Any] = {
        name: getattr(POLICY, name)
        for name in ("inner", "upstream", "subnets", "gateways", "address")
    }
    with pytest.raises(FirewallError):
        Policy(**{**values, field: type(values[field])()})


def test_several_upstream_addresses_pass_the_guard() -> None:
    addresses = (IPv4Network("192.168.0.100"), IPv4Network("192.168.0.110"))
    rule = Rule(chain="guard", oif="upstream", sources=addresses, not_sources=True, action="drop")
    assert nft_statements.statement(rule) == (
        'oifname "upstream" ip saddr != { 192.168.0.100, 192.168.0.110 } drop'
    )
    text = "\n".join(map(str, iptables_entries.entries(rule)))
    assert "--ctrepldst 192.168.0.110" in text
    assert text.count("-j DROP") == 2


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nftables, "require", lambda: None)
    monkeypatch.setattr(iptables, "require", lambda: None)
    monkeypatch.setattr(nft, "program", lambda: "/usr/sbin/nft")
    assert backends.choose("auto").name == "nftables"
    assert backends.choose("iptables").name == "iptables"
    monkeypatch.setattr(nft, "program", lambda: None)
    assert backends.choose("auto").name == "iptables"
    with pytest.raises(FirewallError, match="no firewall backend"):
        backends.named("pf")


def test_missing_parts_come_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft, "program", lambda: None)
    with pytest.raises(FirewallError, match="install nftables"):
        backends.choose("nftables")
    monkeypatch.setattr(iptables, "library_found", lambda: False)
    monkeypatch.setattr(iptables, "kernel_has", lambda _: True)
    with pytest.raises(FirewallError, match="install python3-iptables"):
        backends.choose("auto")
    monkeypatch.setattr(iptables, "kernel_has", lambda _: False)
    with pytest.raises(FirewallError, match="no legacy iptables"):
        backends.choose("iptables")


def test_tables_in_a_listing_of_all() -> None:
    ours = "table inet natns {\n\tchain a {\n\t\taccept\n\t}\n}\n"
    foreign = "# Warning: table ip nat is managed by iptables-nft, do not touch!\n" + ours.replace(
        "inet natns", "ip nat"
    )
    assert nft_listing.block(ours + foreign, "inet natns") == ours
    assert nft_listing.block(foreign + ours, "inet natns") == ours
    assert nft_listing.block(foreign, "inet natns") == ""


def test_nft_complaints_become_one_line() -> None:
    told = "/dev/stdin:3:5-8: Error: syntax error, unexpected foo\nadd tabl\n    ^^^^\n"
    assert nft.condensed(told) == "syntax error, unexpected foo"
    assert nft.condensed("Operation not permitted (you must be root)\nx") == (
        "Operation not permitted (you must be root)"
    )
    assert nft.condensed("") == "no reason"


@pytest.mark.parametrize("end", ["kill -ABRT $$", "kill -SEGV $$"])
def test_a_crash_of_nft_is_a_refusal(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nft"
    program.write_text(f"#!/bin/sh\n{end}\n")
    program.chmod(0o755)
    monkeypatch.setattr(nft, "program", lambda: os.fspath(program))
    with pytest.raises(FirewallError, match="nft refused the rules"):
        nft.load(None, "add table inet natns\n")


def test_text_of_others_may_be_any_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nft"
    program.write_text("#!/bin/sh\nprintf '\\377'; cat\n")
    program.chmod(0o755)
    monkeypatch.setattr(nft, "program", lambda: os.fspath(program))
    assert nft.run(None, "x").stdout == "\udcffx"


def test_fingerprint_tells_texts_apart() -> None:
    assert backends.fingerprint("a") == backends.fingerprint("a") != backends.fingerprint("b")


def loaded_by(module: str) -> set[str]:
    """Return the modules that are loaded once a module has been imported."""
    check = f"import sys, {module}; print(*sys.modules)"
    return set(
        subprocess.run(
            [sys.executable, "-c", check], capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_the_backends_are_light() -> None:
    loaded = loaded_by("libvirt_natns.firewall.backends")
    assert not {"iptc", "pyroute2", "lxml", "libvirt"} & loaded


def test_the_child_of_iptables_loads_little_of_the_package() -> None:
    loaded = loaded_by("libvirt_natns.firewall.iptables_child")
    assert {name for name in loaded if name.startswith("libvirt_natns.")} == {
        "libvirt_natns.firewall",
        *(
            f"libvirt_natns.firewall.{name}"
            for name in ("iptables_child", "iptc_compare", "iptc_library", "iptc_tables")
        ),
    }


def test_host_table() -> None:
    assert nftables.script(host_rules.rules(HOST_POLICY), host_nftables.HOST) == HOST_TABLE


def test_what_published_ports_add_to_the_hosts_table() -> None:
    policy = replace(HOST_POLICY, forwards=HOST_FORWARDS)
    assert added(HOST_TABLE, nftables.script(host_rules.rules(policy), host_nftables.HOST)) == (
        HOST_PUBLISHED
    )
    assert host_accepts.accepts(policy) == host_accepts.accepts(HOST_POLICY)
    with pytest.raises(FirewallError, match="not a transit bridge"):
        replace(policy, transits=())


def test_host_accepts() -> None:
    lines = [nft_statements.statement(rule) for rule in host_accepts.accepts(HOST_POLICY)]
    assert "".join(f"{line}\n" for line in lines) == ACCEPTS


def test_bridged_frames_need_nothing_where_they_are_not_filtered() -> None:
    quiet = host_policy.HostPolicy(private=HOST_POLICY.private, provider=HOST_POLICY.provider)
    assert host_rules.rules(quiet) == ()
    assert host_accepts.accepts(quiet) == ()


def _host_tables(policy: host_policy.HostPolicy) -> list[dict[str, Any]]:
    return host_iptables.tables({4: host_rules.rules(policy)})


def jumps_of(table: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    """Return the chains that a table's built-in chains call, by built-in chain and order."""
    found: dict[tuple[str, str], list[str]] = {}
    for jump in table["jumps"]:
        found.setdefault((jump["builtin"], jump["order"]), []).append(jump["entry"]["target"][0])
    return found


def test_host_chains_of_legacy_iptables() -> None:
    tables = {table["name"]: table for table in _host_tables(HOST_POLICY)}
    assert list(tables) == ["nat", "raw", "mangle"]
    assert list(tables["raw"]["chains"]) == ["NATNS-PREROUTING"]
    assert jumps_of(tables["nat"])["POSTROUTING", "first"] == ["NATNS-POSTROUTING"]
    *kept, entry = tables["nat"]["chains"]["NATNS-POSTROUTING"]
    assert [each["oif"] for each in kept] == ["virbr10", "virbr11"]
    assert (entry["oif"], entry["source"]) == ("!natns-host", "192.168.150.0/24")


def test_published_ports_in_chains_of_legacy_iptables() -> None:
    policy = replace(HOST_POLICY, forwards=HOST_FORWARDS)
    nat, *_ = _host_tables(policy)
    assert list(nat["chains"]) == ["NATNS-KEEP", "NATNS-DNAT", "NATNS-POSTROUTING"]
    assert jumps_of(nat) == {
        # Nothing else is to translate what is private.
        ("PREROUTING", "first"): ["NATNS-KEEP"],
        # An administrator's rules come first.
        ("PREROUTING", "last"): ["NATNS-DNAT"],
        ("OUTPUT", "last"): ["NATNS-DNAT"],
        ("POSTROUTING", "first"): ["NATNS-POSTROUTING"],
    }
    kept, lines = (
        [str(iptables_syntax.ChainEntry(**entry)) for entry in nat["chains"][name]]
        for name in ("NATNS-KEEP", "NATNS-DNAT")
    )
    assert kept == [f"-i {each} -j NETMAP --to 0.0.0.0/0" for each in ("virbr10", "virbr11")]
    to, local = "-j DNAT --to-destination", "-m addrtype --dst-type LOCAL"
    given = f"-d 192.168.0.2/32 -p tcp {local} -m tcp --dport 443:444"
    assert lines == [
        f"-p tcp {local} -m tcp --dport 2222 {to} 192.168.150.2",
        f"-p udp {local} -m udp --dport 80:90 {to} 192.168.150.2",
        f"-d 192.168.0.2/32 -p sctp {local} -m multiport --dports 80 {to} 192.168.150.3",
        f"-s 192.168.0.0/24 {given} {to} 192.168.150.3",
        f"-s 10.0.0.6/32 {given} {to} 192.168.150.3",
    ]


def test_flags_of_tcp_as_each_nft_lists_them() -> None:
    forms = ("& (syn|rst) == syn", "& (syn | rst) == syn", "syn / syn,rst")
    assert len({nft_listing.canonical(f"tcp flags {form} accept") for form in forms}) == 1


def test_the_order_of_elements_says_nothing() -> None:
    """As nft lists the map that a script made: wrapped, reordered, protocols by number."""
    script = "elements = { tcp . 80 : 10.0.0.5 . 22, sctp . 17 : 10.0.0.5 . 6 }\n}"
    listed = "elements = { 132 . 17 : 10.0.0.5 . 6,\n\t\t\t     6 . 80 : 10.0.0.5 . 22 }\n}"
    assert nft_listing.canonical(script) == nft_listing.canonical(listed)
    assert nft_listing.canonical(script) != nft_listing.canonical(listed.replace("22", "23"))


def test_every_nft_lists_the_hosts_table_alike() -> None:
    script = nftables.script(
        host_rules.rules(replace(HOST_POLICY, forwards=HOST_FORWARDS)), host_nftables.HOST
    )
    # An earlier version's, which is replaced.
    former = script.replace("output priority -85", "output priority -100")
    later = former.replace("output priority -100", "output priority dstnat")
    assert later != former
    assert nft_listing.canonical(later) == nft_listing.canonical(former)


# -- foreign chains in nft -------------------------------------------------------


def chain(table: str, name: str, policy: str = "accept", hook: str = "forward") -> dict[str, Any]:
    family, table = table.split()
    return {
        "chain": {
            "family": family,
            "table": table,
            "name": name,
            "type": "filter",
            "hook": hook,
            "prio": 0,
            "policy": policy,
        }
    }


def rule(table: str, name: str, handle: int, *statements: dict[str, Any]) -> dict[str, Any]:
    family, table = table.split()
    place = {"family": family, "table": table, "chain": name}
    return {"rule": {**place, "handle": handle, "expr": list(statements)}}


def listing(*items: dict[str, Any]) -> str:
    return json.dumps({"nftables": [{"metainfo": {}}, *items]})


JUMP = {"jump": {"target": "NATNS-FORWARD"}}
MATCH = {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "eth0"}}


REJECT = {"xt": {"type": "target", "name": "REJECT"}}
CALL = {"jump": {"target": "last"}}
LIBVIRTS = {"jump": {"target": "LIBVIRT_FWO"}}
DOCKERS = {"jump": {"target": "DOCKER-USER"}}
FIREWALLD = [chain("inet firewalld", "filter_FORWARD")]
FIREWALLD.append(rule("inet firewalld", "filter_FORWARD", 1, {"reject": None}))
OWNED = {"table": {"family": "inet", "name": "firewalld", "flags": ["owner"]}}
OWNED_FILTER = {"table": {"family": "ip", "name": "filter", "flags": "owner"}}


@pytest.mark.parametrize(
    ("items", "shared"),
    [
        ([chain("ip filter", "FORWARD"), rule("ip filter", "FORWARD", 1, LIBVIRTS)], True),
        ([chain("ip filter", "FORWARD"), rule("ip filter", "FORWARD", 1, DOCKERS)], True),
        # An administrator's alone: packets of libvirt's networks do not pass, either.
        ([chain("ip filter", "FORWARD", "drop")], False),
        ([chain("ip filter", "FORWARD"), rule("ip filter", "FORWARD", 1, CALL)], False),
        ([chain("ip mangle", "FORWARD")], False),
        # By a zone of ours.
        (FIREWALLD, False),
        (FIREWALLD[:1], False),
        ([OWNED, *FIREWALLD], False),
        ([OWNED_FILTER, chain("ip filter", "FORWARD", "drop")], False),
        # An administrator's own.
        ([chain("inet filter", "forward", "drop")], False),
        ([chain("inet filter", "forward", "drop", hook="input")], False),
        ([chain("bridge filter", "forward", "drop")], False),
        ([chain("ip6 filter", "FORWARD"), rule("ip6 filter", "FORWARD", 1, LIBVIRTS)], True),
        ([chain("ip6 mangle", "FORWARD")], False),
        ([chain("inet natns", "forward", "drop")], False),
        ([chain("inet x", "f"), rule("inet x", "f", 1, {"counter": {}}, {"reject": {}})], False),
    ],
)
def test_which_foreign_chains_get_a_jump(items: list[dict[str, Any]], shared: bool) -> None:
    found = foreign_chains.parse(listing(*items))
    assert any(base.is_shared for base in found.bases) is shared


LOG = {"log": {"prefix": "x"}}
DROP, ACCEPT = {"drop": None}, {"accept": None}


@pytest.mark.parametrize(
    ("rules", "last", "end"),
    [
        ([[MATCH, DROP], [MATCH, REJECT], [ACCEPT]], [], None),
        ([[MATCH, DROP], [LOG], [{"counter": None}, REJECT]], [], 3),
        ([[{"xt": {"type": "match", "name": "comment"}}, DROP], [DROP]], [], 1),
        ([[{"limit": {"rate": 3}}, DROP], [DROP]], [], 2),
        # As ufw has it: a chain that may refuse all, or hold nothing.
        ([[MATCH, CALL], [CALL], [ACCEPT]], [[LOG], [REJECT]], 2),
        ([[CALL]], [], None),
        ([[CALL]], [[MATCH, ACCEPT], [DROP]], None),
    ],
)
def test_where_a_chain_ends(
    rules: list[list[dict[str, Any]]], last: list[list[dict[str, Any]]], end: int | None
) -> None:
    items = [chain("ip filter", "FORWARD")]
    items += [rule("ip filter", "FORWARD", i + 1, *each) for i, each in enumerate(rules)]
    items += [rule("ip filter", "last", 20 + i, *each) for i, each in enumerate(last)]
    (base,) = foreign_chains.parse(listing(*items)).bases
    assert base.end == end


@pytest.mark.parametrize(
    ("rules", "right"),
    [
        ([[MATCH, DROP], [JUMP]], True),
        ([[JUMP], [MATCH, ACCEPT], [LOG], [DROP], [MATCH, DROP]], True),
        ([[JUMP], [MATCH, DROP]], False),
        ([[JUMP], [MATCH, CALL]], False),
        ([[DROP], [JUMP]], False),
        ([[JUMP], [JUMP]], False),
        ([[DROP]], False),
    ],
)
def test_where_our_jump_may_stand(rules: list[list[dict[str, Any]]], right: bool) -> None:
    items = [chain("ip filter", "FORWARD")]
    items += [rule("ip filter", "FORWARD", i + 1, *each) for i, each in enumerate(rules)]
    (base,) = foreign_chains.parse(listing(*items)).bases
    assert base.has_jump is right


WAYS: sample_packets.WaysOut = {4: "eth0", 6: None}


def stopping() -> list[str]:
    """Return the chains that stop packets of the networks, in words."""
    return [str(each) for each in stopping_chains.find(host_accepts.accepts(HOST_POLICY), (), WAYS)]


def test_chains_that_stop_networks_are_named(kernel: dict[str, str]) -> None:
    drops = chain("inet guard", "forward", "drop")
    shared = [chain("ip filter", "FORWARD", "drop"), rule("ip filter", "FORWARD", 1, LIBVIRTS)]
    # Our jump is missing there, which is a difference, and says so itself.
    kernel["json"] = listing(*shared, drops)
    (line,) = stopping()
    assert line.startswith(
        "nftables: inet guard forward (policy drop) stops packets of the networks: add to it "
    )
    assert 'iifname "natns-host" ip saddr 192.168.150.0/24 accept;' in line
    by_name = {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "natns-host"}}
    kernel["json"] = listing(drops, rule("inet guard", "forward", 1, by_name, {"accept": None}))
    # Replies do not pass.
    (line,) = stopping()
    assert 'oifname "natns-host" ip daddr 192.168.150.0/24 accept' in line
    assert 'iifname "natns-host"' not in line
    every = rule("inet guard", "forward", 2, {"accept": None})
    kernel["json"] = listing(drops, every)
    assert stopping() == []
    assert script() == NEW_TABLE


@pytest.mark.parametrize(
    ("items", "remedy"),
    [
        ([rule("inet guard", "forward", 1, {"reject": {}})], 'insert at its beginning iifname "n'),
        ([rule("inet guard", "ufw-a", 1, LOG)], "ufw route allow in on natns-host; ufw route"),
    ],
)
def test_remedies(items: list[dict[str, Any]], remedy: str, kernel: dict[str, str]) -> None:
    kernel["json"] = listing(chain("inet guard", "forward", "drop"), *items)
    (line,) = stopping()
    assert f" packets of the networks: {remedy}" in line


def test_iptables_own_words_are_asked_for(
    kernel: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel["json"] = listing(
        chain("ip filter", "FORWARD"), rule("ip filter", "FORWARD", 1, MATCH, REJECT)
    )
    text = "\n*filter\n:FORWARD ACCEPT\n:DOCKER-USER -\n-A FORWARD -i natns-host -j REJECT\n"
    saved = iptables_save.parse(text)
    monkeypatch.setattr(iptables_save, "saved", lambda kind, family: saved)
    monkeypatch.setattr(iptables, "in_use", lambda namespace, family: frozenset())
    (line,) = stopping()
    assert line.startswith(
        "nftables: ip filter FORWARD (reject) stops packets of the networks: iptables -I"
        " DOCKER-USER -s 192.168.150.0/24 -i natns-host -j ACCEPT"
    )


def test_firewalls_with_an_owner_are_left_alone(kernel: dict[str, str]) -> None:
    """firewalld's chains, and whatever else only its owner may change, even with a jump of ours."""
    jump = rule("ip filter", "FORWARD", 6, JUMP)
    ours = {"chain": {"family": "ip", "table": "filter", "name": "NATNS-FORWARD"}}
    owned = [OWNED_FILTER, chain("ip filter", "FORWARD", "drop"), jump, ours]
    kernel["json"] = listing(*FIREWALLD, *owned)
    assert script() == NEW_TABLE
    assert list(host_nftables.repairs((), ())) == []
    kernel["json"] = listing(*FIREWALLD)
    assert stopping() == []


def test_a_jump_of_an_earlier_version_leaves_firewalld(kernel: dict[str, str]) -> None:
    jump = rule("inet firewalld", "filter_FORWARD", 6, JUMP)
    ours = {"chain": {"family": "inet", "table": "firewalld", "name": "NATNS-FORWARD"}}
    kernel["json"] = listing(*FIREWALLD, jump, ours)
    assert script().removeprefix(NEW_TABLE) == (
        "delete rule inet firewalld filter_FORWARD handle 6\n"
        "flush chain inet firewalld NATNS-FORWARD\ndelete chain inet firewalld NATNS-FORWARD\n"
    )


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What nft would list: the whole ruleset as JSON, and texts by name."""
    held = {"json": listing()}
    monkeypatch.setattr(nft, "program", lambda: "/usr/sbin/nft")
    monkeypatch.setattr(nft, "works", lambda: True)
    monkeypatch.setattr(nft, "ruleset_json", lambda *_: held["json"])
    monkeypatch.setattr(nftables, "listing", lambda _: held.get("inet natns", ""))
    monkeypatch.setattr(nft, "list_chain", lambda name: held[name])
    return held


def script() -> str:
    own, accepts = host_rules.rules(HOST_POLICY), host_accepts.accepts(HOST_POLICY)
    return "".join(repair.script for repair in host_nftables.repairs(own, accepts))


def test_beside_iptables_our_table_keeps_others_nat_off(kernel: dict[str, str]) -> None:
    own = host_firewall.framework_rules(HOST_POLICY, host_nftables, "iptables")
    assert {rule.action for rule in own} == {"keep"}
    # Nothing translates there, so nothing of ours is needed.
    assert list(host_nftables.repairs(own, ())) == []
    nat = chain("ip nat", "PREROUTING", hook="prerouting")
    nat["chain"]["type"] = "nat"
    kernel["json"] = listing(nat)
    (repair,) = host_nftables.repairs(own, ())
    assert repair.line == "nftables: table inet natns is missing"
    assert "iifname @kept dnat ip to ip daddr" in repair.script
    assert "masquerade" not in repair.script
    # When the NAT of others has gone, so does the table.
    kernel["json"] = listing({"table": {"family": "inet", "name": "natns"}})
    (repair,) = host_nftables.repairs(own, ())
    assert repair.script == "delete table inet natns\n"


def test_iptables_needs_no_nft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft, "program", lambda: None)
    own = host_firewall.framework_rules(HOST_POLICY, host_nftables, "iptables")
    assert host_nftables.ensure(own, ()) == ()
    assert host_nftables.differences(own, ()) == ()


def test_a_host_without_foreign_chains_gets_our_table_only(kernel: dict[str, str]) -> None:
    assert script() == NEW_TABLE


def test_a_foreign_chain_gets_one_jump_at_its_end(kernel: dict[str, str]) -> None:
    kernel["json"] = listing(
        chain("ip filter", "FORWARD", "drop"),
        rule("ip filter", "FORWARD", 5, LIBVIRTS),
        rule("ip filter", "FORWARD", 6, JUMP),
        rule("ip filter", "FORWARD", 7, MATCH, {"drop": None}),
        rule("ip filter", "FORWARD", 8, REJECT),
    )
    expected = "add chain ip filter NATNS-FORWARD\nflush chain ip filter NATNS-FORWARD\n"
    expected += "".join(
        f"add rule ip filter NATNS-FORWARD {line}\n" for line in ACCEPTS.splitlines()
    )
    expected += "delete rule ip filter FORWARD handle 6\n"
    jump = 'jump NATNS-FORWARD comment "libvirt-natns"'
    expected += f"insert rule ip filter FORWARD handle 8 {jump}\n"
    assert script() == NEW_TABLE + expected


def test_what_is_right_is_left_alone(kernel: dict[str, str]) -> None:
    accepts = "".join(f"\t\t{line}\n" for line in ACCEPTS.splitlines())
    table = HOST_TABLE.partition("delete table inet natns\n")[2]
    kernel["inet natns"] = nft_listing.canonical(table)
    kernel["ip filter NATNS-FORWARD"] = (
        f"table ip filter {{\n\tchain NATNS-FORWARD {{\n{accepts}\t}}\n}}\n"
    )
    own = {"table": {"family": "inet", "name": "natns"}}
    ours = {"chain": {"family": "ip", "table": "filter", "name": "NATNS-FORWARD"}}
    base = chain("ip filter", "FORWARD", "drop")
    libvirts = rule("ip filter", "FORWARD", 6, LIBVIRTS)
    kernel["json"] = listing(own, base, ours, libvirts, rule("ip filter", "FORWARD", 7, JUMP))
    assert script() == ""
    gone = [repair.script for repair in host_nftables.repairs((), ())]
    assert gone == [
        "delete table inet natns\n",
        "delete rule ip filter FORWARD handle 7\n",
        "flush chain ip filter NATNS-FORWARD\ndelete chain ip filter NATNS-FORWARD\n",
    ]


def test_a_foreign_table_with_an_odd_name_is_left_alone(kernel: dict[str, str]) -> None:
    item = chain("inet x", "forward", "drop")
    item["chain"]["table"] = 'a"; flush ruleset'
    kernel["json"] = listing(item)
    # It is not ours to change, whatever it is called.
    assert script() == NEW_TABLE


@pytest.mark.parametrize("has_arp", [True, False])
def test_a_failure_that_passes_does_not_cost_the_limits_of_arp(
    has_arp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(_namespace: str | None, text: str) -> None:
        if "arp natns" in text:
            raise FirewallError("nft refused the rules")
        loaded.append(text)

    def run(_namespace: str | None, commands: str) -> CompletedProcess[str]:
        assert commands == nftables.TRY_ARP
        return CompletedProcess([], 0 if has_arp else 1, "", "")

    monkeypatch.setattr(nft, "load", load)
    monkeypatch.setattr(nft, "run", run)
    monkeypatch.setattr(nfnetlink, "tables", set)
    if has_arp:
        with pytest.raises(FirewallError, match="nft refused the rules"):
            nftables.apply(None, ruleset(POLICY))
        assert not loaded
    else:
        nftables.apply(None, ruleset(POLICY))
        assert loaded


def test_a_kernel_without_nftables_has_no_rules_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program alone says nothing: ``firewall = "iptables"`` must work beside it."""

    def fail() -> str:
        raise FirewallError("cache initialization failed: Invalid argument")

    monkeypatch.setattr(nft, "program", lambda: "/usr/sbin/nft")
    monkeypatch.setattr(nfnetlink, "works", lambda: False)
    monkeypatch.setattr(nft, "ruleset_json", fail)
    own = host_firewall.framework_rules(HOST_POLICY, host_nftables, "iptables")
    accepts = host_accepts.accepts(HOST_POLICY)
    assert host_nftables.ensure(own, accepts) == ()
    assert host_nftables.differences(own, accepts) == ()
    assert stopping_chains.find(accepts, (), WAYS) == ()


def test_ports_that_dnsmasq_serves_by_its_options() -> None:
    served = (("tcp", 5353), ("udp", 4011))
    text = nftables.render(ruleset(replace(POLICY, served=served)))
    assert "ip daddr 10.0.0.1 udp dport { 53, 69, 4011 } accept" in text
    assert "ip daddr 10.0.0.1 tcp dport { 53, 5353 } accept" in text
