# SPDX-License-Identifier: LGPL-2.1-or-later
"""IPv6 where the upstream's link, or the private one, is of another sort than usual.

An address by DHCP beside it, a macvlan, a port that takes less than guests send.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from lab import ECHO_PORT, FastGuest, natns, remove_config, run, wait_for, write_config
from lab_dhcp import DhcpServer
from lab_domains import asked, networks
from lab_ipv6 import GATEWAY6, INTERNET6, SUBNET6, DualProvider, dual, static6

MAC = "52:54:00:00:00:05"
GUEST = "fd00:10::5"

pytestmark = pytest.mark.usefixtures("installed", "nothing_left")


@contextmanager
def guest_in(
    bridge: str, address: str = f"{GUEST}/64", gateway: str = "fd00:10::1"
) -> Iterator[FastGuest]:
    with FastGuest(bridge, MAC) as guest:
        static6(guest, address, gateway)
        yield guest


def is_well() -> None:
    """Nothing differs, and who looks again finds nothing to do."""
    assert natns("check", check=False).stdout == ""
    assert natns("sync").stdout == ""


def by_dhcp(*lines: str) -> str:
    return "\n".join(
        [
            'upstream = "office"',
            "[upstreams.office]",
            'kind = "bridge"',
            'bridge = "br0"',
            'pool = "dhcp"',
            "probe = 0.05",
            f'subnet6 = "{SUBNET6}"',
            'pool6 = ["2001:db8:77::100-2001:db8:77::1ff"]',
            *lines,
            "",
        ]
    )


def leaves_by() -> str | None:
    """Whom a server outside sees where the guest connects to it."""
    return asked("guest", "tcp", INTERNET6, ECHO_PORT)


def address6(network: str) -> str:
    (shown,) = json.loads(natns("status", "--json", network).stdout)["networks"]
    return str(shown["address6"])


def default_of(namespace: str) -> str:
    return run("ip", "-n", namespace, "-6", "route", "show", "default").stdout


@pytest.mark.parametrize("gateway", [f'gateway6 = "{GATEWAY6}"', ""], ids=["static", "advertised"])
def test_ipv4_by_dhcp(gateway: str) -> None:
    with DualProvider(advertised=not gateway), DhcpServer():
        write_config(by_dhcp(gateway))
        try:
            with networks(dual("a", "virbr10")), guest_in("virbr10"):
                wait_for(lambda: default_of("nat-a"), timeout=15, what="a way out")
                before = default_of("nat-a")
                assert leaves_by() == address6("a")
                is_well()
                assert default_of("nat-a").split()[:3] == before.split()[:3]
        finally:
            remove_config()


def test_a_network_without_ipv4_waits_for_no_dhcp_server() -> None:
    with DualProvider():
        write_config(by_dhcp(f'gateway6 = "{GATEWAY6}"', f'dns = ["{GATEWAY6}"]'))
        try:
            with networks(dual("a", "virbr10", ipv4=False)), guest_in("virbr10"):
                assert leaves_by() == address6("a")
                is_well()
        finally:
            remove_config()


def test_a_part_of_the_providers_subnet_by_macvlan() -> None:
    with DualProvider() as provider:
        write_config(provider.config6(more='attach = "macvlan"'))
        try:
            part = dual("a", "virbr10", address6="2001:db8:77::1:1", prefix=112)
            inside = guest_in("virbr10", "2001:db8:77::1:5/112", "2001:db8:77::1:1")
            with networks(part), inside as guest:
                assert leaves_by() == "2001:db8:77::1:5"
                assert guest.ping(GATEWAY6)
                is_well()
        finally:
            remove_config()


def test_a_port_that_takes_less() -> None:
    """A link to another host, say: what the namespace sends there is no larger."""
    with DualProvider() as provider:
        write_config(provider.config6())
        try:
            with networks(dual("a", "virbr10")):
                run(
                    "ip",
                    "link",
                    "add",
                    "far",
                    "mtu",
                    "1400",
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "far0",
                )
                run("ip", "link", "set", "far", "master", "virbr10", "up")
                assert "limited to 1400 octets" in natns("sync").stdout
                assert private_mtu() == 1400
                is_well()
                run("ip", "link", "delete", "far")
                natns("sync")
                assert private_mtu() is None
                is_well()
        finally:
            remove_config()


def private_mtu() -> int | None:
    """That of the only route to the private subnet."""
    shown = run("ip", "-n", "nat-a", "-j", "-6", "route", "show", "fd00:10::/64").stdout
    (route,) = json.loads(shown)
    for metrics in route.get("metrics", []):
        return int(metrics["mtu"]) if "mtu" in metrics else None
    return None
