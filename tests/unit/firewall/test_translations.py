# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading translations back from what the backends load, and list."""

from ipaddress import IPv6Address, ip_address, ip_network

import pytest

from libvirt_natns.firewall import iptables, nft_listing, nftables
from libvirt_natns.firewall.backends import Backend
from libvirt_natns.firewall.namespace_policy import Policy
from libvirt_natns.firewall.namespace_rules import ruleset
from libvirt_natns.firewall.translations import PublishedPort, parse
from libvirt_natns.model.publication import Forward, PortProtocol, PortSet, StaticNat

OUT, OUT6 = "192.168.0.100", "2001:db8::100"
WEB, WEB6 = "10.0.0.5", "fd01::5"


def forward(
    proto: PortProtocol,
    address: str,
    first: int,
    target: str,
    to: int,
    *sources: str,
    more: int = 0,
) -> Forward:
    return Forward(
        "uuid-web", "guest web", "uuid-a", proto, ip_address(address), first, first + more,
        ip_address(target), to, to + more, tuple(map(ip_network, sources)),
    )  # fmt: skip


def static(address: str, target: str, *ports: PortSet) -> StaticNat:
    return StaticNat(
        "uuid-web", "guest web", "uuid-a", ip_address(address), ip_address(target), ports
    )


POLICY = Policy(
    inner="virbr1",
    upstream="upstream",
    subnets=(ip_network("10.0.0.0/24"), ip_network("fd01::/64")),
    gateways=(ip_address("10.0.0.1"), ip_address("fd01::1")),
    address=ip_address(OUT),
    address6=IPv6Address(OUT6),
    forwards=(
        forward("tcp", OUT, 8080, WEB, 80),
        forward("tcp", OUT, 22, WEB, 22),
        forward("tcp", OUT, 49152, WEB, 23, "10.1.0.0/16", "10.2.0.0/16"),
        forward("tcp", OUT, 8000, WEB, 8000, more=10),
        forward("udp", OUT6, 49153, WEB6, 53),
        forward("sctp", OUT6, 49154, WEB6, 54, "2001:db8:1::/48"),
        forward("tcp", OUT6, 5, WEB6, 5, "2001:db8:1::/48"),
    ),
    statics=(
        static("192.168.0.150", "10.0.0.6"),
        static("192.168.0.151", "10.0.0.7", PortSet("tcp", 80, 81)),
        static("2001:db8::150", "fd01::6"),
    ),
)


@pytest.mark.parametrize("backend", [nftables, iptables], ids=lambda each: each.name)
def test_ports_and_addresses_are_read_back(backend: Backend) -> None:
    text = backend.render(ruleset(POLICY))
    if backend is nftables:
        text = nft_listing.canonical(text)
    found = parse(text)
    assert set(found.ports) == {
        PublishedPort("tcp", 8080, ip_address(WEB), 80),
        PublishedPort("tcp", 22, ip_address(WEB), 22),
        PublishedPort("tcp", 49152, ip_address(WEB), 23),
        PublishedPort("udp", 49153, ip_address(WEB6), 53),
        PublishedPort("sctp", 49154, ip_address(WEB6), 54),
        PublishedPort("tcp", 5, ip_address(WEB6), 5),
    }
    assert {str(target): str(address) for target, address in found.own.items()} == {
        "10.0.0.6": "192.168.0.150",
        "10.0.0.7": "192.168.0.151",
        "fd01::6": "2001:db8::150",
    }


def test_no_rules() -> None:
    assert parse("").ports == ()
    assert parse("").own == {}
