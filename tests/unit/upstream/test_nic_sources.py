# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sources of packets, from captured routes and rules."""

import struct
from ipaddress import IPv4Address, IPv4Network
from socket import AF_INET

import pytest

from libvirt_natns.firewall import iptables, nftables
from libvirt_natns.kernel import netlink
from libvirt_natns.upstream.router import nat_rules, nic_addresses, nic_sources
from libvirt_natns.upstream.router.nic_addresses import FOREVER, NicAddress
from libvirt_natns.upstream.router.nic_routes import NicRoute
from libvirt_natns.upstream.router.nic_rules import NicRule
from libvirt_natns.upstream.router.nic_snapshot import Capture
from libvirt_natns.upstream.router.target import Target

A, B, C = "198.51.100.10", "198.51.100.60", "198.51.100.61"


def address(ip: str, valid: int = FOREVER) -> NicAddress:
    packed = IPv4Address(ip).packed
    body = struct.pack("=BBBBI", AF_INET, 32, 0, 0, 7) + netlink.pack(
        [
            (netlink.IFA_ADDRESS, packed),
            (netlink.IFA_LOCAL, packed),
            (netlink.IFA_CACHEINFO, struct.pack("=IIII", valid, valid, 1, 2)),
        ]
    )
    return nic_addresses.parse(body)


def route(
    to: str, source: str = "", *, table: int = 254, metric: int = 0, kernel: bool = False
) -> NicRoute:
    network = IPv4Network(to)
    origin = netlink.RTPROT_KERNEL if kernel else netlink.RTPROT_STATIC
    header = struct.pack(
        "=BBBBBBBBI", AF_INET, network.prefixlen, 0, 0, table, origin, 0, netlink.RTN_UNICAST, 0
    )
    attributes = [(netlink.RTA_DST, network.network_address.packed)] if network.prefixlen else []
    attributes += [(netlink.RTA_PREFSRC, IPv4Address(source).packed)] if source else []
    attributes += [netlink.u32(netlink.RTA_PRIORITY, metric)] if metric else []
    return NicRoute((header + netlink.pack(attributes)).hex())


def rule(to: str, table: int, priority: int, *others: netlink.Attribute) -> NicRule:
    network = IPv4Network(to)
    header = struct.pack(
        "=BBBBBBBBI", AF_INET, network.prefixlen, 0, 0, table, 0, 0, netlink.FR_ACT_TO_TBL, 0
    )
    attributes = [(netlink.FRA_DST, network.network_address.packed)] if network.prefixlen else []
    attributes += [netlink.u32(netlink.FRA_PRIORITY, priority), *others]
    attributes.append((netlink.FRA_SUPPRESS_PREFIXLEN, nic_sources.UNSET))
    return NicRule((header + netlink.pack(attributes)).hex())


def nic(*routes: NicRoute, rules: tuple[NicRule, ...] = (), leased: str = "") -> Capture:
    addresses = tuple(address(ip, 600 if ip == leased else FOREVER) for ip in (A, B, C))
    return Capture("ens3", 7, "52:54:00:00:00:01", 1500, 1, 0, 0, "", addresses=addresses,
                   routes=routes, rules=rules)  # fmt: skip


MARK = netlink.u32(10, 1)
FOUND: list[tuple[Capture, nic_sources.Sources]] = [
    (nic(route("0.0.0.0/0")), ()),
    # The kernel's own choice is a masquerade's.
    (nic(route("198.51.100.0/24", A, kernel=True), route("0.0.0.0/0")), ()),
    (nic(route("0.0.0.0/0", B)), (("0.0.0.0/0", B),)),
    (
        nic(route("198.51.100.0/24", A, kernel=True), route("0.0.0.0/0", B)),
        (("198.51.100.0/24", ""), ("0.0.0.0/0", B)),
    ),
    (
        nic(route("0.0.0.0/0", A, metric=200), route("0.0.0.0/0", B, metric=100)),
        (("0.0.0.0/0", B),),
    ),
    (
        nic(route("0.0.0.0/0"), route("192.0.2.0/24", B), route("192.0.2.0/25", C)),
        (("192.0.2.0/25", C), ("192.0.2.0/24", B), ("0.0.0.0/0", "")),
    ),
    # A rule goes ahead of routes with longer prefixes, for the destinations that it covers.
    (
        nic(route("0.0.0.0/0"), route("192.0.2.0/25", C), route("0.0.0.0/0", B, table=100),
            rules=(rule("192.0.2.0/24", 100, 1000),)),
        (("192.0.2.0/24", B), ("0.0.0.0/0", "")),
    ),
    (
        nic(route("0.0.0.0/0"), route("0.0.0.0/0", B, table=100),
            rules=(rule("0.0.0.0/0", 100, 1000, MARK),)),
        (),
    ),
    (
        nic(route("0.0.0.0/0", A), route("192.0.2.0/24", A), route("0.0.0.0/0", B, table=100),
            rules=(rule("0.0.0.0/0", 254, 999, netlink.u32(netlink.FRA_SUPPRESS_PREFIXLEN, 0)),
                   rule("0.0.0.0/0", 100, 1000))),
        (("192.0.2.0/24", A), ("0.0.0.0/0", B)),
    ),
    # The lease may bring another address; that comes first on the NIC.
    (nic(route("0.0.0.0/0", B), leased=B), ()),
    (
        nic(route("198.51.100.0/24", A, kernel=True), route("0.0.0.0/0", B), leased=B),
        (("198.51.100.0/24", A), ("0.0.0.0/0", "")),
    ),
    # An address of another link is none of ours.
    (nic(route("0.0.0.0/0", "203.0.113.7")), ()),
]  # fmt: skip


@pytest.mark.parametrize(("before", "expected"), FOUND)
def test_sources(before: Capture, expected: nic_sources.Sources) -> None:
    assert nic_sources.choose(before) == expected


def test_rules_of_both_backends_translate_in_this_order() -> None:
    target = Target(
        "wan", "ens3", "nftables", "192.168.158.0/24", (), (), "10.213.252.0/22",
        sources=(("192.0.2.0/25", ""), ("192.0.2.0/24", B), ("0.0.0.0/0", C)),
    )  # fmt: skip
    chain = nftables.render(nat_rules.rules(target), "router").partition("chain srcnat {")[2]
    lines = [line.strip() for line in chain.partition("}")[0].splitlines() if "ens3" in line]
    inner = 'oifname "ens3" ip saddr 192.168.158.0/24'
    assert lines[::2] == [
        f"{inner} ip daddr 192.0.2.0/25 masquerade",
        f"{inner} ip daddr 192.0.2.0/24 snat ip to {B}",
        f"{inner} snat ip to {C}",
        f"{inner} masquerade",
    ]
    nat = next(
        t for t in iptables.tables(nat_rules.rules(target), iptables.ROUTER) if t.name == "nat"
    )
    entries = [str(e) for chain in nat.chains.values() for e in chain]
    assert sum(f"--to-source {B}" in entry for entry in entries) == 2
    assert Target.from_object(target.as_object()) == target
