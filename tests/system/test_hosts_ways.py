# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ways out of a host in both families: its guests leave as it does, before and after a change."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from lab import Service, natns, remove_config, run, wait_for, write_config
from lab_domains import networks
from lab_hosts_ways import (
    LAN,
    SERVERS,
    TUNNEL,
    both,
    default_by,
    dual_guest,
    leaves_by,
    lines_in_force,
    seen_as,
    way_out,
)
from lab_ipv6 import dual

BEFORE_SERVICE = 20.0
"""Seconds to wait for the service at most; it follows at once."""

WAYS = {
    "default": both("{ip} route add default via {via} metric 5"),
    # OpenVPN's redirect-gateway def1, in IPv6 as well.
    "halves": both("{ip} route add {low} via {via}", "{ip} route add {high} via {via}"),
    # wg-quick's full tunnel.
    "table": both(
        "{ip} route add default via {via} table 51820",
        "{ip} rule add pref 32764 table main suppress_prefixlength 0",
        "{ip} rule add pref 32765 not fwmark 0xca6c table 51820",
    ),
    # A split tunnel has routes to the company's networks alone.
    "split": both("{ip} route add {servers} via {via}"),
}
OF_GUESTS = {
    # The administrator sends guests by the tunnel, and not the host itself.
    "link": both(
        "{ip} route add default via {via} table 100",
        "{ip} rule add pref 100 iif natns-host table 100",
    ),
    "mark": (
        *both(
            "{ip} route add default via {via} table 100",
            "{ip} rule add pref 100 fwmark 7 table 100",
        ),
        "nft add table inet admin",
        "nft add chain inet admin marks { type filter hook prerouting priority mangle ; }",
        "nft add rule inet admin marks iifname natns-host meta mark set 7",
    ),
}
NETWORK = dual("a", "virbr10")


@pytest.fixture(autouse=True)
def no_configuration(installed: None) -> Iterator[None]:
    yield
    remove_config()


def backend(firewall: str) -> None:
    write_config(f'firewall = "{firewall}"\n')


def is_well() -> bool:
    """The service may be at the rules still when the first packet passes."""
    return natns("check", check=False).returncode == 0


def lan(stack: ExitStack) -> None:
    """The host is in a LAN, and leaves by it."""
    stack.enter_context(way_out(LAN, *default_by(LAN, 9)))


@pytest.mark.parametrize(
    ("firewall", "way"), [*(("nftables", way) for way in WAYS), ("iptables", "table")]
)
def test_guests_leave_as_the_host_does(firewall: str, way: str) -> None:
    backend(firewall)
    with ExitStack() as stack:
        lan(stack)
        stack.enter_context(way_out(TUNNEL, *WAYS[way]))
        assert leaves_by(TUNNEL, None), "the control"
        stack.enter_context(networks(NETWORK))
        dual_guest(stack, "virbr10")
        assert leaves_by(TUNNEL)


@pytest.mark.parametrize(
    ("firewall", "ways"),
    [("nftables", ["split", "mark"]), ("iptables", ["split", "link"]), ("nftables", [])],
    ids=["nftables-service", "iptables-service", "hooks"],
)
def test_ways_that_come_and_go_are_followed(firewall: str, ways: list[str]) -> None:
    """Without the service, sync follows all ways, which meet one network after another."""
    backend(firewall)
    served = bool(ways)
    with ExitStack() as stack:
        if served:
            stack.enter_context(Service())
        lan(stack)
        stack.enter_context(networks(NETWORK))
        dual_guest(stack, "virbr10")
        assert leaves_by(LAN)
        for way in ways or (WAYS | OF_GUESTS):
            with way_out(TUNNEL, *(WAYS | OF_GUESTS)[way]):
                assert way in OF_GUESTS or leaves_by(TUNNEL, None), "the control"
                if not served:
                    natns("sync")
                wait_for(lambda: leaves_by(TUNNEL), timeout=BEFORE_SERVICE, what=f"way {way}")
                wait_for(is_well, timeout=BEFORE_SERVICE, what="a host without differences")
            if not served:
                natns("sync")
            wait_for(lambda: leaves_by(LAN), timeout=BEFORE_SERVICE, what=f"the LAN after {way}")
            wait_for(is_well, timeout=BEFORE_SERVICE, what="a host without differences")


def test_a_better_metric_and_its_end_are_followed() -> None:
    """A link that goes down takes its routes along; so does its way out."""
    with ExitStack() as stack:
        stack.enter_context(Service())
        lan(stack)
        far = stack.enter_context(way_out(TUNNEL, *default_by(TUNNEL, 20)))
        stack.enter_context(networks(NETWORK))
        dual_guest(stack, "virbr10")
        assert leaves_by(LAN)
        run("ip", "link", "set", LAN.link, "down")
        wait_for(lambda: leaves_by(TUNNEL), timeout=BEFORE_SERVICE, what="the way that is left")
        assert far.name == TUNNEL.name


def multipath(family: int) -> str:
    return f"ip -{family} route replace default " + " ".join(
        f"nexthop via {way.there if family == 4 else way.there6} dev {way.link}"
        for way in (LAN, TUNNEL)
    )


@pytest.mark.parametrize(
    ("firewall", "family", "before"),
    [("nftables", 4, True), ("nftables", 4, False), ("nftables", 6, True), ("iptables", 4, True)],
)
def test_a_route_by_several_routers_leads_by_all_of_them(
    firewall: str, family: int, before: bool
) -> None:
    backend(firewall)
    with ExitStack() as stack:
        stack.enter_context(Service())
        stack.enter_context(way_out(LAN))
        stack.enter_context(way_out(TUNNEL))
        if before:
            stack.enter_context(lines_in_force(multipath(family)))
        stack.enter_context(networks(NETWORK))
        dual_guest(stack, "virbr10")
        if not before:
            stack.enter_context(lines_in_force(multipath(family)))
        expected = {LAN.seen(family), TUNNEL.seen(family)}
        assert seen_as(None, family, len(SERVERS)) == expected, "the control"
        wait_for(
            lambda: seen_as("guest", family, len(SERVERS)) == expected,
            timeout=30,
            what="answers by both routers",
        )
        wait_for(is_well, timeout=BEFORE_SERVICE, what="a host without differences")
