# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hosts as people have them: their ways out, each from a line, with a guest that leaves by it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from lab import (
    FastGuest,
    Node,
    Service,
    isolated,
    natns,
    remove_config,
    run,
    wait_for,
    write_config,
)
from lab_boundary import on_a_link
from lab_domains import asked, networks

INTERNET, PORT = "203.0.113.80", 8080
"""A server that each way out leads to; it says as whom it sees a client."""
HERE, THERE = "10.8.0.2", "10.8.0.1"

# As wg-quick makes it: all but the tunnel's own packets ask a table of the tunnel's first.
TABLE = (
    f"route add default via {THERE} table 51820",
    "rule add pref 32764 table main suppress_prefixlength 0",
    "rule add pref 32765 not fwmark 0xca6c table 51820",
)
WAYS = {
    "default": (f"route add default via {THERE} metric 5",),
    # OpenVPN's redirect-gateway def1, and what some VPNs make of it.
    "halves": tuple(f"route add {half} via {THERE}" for half in ("0.0.0.0/1", "128.0.0.0/1")),
    "eighths": tuple(f"route add {part}.0.0.0/3 via {THERE}" for part in range(0, 256, 32)),
    "table": TABLE,
}


LAN, ROUTER = "192.168.7.2", "192.168.7.1"


@contextmanager
def way_out(
    *routes: str, name: str = "far", link: str = "", here: str = HERE, there: str = THERE
) -> Iterator[Node]:
    """A link of the host that these routes lead over, with the Internet behind it."""
    with ExitStack() as stack:
        far = on_a_link(stack, name, link or f"p-{name}", here, there)
        run("ip", "-n", far.name, "address", "add", f"{INTERNET}/32", "dev", "lo")
        for route in routes:
            object_, verb, *words = route.split()
            if object_ == "rule":
                stack.callback(run, "ip", "rule", "del", *words, check=False)
            run("ip", object_, verb, *words)
        far.serve("tcp", PORT)
        yield far


@pytest.mark.parametrize("firewall", ["nftables", "iptables"])
@pytest.mark.parametrize("way", WAYS)
def test_guests_leave_as_the_host_does(way: str, firewall: str, installed: None) -> None:
    write_config(f'firewall = "{firewall}"\n')
    try:
        with way_out(*WAYS[way]):
            assert asked(None, "tcp", INTERNET, PORT) == HERE, "the control"
            with networks(isolated("a", "virbr10")), FastGuest("virbr10", name="guest") as guest:
                guest.dhcp()
                assert asked("guest", "tcp", INTERNET, PORT) == HERE
    finally:
        remove_config()


def leaves_as(address: str) -> bool:
    return asked("guest", "tcp", INTERNET, PORT, timeout=1.0) == address


@pytest.mark.parametrize("served", [True, False], ids=["service", "hooks"])
@pytest.mark.parametrize("way", WAYS)
def test_a_way_out_that_comes_and_goes_is_followed(way: str, served: bool, installed: None) -> None:
    """A tunnel beside the LAN; without the service, sync follows."""
    lan = way_out(f"route add default via {ROUTER} metric 9", name="lan", here=LAN, there=ROUTER)
    with ExitStack() as stack:
        if served:
            stack.enter_context(Service())
        stack.enter_context(lan)
        stack.enter_context(networks(isolated("a", "virbr10")))
        stack.enter_context(FastGuest("virbr10", name="guest")).dhcp()
        assert leaves_as(LAN)
        with way_out(*WAYS[way]):
            assert asked(None, "tcp", INTERNET, PORT) == HERE, "the control"
            if not served:
                natns("sync")
            wait_for(lambda: leaves_as(HERE), timeout=20, what="the way by the tunnel")
            assert natns("check").stdout == ""
        if not served:
            natns("sync")
        wait_for(lambda: leaves_as(LAN), timeout=20, what="the way by the LAN")
        assert natns("check").stdout == ""


def test_a_laptop_moves_from_one_network_to_another(installed: None) -> None:
    with ExitStack() as stack:
        stack.enter_context(Service())
        with way_out(f"route add default via {ROUTER}", name="lan", here=LAN, there=ROUTER):
            stack.enter_context(networks(isolated("a", "virbr10")))
            stack.enter_context(FastGuest("virbr10", name="guest")).dhcp()
            assert leaves_as(LAN)
        stack.enter_context(way_out(*WAYS["default"]))
        wait_for(lambda: leaves_as(HERE), timeout=20, what="the way by the other network")
        assert natns("check").stdout == ""
