# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hosts as people have them: their ways out, each from a line, with a guest that leaves by it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from lab import FastGuest, Node, isolated, remove_config, run, write_config
from lab_boundary import on_a_link
from lab_domains import asked, networks

INTERNET, PORT = "203.0.113.80", 8080
"""A server that each way out leads to; it says as whom it sees a client."""
HERE, THERE = "10.8.0.2", "10.8.0.1"

WAYS = {
    "default": (f"default via {THERE}",),
    # OpenVPN's redirect-gateway def1, and what some VPNs make of it.
    "halves": (f"0.0.0.0/1 via {THERE}", f"128.0.0.0/1 via {THERE}"),
    "quarters": tuple(f"{first}.0.0.0/2 via {THERE}" for first in (0, 64, 128, 192)),
    "eighths": tuple(f"{first}.0.0.0/3 via {THERE}" for first in range(0, 256, 32)),
}


@contextmanager
def way_out(*routes: str) -> Iterator[Node]:
    """A link of the host that these routes lead over, with the Internet behind it."""
    with ExitStack() as stack:
        far = on_a_link(stack, "far", "p-far", HERE, THERE)
        run("ip", "-n", far.name, "address", "add", f"{INTERNET}/32", "dev", "lo")
        for route in routes:
            run("ip", "route", "add", *route.split())
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
