# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rented servers with an address by DHCP, behind a router: the lease goes on as it was asked."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import lab_vps
import pytest
from lab import Server, remove_config, run, wait_for, write_config
from lab_hosts_router import (
    ADDRESS,
    FAR,
    FLOATING,
    SSH,
    dhcp_server,
    server,
    sources,
)
from lab_sides import Command, in_process
from lab_vps import CONFIG, GATEWAY, NAMESPACE, NIC, ROUTER, greeting, state_of_host

BACKENDS = ("nftables", "iptables")
DEFAULT = f"route add default via {GATEWAY}"


@pytest.fixture(autouse=True)
def nothing_kept(nothing_left: None) -> Iterator[None]:
    yield
    remove_config()
    shutil.rmtree(lab_vps.STATE, ignore_errors=True)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return in_process(capsys)


def configure(firewall: str = "auto", more: str = "") -> None:
    write_config(f'firewall = "{firewall}"\nupstream = "wan"\n{CONFIG}{more}')


OFF_LINK = "172.31.1.1"
LEASED = f"address add {ADDRESS}/32 dev {NIC} valid_lft 600 preferred_lft 600"
STATIC_FIRST = f"address add {FLOATING}/32 dev {NIC}"
TO_GATEWAY = f"route add {OFF_LINK} dev {NIC}"
BY_OPTION_121 = (
    "--dhcp-option=1,255.255.255.255",
    f"--dhcp-option=121,{OFF_LINK}/32,0.0.0.0,0.0.0.0/0,{OFF_LINK}",
)
CLOUDS = {
    # networkd names the leased address in the routes; the static address came first.
    "leased": (
        STATIC_FIRST,
        LEASED,
        f"{TO_GATEWAY} src {ADDRESS} proto dhcp",
        f"route add default via {OFF_LINK} src {ADDRESS} proto dhcp metric 100",
    ),
    "leased first": (LEASED, STATIC_FIRST, TO_GATEWAY, f"route add default via {OFF_LINK}"),
    "floating": (
        LEASED,
        STATIC_FIRST,
        TO_GATEWAY,
        f"route add default via {OFF_LINK} src {FLOATING}",
    ),
}


def lease(address: str) -> str:
    return f"--dhcp-range={address},{address},2m"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lines", CLOUDS.values(), ids=CLOUDS)
def test_an_address_alone_by_dhcp_beside_a_static_address(
    lines: tuple[str, ...], backend: str, command: Command
) -> None:
    configure(backend)
    provided = (f"address add {OFF_LINK}/32 dev {lab_vps.SWITCH}",)
    with server(*lines, provided=provided):
        host, before = state_of_host(), sources()
        with dhcp_server(lease(ADDRESS), *BY_OPTION_121):
            assert command("router", "up").err == ""
            wait_for(lambda: Path("/run/libvirt-natns/routers/wan/applied").exists())
            assert sources() == before
            for own in (ADDRESS, FLOATING):
                with closing(Server(None, "tcp", SSH)):
                    assert greeting(own, SSH, NAMESPACE, source=FAR[0]) == FAR[0]
            assert "wan: up\n" in command("router", "status").out
        with dhcp_server(lease("198.51.100.33"), *BY_OPTION_121):
            os.kill(int(Path("/run/libvirt-natns/routers/wan/pid").read_text()), signal.SIGUSR1)
            wait_for(lambda: "198.51.100.33" in nic_addresses(), timeout=30, what="the new lease")
            moved = {to: by.replace(ADDRESS, "198.51.100.33") for to, by in before.items()}
            wait_for(lambda: sources() == moved, what="the new address")
            assert "wan: up\n" in command("router", "status").out
        assert command("router", "down").err == ""
        assert sources() == before
        # The client's helper may end a moment later.
        wait_for(lambda: state_of_host() == host, what="the host as it was")


def nic_addresses() -> str:
    return run("ip", "-4", "address", "show", NIC, namespace=ROUTER).stdout
