# SPDX-License-Identifier: LGPL-2.1-or-later
"""A network's plan, in the words of ``virt-natns plan``."""

from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import pytest

from libvirt_natns import names, plan
from libvirt_natns.dnsmasq import Daemon
from libvirt_natns.model import Network, Outside, StaticRoute, Subnet, Upstream
from libvirt_natns.plan import Surroundings, describe, make, path_mtu, transit
from libvirt_natns.records import replace

UUID = "c7308e5b-a296-4b40-a0cb-069d4253d364"
OUTSIDE = Outside(IPv4Address("192.168.0.100"))
NETWORK = Network(
    uuid=UUID, name="a", bridge="virbr10", subnets=(Subnet(IPv4Interface("10.0.0.1/24")),)
)
PROVIDER = Upstream(
    name="provider",
    kind="bridge",
    bridge="br0",
    subnet=IPv4Network("192.168.0.0/24"),
    gateway=IPv4Address("192.168.0.1"),
)
DAEMON = Daemon(UUID, "nat-a", "virbr10", None)
AROUND = Surroundings(private_mtu=1500, upstream_mtu=1400, backend="nftables", dnsmasq=None)

STOCK = """\
namespace nat-a
patch natin-910a6529e (natns-private-a) to virbr10 in nat-a, MTU 1500
patch natup-910a6529e (natns-upstream-a) to upstream in nat-a, MTU 1400
patch natin-910a6529e on bridge virbr10
patch natup-910a6529e on bridge br0
firewall of nat-a: {rules} rules, nftables
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

TRANSIT = """\
transit bridge natns-host (natns-transit-host)
address 198.19.252.1/22 on natns-host in the host
sysctl net/ipv4/conf/natns-host/forwarding = 1 in the host
sysctl net/ipv4/conf/eth0/forwarding = 1 in the host
sysctl net/ipv4/conf/wlan0/forwarding = 1 in the host
sysctl net/ipv4/conf/natns-host/route_localnet = 1 in the host
"""


def of(operations: plan.Plan, kind: type) -> list[plan.Operation]:
    return [operation for operation in operations if isinstance(operation, kind)]


def words(operations: plan.Plan) -> str:
    """The description without the sysctls of the namespace, which are the same for all."""
    return "".join(
        line
        for line in describe(operations).splitlines(keepends=True)
        if not (line.startswith("sysctl") and line.endswith(" in nat-a\n"))
    )


def rules(operations: plan.Plan) -> int:
    (firewall,) = of(operations, plan.Firewall)
    assert isinstance(firewall, plan.Firewall)
    return len(firewall.rules)


def test_stock_network() -> None:
    made = make(NETWORK, PROVIDER, OUTSIDE, AROUND)
    assert words(made) == STOCK.format(rules=rules(made))
    assert of(made, plan.Settings) == [
        plan.Settings("nat-a", plan.SYSCTLS + plan.SYSCTLS_WITHOUT_IPV6)
    ]
    assert rules(made) > 0


def test_several_subnets_and_routes() -> None:
    network = replace(
        NETWORK,
        subnets=(*NETWORK.subnets, Subnet(IPv4Interface("10.1.0.1/24"))),
        routes=(StaticRoute(IPv4Network("10.9.0.0/24"), IPv4Address("10.0.0.9")),),
    )
    made = make(network, PROVIDER, OUTSIDE, AROUND)
    assert words(made) == MORE.format(rules=rules(made))


def test_nothing_is_taken_from_a_bridge_that_has_no_address() -> None:
    made = make(replace(NETWORK, taken_over=False), PROVIDER, OUTSIDE, AROUND)
    assert not of(made, plan.Withdrawal)
    assert "address 10.0.0.1/24 on virbr10 in nat-a" in describe(made)


def test_upstream_without_a_gateway() -> None:
    made = make(NETWORK, replace(PROVIDER, gateway=None), OUTSIDE, AROUND)
    assert not of(made, plan.Route)


def test_dnsmasq_comes_last() -> None:
    made = make(NETWORK, PROVIDER, OUTSIDE, replace(AROUND, dnsmasq=DAEMON))
    assert made[-1] == plan.Dnsmasq(DAEMON)


def test_no_packet_passes_unfiltered() -> None:
    """Not one link is up before the firewall is loaded; forwarding is the first sysctl,
    since writing it resets others."""
    made = make(NETWORK, PROVIDER, OUTSIDE, AROUND)
    kinds = [type(operation) for operation in made]
    assert kinds.index(plan.Firewall) < kinds.index(plan.LinkUp)
    assert plan.SYSCTLS[0] == ("net/ipv4/ip_forward", "1")


def test_host_ends_and_namespace_ends_differ() -> None:
    patches = of(make(NETWORK, PROVIDER, OUTSIDE, AROUND), plan.Patch)
    macs = {
        mac for each in patches if isinstance(each, plan.Patch) for mac in (each.mac, each.port_mac)
    }
    assert len(macs) == 4


def test_the_announced_mac_is_the_links() -> None:
    made = make(NETWORK, PROVIDER, OUTSIDE, AROUND)
    (announcement,) = of(made, plan.Announcement)
    patches = {each.link: each.mac for each in made if isinstance(each, plan.Patch)}
    assert isinstance(announcement, plan.Announcement)
    assert announcement.mac == patches[announcement.link] == names.mac(UUID, "upstream")


def test_transit_of_an_upstream_of_kind_host() -> None:
    upstream = Upstream(
        name="host",
        kind="host",
        bridge="natns-host",
        subnet=IPv4Network("198.19.252.0/22"),
        gateway=IPv4Address("198.19.252.1"),
    )
    assert describe(transit(upstream, ["eth0", "wlan0"])) == TRANSIT


@pytest.mark.parametrize(
    ("private", "upstream", "told"), [(1500, 1500, None), (1500, 1400, 1400), (1400, 1500, None)]
)
def test_mtu_that_guests_are_told(private: int, upstream: int, told: int | None) -> None:
    assert path_mtu(private, upstream) == told
