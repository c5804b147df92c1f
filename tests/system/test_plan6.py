# SPDX-License-Identifier: LGPL-2.1-or-later
"""A plan with IPv6, made by hand and carried out: what the kernel makes of it."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from threading import Timer

import pytest
from lab import Node, end_process, run, spawn, wait_for

from libvirt_natns import names
from libvirt_natns.addresses import AddressRange
from libvirt_natns.daemons import ndppd
from libvirt_natns.engine.plan.network_plan import make
from libvirt_natns.engine.plan.surroundings import Surroundings
from libvirt_natns.engine.removal import remove
from libvirt_natns.kernel import address_probe, ndp
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import BridgeSegment
from libvirt_natns.model.subnet import Subnet
from libvirt_natns.model.upstream import BridgeUpstream, Outside
from libvirt_natns.operations.addressing import Route
from libvirt_natns.operations.carry_out import carry_out, plan_differences
from libvirt_natns.operations.daemon_operations import NeighbourProxy
from libvirt_natns.operations.namespaces import Sysctl
from libvirt_natns.operations.neighbour_operations import ProxiedNeighbours
from libvirt_natns.operations.operation import Plan
from libvirt_natns.operations.undo import Undo
from libvirt_natns.service.kernel_watch import KernelWatch
from libvirt_natns.service.watched import ENDED, Watched

UUID = "6a8f7f0e-6c1c-4e64-9f3c-0d8c4e6f0a66"
BRIDGE, PRIVATE = "br0", "virbr60"
NAMESPACE = names.namespace("six")
MAC = names.mac(UUID, "upstream")

ROUTER = IPv6Address("2001:db8:77::1")
SUBNET = IPv6Network("2001:db8:77::/64")
OWN = IPv6Address("2001:db8:77::100")
ROUTED = IPv6Interface("2001:db8:100::1/64")
PROXIED = IPv6Interface("2001:db8:77::2/64")
GUEST = "2001:db8:100::5"
PROXIED_GUEST = "2001:db8:77:0:5054:ff:fe00:5"

UPSTREAM = BridgeSegment.of(
    BridgeUpstream(
        name="provider",
        bridge=BRIDGE,
        subnet=IPv4Network("192.168.0.0/24"),
        gateway=IPv4Address("192.168.0.1"),
        subnet6=SUBNET,
        gateway6=ROUTER,
        pool6=(AddressRange(OWN, IPv6Address("2001:db8:77::1ff")),),
    )
)
NETWORK = Network(
    uuid=UUID,
    name="six",
    bridge=PRIVATE,
    subnets=(Subnet(IPv4Interface("10.0.0.1/24")), Subnet(ROUTED)),
)
OUTSIDE = Outside(IPv4Address("192.168.0.100"), OWN, routed=(ROUTED.network,))
AROUND = Surroundings(1500, 1500, "nftables", None)


def static(node: Node, address: str, gateway: str | None = None) -> None:
    """An IPv6 address that answers at once."""
    run("ip", "-n", node.name, "address", "add", address, "dev", "eth0", "nodad")
    if gateway:
        run("ip", "-n", node.name, "route", "add", "default", "via", gateway, "dev", "eth0")


@dataclass
class World:
    """A provider's router, a guest, and the kernel session that builds between them."""

    router: Node
    guest: Node
    kernel: Kernel

    def up(
        self,
        outside: Outside = OUTSIDE,
        upstream: BridgeSegment = UPSTREAM,
        network: Network = NETWORK,
    ) -> Plan:
        made = make(network, upstream, outside, AROUND)
        self.carry_out(made)
        assert plan_differences(self.kernel, made) == []
        return made

    def carry_out(self, made: Plan) -> list[str]:
        with Undo() as undo:
            repaired = carry_out(self.kernel, made, undo)
            undo.pop_all()
        return repaired


@contextmanager
def quiet_bridge(name: str) -> Iterator[None]:
    """A bridge of the host on which the host itself has nothing to say."""
    run("ip", "link", "add", name, "type", "bridge", "stp_state", "0")
    run("sysctl", "-qw", f"net.ipv6.conf.{name}.disable_ipv6=1")
    run("ip", "link", "set", name, "up")
    try:
        yield
    finally:
        run("ip", "link", "del", name)


@pytest.fixture
def world() -> Iterator[World]:
    kernel = Kernel()
    with kernel, quiet_bridge(BRIDGE), quiet_bridge(PRIVATE):
        # As libvirt leaves it.
        run("sysctl", "-qw", f"net.ipv6.conf.{PRIVATE}.disable_ipv6=0")
        for subnet in NETWORK.subnets:
            run("ip", "address", "add", str(subnet.interface), "dev", PRIVATE)
        with Node("router", BRIDGE) as router, Node("guest", PRIVATE) as guest:
            static(router, f"{ROUTER}/64")
            router.add_address("192.168.0.1/24")
            router.run("sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
            try:
                yield World(router, guest, kernel)
            finally:
                remove(kernel, UUID, NAMESPACE)
                directory = names.network_directory(UUID)
                for each in (directory, directory.parent):
                    if each.exists():
                        each.rmdir()


def ip(*arguments: str) -> str:
    return run("ip", "-n", NAMESPACE, *arguments).stdout


def test_a_routed_prefix_both_ways_at_once(world: World) -> None:
    """No address is tentative for a moment: what starts now is answered now."""
    world.up()
    assert ip("-6", "address", "show", "tentative") == ""
    assert str(ROUTED) not in run("ip", "-6", "address", "show", PRIVATE).stdout
    static(world.guest, f"{GUEST}/64", str(ROUTED.ip))
    world.router.add_route(str(ROUTED.network), str(OWN))
    assert world.guest.ping(str(ROUTER))
    assert world.router.ping(GUEST)


def test_private_prefixes_leave_by_the_upstream_address(world: World) -> None:
    """In both families, and nothing leads back to the guest's own address."""
    private = IPv6Interface("fd00:1::1/64")
    world.up(
        replace(OUTSIDE, routed=()),
        network=replace(NETWORK, subnets=(NETWORK.subnets[0], Subnet(private))),
    )
    static(world.guest, "fd00:1::5/64", str(private.ip))
    world.guest.add_address("10.0.0.5/24")
    world.guest.add_route("default", "10.0.0.1")
    with world.router.sniff(f"ip6 host {OWN} and icmp6 and ip6[40]==128") as seen:
        assert world.guest.ping(str(ROUTER))
        assert world.guest.ping("192.168.0.1")
        wait_for(lambda: seen.lines(), what="the translated packet")


def test_what_the_host_has(world: World) -> None:
    """What the kernel makes for every link and address does not count."""
    address, prefix = IPv6Address("2001:db8:5::1"), IPv6Network("2001:db8:5::/64")
    far, gateway = IPv6Network("2001:db8:6::/64"), IPv6Address("2001:db8:5::9")
    kernel = world.kernel
    run("sysctl", "-qw", f"net.ipv6.conf.{BRIDGE}.disable_ipv6=0")
    try:
        kernel.host.addresses.add(BRIDGE, IPv6Interface((address, 64)))
        kernel.host.routes.add_as_libvirt(far, gateway, BRIDGE)
        assert kernel.host.routes.has(far, gateway, BRIDGE)
        assert {address, ROUTED.ip, IPv4Address("10.0.0.1")} <= kernel.host.addresses.beyond_link()
        assert {prefix, far, ROUTED.network} <= kernel.host.routes.destinations()
        assert not {prefix, far} & kernel.host.routes.destinations(without=[BRIDGE])
        assert not [
            to for to in kernel.host.routes.destinations() if to.is_link_local or to.is_multicast
        ]
        assert kernel.host.routes.links(6) == {BRIDGE, PRIVATE}
        assert kernel.host.routes.links() == {PRIVATE}
        kernel.host.routes.replace(far, None, PRIVATE)
        assert kernel.host.routes.has(far, None, PRIVATE)
        kernel.host.routes.remove(far, PRIVATE)
        kernel.host.routes.remove(far, PRIVATE)
        assert far not in kernel.host.routes.destinations()
        assert kernel.host.addresses.foreign(BRIDGE, []) == {IPv6Interface((address, 64))}
    finally:
        run("sysctl", "-qw", f"net.ipv6.conf.{BRIDGE}.disable_ipv6=1")


def test_neighbours_are_told_and_found(world: World) -> None:
    """Who has known the address by another MAC believes the newcomer."""
    run("ip", "-n", "router", "neighbour", "replace", str(OWN), "lladdr", "02:00:00:00:00:99",
        "dev", "eth0", "nud", "stale")  # fmt: skip
    with world.router.sniff(f"icmp6 and ether src {MAC} and ip6[40]==136") as heard:
        world.up()
        wait_for(lambda: len(heard.lines()) >= 2, what="two advertisements that nobody asked for")
        told = heard.lines()[:2]
    assert all(f"{OWN} > ff02::1" in line and f"tgt is {OWN}" in line for line in told)
    assert MAC in world.router.run("ip", "neighbour", "show", str(OWN)).stdout

    free = OWN + 1
    assert address_probe.probe(BRIDGE, [OWN, free, ROUTER], 0.4) == {OWN, ROUTER}
    other = IPv4Address("192.168.0.1")
    assert address_probe.probe(BRIDGE, [ROUTER, other], 2.0) == {ROUTER, other}


def test_another_station_that_looks_for_the_same_address_has_it(world: World) -> None:
    """It asks before we do, as one that starts at the same moment."""

    with closing(world.router.packet_socket()) as wire:
        theirs = ndp.question(bytes.fromhex(world.router.mac.replace(":", "")), OWN)
        timer = Timer(0.2, wire.send, [theirs])
        timer.start()
        try:
            # It ends as soon as the answer is known.
            assert address_probe.probe(BRIDGE, [OWN], 10.0) == {OWN}
        finally:
            timer.join()


DAMAGE = (
    f"ip -n {NAMESPACE} address del {OWN}/64 dev upstream",
    f"ip -n {NAMESPACE} address del {ROUTED} dev {PRIVATE}",
    f"ip -n {NAMESPACE} address add 2001:db8:77::bad/64 dev upstream",
    f"ip -n {NAMESPACE} -6 route del default",
    f"ip -n {NAMESPACE} -6 route add default via {ROUTER + 8} dev upstream metric 50",
    f"ip -n {NAMESPACE} -6 route append default via {ROUTER + 8} dev upstream",
    f"ip netns exec {NAMESPACE} sysctl -qw net.ipv6.conf.all.forwarding=0",
    f"ip netns exec {NAMESPACE} sysctl -qw net.ipv6.conf.upstream.accept_ra=2",
    f"ip netns exec {NAMESPACE} sysctl -qw net.ipv6.conf.all.disable_ipv6=1",
    f"ip netns exec {NAMESPACE} sysctl -qw net.ipv6.conf.{PRIVATE}.disable_ipv6=1",
    f"ip address add {ROUTED} dev {PRIVATE}",
)


def test_what_somebody_breaks_is_seen_and_mended(world: World) -> None:
    made = world.up()
    for command in DAMAGE:
        run(*command.split())
        assert plan_differences(world.kernel, made), command
        assert world.carry_out(made), command
        assert plan_differences(world.kernel, made) == [], command


def test_no_ipv6_outside_for_an_upstream_without(world: World) -> None:
    """Inside it goes on, and not one packet of IPv6 leaves."""
    with world.router.sniff(f"ip6 and ether src {MAC}") as heard:
        world.up(Outside(OUTSIDE.address), replace(UPSTREAM, subnet6=None, gateway6=None, pool6=()))
        assert "inet6" not in ip("address", "show", "upstream")
        static(world.guest, f"{GUEST}/64", str(ROUTED.ip))
        assert world.guest.ping(str(ROUTED.ip))
        assert not world.guest.ping(str(ROUTER))
        assert heard.lines() == []


def test_a_network_without_ipv6_says_nothing_in_it(world: World) -> None:
    made = world.up(Outside(OUTSIDE.address), network=replace(NETWORK, subnets=NETWORK.subnets[:1]))
    assert "inet6" not in ip("address", "show")
    # The network gets a subnet of it, and loses it again.
    world.up()
    assert str(OWN) in ip("address", "show", "upstream")
    assert world.carry_out(made)
    assert "inet6" not in ip("address", "show")


def test_a_router_that_advertises_itself(world: World) -> None:
    """Its address is not known; what it advertises besides is not taken."""
    advertiser = spawn(
        "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--port=0",
        "--user=root", "--enable-ra", f"--dhcp-range={SUBNET.network_address},slaac",
        "--interface=eth0", "--log-facility=/dev/null", "--leasefile-ro", namespace="router",
    )  # fmt: skip
    try:
        world.up(upstream=replace(UPSTREAM, gateway6=None))
        wait_for(lambda: "proto ra" in ip("-6", "route", "show", "default"), what="a way out")
        assert ip("-6", "address", "show", "dynamic") == ""
        static(world.guest, f"{GUEST}/64", str(ROUTED.ip))
        world.router.add_route(str(ROUTED.network), str(OWN))
        assert world.guest.ping(str(ROUTER))
    finally:
        end_process(advertiser)


# -- guests in the provider's own prefix ---------------------------------------

PROXY = replace(NETWORK, subnets=(NETWORK.subnets[0], Subnet(PROXIED)))
PROXY_OUTSIDE = replace(OUTSIDE, routed=(), proxied=(PROXIED.network,))


def test_guests_in_the_providers_own_prefix(world: World) -> None:
    """Each is found by its address, nobody else is, and the router not by a guest."""
    made = world.up(PROXY_OUTSIDE, network=PROXY)
    assert f"{OWN}/128" in ip("address", "show", "upstream")
    static(world.guest, f"{PROXIED_GUEST}/64", str(PROXIED.ip))
    with world.guest.sniff(f"icmp6 and ip6[40]==135 and host not {PROXIED_GUEST}") as asked:
        assert world.router.ping(PROXIED_GUEST)
        # To the guest the router is a neighbour.
        assert world.guest.ping(str(ROUTER))
        assert not world.router.ping("2001:db8:77:0:5054:ff:fe00:6")
        wait_for(lambda: any("fe00:6" in line for line in asked.lines()), what="the question")
        # A guest that claims the router's address, or another network's, is not even asked.
        static(world.guest, f"{ROUTER}/64")
        static(world.guest, f"{OWN + 1}/64")
        assert not world.router.ping(str(OWN + 1))
        stranger = "2001:db8:77:1::5"
        world.router.run("ip", "route", "add", f"{stranger}/128", "dev", "eth0")
        assert not world.router.ping(stranger)
        assert not [line for line in asked.lines() if f"has {OWN + 1}," in line or stranger in line]

    for claimed in (ROUTER, OWN + 1):
        world.guest.run("ip", "address", "del", f"{claimed}/64", "dev", "eth0")
    pid = ndppd.running(UUID, NAMESPACE)
    assert pid
    run("kill", str(pid))
    wait_for(lambda: ndppd.running(UUID, NAMESPACE) is None, what="the end of ndppd")
    assert plan_differences(world.kernel, made) == [
        f"ndppd on upstream in {NAMESPACE} is not running"
    ]
    world.carry_out(made)
    # Its links are made again: it would go on listening to those that have gone.
    run("ip", "link", "del", names.upstream_patch(UUID))
    assert plan_differences(world.kernel, made)
    world.carry_out(made)
    assert plan_differences(world.kernel, made) == []
    assert world.router.ping(PROXIED_GUEST)


def test_a_bridge_that_sends_multicast_only_where_it_was_asked_for(world: World) -> None:
    """Guests' groups are joined on the guests' side alone; the provider's bridge snoops."""
    made = world.up(PROXY_OUTSIDE, network=PROXY)
    static(world.guest, f"{PROXIED_GUEST}/64", str(PROXIED.ip))
    for key, value in (("accept_dad", "0"), ("disable_ipv6", "0")):
        run("sysctl", "-qw", f"net.ipv6.conf.{BRIDGE}.{key}={value}")
    own = ("ip", "-6", "address", "show", "dev", BRIDGE, "scope", "link", "-tentative")
    # Without an address to ask from, the bridge would try again in half a minute only.
    wait_for(lambda: run(*own).stdout, what="the bridge's own address")
    for option, value in (
        ("mcast_query_response_interval", "10"), ("mcast_startup_query_interval", "10"),
        ("mcast_snooping", "1"), ("mcast_querier", "1"),
    ):  # fmt: skip
        run("ip", "link", "set", BRIDGE, "type", "bridge", option, value)
    port = names.upstream_patch(UUID)

    def found() -> bool:
        world.router.run("ip", "neighbour", "flush", "dev", "eth0")
        return world.router.ping(PROXIED_GUEST)

    assert found()
    run("bridge", "link", "set", "dev", port, "mcast_router", "1")
    wait_for(lambda: not found(), timeout=30, what="the bridge to hold it back")
    assert plan_differences(world.kernel, made) == [f"patch {port} does not get all multicast"]
    world.carry_out(made)
    assert found()


def test_a_proxy_that_is_not_wanted_any_more_ends(world: World) -> None:
    world.up(PROXY_OUTSIDE, network=PROXY)
    pid = ndppd.running(UUID, NAMESPACE)
    world.up()
    assert ndppd.running(UUID, NAMESPACE) is None
    assert str(ROUTER) not in ip("neighbour", "show", "proxy")
    wait_for(lambda: run("kill", "-0", str(pid), check=False).returncode, what="the end of ndppd")


def test_a_proxy_in_the_host(world: World) -> None:
    """As for a network in the host's own prefix: asked on one link, asked again on another."""
    with quiet_bridge("wan"), Node("far", "wan") as far:
        for link in ("wan", PRIVATE):
            run("sysctl", "-qw", f"net.ipv6.conf.{link}.disable_ipv6=0")
        static(far, "2001:db8:99::1/64")
        static(world.guest, "2001:db8:99::5/64", "fe80::1")
        run("ip", "address", "add", "fe80::1/64", "dev", PRIVATE, "nodad")
        prefix = IPv6Network("2001:db8:99::/64")
        made: Plan = (
            Sysctl(None, "net/ipv6/conf/all/forwarding", "1"),
            Route(None, IPv6Network("2001:db8:99::1/128"), None, "wan"),
            Route(None, IPv6Network("2001:db8:99::5/128"), None, PRIVATE),
            ProxiedNeighbours(None, PRIVATE, (IPv6Address("2001:db8:99::1"),)),
            Sysctl(None, f"net/ipv6/conf/{PRIVATE}/proxy_ndp", "1"),
            Sysctl(None, f"net/ipv6/neigh/{PRIVATE}/proxy_delay", "0"),
            NeighbourProxy(ndppd.Proxy(UUID, None, "wan", PRIVATE, (prefix,))),
        )
        try:
            world.carry_out(made)
            assert plan_differences(world.kernel, made) == []
            wait_for(lambda: far.ping("2001:db8:99::5"), what="the guest's answer")
        finally:
            ndppd.stop(UUID)
            run("sysctl", "-qw", "net.ipv6.conf.all.forwarding=0")
    assert ndppd.running(UUID, None) is None


# -- the watch -----------------------------------------------------------------


def test_what_the_kernel_does_by_itself_alarms_nobody(world: World) -> None:
    world.up(PROXY_OUTSIDE, network=PROXY)
    pid = ndppd.running(UUID, NAMESPACE)
    suspected: list[str] = []
    ports = (names.private_patch(UUID), names.upstream_patch(UUID))
    seen = Watched(UUID, NAMESPACE, PRIVATE, ports, proxies=(pid or ENDED,))
    watch = KernelWatch(lambda _: seen, suspected.append)
    watch.start()

    def noticed(*command: str) -> None:
        suspected.clear()
        run(*command)
        wait_for(lambda: UUID in suspected, what=f"an alarm after {' '.join(command)}")

    try:
        watch.follow([UUID])
        assert watch.settled(5.0)
        assert suspected == []
        inside = ("ip", "-n", NAMESPACE)
        run(*inside, "address", "add", "fe80::5/64", "dev", "upstream", "nodad")
        run(*inside, "address", "del", "fe80::5/64", "dev", "upstream")
        run(*inside, "route", "add", "default", "via", "fe80::9", "dev", "upstream",
            "proto", "ra", "metric", "2048")  # fmt: skip
        run("ip", "address", "add", "fe80::5/64", "dev", PRIVATE, "nodad")
        # What comes later is heard later.
        noticed(*inside, "route", "del", f"{ROUTER}/128", "dev", "upstream")
        assert suspected == [UUID]
        noticed(*inside, "address", "del", f"{OWN}/128", "dev", "upstream")
        noticed("ip", "address", "add", str(PROXIED), "dev", PRIVATE)
        noticed("kill", str(pid))
    finally:
        watch.stop()
