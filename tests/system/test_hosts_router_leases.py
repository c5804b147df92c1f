# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rented servers with an address by DHCP, behind a router: the lease goes on as it was asked."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import cycle
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
    lease_of_networkd,
    server,
    sources,
)
from lab_sides import Command, in_process
from lab_vps import CONFIG, GATEWAY, MAC, NAMESPACE, NIC, ROUTER, greeting, state_of_host

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


@pytest.mark.parametrize(
    ("lines", "backend"), zip(CLOUDS.values(), cycle(BACKENDS), strict=False), ids=CLOUDS
)
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


DUID = "ff56504d98000200000ab11c2d3e4f5a6b7c8d"
OF_A_LEASE = (
    f"address add {ADDRESS}/24 dev {NIC} valid_lft 600 preferred_lft 600",
    f"{DEFAULT} proto dhcp",
)


def colons(digits: str) -> str:
    return bytes.fromhex(digits).hex(":")


def leases_by_identity() -> tuple[str, ...]:
    """The server gives the address to this identifier alone, and to any other another."""
    return (
        f"--dhcp-range={ADDRESS},198.51.100.99,2m",
        f"--dhcp-host=id:{colons(DUID)},{ADDRESS}",
        f"--dhcp-host={MAC},198.51.100.99",
        f"--dhcp-option=3,{GATEWAY}",
    )


def test_the_lease_of_an_identifier_goes_on(command: Command) -> None:
    """As systemd-networkd, and netplan with it, ask by default."""
    configure()
    with server(*OF_A_LEASE), dhcp_server(*leases_by_identity()):
        note = lease_of_networkd(DUID)
        try:
            assert command("router", "up").err == ""
            applied = Path("/run/libvirt-natns/routers/wan/applied")
            wait_for(applied.exists, timeout=20, what="a lease that is kept up")
            assert sources()[FAR[0]] == ADDRESS
            assert "wan: up\n" in command("router", "status").out
            assert command("router", "down").status == 0
            # At a boot the client of the host has not asked, and its files are of another time.
            note.unlink()
            run("ip", "address", "flush", "dev", NIC)
            assert command("router", "up", "--boot").err == ""
            wait_for(applied.exists, timeout=20, what="the lease again")
            assert sources()[FAR[0]] == ADDRESS
        finally:
            note.unlink(missing_ok=True)


def test_an_identifier_that_is_not_told_is_refused(command: Command) -> None:
    configure()
    with server(*OF_A_LEASE), dhcp_server(*leases_by_identity()):
        host, note = state_of_host(), lease_of_networkd("")
        try:
            refused = command("router", "up")
            assert (refused.status, refused.err.count("\n")) == (1, 1)
            assert "systemd-networkd does not tell" in refused.err
            assert 'client_id = "ff:..." in [upstreams.wan]' in refused.err
            after = state_of_host()
            assert after == host, host.diff(after)
            configure(more=f'client_id = "{colons(DUID)}"\n')
            assert command("router", "up").err == ""
            wait_for(lambda: Path("/run/libvirt-natns/routers/wan/applied").exists(), timeout=20)
            assert f"{ADDRESS}/" in nic_addresses()
        finally:
            note.unlink(missing_ok=True)


SCRIPT = """\
#!/bin/sh
[ -n "$new_ip_address" ] || exit 0
ip address replace "$new_ip_address/24" dev "$interface" valid_lft 600 preferred_lft 600
ip route replace default via "$new_routers"
"""


@pytest.mark.parametrize("options", [(), ("-i",)], ids=["no identifier", "DUID"])
def test_the_lease_of_dhclient_goes_on(
    options: tuple[str, ...], tmp_path: Path, command: Command
) -> None:
    """The server knows who has the address, and gives another client another one."""
    configure()
    script, pid = tmp_path / "script", tmp_path / "pid"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    addresses = "--dhcp-range=198.51.100.20,198.51.100.90,2m"
    with (
        ExitStack() as stack,
        server(),
        dhcp_server(addresses, f"--dhcp-option=3,{GATEWAY}", leases=tmp_path / "leases"),
    ):
        run("mount", "-t", "tmpfs", "dhclient", "/var/lib/dhcp")
        stack.callback(run, "umount", "/var/lib/dhcp")
        file = "/var/lib/dhcp/dhclient.ens3.leases"
        run("dhclient", "-4", "-1", *options, "-cf", "/dev/null", "-lf", file, "-pf", pid,
            "-sf", script, NIC)  # fmt: skip
        stack.callback(run, "dhclient", "-x", "-pf", pid, check=False)
        before = sources()
        assert before[FAR[0]].startswith("198.51.100.")
        assert command("router", "up").err == ""
        applied = Path("/run/libvirt-natns/routers/wan/applied")
        wait_for(applied.exists, timeout=20, what="a lease that is kept up")
        assert sources() == before
        assert "wan: up\n" in command("router", "status").out
