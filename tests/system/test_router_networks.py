# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks behind a router namespace, by real packets: the host takes no part.

guest-a 10.0.0.5      guest-b 10.0.0.5
    | virbr10             | virbr11
  nat-a                 nat-b
    +------ transit ------+      natns-wan, the host
               |                     |
            natns-router-wan --------+
               | ens3: one MAC
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import lab_vps
import pytest
from lab import (
    ECHO_PORT,
    INTERNET,
    Capture,
    FastGuest,
    Host,
    Server,
    define_network,
    isolated,
    remove_config,
    run,
    start_network,
    virsh,
    wait_for,
    write_config,
)
from lab_sides import Command, in_process
from lab_vps import ADDRESS, CONFIG, HOST_LINK, MAC, NAMESPACE, NIC, ROUTER, Vps, greeting

GUEST_MAC = "52:54:00:00:00:05"
GUEST = "10.0.0.5"
FORWARD = f'<natns:portForward guestAddress="{GUEST}">{{}}</natns:portForward>'
NETWORKS = (("a", "virbr10", 8001), ("b", "virbr11", 8002))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return in_process(capsys)


def network(name: str, bridge: str, *ranges: str) -> str:
    published = "".join(ranges)
    nat = f'<natns:nat xmlns:natns="urn:libvirt-natns:1">{FORWARD.format(published)}</natns:nat>'
    return isolated(name, bridge, hosts=[Host(GUEST_MAC, GUEST)], metadata=nat if published else "")


@pytest.fixture
def vps(request: pytest.FixtureRequest, installed: None, nothing_left: None) -> Iterator[Vps]:
    """A server whose router is up, with nothing on it yet."""
    with ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, lab_vps.STATE, ignore_errors=True)
        world = cleanup.enter_context(Vps())
        cleanup.callback(remove_config)
        backend = getattr(request, "param", "nftables")
        write_config(f'firewall = "{backend}"\nupstream = "wan"\n{CONFIG}')
        yield world


@pytest.fixture
def guests(vps: Vps, command: Command) -> Iterator[dict[str, FastGuest]]:
    """Two networks of one subnet, each with the same guest, which publishes a port."""
    with ExitStack() as cleanup:
        assert command("router", "up").status == 0
        made = {}
        for name, bridge, port in NETWORKS:
            start_network(network(name, bridge, f'<natns:range start="{port}" to="80"/>'))
            cleanup.callback(virsh, "net-undefine", name, check=False)
            cleanup.callback(virsh, "net-destroy", name, check=False)
            guest = cleanup.enter_context(FastGuest(bridge, GUEST_MAC, f"guest-{name}"))
            guest.static(f"{GUEST}/24", "10.0.0.1")
            guest.serve("tcp", 80)
            made[name] = guest
        yield made


def echo(guest: FastGuest, address: str, port: int) -> str:
    return greeting(address, port, guest.name, timeout=2.0)


@pytest.mark.parametrize("vps", ["nftables", "iptables"], indirect=True)
def test_guests_talk_and_forwards_answer(
    vps: Vps, guests: dict[str, FastGuest], command: Command
) -> None:
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "0", "the host routes"
    at_host = Capture(None, HOST_LINK, "host 10.0.0.5 or net 198.19.248.0/22")
    with vps.sniff() as seen, closing(at_host):
        for _, guest in guests.items():
            assert echo(guest, INTERNET, ECHO_PORT) == ADDRESS
        # Published ports, asked from outside, by the host and by both guests.
        for name, _, port in NETWORKS:
            assert greeting(ADDRESS, port, NAMESPACE, source=INTERNET) == INTERNET, name
            assert greeting(ADDRESS, port), "asked by the host"
            assert all(echo(guest, ADDRESS, port) for guest in guests.values())
        with closing(Server(None, "tcp", 22)):
            assert echo(guests["a"], ADDRESS, 22), "the host's port, asked by a guest"
        assert vps.sources(seen) == {MAC}
        assert at_host.lines() == []
    # Nobody gets at a namespace's own address.
    lab_vps.provider("ip", "route", "add", "198.19.248.0/22", "via", ADDRESS)
    assert not greeting("198.19.248.2", 8001, NAMESPACE, timeout=0.5)
    assert "8001" in run("ip", "netns", "exec", ROUTER, "sh", "-c",
                         "nft list ruleset; iptables-legacy -t nat -S").stdout  # fmt: skip
    virsh("net-destroy", "b")
    assert not greeting(ADDRESS, 8002, NAMESPACE, timeout=0.5), "what is not published any more"
    assert greeting(ADDRESS, 8001, NAMESPACE)


def test_looking_and_repairing(vps: Vps, guests: dict[str, FastGuest], command: Command) -> None:
    assert command("check").status == 0
    assert "wan" in command("status").out
    assert ROUTER in command("diagram").out
    (found,) = json.loads(command("router", "status", "--json").out)["routers"]
    assert found["networks"] == ["a", "b"]
    refused = command("router", "down")
    assert (refused.status, refused.err.count("\n")) == (1, 1)
    assert "serves a, b" in refused.err and "--force" in refused.err
    # The router is made anew under them, and hangs them on it again.
    assert command("router", "down", "--force").status == 0
    assert greeting(INTERNET, ECHO_PORT) == ADDRESS
    assert command("check").status == 1
    assert command("router", "up").status == 0
    assert command("check").status == 0
    run("nft", "flush", "ruleset", namespace=ROUTER)
    assert "host: router wan: firewall" in command("check").out
    assert command("sync").status == 0
    assert command("check").status == 0
    assert "router wan is up: virt-natns router down wan" in command("uninstall").err
    assert all(echo(guest, INTERNET, ECHO_PORT) == ADDRESS for guest in guests.values())
    assert greeting(ADDRESS, 8002, NAMESPACE)


def test_refused_in_start(vps: Vps, command: Command) -> None:
    """A network whose router is not up, and forwards that would take the host's ports."""
    define_network(network("c", "virbr12", '<natns:range start="22"/>'))
    failed = virsh("net-start", "c", check=False).stderr
    assert "its router is not up: virt-natns router up wan" in failed
    assert not Path("/sys/class/net/virbr12").exists()
    command("router", "up")
    failed = virsh("net-start", "c", check=False).stderr
    assert "tcp port 22 of router wan belongs to the host" in failed
    virsh("net-undefine", "c")
    start_network(network("c", "virbr12", '<natns:range start="8080" to="80"/>'))
    define_network(network("d", "virbr13", '<natns:range start="8080"/>'))
    failed = virsh("net-start", "d", check=False).stderr
    assert "8080" in failed, "two networks share the router's address"
    for name in "cd":
        virsh("net-destroy", name, check=False)
        virsh("net-undefine", name)
    assert command("router", "down").status == 0
    wait_for(lambda: Path("/sys/class/net", NIC).exists())
