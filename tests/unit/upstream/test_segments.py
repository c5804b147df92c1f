# SPDX-License-Identifier: LGPL-2.1-or-later
"""The segment of each kind of upstream."""

from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from pathlib import Path
from typing import cast

import pytest

from libvirt_natns import names
from libvirt_natns.addresses import AddressRange, default_route
from libvirt_natns.errors import UpstreamError
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.network import Network
from libvirt_natns.model.publication import Forward
from libvirt_natns.model.segment import BridgeSegment, DhcpSegment, LeasedSegment, Segment
from libvirt_natns.model.subnet import StaticRoute, Subnet
from libvirt_natns.model.transit_segment import HostSegment, RouterSegment
from libvirt_natns.model.upstream import (
    HOST_UPSTREAM,
    BridgeUpstream,
    DhcpUpstream,
    HostUpstream,
    Outside,
    RouterUpstream,
)
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import segments

SUBNET, TRANSIT = IPv4Network("192.168.0.0/24"), IPv4Network("198.19.252.0/22")
GATEWAY, LEASED = IPv4Address("192.168.0.1"), IPv4Address("192.168.0.50")
PREFIX, OWN6 = IPv6Network("fd00:1::/64"), IPv6Network("2001:db8:77::/64")
FURTHER = StaticRoute(IPv4Network("172.30.0.0/16"), IPv4Address("192.168.0.7"))

PROVIDER = BridgeUpstream(name="provider", bridge="br0", subnet=SUBNET, gateway=GATEWAY)
OFFICE = DhcpUpstream(name="office", bridge="br1", attach="macvlan")
WAN = RouterUpstream(name="wan", nic="ens3", prefixes6=(IPv6Network("2001:db8:100::/56"),))

BRIDGED = BridgeSegment.of(PROVIDER)
UNLEASED = DhcpSegment.of(OFFICE)
BY_LEASE = LeasedSegment(
    upstream=OFFICE,
    bridge="br1",
    subnet=SUBNET,
    gateway=GATEWAY,
    leased=LEASED,
    mtu=1400,
    routes=(FURTHER,),
)
ON_HOST = HostSegment.of(HOST_UPSTREAM, "natns-host", TRANSIT, None, OWN6)
ON_ROUTER = RouterSegment.of(WAN, names.ROUTER_TRANSIT, TRANSIT, PREFIX, OWN6)
ALL = (BRIDGED, UNLEASED, BY_LEASE, ON_HOST, ON_ROUTER)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path / "run")
    monkeypatch.setattr(names, "STATE_DIRECTORY", tmp_path / "lib")
    return Store(tmp_path)


def network(*subnets: Subnet) -> Network:
    return Network("6f2b9c1e-0000-4000-8000-0000000000d1", "a", "virbr10", subnets=subnets)


FOUR, SIX = Subnet(IPv4Interface("10.0.0.1/24")), Subnet(IPv6Interface("fd00:10::1/64"))


@pytest.mark.parametrize(
    ("segment", "kind", "words", "namespace", "known", "shares"),
    [
        (BRIDGED, "bridge", "bridge br0", None, True, False),
        (UNLEASED, "bridge", "interface br1", None, False, False),
        (BY_LEASE, "bridge", "interface br1", None, True, False),
        (ON_HOST, "host", "bridge natns-host", None, True, True),
        (ON_ROUTER, "router", f"bridge {names.ROUTER_TRANSIT}", "natns-router-wan", True, True),
    ],
)
def test_kinds(
    segment: Segment, kind: str, words: str, namespace: str | None, known: bool, shares: bool
) -> None:
    assert (segment.kind, segment.in_words, segment.namespace) == (kind, words, namespace)
    assert (segment.known, segment.shares_addresses) == (known, shares)


def test_no_neighbour_is_asked_on_a_bridge_of_ours() -> None:
    assert [segment.probe for segment in ALL] == [0.2, 0.2, 0.2, 0.0, 0.0]


def test_a_server_leases_ipv4_alone() -> None:
    assert [segment.side(4).by_dhcp for segment in ALL] == [False, True, True, False, False]
    assert not any(segment.side(6).by_dhcp for segment in ALL)
    assert BY_LEASE.side_of(LEASED) == BY_LEASE.side(4)
    assert BY_LEASE.side_of(PREFIX[1]) == BY_LEASE.side(6)


def test_routes_of_a_lease() -> None:
    learnt = [segment.learnt_routes for segment in (BRIDGED, UNLEASED, ON_HOST)]
    assert learnt == [None, (), None]
    further = (FURTHER.destination, FURTHER.gateway)
    assert BY_LEASE.learnt_routes == ((default_route(4), GATEWAY), further)


@pytest.mark.parametrize(("mtu", "carried"), [(1500, 1400), (1300, 1300)])
def test_a_leases_mtu_counts_if_it_is_less(mtu: int, carried: int) -> None:
    assert BY_LEASE.carried(mtu) == carried
    assert BRIDGED.carried(mtu) == UNLEASED.carried(mtu) == mtu


def test_a_transit_bridge() -> None:
    last = IPv4Address("198.19.255.254")
    assert ON_HOST.pool == (AddressRange(IPv4Address("198.19.252.2"), last),)
    assert [str(each) for each in ON_HOST.transit_gateways] == ["198.19.252.1/22"]
    assert [str(each) for each in ON_ROUTER.transit_gateways] == [
        "198.19.252.1/22",
        "fd00:1::1/64",
    ]
    assert (ON_ROUTER.own6, ON_ROUTER.prefixes6) == (OWN6, WAN.prefixes6)
    assert ON_HOST.own6 is None, "a host without IPv6 answers for no address"
    assert BRIDGED.transit_gateways == ()


def test_a_forward_inside_a_transit_bridge() -> None:
    everywhere, own = IPv4Address(0), IPv4Address("198.19.252.5")
    client = IPv4Network("9.9.9.0/24")
    forward = Forward(
        "web", "web", "n", "tcp", everywhere, 80, 80, FOUR.gateway + 4, 80, 80, (client,)
    )
    assert BRIDGED.inside(forward, Outside(own)) == forward
    assert ON_HOST.inside(forward, Outside()) == forward
    inside = ON_HOST.inside(forward, Outside(own))
    assert inside.address == own
    assert inside.sources == (client, IPv4Network("198.19.252.1/32"))


# -- from the upstream -----------------------------------------------------------


def test_a_network_of_ipv6_alone_asks_no_dhcp_server(store: Store) -> None:
    kernel = cast("Kernel", None)
    assert segments.of_network(kernel, store, network(SIX), OFFICE) == BridgeSegment.of(OFFICE)
    assert segments.of_network(kernel, store, network(FOUR, SIX), OFFICE) == UNLEASED
    assert segments.of_network(kernel, store, network(FOUR), PROVIDER) == BRIDGED


def test_what_is_known_without_a_network(store: Store) -> None:
    assert segments.of_upstream(store, PROVIDER) == BRIDGED
    assert segments.of_upstream(store, OFFICE) == UNLEASED
    assert segments.of_upstream(store, HOST_UPSTREAM) is None
    assert segments.of_upstream(store, WAN) is None
    with pytest.raises(UpstreamError, match="its router is not up"):
        segments.of_network(cast("Kernel", None), store, network(FOUR), WAN)
    configured = segments.of_upstream(store, HostUpstream(name="host", subnet=TRANSIT))
    assert configured == HostSegment.of(
        HostUpstream(name="host", subnet=TRANSIT), "natns-host", TRANSIT, None, None
    )
    store.transit.choose_subnet("host", [TRANSIT], None)
    store.transit.choose_prefix("host", PREFIX)
    chosen = segments.of_upstream(store, HOST_UPSTREAM)
    assert chosen is not None
    assert (chosen.subnet, chosen.subnet6) == (TRANSIT, PREFIX)
    without = segments.of_upstream(store, HOST_UPSTREAM, ipv6=False)
    assert without is not None
    assert (without.subnet, without.subnet6) == (TRANSIT, None)
