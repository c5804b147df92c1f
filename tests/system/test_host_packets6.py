# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's own rules in IPv6 (upstreams of kind "host"), by real packets.

The host has 2001:db8:77::2 on br0 and routes a transit bridge, fd00:20::/64.

    guest fd00:10::5        neighbour 2001:db8:77::50
        | virbr20                |
      nat-t fd00:20::2 ------ natns-host fd00:20::1, the host, br0
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path

import pytest
from lab import wait_for
from packets import (
    DATAGRAM,
    FOREIGN,
    KINDS,
    STREAM,
    answering,
    asked,
    closed,
    forward,
    in_node,
    seen_by,
    serving,
    sh,
    silent,
    state,
)
from packets6 import (
    GATEWAY,
    GUEST,
    NAT,
    NEIGHBOUR,
    OPEN,
    OUTSIDE,
    PRIVATE,
    SERVER,
    node,
    patch,
    pings,
    small_world,
)

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[2]))

from test_firewall_packets6 import POLICY as ON_BRIDGE

from libvirt_natns.firewall import backends, host_firewall
from libvirt_natns.firewall.host_policy import HostForward, HostPolicy, Private, Provider, Transit
from libvirt_natns.firewall.namespace_policy import Policy
from libvirt_natns.firewall.namespace_rules import ruleset

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

HOST, SECOND = f"{OUTSIDE}::2", f"{OUTSIDE}::3"
BRIDGE, TRANSIT, NAT_T = "natns-host", "fd00:20::1", "fd00:20::2"
BRIDGE_NF = Path("/proc/sys/net/bridge/bridge-nf-call-ip6tables")

FOREIGN6 = {
    "none": ":",
    "iptables-nft": FOREIGN["iptables-nft"]
    .replace("iptables", "ip6tables")
    .replace("172.17.0.0/16", "fd00:17::/64"),
    "iptables-legacy": FOREIGN["iptables-legacy"].replace("iptables", "ip6tables"),
}

POLICY = Policy(
    inner="virbr20",
    upstream="upstream",
    subnets=(IPv6Network(f"{PRIVATE}::/64"),),
    gateways=(IPv6Address(GATEWAY),),
    address=None,
    address6=IPv6Address(NAT_T),
    segments=(IPv6Network("fd00:20::/64"),),
    transit=(IPv6Interface(f"{TRANSIT}/64"),),
    forwards=(
        forward("tcp", "2222", "22", address=NAT_T, target=GUEST),
        forward("udp", "2222", "22", address=NAT_T, target=GUEST),
        forward("tcp", "8000-8002", address=NAT_T, target=GUEST),
    ),
)


def published(proto: str, first: int, last: int, address: str = "", *sources: str) -> HostForward:
    return HostForward(
        proto,  # type: ignore[arg-type]
        IPv6Address(address) if address else None,
        first,
        last,
        IPv6Address(NAT_T),
        BRIDGE,
        tuple(map(IPv6Network, sources)),
    )


HOST_POLICY = HostPolicy(
    transits=(
        Transit(BRIDGE, IPv4Network("192.168.150.0/24")),
        Transit(BRIDGE, IPv6Network("fd00:20::/64")),
    ),
    forwards=(
        published("tcp", 2222, 2222),
        published("udp", 2222, 2222, SECOND),
        published("tcp", 8000, 8002, "", f"{NEIGHBOUR}/128"),
        HostForward("tcp", None, 2222, 2222, IPv4Address("192.168.150.2"), BRIDGE),
    ),
)


@pytest.fixture(scope="module")
def world() -> Iterator[ExitStack]:
    with small_world() as stack:
        if BRIDGE_NF.exists():
            BRIDGE_NF.write_text("0")
        sh(f"ip link add {BRIDGE} type bridge; ip link add virbr20 type bridge")
        sh(f"ip link set virbr20 up; ip link set {BRIDGE} up")
        for link, addresses in (("br0", (HOST, SECOND)), (BRIDGE, (TRANSIT,))):
            sh(f"sysctl -qw net.ipv6.conf.{link}.accept_dad=0 net.ipv6.conf.{link}.disable_ipv6=0")
            for address in addresses:
                sh(f"ip address add {address}/64 dev {link} nodad")
        sh("sysctl -qw net.ipv6.conf.lo.disable_ipv6=0 net.ipv6.conf.all.forwarding=1")
        node(stack, "nat-t")
        patch("virbr20", "p-in-t", "nat-t", "virbr20", GATEWAY)
        patch(BRIDGE, "p-up-t", "nat-t", "upstream", NAT_T)
        sh("bridge link set dev p-up-t hairpin on")
        in_node("nat-t", "sysctl -qw net.ipv6.conf.all.forwarding=1")
        in_node("nat-t", f"ip route add default via {TRANSIT}")
        node(stack, "guest-t")
        patch("virbr20", "p-t", "guest-t", "eth0", GUEST)
        in_node("guest-t", f"ip route add default via {GATEWAY}")
        for program in ("iptables-legacy", "ip6tables-legacy"):
            for table in ("filter", "nat", "raw", "mangle"):
                # A legacy table once used stays for good: have them before.
                sh(f"{program} -t {table} -S")
        wait_for(lambda: " UP " in sh(f"ip -br link show {BRIDGE}"))
        yield stack


@pytest.fixture(params=["none", "all"])
def foreign(request: pytest.FixtureRequest, world: ExitStack) -> Iterator[str]:
    """Others' rules, which are gone afterwards."""
    sh("; ".join(FOREIGN6.values()) if request.param == "all" else FOREIGN6[request.param])
    yield request.param
    host_firewall.remove()
    sh("nft flush ruleset; ip6tables-legacy -F FORWARD; ip6tables-legacy -P FORWARD ACCEPT")


@pytest.mark.parametrize("name", ["nftables", "iptables"])
def test_guests_and_published_ports(name: str, foreign: str) -> None:
    backends.named(name).apply("nat-t", ruleset(POLICY))
    before = state6()
    assert host_firewall.ensure(HOST_POLICY, name)
    assert host_firewall.differences(HOST_POLICY, name) == ()
    with (
        answering("guest-t", "neighbour", address="::"),
        answering(None, ports=(2222,), address="::1"),
    ):
        for kind in KINDS:
            # Of several addresses, the kernel takes which it likes.
            said = asked("guest-t", NEIGHBOUR, 22, kind)
            assert said in (f"neighbour:22 saw {HOST}", f"neighbour:22 saw {SECOND}")
        for address in (HOST, SECOND):
            assert asked("neighbour", address, 2222, STREAM) == f"guest-t:22 saw {NEIGHBOUR}"
            assert asked("guest-t", address, 2222, STREAM) == f"guest-t:22 saw {TRANSIT}"
            assert asked(None, address, 2222, STREAM).startswith("guest-t:22 saw ")
        assert asked("neighbour", SECOND, 2222, DATAGRAM) == f"guest-t:22 saw {NEIGHBOUR}"
        assert asked("neighbour", HOST, 8001, STREAM) == f"guest-t:8001 saw {NEIGHBOUR}"
        # The host's own, and what is not published or for others.
        assert asked(None, "::1", 2222, STREAM) == "host:2222 saw ::1"
        assert closed("neighbour", HOST, 2222, DATAGRAM)
        assert closed("server", HOST, 8001, STREAM)
        in_node("neighbour", f"ip route replace fd00:20::/64 via {HOST}")
        assert silent("neighbour", (NAT_T, 2222, STREAM), (NAT_T, 2222, DATAGRAM)) == []
    host_firewall.remove()
    assert state6() == before


def state6() -> str:
    legacy = "".join(
        sh(f"ip6tables-legacy-save -t {t}") for t in ("filter", "nat", "raw", "mangle")
    )
    kept = [line.split(" [")[0] for line in legacy.splitlines() if not line.startswith("#")]
    return "\n".join([state(), *kept])


TAMPERING = {
    "nftables": "nft flush chain ip6 filter NATNS-FORWARD; nft delete table inet natns;"
    " ip6tables-nft -A FORWARD -i docker1 -j DROP; ip6tables-nft -I FORWARD -i docker2 -j DROP",
    "iptables": "ip6tables-legacy -t nat -F NATNS-POSTROUTING;"
    " ip6tables-legacy -I NATNS-FORWARD -j DROP; ip6tables-nft -F FORWARD",
}


@pytest.mark.parametrize("name", list(TAMPERING))
@pytest.mark.parametrize("foreign", ["all"], indirect=True)
def test_alterations_are_named_and_mended(name: str, foreign: str) -> None:
    host_firewall.ensure(HOST_POLICY, name)
    sh(TAMPERING[name])
    assert len(host_firewall.differences(HOST_POLICY, name)) == 3
    host_firewall.ensure(HOST_POLICY, name)
    assert host_firewall.differences(HOST_POLICY, name) == ()
    host_firewall.ensure(HostPolicy(), name)
    assert "NATNS" not in state6()
    assert "natns" not in state6()


def test_others_chains_are_left_alone_without_ipv6(world: ExitStack) -> None:
    sh(FOREIGN6["iptables-nft"])
    before = sh("nft list table ip6 filter")
    only4 = HostPolicy(transits=HOST_POLICY.transits[:1])
    host_firewall.ensure(only4, "nftables")
    assert sh("nft list table ip6 filter") == before
    host_firewall.remove()
    sh("nft flush ruleset")


@pytest.mark.parametrize("name", ["nftables", "iptables"])
@pytest.mark.parametrize("foreign", ["iptables-nft", "iptables-legacy"], indirect=True)
def test_where_bridged_frames_are_filtered(name: str, foreign: str) -> None:
    """bridge-nf-call-ip6tables=1 and FORWARD drops: neighbours do not even find each other."""
    if not BRIDGE_NF.exists():
        pytest.skip("this kernel has no br_netfilter")
    backends.named(name).apply("nat-a", ruleset(ON_BRIDGE))
    wanted = HostPolicy(
        private=(Private("virbr10", ON_BRIDGE.subnets),),
        provider=(Provider("br0", IPv6Address(NAT)), Provider("br0", ON_BRIDGE.public[0])),
        bridge_nf6=True,
    )
    BRIDGE_NF.write_text("1")
    try:
        for space in ("guest", "nat-a", "server"):
            in_node(space, "ip -6 neigh flush all")
        assert not pings("guest", GATEWAY)
        assert not pings("nat-a", SERVER)
        host_firewall.ensure(wanted, name)
        assert host_firewall.differences(wanted, name) == ()
        with serving("server", address="::"):
            for source, seen in ((GUEST, NAT), (OPEN, OPEN)):
                assert seen_by(SERVER, "guest", STREAM, address=source) == seen
    finally:
        BRIDGE_NF.write_text("0")
        host_firewall.remove()
