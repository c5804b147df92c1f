# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which networks are handled, and which can never work."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface

import pytest

from libvirt_natns.errors import DocumentError, LeaseError, UpstreamError
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.dns import Dns, Forwarder
from libvirt_natns.model.metadata import NatMetadata
from libvirt_natns.model.network import LibvirtNetwork, Network
from libvirt_natns.model.segment import BridgeSegment, DhcpSegment
from libvirt_natns.model.subnet import StaticRoute, Subnet
from libvirt_natns.model.upstream import BridgeUpstream, DhcpUpstream, Upstream
from libvirt_natns.state.applicants import applicant, check_wanted, reserved_addresses
from libvirt_natns.upstream.selection import check_addresses, check_resolvers, upstream_of, verdict

SUBNET = Subnet(IPv4Interface("10.0.0.1/24"))
SIX = Subnet(IPv6Interface("fd00:10::1/64"))
NETWORK = Network(
    uuid="c7308e5b-a296-4b40-a0cb-069d4253d364", name="a", bridge="virbr10", subnets=(SUBNET,)
)
CONFIGURED = BridgeUpstream(
    name="provider",
    bridge="br0",
    subnet=IPv4Network("192.168.0.0/24"),
    gateway=IPv4Address("192.168.0.1"),
    dns=(IPv4Address("192.168.0.53"), IPv6Address("2001:db8::53")),
)
PROVIDER = BridgeSegment.of(CONFIGURED)
ANNOTATED = Config(scope="annotated")


@pytest.mark.parametrize(
    ("network", "config", "handled", "reason"),
    [
        (NETWORK, Config(), True, "isolated"),
        (replace(NETWORK, nat=NatMetadata()), Config(), True, "annotated"),
        (replace(NETWORK, nat=NatMetadata()), ANNOTATED, True, "annotated"),
        (NETWORK, ANNOTATED, False, "has no <natns:nat>"),
        (replace(NETWORK, forward_mode="nat"), Config(), False, "<forward mode='nat'>"),
        (
            replace(NETWORK, forward_mode="open", nat=NatMetadata()),
            ANNOTATED,
            False,
            "<forward mode='open'>",
        ),
        (replace(NETWORK, nat=NatMetadata(enabled=False)), Config(), False, "enabled='no'"),
        (replace(NETWORK, nat=NatMetadata(enabled=False)), ANNOTATED, False, "enabled='no'"),
        (replace(NETWORK, subnets=()), Config(), False, "has no address"),
        (replace(NETWORK, subnets=(SIX,)), Config(), True, "isolated"),
        (LibvirtNetwork("u", "a", None, subnets=(SUBNET,)), Config(), False, "has no bridge"),
    ],
)
def test_verdict(network: LibvirtNetwork, config: Config, handled: bool, reason: str) -> None:
    found = verdict(network, config)
    assert found.handled is handled
    assert found.network is (network if handled else None)
    assert reason in found.reason


def test_annotated_network_without_any_address() -> None:
    with pytest.raises(DocumentError, match="network a has neither <ip> nor <natns:ip>"):
        verdict(replace(NETWORK, subnets=(), nat=NatMetadata()), Config())


# -- upstreams -----------------------------------------------------------------


def config_with(*upstreams: Upstream, default: str = "host") -> Config:
    known = {**Config().upstreams, **{upstream.name: upstream for upstream in upstreams}}
    return Config(upstream=default, upstreams=known)


def test_upstream_of_the_metadata_or_the_default() -> None:
    config = config_with(CONFIGURED)
    assert upstream_of(NETWORK, config).name == "host"
    wants = replace(NETWORK, nat=NatMetadata(upstream="provider"))
    assert upstream_of(wants, config) == CONFIGURED
    assert upstream_of(NETWORK, config_with(CONFIGURED, default="provider")) == CONFIGURED


def test_unknown_upstream_names_the_known_ones() -> None:
    wants = replace(NETWORK, nat=NatMetadata(upstream="wan"))
    with pytest.raises(UpstreamError, match=r"network a: there is no upstream wan.*host, provider"):
        upstream_of(wants, config_with(CONFIGURED))


def test_what_a_lease_has_yet_to_say_is_not_checked() -> None:
    dhcp = DhcpUpstream(name="provider", bridge="br0")
    check_addresses(on("192.168.0.1/24"), DhcpSegment.of(dhcp))
    with pytest.raises(DocumentError, match=r"overlaps 192\.168\.0\.0/24"):
        check_addresses(on("192.168.0.1/24"), DhcpSegment.of(replace(dhcp, subnet=PROVIDER.subnet)))


# -- addresses -----------------------------------------------------------------


def on(*interfaces: str) -> Network:
    return replace(NETWORK, subnets=tuple(Subnet(IPv4Interface(text)) for text in interfaces))


@pytest.mark.parametrize(
    "network",
    [
        on("192.168.0.1/24"),
        on("192.168.0.129/25"),
        on("192.168.1.1/16"),
        on("10.0.0.1/24", "192.168.0.9/30"),
        replace(
            NETWORK,
            routes=(StaticRoute(IPv4Network("192.168.0.0/16"), IPv4Address("10.0.0.9")),),
        ),
    ],
)
def test_overlap_with_the_upstream_is_refused(network: Network) -> None:
    with pytest.raises(DocumentError, match=r"network a: its subnet .* overlaps 192\.168\.0\.0/24"):
        check_addresses(network, PROVIDER)


@pytest.mark.parametrize("bridge", ["upstream", "lo"])
def test_bridge_named_like_another_link_of_the_namespace(bridge: str) -> None:
    with pytest.raises(DocumentError, match=f"cannot be called {bridge}"):
        check_addresses(replace(NETWORK, bridge=bridge), PROVIDER)


def test_addresses_that_work() -> None:
    check_addresses(on("10.0.0.1/24", "192.168.1.1/24"), PROVIDER)


def test_reserved_addresses() -> None:
    """Whatever an address is besides, the gateway is what people know it as."""
    gateway = IPv4Address("192.168.0.1")
    assert reserved_addresses(replace(PROVIDER, dns=(*PROVIDER.dns, gateway))) == {
        IPv4Address("192.168.0.0"): "network address",
        IPv4Address("192.168.0.255"): "broadcast address",
        IPv4Address("192.168.0.53"): "DNS server",
        IPv4Address("192.168.0.1"): "gateway",
    }


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ("192.168.1.5", "is not in its subnet 192.168.0.0/24"),
        ("192.168.0.0", "is its network address"),
        ("192.168.0.255", "is its broadcast address"),
        ("192.168.0.1", "is its gateway"),
        ("192.168.0.53", "is its DNS server"),
    ],
)
def test_wanted_addresses_that_cannot_be_had(wanted: str, problem: str) -> None:
    with pytest.raises(LeaseError, match=problem):
        check_wanted(applicant(NETWORK), PROVIDER, IPv4Address(wanted))


def test_wanted_address_outside_the_pool() -> None:
    check_wanted(applicant(NETWORK), PROVIDER, IPv4Address("192.168.0.5"))


def test_network_that_hides_its_resolvers() -> None:
    inside, outside = IPv4Address("10.0.0.53"), IPv4Address("192.168.0.53")
    with pytest.raises(DocumentError, match=r"DNS server 10\.0\.0\.53 .* its own subnet"):
        check_resolvers(NETWORK, PROVIDER, [inside])
    # One that is left will do, and so will those that its own XML names, or nobody.
    check_resolvers(NETWORK, PROVIDER, [inside, outside])
    check_resolvers(NETWORK, PROVIDER, [])
    forwarder = Dns(forwarders=(Forwarder(address=outside),))
    check_resolvers(replace(NETWORK, dns=forwarder), PROVIDER, [inside])
    check_resolvers(replace(NETWORK, dns=None), PROVIDER, [inside])
