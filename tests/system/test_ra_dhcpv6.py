# SPDX-License-Identifier: LGPL-2.1-or-later
"""What guests make of the advertisements and leases that a network's dnsmasq gives in IPv6.

A network of libvirt's, whose addresses a namespace of the test's own has taken over:
``dnsmasq_config``'s texts, a real dnsmasq, and the kernel and dhclient as guests.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address, IPv6Address, IPv6Interface, IPv6Network

import pytest
from lab import CommandError, FastGuest, Node, run, start_network, virsh, wait_for
from lab_ipv6 import leased6

from libvirt_natns import names
from libvirt_natns.addresses import Address
from libvirt_natns.daemons import dnsmasq, libvirt_dnsmasq
from libvirt_natns.daemons.dnsmasq import Daemon
from libvirt_natns.daemons.dnsmasq_config import Advertised, make
from libvirt_natns.daemons.resolv_conf import Resolvers
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.model.network import Network
from libvirt_natns.model.subnet import Subnet

MAC, OTHER = "52:54:00:00:00:05", "52:54:00:00:00:06"
BRIDGE = "virbr10"
PREFIX = "fd00:1::/64"
LEASED = Subnet(IPv6Interface("2001:db8:0:7::1/64"))
RANGE = "<dhcp><range start='fd00:1::100' end='fd00:1::1ff'/>{}</dhcp>"
FIXED = "<host id='0:3:0:1:52:54:0:0:0:6' name='fixed' ip='fd00:1::6'/>"
NATNS = """<metadata><natns:nat xmlns:natns='urn:libvirt-natns:1'>
  <natns:ip family='ipv6' address='fd00:1::1' prefix='64'><natns:dhcp>
    <natns:host mac='52:54:00:00:00:05' name='web' ip='fd00:1::5'/>
  </natns:dhcp></natns:ip></natns:nat></metadata>"""
PATIENCE = 15


def network_xml(inside: str = "", prefix: int = 64) -> str:
    return f"""<network>
  <name>a</name>
  <uuid>00000000-0000-4000-8000-00000000000a</uuid>
  <bridge name='{BRIDGE}'/>
  <domain name='a'/>
  <ip address='10.0.0.1' netmask='255.255.255.0'>
    <dhcp><range start='10.0.0.100' end='10.0.0.200'/></dhcp>
  </ip>
  <ip family='ipv6' address='fd00:1::1' prefix='{prefix}'>{inside}</ip>
</network>"""


# -- the world -----------------------------------------------------------------


def started(xml: str) -> Network:
    """The network as libvirt knows it, without its addresses on the bridge."""
    name = start_network(xml)
    network = libvirt_xml.parse_network(virsh("net-dumpxml", name).stdout.encode())
    for subnet in network.subnets if network.taken_over else ():
        run("ip", "address", "del", str(subnet.interface), "dev", BRIDGE)
    return network


@contextmanager
def router(
    network: Network,
    *,
    leased: Iterable[Subnet] = (),
    mtu: int | None = None,
    kept: Iterable[tuple[str, Address]] = (),
    proxied: tuple[IPv6Network, ...] = (),
    router6: bool = True,
) -> Iterator[Node]:
    """A namespace with the network's addresses, and its dnsmasq there."""
    network = replace(network, subnets=(*network.subnets, *leased))
    with Node("router", BRIDGE) as node:
        node.run("ip", "link", "set", "eth0", "down")
        node.run("ip", "link", "set", "eth0", "name", BRIDGE)
        node.run("sysctl", "-q", f"net.ipv6.conf.{BRIDGE}.accept_dad=0")
        node.run("sysctl", "-q", "net.ipv6.conf.all.forwarding=1")
        node.run("ip", "link", "set", BRIDGE, "up")
        for subnet in network.subnets:
            node.run("ip", "address", "add", str(subnet.interface), "dev", BRIDGE)
        libvirts = libvirt_dnsmasq.read(network.name) if network.taken_over else None
        asked = Resolvers()
        files = make(network, libvirts, asked, mtu, kept, Advertised(proxied, router6))
        try:
            dnsmasq.ensure(Daemon(network.uuid, "router", BRIDGE, files))
            yield node
        finally:
            dnsmasq.stop(network.uuid)
            shutil.rmtree(names.RUN_DIRECTORY)


@contextmanager
def guest(mac: str = MAC, name: str = "guest") -> Iterator[FastGuest]:
    """A guest whose kernel listens to routers, and asks for them as soon as it is up."""
    with FastGuest(BRIDGE, mac, name) as node:
        node.run("ip", "link", "set", "eth0", "down")
        node.run("sysctl", "-q", "net.ipv6.conf.eth0.accept_dad=0")
        node.run("ip", "link", "set", "eth0", "up")
        yield node


def addresses(node: Node) -> list[IPv6Interface]:
    """The guest's addresses but for those of the link itself."""
    (link,) = json.loads(node.run("ip", "-j", "-6", "address", "show", "eth0").stdout)
    found = (IPv6Interface(f"{each['local']}/{each['prefixlen']}") for each in link["addr_info"])
    return [each for each in found if not each.is_link_local]


def routes(node: Node) -> dict[str, str | None]:
    """Where the guest sends what: by which gateway, or None for what is on its link."""
    found = json.loads(node.run("ip", "-j", "-6", "route", "show", "dev", "eth0").stdout)
    return {each["dst"]: each.get("gateway") for each in found if "fe80::" not in each["dst"]}


def link_local(node: Node) -> str:
    text = node.run("ip", "-6", "-brief", "address", "show", "scope", "link").stdout
    found = re.search(r"fe80:[0-9a-f:]+", text)
    assert found, text
    return found[0]


def advertised(node: Node) -> str:
    """What a router answers the guest, in rdisc6's words."""
    return node.run("rdisc6", "-1", "-r", "5", "-w", "2000", "eth0").stdout


# -- addresses that guests make themselves ----------------------------------------


def test_guests_learn_their_prefix_and_their_router() -> None:
    with router(started(network_xml()), mtu=1400) as node, guest() as asks:
        wait_for(lambda: addresses(asks), timeout=PATIENCE, what="an address")
        (address,) = addresses(asks)
        assert address.network == IPv6Network(PREFIX)
        assert routes(asks) == {PREFIX: None, "default": link_local(node)}
        assert asks.run("cat", "/proc/sys/net/ipv6/conf/eth0/mtu").stdout == "1400\n"
        assert asks.ping("fd00:1::1")
        said = advertised(asks)
        assert re.search(r"Stateful address conf. *: +No", said)
        assert f"Recursive DNS server     : {link_local(node)}" in said
        assert asks.dig("router.a", "AAAA", server=f"{link_local(node)}%eth0") == []
        # The guests' other family is served by the same dnsmasq.
        assert asks.dhcp()["router"] == "10.0.0.1"


def test_a_proxied_prefix_is_reached_through_the_router() -> None:
    network = started(network_xml())
    with router(network, proxied=(IPv6Network(PREFIX),)) as node, guest() as asks:
        wait_for(lambda: addresses(asks), timeout=PATIENCE, what="an address")
        assert addresses(asks)[0] in IPv6Network(PREFIX)
        assert routes(asks) == {"default": link_local(node)}


def test_without_a_way_out_nobody_is_told_to_leave() -> None:
    network = started(network_xml())
    with router(network, router6=False), guest() as asks:
        wait_for(lambda: addresses(asks), timeout=PATIENCE, what="an address")
        assert routes(asks) == {PREFIX: None}
        assert asks.ping("fd00:1::1")


# -- addresses by DHCPv6 ------------------------------------------------------------


def test_leases_by_chance_by_mac_and_by_duid() -> None:
    network = started(network_xml(RANGE.format(FIXED)))
    kept: list[tuple[str, Address]] = [
        (MAC, IPv4Address("10.0.0.7")),
        (MAC, IPv6Address("fd00:1::7")),
    ]
    with router(network, leased=[LEASED], kept=kept) as node, guest() as by_mac:
        # Of the leased prefix it makes an address; of the other it is given one.
        wait_for(lambda: addresses(by_mac), timeout=PATIENCE, what="an address")
        assert [each.network for each in addresses(by_mac)] == [LEASED.network]
        assert routes(by_mac)["default"] == link_local(node)
        assert routes(by_mac)[PREFIX] is None
        assert leased6(by_mac)["new_ip6_address"] == "fd00:1::7"
        assert by_mac.dhcp()["ip"] == "10.0.0.7"
        with guest(OTHER, "fixed") as fixed, guest("52:54:00:00:00:99", "any") as anybody:
            found = leased6(fixed)
            assert found["new_ip6_address"] == "fd00:1::6"
            assert found["new_dhcp6_name_servers"] == "fd00:1::1"
            by_chance = IPv6Address(leased6(anybody)["new_ip6_address"])
            assert IPv6Address("fd00:1::100") <= by_chance <= IPv6Address("fd00:1::1ff")
            assert anybody.ping("fd00:1::6")
            assert anybody.dig("fixed.a", "AAAA", server="fd00:1::1") == ["fd00:1::6"]
        for address in ("10.0.0.7/24", "fd00:1::7/64", "fd00:1::6/64", f"{by_chance}/64"):
            wait_for(partial(shows_lease, address), what=address)


def shows_lease(address: str) -> bool:
    return f" {address} " in virsh("net-dhcp-leases", "a").stdout


def test_leases_outlive_the_dnsmasq_that_gave_them() -> None:
    network = started(network_xml(RANGE.format("")))
    with router(network), guest() as asks:
        first = leased6(asks)
        files = make(network, libvirt_dnsmasq.read("a"), Resolvers(), 1400)
        dnsmasq.ensure(Daemon(network.uuid, "router", BRIDGE, files))
        again = leased6(asks)
        for known in ("new_ip6_address", "new_dhcp6_server_id"):
            assert again[known] == first[known]
        wait_for(lambda: virsh("net-dhcp-leases", "a").stdout.count(" ipv6 ") == 1)


def test_natns_ip_knows_a_guest_by_its_mac() -> None:
    xml = re.sub(r"  <ip.*</ip>", NATNS, network_xml(), flags=re.DOTALL)
    with router(started(xml)) as node, guest() as asks:
        wait_for(lambda: "default" in routes(asks), timeout=PATIENCE, what="a router")
        assert routes(asks) == {PREFIX: None, "default": link_local(node)}
        assert leased6(asks)["new_ip6_address"] == "fd00:1::5"
        assert asks.dig("web.a", "AAAA", server="fd00:1::1") == ["fd00:1::5"]


def test_a_prefix_that_leaves_no_room_for_addresses_of_ones_own() -> None:
    with router(started(network_xml(RANGE.format(""), 80))) as node, guest() as asks:
        wait_for(lambda: "default" in routes(asks), timeout=PATIENCE, what="a router")
        assert routes(asks) == {"fd00:1::/80": None, "default": link_local(node)}
        assert addresses(asks) == []
        assert IPv6Address(leased6(asks)["new_ip6_address"]) in IPv6Network("fd00:1::100/120")
        assert asks.ping("fd00:1::1")


def test_libvirts_own_dnsmasq_serves_nobody_any_more() -> None:
    """It still listens on the bridge, yet the addresses have gone from there."""
    started(network_xml(RANGE.format("")))
    with guest() as asks, asks.sniff("udp port 547 or icmp6[icmp6type]==134") as seen:
        assert asks.run("rdisc6", "-r", "2", "-w", "500", "eth0", check=False).returncode != 0
        with pytest.raises(CommandError):
            leased6(asks, limit=2)
        assert seen.lines()
        assert [line for line in seen.lines() if " > ff02::1:2.547: " not in line] == []
