# SPDX-License-Identifier: LGPL-2.1-or-later
"""DHCP servers upstream that say what must not be believed."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lab import (
    INTERNET,
    FastGuest,
    Provider,
    Service,
    define_network,
    natns,
    remove_config,
    virsh,
    wait_for,
)
from lab_rogue_dhcp import (
    CLASSLESS,
    DNS,
    DOMAIN,
    HOSTNAME,
    MASK,
    MTU,
    ROUTER,
    STATIC_ROUTES,
    Options,
    RogueDhcp,
    addresses,
    classless,
)
from test_dhcp_upstream import GUEST, client, configure, gets_out, network, renew
from views import addresses as addresses_of
from views import links, refusal, routes, upstream_address

PRIVATE = "10.0.0.0/24"
GATEWAY, ROGUE, BRANCH, ADDRESS = "192.168.0.1", "192.168.0.77", "192.168.0.7", "192.168.0.50"
INJECTED = Path("/run/tmp/injected")
HONEST: Options = {ROUTER: addresses(GATEWAY), DNS: addresses(GATEWAY)}
HOSTILE: Options = {
    **HONEST,
    CLASSLESS: classless(
        ("0.0.0.0/0", GATEWAY),
        (PRIVATE, ROGUE),
        ("10.0.0.128/25", ROGUE),
        ("10.0.0.1/32", ROGUE),
        ("127.0.0.0/8", ROGUE),
        ("169.254.0.0/16", ROGUE),
        ("224.0.0.0/4", ROGUE),
        ("192.168.0.0/24", ROGUE),
        ("192.168.0.2/32", ROGUE),
        ("172.30.0.0/16", BRANCH),
        ("172.31.0.0/16", "10.0.0.77"),
        ("172.29.0.0/16", ADDRESS),
    ),
    STATIC_ROUTES: addresses("10.0.0.0", ROGUE, "10.0.0.128", ROGUE),
    MTU: bytes([0, 68]),
    DNS: addresses(GATEWAY, "127.0.0.1", "255.255.255.255", ADDRESS),
    DOMAIN: f"a;touch${{IFS}}{INJECTED}".encode(),
    HOSTNAME: f"$(touch${{IFS}}{INJECTED})\n`touch {INJECTED}`".encode(),
}


@pytest.fixture(params=["hooks-nftables", "service-iptables"])
def configured(
    request: pytest.FixtureRequest, installed: None, provider: Provider
) -> Iterator[Service | None]:
    resident, _, firewall = str(request.param).partition("-")
    configure("probe = 0.05", firewall=firewall)
    with ExitStack() as cleanup:
        cleanup.callback(remove_config)
        yield cleanup.enter_context(Service()) if resident == "service" else None


def is_well(guest: FastGuest) -> bool:
    """Whether a guest gets out, and its names are answered for."""
    return gets_out(guest) == upstream_address("a") and guest.dig("www.example.test") == [INTERNET]


def test_values_that_make_no_sense_are_left_out(
    configured: Service | None, provider: Provider
) -> None:
    """Of routes alone one is of use; guests have their gateway, names and way out."""
    with RogueDhcp(provider.router, ADDRESS, HOSTILE):
        define_network(network())
        virsh("net-start", "a")
        with FastGuest("virbr10", GUEST.mac) as guest:
            guest.dhcp()
            assert is_well(guest)
            assert routes("nat-a") == {
                "default": f"{GATEWAY} upstream",
                PRIVATE: "virbr10",
                "172.30.0.0/16": f"{BRANCH} upstream",
                "192.168.0.0/24": "upstream",
            }
            assert links("nat-a")["upstream"]["mtu"] == 1500
            told = natns("check", check=False).stdout
            assert f"route {PRIVATE} via {ROGUE}: leads into the private subnet" in told
            assert "more" in told
            assert len(told.splitlines()) == 1
            renew()
            natns("sync", check=False)
            assert is_well(guest)
        if configured is not None:
            assert len(configured.logged("level=info", "the DHCP lease is used without")) == 1
        assert not INJECTED.exists()
        virsh("net-destroy", "a")


REFUSED: tuple[tuple[str, Options, str], ...] = (
    (ADDRESS, {MASK: bytes(4)}, "wider than /8"),
    ("127.0.0.5", {MASK: addresses("255.0.0.0")}, "is not a host address"),
    ("10.0.0.77", {}, "overlaps"),
    ("10.9.9.9", {MASK: addresses("255.0.0.0")}, "overlaps"),
    ("192.168.0.255", {}, "broadcast address"),
    ("169.254.7.7", {}, "is not a host address"),
)


@pytest.fixture
def hooks(installed: None, provider: Provider) -> Iterator[None]:
    configure("probe = 0.02")
    yield
    remove_config()


def test_a_start_is_refused_in_one_line(hooks: None, provider: Provider) -> None:
    define_network(network())
    with RogueDhcp(provider.router, ADDRESS, HONEST) as server:
        for address, options, said in REFUSED:
            server.address, server.options = address, {**HONEST, **options}
            assert said in refusal("a")


def test_a_gateway_that_is_none(hooks: None, provider: Provider) -> None:
    """The network starts without it, with DHCP and DNS inside, and `check` says so."""
    define_network(network())
    with RogueDhcp(provider.router, ADDRESS, HONEST) as server:
        for gateway in (ADDRESS, "192.168.9.1", "192.168.0.255", "10.0.0.1"):
            server.options = {**HONEST, ROUTER: addresses(gateway)}
            virsh("net-start", "a")
            assert routes("nat-a") == {PRIVATE: "virbr10", "192.168.0.0/24": "upstream"}
            assert f"gateway {gateway}: " in natns("check", check=False).stdout
            virsh("net-destroy", "a")


def test_a_running_network_keeps_what_it_has(
    configured: Service | None, provider: Provider
) -> None:
    """Renewals whose values cannot be used change nothing; one that can comes into force."""
    with RogueDhcp(provider.router, ADDRESS, HONEST) as server:
        define_network(network())
        virsh("net-start", "a")
        before = routes("nat-a"), addresses_of("upstream", "nat-a")
        with FastGuest("virbr10", GUEST.mac) as guest:
            guest.dhcp()
            for address, options, said in (
                (ADDRESS, {**HONEST, MASK: bytes(4)}, "wider than /8"),
                ("127.0.0.1", HONEST, "is not a host address"),
                ("10.0.0.9", HONEST, "overlaps"),
                ("192.168.0.255", HONEST, "broadcast address"),
            ):
                server.address, server.options = address, options
                _renewed(server)
                told = _check_says(said)
                assert len(told.splitlines()) == 1, told
                natns("sync", check=False)
                assert (routes("nat-a"), addresses_of("upstream", "nat-a")) == before, address
                assert is_well(guest)
            server.address, server.options = "192.168.0.60", HONEST
            _renewed(server)
            wait_for(lambda: addresses_of("upstream", "nat-a") == ["192.168.0.60/24"], timeout=10)
            wait_for(lambda: natns("check", check=False).returncode == 0, timeout=10)
            assert is_well(guest)
        virsh("net-destroy", "a")


def _renewed(server: RogueDhcp) -> None:
    """Have the client ask anew, until the server has leased something."""
    known = server.acknowledged
    os.kill(client(), signal.SIGUSR1)
    wait_for(lambda: server.acknowledged > known, timeout=15, what="a renewal")


def _check_says(said: str) -> str:
    def told() -> str:
        found = natns("check", check=False).stdout
        return found if said in found else ""

    return wait_for(told, timeout=10, what=said)
