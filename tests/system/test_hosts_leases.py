# SPDX-License-Identifier: LGPL-2.1-or-later
"""DHCP servers as they are: they offer addresses that other stations have."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from lab import (
    ECHO_PORT,
    INTERNET,
    FastGuest,
    Provider,
    define_network,
    isolated,
    natns,
    remove_config,
    run,
    virsh,
    wait_for,
    write_config,
)
from lab_base import CONFIG_FILE
from lab_dhcp import DhcpServer
from lab_domains import asked, networks

RANGE = tuple(f"192.168.0.{number}" for number in range(50, 54))
NETWORK = isolated("a", "virbr10", uuid="6b8f0e52-9a44-4c0f-8f3e-0a6d5b7c9d11")


@pytest.fixture(params=["bridge", "macvlan"])
def provider(request: pytest.FixtureRequest, installed: None) -> Iterator[Provider]:
    with Provider() as world:
        write_config(
            'upstream = "office"\n[upstreams.office]\nkind = "bridge"\nbridge = "br0"\n'
            f'pool = "dhcp"\nattach = "{request.param}"\n'
        )
        yield world
    remove_config()


def left_as() -> str | None:
    """The address that a guest of the network leaves by."""
    with FastGuest("virbr10", name="guest") as guest:
        guest.static("10.0.0.5/24", "10.0.0.1")
        return asked("guest", "tcp", INTERNET, ECHO_PORT)


def test_the_next_offer_is_taken(provider: Provider) -> None:
    """Other stations have the address of last time, and all of the range but one."""
    with ExitStack() as stack:
        server = stack.enter_context(DhcpServer(RANGE[0], RANGE[-1]))
        with networks(NETWORK):
            address = left_as()
            assert address in RANGE
        free = next(each for each in reversed(RANGE) if each != address)
        squatter = provider.neighbour("squatter")
        for each in RANGE:
            if each != free:
                squatter.add_address(f"{each}/24")
        stack.enter_context(networks(NETWORK))
        assert left_as() == free
        assert {declined for declined, _ in server.seen("DHCPDECLINE")} >= {address}
        assert natns("check").stdout == ""


@pytest.mark.parametrize("named_by", ["server", "configuration"])
def test_an_address_alone_with_a_router_elsewhere(named_by: str, provider: Provider) -> None:
    """As clouds lease addresses; the configuration may name the router as well."""
    provider.router.add_address("51.0.113.254/32")
    router = ["--dhcp-option=3,51.0.113.254"] if named_by == "server" else ["--dhcp-option=3"]
    if named_by == "configuration":
        file = CONFIG_FILE.read_text()
        write_config(f'{file}gateway = "51.0.113.254"\n')
    options = ("--dhcp-option=1,255.255.255.255", *router)
    with DhcpServer(RANGE[0], RANGE[-1], *options), networks(NETWORK):
        assert left_as() in RANGE
        shown = run("ip", "-n", "nat-a", "route", "show", "default").stdout
        assert "via 51.0.113.254" in shown
        assert natns("check").stdout == ""


def test_no_offer_can_be_taken(provider: Provider) -> None:
    """The start is refused, and the refusal names the stations as well as the server."""
    with DhcpServer(RANGE[0], RANGE[1]) as server:
        squatter = provider.neighbour("squatter")
        for each in RANGE[:2]:
            squatter.add_address(f"{each}/24")
        define_network(NETWORK)
        done = virsh("net-start", "a", check=False)
        assert "has leased an address within 10 s" in done.stderr
        assert "the stations that have the addresses which it offers" in done.stderr
        assert len(server.seen("DHCPDECLINE")) > 1
        # The station goes; the next start takes the address.
        squatter.down()
        wait_for(lambda: _starts(), timeout=30, what="the network's start")
        virsh("net-destroy", "a")
    virsh("net-undefine", "a")


def _starts() -> bool:
    return virsh("net-start", "a", check=False).returncode == 0
