# SPDX-License-Identifier: LGPL-2.1-or-later
"""Daemons that read packets of guests or of the upstream have what they need, and no more."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from ipaddress import IPv6Network
from pathlib import Path

import pytest
from lab import FastGuest, Host, Provider, isolated, remove_config, run, start_network, write_config
from lab_base import wait_for
from lab_dhcp import DhcpServer
from lab_domains import networks
from views import addresses, status

from libvirt_natns import names
from libvirt_natns.daemons import dns_relay, dnsmasq, dnsmasq_process, ndppd, udhcpc
from libvirt_natns.daemons.ndppd import Proxy
from libvirt_natns.kernel import processes

REAL_INTERPRETER = True
UUID = "6f2b9c1e-0000-4000-8000-0000000000e1"
DIRECTORY = names.dhcp_directory(UUID)
GUEST = Host("52:54:00:0a:00:05", "10.0.0.5")
NUMBERS = {"chown": 0, "dac_override": 1, "setgid": 6, "setuid": 7, "setpcap": 8,
           "net_bind_service": 10, "net_admin": 12, "net_raw": 13}  # fmt: skip


def mask(*capabilities: str) -> int:
    return sum(1 << NUMBERS[each] for each in capabilities)


def state(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def check(pid: int, *capabilities: str, no_new_privs: bool = True) -> None:
    found, allowed = state(pid), mask(*capabilities)
    for key in ("CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb"):
        assert not int(found[key], 16) & ~allowed, f"{key} of {found['Name']} is {found[key]}"
    assert found["NoNewPrivs"] == str(int(no_new_privs))
    assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) >= 0


@pytest.fixture
def spared(provider: Provider) -> Iterator[None]:
    """As in the service: the kernel ends other programs first."""
    own = Path("/proc/self/oom_score_adj")
    before = own.read_text()
    # Some machines' own containers forbid that.
    with suppress(PermissionError):
        own.write_text("-500")
    yield
    own.write_text(before)
    remove_config()


def test_dnsmasq_and_the_dhcp_client(installed: None, spared: None) -> None:
    """They have a lease, give leases, and follow a change of theirs all the same."""
    write_config('upstream = "office"\n[upstreams.office]\nkind = "bridge"\nbridge = "br0"\n'
                 'pool = "dhcp"\n')  # fmt: skip
    with DhcpServer("192.168.0.50", "192.168.0.60"):
        start_network(isolated("a", "virbr10", uuid=UUID, hosts=[GUEST]))
        # libvirtd runs the hook, which starts both: it is not spared itself.
        served = dnsmasq.running(UUID, "nat-a")
        asking = udhcpc.process(DIRECTORY, "nat-a")
        assert served is not None
        assert asking is not None
        check(asking, *udhcpc.CAPABILITIES)
        # With it, the kernel refuses the profile that AppArmor has for libvirt's lease helper.
        check(served, *dnsmasq_process.CAPABILITIES, no_new_privs=False)
        effective = int(state(served)["CapEff"], 16)
        assert not effective & ~mask("net_admin", "net_raw", "net_bind_service")
        assert state(served)["Uid"].split()[1] != "0"
        with FastGuest("virbr10", GUEST.mac) as guest:
            assert guest.dhcp()["ip"] == "10.0.0.5"
        wait_for(lambda: "10.0.0.5" in run("virsh", "net-dhcp-leases", "a").stdout)
    with DhcpServer("192.168.0.70", "192.168.0.80"):
        # The client has lost its address: its listener has the network take another one.
        os.kill(asking, 10)
        wait_for(lambda: held().startswith("192.168.0.7"), timeout=40, what="the other address")
        wait_for(lambda: status("a")["health"] == "ok", timeout=20, what="a network that is well")


def test_the_dns_relay(installed: None, spared: None) -> None:
    with networks(isolated("a", "virbr10")):
        pid = dns_relay.running(names.transit_bridge("host"))
        assert pid is not None
        check(pid, *dns_relay.CAPABILITIES)
        assert not int(state(pid)["CapEff"], 16) & ~mask("net_bind_service")
        assert state(pid)["Uid"].split()[1] != "0"


def held() -> str:
    """The namespace's upstream address; "" without one."""
    return "".join(addresses("upstream", "nat-a"))


def test_a_daemon_of_the_service_is_not_spared(spared: None) -> None:
    """The neighbour discovery proxy, as the service starts it."""
    with ExitStack() as cleanup:
        run("ip", "netns", "add", "nat-p")
        cleanup.callback(run, "ip", "netns", "del", "nat-p")
        for link in ("upstream", "inner"):
            run("ip", "-n", "nat-p", "link", "add", link, "type", "bridge")
            run("ip", "-n", "nat-p", "link", "set", link, "up")
        cleanup.callback(ndppd.stop, UUID)
        proxy = Proxy(UUID, "nat-p", "upstream", "inner", (IPv6Network("2001:db8::/64"),))
        ndppd.ensure(proxy, (2, 3))
        pid = ndppd.running(UUID, "nat-p")
        assert pid is not None
        check(pid, *ndppd.CAPABILITIES)
    names.network_directory(UUID).rmdir()
    names.network_directory(UUID).parent.rmdir()
    names.RUN_DIRECTORY.rmdir()


def test_programs_are_looked_for_in_the_systems_directories_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("dnsmasq", "nft", "udhcpc", "ndppd", "only-here"):
        file = tmp_path / name
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for found in (dnsmasq_process.program(), ndppd.program(), udhcpc.program()[0]):
        assert not found.startswith(str(tmp_path))
    assert processes.program("only-here") == str(tmp_path / "only-here")
