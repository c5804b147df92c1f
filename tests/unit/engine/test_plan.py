# SPDX-License-Identifier: LGPL-2.1-or-later
"""A network's plan, in the words of ``virt-natns plan``."""

from dataclasses import replace
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)

import pytest

from libvirt_natns import names
from libvirt_natns.addresses import AddressRange
from libvirt_natns.daemons.dnsmasq import Daemon
from libvirt_natns.engine.plan.network_plan import make, policy
from libvirt_natns.engine.plan.surroundings import Published, Surroundings, path_mtu
from libvirt_natns.engine.plan.sysctls import (
    ADVERTISED,
    SYSCTLS,
    SYSCTLS_WITH_IPV6,
    SYSCTLS_WITHOUT_IPV6,
)
from libvirt_natns.engine.plan.transit_bridge import transit
from libvirt_natns.model.bandwidth import Bandwidth, inbound, outbound
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import BridgeSegment
from libvirt_natns.model.subnet import StaticRoute, Subnet
from libvirt_natns.model.transit_segment import HostSegment
from libvirt_natns.model.upstream import (
    HOST_UPSTREAM,
    BridgeUpstream,
    HostUpstream,
    Outside,
)
from libvirt_natns.operations.addressing import Route
from libvirt_natns.operations.daemon_operations import Dnsmasq, NeighbourProxy
from libvirt_natns.operations.firewall_operations import Firewall
from libvirt_natns.operations.link_operations import AllMulticast, LinkUp, Patch
from libvirt_natns.operations.namespaces import Settings
from libvirt_natns.operations.neighbour_operations import Announcement
from libvirt_natns.operations.operation import Operation, Plan, describe_plan

UUID = "c7308e5b-a296-4b40-a0cb-069d4253d364"
OUTSIDE = Outside(IPv4Address("192.168.0.100"))
NETWORK = Network(
    uuid=UUID, name="a", bridge="virbr10", subnets=(Subnet(IPv4Interface("10.0.0.1/24")),)
)
PROVIDER = BridgeSegment.of(
    BridgeUpstream(
        name="provider",
        bridge="br0",
        subnet=IPv4Network("192.168.0.0/24"),
        gateway=IPv4Address("192.168.0.1"),
    )
)
MACVLAN = BridgeSegment.of(replace(PROVIDER.upstream, bridge="eth1", attach="macvlan"))
PROVIDER6 = replace(
    PROVIDER,
    subnet6=IPv6Network("2001:db8:77::/64"),
    gateway6=IPv6Address("2001:db8:77::1"),
    pool6=(AddressRange(IPv6Address("2001:db8:77::100"), IPv6Address("2001:db8:77::1ff")),),
)
OUTSIDE6 = replace(OUTSIDE, address6=IPv6Address("2001:db8:77::100"))
DUAL_NETWORK = replace(NETWORK, subnets=(*NETWORK.subnets, Subnet(IPv6Interface("fd00:1::1/64"))))
DAEMON = Daemon(UUID, "nat-a", "virbr10", None)
AROUND = Surroundings(private_mtu=1500, upstream_mtu=1400, backend="nftables", dnsmasq=None)

STOCK = """\
namespace nat-a
patch natin-910a6529e (natns-private-a) to virbr10 in nat-a, MTU 1500
patch natup-910a6529e (natns-upstream-a) to upstream in nat-a, MTU 1400
patch natin-910a6529e on bridge virbr10
patch natup-910a6529e on bridge br0
firewall of nat-a: {rules} rules, nftables
conntrack time-outs in nat-a as in the host
no address 10.0.0.1/24 on virbr10 in the host
address 10.0.0.1/24 on virbr10 in nat-a
address 192.168.0.100/24 on upstream in nat-a
link lo up in nat-a
link virbr10 up in nat-a
link upstream up in nat-a
route default via 192.168.0.1 on upstream in nat-a
announce 192.168.0.100 to the neighbours on upstream
"""

MORE = """\
namespace nat-a
patch natin-910a6529e (natns-private-a) to virbr10 in nat-a, MTU 1500
patch natup-910a6529e (natns-upstream-a) to upstream in nat-a, MTU 1400
patch natin-910a6529e on bridge virbr10
patch natup-910a6529e on bridge br0
firewall of nat-a: {rules} rules, nftables
conntrack time-outs in nat-a as in the host
no address 10.0.0.1/24 on virbr10 in the host
no address 10.1.0.1/24 on virbr10 in the host
address 10.0.0.1/24, 10.1.0.1/24 on virbr10 in nat-a
address 192.168.0.100/24 on upstream in nat-a
link lo up in nat-a
link virbr10 up in nat-a
link upstream up in nat-a
route 10.9.0.0/24 via 10.0.0.9 on virbr10 in nat-a
route default via 192.168.0.1 on upstream in nat-a
announce 192.168.0.100 to the neighbours on upstream
"""

DUAL = """\
namespace nat-a
patch natin-910a6529e (natns-private-a) to virbr10 in nat-a, MTU 1500
patch natup-910a6529e (natns-upstream-a) to upstream in nat-a, MTU 1400
patch natin-910a6529e on bridge virbr10
patch natup-910a6529e on bridge br0
firewall of nat-a: {rules} rules, nftables
conntrack time-outs in nat-a as in the host
no address 10.0.0.1/24 on virbr10 in the host
no address fd00:1::1/64 on virbr10 in the host
address 10.0.0.1/24, fd00:1::1/64 on virbr10 in nat-a
address 192.168.0.100/24, 2001:db8:77::100/64 on upstream in nat-a
link lo up in nat-a
link virbr10 up in nat-a
link upstream up in nat-a
route default via 192.168.0.1 on upstream in nat-a
route default via 2001:db8:77::1 on upstream in nat-a
no proxy entry on virbr10 in nat-a
no ndppd on upstream in nat-a
announce 192.168.0.100 to the neighbours on upstream
announce 2001:db8:77::100 to the neighbours on upstream
"""

PROXIED = """\
address 10.0.0.1/24, 2001:db8:77::2/64 on virbr10 in nat-a
address 192.168.0.100/24, 2001:db8:77::100/128 on upstream in nat-a
route default via 192.168.0.1 on upstream in nat-a
route 2001:db8:77::1 on upstream in nat-a
route 2001:db8:77::53 on upstream in nat-a
route default via 2001:db8:77::1 on upstream in nat-a
proxy entries for 2001:db8:77::1, 2001:db8:77::53 on virbr10 in nat-a
ndppd on upstream in nat-a for 2001:db8:77::/64 behind virbr10
"""

TRANSIT = """\
transit bridge natns-host (natns-transit-host)
address 198.19.252.1/22 on natns-host in the host
sysctl net/ipv4/conf/natns-host/forwarding = 1 in the host
sysctl net/ipv4/conf/eth0/forwarding = 1 in the host
sysctl net/ipv4/conf/wlan0/forwarding = 1 in the host
sysctl net/ipv4/conf/natns-host/route_localnet = 1 in the host
DNS relay on natns-host at 198.19.252.1, port 305
"""


def of(operations: Plan, kind: type) -> list[Operation]:
    return [operation for operation in operations if isinstance(operation, kind)]


def words(operations: Plan) -> str:
    """The description without the sysctls of the namespace, which are the same for all."""
    return "".join(
        line
        for line in describe_plan(operations).splitlines(keepends=True)
        if not (line.startswith("sysctl") and line.endswith(" in nat-a\n"))
    )


def rules(operations: Plan) -> int:
    (firewall,) = of(operations, Firewall)
    assert isinstance(firewall, Firewall)
    return len(firewall.rules)


def test_stock_network() -> None:
    made = make(NETWORK, PROVIDER, OUTSIDE, AROUND)
    assert words(made) == STOCK.format(rules=rules(made))
    assert of(made, Settings) == [Settings("nat-a", SYSCTLS + SYSCTLS_WITHOUT_IPV6)]
    assert rules(made) > 0


def test_bandwidth_limits_both_ends_of_the_private_patch() -> None:
    limits = Bandwidth(inbound(1000, 5000, 5120), outbound(128, 0))
    made = words(make(replace(NETWORK, bandwidth=limits), PROVIDER, OUTSIDE, AROUND))
    patch = "patch natin-910a6529e on bridge virbr10\n"
    assert (
        "link virbr10 in nat-a sends 1000000 octets/s, at most 5000000\n"
        f"link natin-910a6529e in the host sends 128000 octets/s\n{patch}"
    ) in made


def test_several_subnets_and_routes() -> None:
    network = replace(
        NETWORK,
        subnets=(*NETWORK.subnets, Subnet(IPv4Interface("10.1.0.1/24"))),
        routes=(StaticRoute(IPv4Network("10.9.0.0/24"), IPv4Address("10.0.0.9")),),
    )
    made = make(network, PROVIDER, OUTSIDE, AROUND)
    assert words(made) == MORE.format(rules=rules(made))


def test_a_private_bridge_that_carries_less_than_its_patch_takes() -> None:
    network = replace(
        NETWORK, routes=(StaticRoute(IPv4Network("10.9.0.0/24"), IPv4Address("10.0.0.9")),)
    )
    told = describe_plan(make(network, PROVIDER, OUTSIDE, replace(AROUND, carried=1450)))
    assert "to virbr10 in nat-a, MTU 1500\n" in told
    assert "packets to 10.0.0.0/24, 10.9.0.0/24 limited to 1450 octets in nat-a\n" in told
    assert "octets" not in describe_plan(make(network, PROVIDER, OUTSIDE, AROUND))


def test_macvlan() -> None:
    made = make(NETWORK, MACVLAN, OUTSIDE, AROUND)
    wanted = STOCK.replace(
        "patch natup-910a6529e (natns-upstream-a) to upstream in nat-a, MTU 1400",
        "macvlan upstream on eth1 in nat-a, MTU 1400",
    ).replace("patch natup-910a6529e on bridge br0\n", "")
    assert words(made) == wanted.format(rules=rules(made))


def test_the_host_must_not_have_an_address_that_libvirt_did_not_set() -> None:
    made = make(replace(NETWORK, taken_over=False), PROVIDER, OUTSIDE, AROUND)
    assert "no address 10.0.0.1/24 on virbr10 in the host" in describe_plan(made)
    assert "address 10.0.0.1/24 on virbr10 in nat-a" in describe_plan(made)


def test_upstream_without_a_gateway() -> None:
    made = make(NETWORK, replace(PROVIDER, gateway=None), OUTSIDE, AROUND)
    assert not of(made, Route)


def test_dnsmasq_comes_last() -> None:
    made = make(NETWORK, PROVIDER, OUTSIDE, replace(AROUND, dnsmasq=DAEMON))
    assert made[-1] == Dnsmasq(DAEMON)


def test_no_packet_passes_unfiltered() -> None:
    """Not one link is up before the firewall is loaded; forwarding is the first sysctl,
    since writing it resets others."""
    made = make(NETWORK, PROVIDER, OUTSIDE, AROUND)
    kinds = [type(operation) for operation in made]
    assert kinds.index(Firewall) < kinds.index(LinkUp)
    assert SYSCTLS[0] == ("net/ipv4/ip_forward", "1")


def test_host_ends_and_namespace_ends_differ() -> None:
    patches = of(make(NETWORK, PROVIDER, OUTSIDE, AROUND), Patch)
    macs = {mac for each in patches if isinstance(each, Patch) for mac in (each.mac, each.port_mac)}
    assert len(macs) == 4


def test_the_announced_mac_is_the_links() -> None:
    made = make(NETWORK, PROVIDER, OUTSIDE, AROUND)
    (announcement,) = of(made, Announcement)
    patches = {each.link: each.mac for each in made if isinstance(each, Patch)}
    assert isinstance(announcement, Announcement)
    assert announcement.mac == patches[announcement.link] == names.mac(UUID, "upstream")


def test_transit_of_an_upstream_of_kind_host() -> None:
    upstream = HostSegment(
        upstream=HOST_UPSTREAM,
        bridge="natns-host",
        subnet=IPv4Network("198.19.252.0/22"),
        gateway=IPv4Address("198.19.252.1"),
    )
    assert describe_plan(transit(upstream, ["eth0", "wlan0"])) == TRANSIT


# -- IPv6 ----------------------------------------------------------------------


def set_on(made: Plan, link: str) -> dict[str, str]:
    """The settings of IPv6 of a link of the namespace."""
    prefix = f"net/ipv6/conf/{link}/"
    return {
        key.removeprefix(prefix): value
        for each in made
        if isinstance(each, Settings)
        for key, value in each.values
        if key.startswith(prefix)
    }


def lines(made: Plan, *beginnings: str) -> str:
    return "".join(
        f"{line}\n" for line in describe_plan(made).splitlines() if line.startswith(beginnings)
    )


def test_dual_stack() -> None:
    made = make(DUAL_NETWORK, PROVIDER6, OUTSIDE6, AROUND)
    assert words(made) == DUAL.format(rules=rules(made))
    settings = of(made, Settings)
    assert settings[0] == Settings("nat-a", SYSCTLS + SYSCTLS_WITH_IPV6)
    assert made.index(settings[1]) < min(made.index(each) for each in of(made, LinkUp))
    for link in ("virbr10", "upstream"):
        found = set_on(made, link)
        assert found.items() >= {
            "accept_ra": "0", "autoconf": "0", "accept_redirects": "0", "accept_dad": "0",
            "disable_ipv6": "0",
        }.items()  # fmt: skip


def test_ipv6_alone() -> None:
    network = replace(NETWORK, subnets=DUAL_NETWORK.subnets[1:])
    upstream = replace(PROVIDER6, subnet=None, gateway=None)
    made = make(network, upstream, Outside(address6=OUTSIDE6.address6), AROUND)
    assert "192.168" not in describe_plan(made)
    assert "route default via 2001:db8:77::1 on upstream in nat-a" in describe_plan(made)


def test_ipv6_of_a_network_whose_upstream_has_none() -> None:
    made = make(DUAL_NETWORK, PROVIDER, OUTSIDE, AROUND)
    assert set_on(made, "upstream")["disable_ipv6"] == "1"
    assert set_on(made, "virbr10")["disable_ipv6"] == "0"
    assert lines(made, "route", "announce") == (
        "route default via 192.168.0.1 on upstream in nat-a\n"
        "announce 192.168.0.100 to the neighbours on upstream\n"
    )


def test_no_way_out_by_a_family_in_which_there_is_no_address() -> None:
    made = make(DUAL_NETWORK, PROVIDER6, Outside(address6=OUTSIDE6.address6), AROUND)
    assert "via 192.168.0.1" not in describe_plan(made)


def test_a_router_that_advertises_itself() -> None:
    made = make(DUAL_NETWORK, replace(PROVIDER6, gateway6=None), OUTSIDE6, AROUND)
    assert set_on(made, "upstream").items() >= dict(ADVERTISED).items()
    assert set_on(made, "virbr10")["accept_ra"] == "0"
    assert "route default via 2001" not in describe_plan(made)


@pytest.mark.parametrize(
    ("gateway", "direct"), [("2001:db8:77::1", "route 2001:db8:77::1 on"), ("fe80::1", "")]
)
def test_a_routed_prefix_needs_no_address(gateway: str, direct: str) -> None:
    """The router is a neighbour all the same."""
    upstream = replace(PROVIDER6, gateway6=IPv6Address(gateway))
    made = make(DUAL_NETWORK, upstream, Outside(routed=(IPv6Network("fd00:1::/64"),)), AROUND)
    route = f"route default via {gateway} on upstream in nat-a\n"
    before = f"{direct} upstream in nat-a\n" if direct else ""
    assert lines(made, "route") == before + route
    assert set_on(made, "upstream")["disable_ipv6"] == "0"


def test_guests_in_the_providers_prefix() -> None:
    upstream = replace(PROVIDER6, dns=(IPv6Address("2001:db8:77::53"), IPv6Address("2001:db8::53")))
    network = replace(
        NETWORK, subnets=(*NETWORK.subnets, Subnet(IPv6Interface("2001:db8:77::2/64")))
    )
    outside = replace(OUTSIDE6, proxied=(IPv6Network("2001:db8:77::/64"),))
    made = make(network, upstream, outside, AROUND)
    assert lines(made, "address", "route", "proxy", "ndppd") == PROXIED
    assert of(made, AllMulticast) == [AllMulticast(names.upstream_patch(UUID))]
    assert set_on(made, "virbr10")["proxy_ndp"] == "1"
    (proxy,) = of(made, NeighbourProxy)
    assert isinstance(proxy, NeighbourProxy)
    for known in ("::1", "::53", "::100", "::1ff"):
        address = IPv6Address("2001:db8:77" + known)
        assert not any(address in part for part in proxy.daemon.answered)
    assert any(IPv6Address("2001:db8:77::200") in part for part in proxy.daemon.answered)


def test_guests_in_a_part_of_the_providers_prefix() -> None:
    """It is the more specific: the rest of the subnet is on the upstream's link."""
    part = IPv6Network("2001:db8:77:0:1::/80")
    network = replace(NETWORK, subnets=(Subnet(IPv6Interface("2001:db8:77:0:1::1/80")),))
    made = make(network, PROVIDER6, replace(OUTSIDE6, address=None, proxied=(part,)), AROUND)
    assert "address 2001:db8:77::100/64 on upstream" in describe_plan(made)
    assert set_on(made, "virbr10")["proxy_ndp"] == "0"
    assert lines(made, "route") == "route default via 2001:db8:77::1 on upstream in nat-a\n"


def test_transit_in_both_families() -> None:
    upstream = HostSegment(
        upstream=HOST_UPSTREAM,
        bridge="natns-host",
        subnet=IPv4Network("198.19.252.0/22"),
        gateway=IPv4Address("198.19.252.1"),
        subnet6=IPv6Network("fd12:3456:789a::/64"),
        gateway6=IPv6Address("fd12:3456:789a::1"),
    )
    made = describe_plan(transit(upstream, ["eth0"]))
    assert "address 198.19.252.1/22, fd12:3456:789a::1/64 on natns-host in the host\n" in made
    assert "sysctl net/ipv6/conf/natns-host/accept_ra = 0 in the host\n" in made


@pytest.mark.parametrize(
    ("private", "upstream", "assumed", "told"),
    [
        (1500, 1500, 1500, None),
        (1500, 1400, 1500, 1400),
        (1400, 1500, 1400, None),
        (1450, 1500, 1500, 1450),
        (1450, 1400, 1500, 1400),
        (9000, 1500, 9000, 1500),
        (9000, 1450, 9000, 1450),
        (1300, 1400, 1400, 1300),
    ],
)
def test_mtu_that_guests_are_told(
    private: int, upstream: int, assumed: int, told: int | None
) -> None:
    assert path_mtu(private, upstream, assumed) == told


def test_policy_knows_the_upstreams_segment_and_gateway() -> None:
    rules = policy(DUAL_NETWORK, PROVIDER6, OUTSIDE6, Published())
    assert rules.segments == (PROVIDER6.subnet, PROVIDER6.subnet6)
    assert rules.transit == ()
    assert (rules.link_local, rules.max_flows) == (False, 32768)
    behind = HostSegment(
        upstream=HostUpstream(name="host", link_local="forward", max_flows=64),
        bridge="natns-host",
        subnet=IPv4Network("192.168.0.0/24"),
        gateway=IPv4Address("192.168.0.1"),
        subnet6=PROVIDER6.subnet6,
        gateway6=PROVIDER6.gateway6,
    )
    rules = policy(DUAL_NETWORK, behind, OUTSIDE6, Published())
    assert rules.transit == (
        IPv4Interface("192.168.0.1/24"),
        IPv6Interface("2001:db8:77::1/64"),
    )
    assert (rules.link_local, rules.max_flows) == (True, 64)


def test_a_subnet_that_guests_have_is_no_segment() -> None:
    proxied = replace(OUTSIDE6, proxied=(IPv6Network("2001:db8:77::/64"),))
    rules = policy(DUAL_NETWORK, PROVIDER6, proxied, Published())
    assert rules.segments == (PROVIDER6.subnet,)


def test_no_setting_of_links_is_left_to_chance() -> None:
    keys = [key for key, _ in SYSCTLS + SYSCTLS_WITH_IPV6]
    assert len(keys) == len(set(keys))
    assert keys[0] == "net/ipv4/ip_forward", "writing it resets the others"
    for key in ("proxy_arp", "route_localnet", "accept_local", "arp_accept", "arp_filter"):
        for which in ("all", "default"):
            assert (f"net/ipv4/conf/{which}/{key}", "0") in SYSCTLS
