# SPDX-License-Identifier: LGPL-2.1-or-later
"""IPv6 of networks behind a router namespace, by real packets, at a provider who trusts one MAC."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing

import lab_vps
import pytest
from lab import (
    ECHO_PORT,
    Capture,
    FastGuest,
    Server,
    Service,
    define_network,
    remove_config,
    run,
    start_network,
    virsh,
    wait_for,
    write_config,
)
from lab_ipv6 import dual, slaac, static6
from lab_sides import Command, in_process
from lab_vps import (
    ADDRESS6,
    CONFIG,
    GATEWAY6,
    HOST_LINK,
    INTERNET6,
    MAC,
    NAMESPACE,
    NIC,
    ROUTER,
    Vps,
    greeting,
    state_of_host,
)

GUEST_MAC = "52:54:00:00:00:05"
PRIVATE = "fd00:10::5"
PART = "2001:db8:1:0:c::/80"
PUBLIC = "2001:db8:1:0:c::5"
MADE = "2001:db8:1:0:5054:ff:fe00:5"
"""What a guest makes of its MAC address, in all of the provider's subnet."""

ROUTED = "2001:db8:100::/60"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return in_process(capsys)


def publishing(guest: str, ports: str) -> str:
    return (
        '<natns:nat xmlns:natns="urn:libvirt-natns:1">'
        f'<natns:portForward guestAddress="{guest}"><natns:range {ports}/></natns:portForward>'
        "</natns:nat>"
    )


@pytest.fixture
def vps(request: pytest.FixtureRequest, installed: None, nothing_left: None) -> Iterator[Vps]:
    """A server with nothing on it, and a router configured."""
    with ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, lab_vps.STATE, ignore_errors=True)
        world = cleanup.enter_context(Vps())
        cleanup.callback(remove_config)
        backend = getattr(request, "param", "nftables")
        more = f'prefixes6 = ["{ROUTED}"]\n' if backend == "routed" else ""
        firewall = "auto" if more else backend
        write_config(f'firewall = "{firewall}"\nupstream = "wan"\n{CONFIG}{more}')
        yield world


@pytest.fixture
def cleanup(vps: Vps) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def started(cleanup: ExitStack, name: str, bridge: str, xml: str) -> FastGuest:
    """The guest of a network of that XML."""
    start_network(xml)
    cleanup.callback(virsh, "net-undefine", name, check=False)
    cleanup.callback(virsh, "net-destroy", name, check=False)
    guest = cleanup.enter_context(FastGuest(bridge, GUEST_MAC, f"guest-{name}"))
    guest.static("10.0.0.5/24", "10.0.0.1")
    for port in (22, 23):
        guest.serve("tcp", port, address="::")
    return guest


def private(cleanup: ExitStack, name: str, bridge: str, port: int) -> FastGuest:
    metadata = publishing(PRIVATE, f'start="{port}" to="22"')
    guest = started(cleanup, name, bridge, dual(name, bridge, metadata=metadata))
    static6(guest, f"{PRIVATE}/64", "fd00:10::1")
    return guest


def public(cleanup: ExitStack, name: str, bridge: str, guest: str = PUBLIC) -> FastGuest:
    metadata = publishing(guest, 'start="22"')
    address, prefix = ("2001:db8:1:0:c::1", 80) if guest == PUBLIC else ("2001:db8:1::c", 64)
    xml = dual(name, bridge, address6=address, prefix=prefix, metadata=metadata)
    made = started(cleanup, name, bridge, xml)
    if guest == PUBLIC:
        static6(made, f"{PUBLIC}/80", address)
    return made


def seen_of(guest: FastGuest, address: str = INTERNET6, port: int = ECHO_PORT) -> str:
    return greeting(address, port, guest.name, timeout=2.0)


def from_outside(address: str, port: int, timeout: float = 3.0) -> str:
    return greeting(address, port, NAMESPACE, source=INTERNET6, timeout=timeout)


def own_address() -> str:
    """The router's own, the only one on its NIC."""
    told = run("ip", "-n", ROUTER, "-j", "-6", "address", "show", NIC, "scope", "global").stdout
    listed = [entry for link in json.loads(told) for entry in link.get("addr_info", [])]
    (found,) = [entry["local"] for entry in listed if "local" in entry]
    return str(found)


def test_packets_go_both_ways_in_ipv6(vps: Vps, cleanup: ExitStack, command: Command) -> None:
    before = state_of_host()
    assert command("router", "up").status == 0
    own = own_address()
    assert own.startswith("2001:db8:1:") and own != ADDRESS6
    at_host = Capture(None, HOST_LINK, f"ip6 and net {PART} or host {own}")
    with vps.sniff() as sent, closing(at_host):
        one = private(cleanup, "a", "virbr10", 8001)
        two = private(cleanup, "b", "virbr11", 8002)
        three = public(cleanup, "c", "virbr12")
        # Two networks with one prefix, at once; and one whose addresses are the provider's.
        assert [seen_of(each) for each in (one, two)] == [own, own]
        wait_for(lambda: seen_of(three) == PUBLIC, what="the first answer")
        for port in (8001, 8002):
            assert from_outside(own, port) == INTERNET6
            assert seen_of(one, own, port) and seen_of(three, own, port)
        assert from_outside(PUBLIC, 22) == INTERNET6
        assert seen_of(one, PUBLIC, 22), "between networks"
        assert lab_vps.provider("busybox", "ping", "-c1", "-W2", PUBLIC)
        assert not from_outside(PUBLIC, 23, 0.5), "what is not published"
        assert not from_outside(own, 22, 0.5)
        assert at_host.lines() == []
        with closing(Server(None, "tcp", 22, address=ADDRESS6)):
            assert seen_of(one, ADDRESS6, 22) == own, "the host, asked by guests"
            assert seen_of(three, ADDRESS6, 22) == PUBLIC
        assert vps.sources(sent) == {MAC}
    assert greeting(INTERNET6, ECHO_PORT) == ADDRESS6, "the host"
    assert greeting(PUBLIC, 22) and greeting(own, 8001), "asked by the host"
    assert command("check").out == ""
    cleanup.close()
    assert not from_outside(PUBLIC, 22, 0.5)
    assert PART not in run("ip", "-n", ROUTER, "-6", "route").stdout
    assert command("router", "down").status == 0
    after = state_of_host()
    assert after == before, before.diff(after)


def proxies() -> list[str]:
    """The processes that answer for guests."""
    return run("pgrep", "-x", "ndppd", check=False).stdout.split()


@pytest.mark.parametrize("vps", ["iptables"], indirect=True)
def test_with_iptables(vps: Vps, cleanup: ExitStack, command: Command) -> None:
    """And where the host has another address, and leaves the NIC its own."""
    more = 'host_address6 = "2001:db8:1::22"\n'
    write_config(f'firewall = "iptables"\nupstream = "wan"\n{CONFIG}{more}')
    assert command("router", "up").status == 0
    assert own_address() == ADDRESS6
    guest = private(cleanup, "a", "virbr10", 8001)
    public(cleanup, "c", "virbr12")
    assert seen_of(guest) == ADDRESS6
    assert from_outside(ADDRESS6, 8001) == INTERNET6
    assert wait_for(lambda: from_outside(PUBLIC, 22, 1.0), what="the first answer") == INTERNET6
    assert not from_outside(PUBLIC, 23, 0.5)
    assert greeting(INTERNET6, ECHO_PORT) == "2001:db8:1::22"
    assert command("check").out == ""


def test_all_of_the_providers_subnet(vps: Vps, cleanup: ExitStack, command: Command) -> None:
    """Guests make themselves addresses in it; the host and the router go on in it."""
    lab_vps.provider("ip", "address", "add", "2001:db8:1::1/64", "dev", lab_vps.SWITCH, "nodad")
    run("ip", "-6", "route", "replace", "default", "via", "2001:db8:1::1", "dev", NIC)
    run("ip", "-6", "route", "delete", "default", "via", GATEWAY6, "dev", NIC, check=False)
    assert command("router", "up").status == 0
    guest = public(cleanup, "c", "virbr12", MADE)
    with vps.sniff() as sent:
        assert slaac(guest, "2001:db8:1:") == MADE
        wait_for(lambda: seen_of(guest) == MADE, what="the first answer")
        assert from_outside(MADE, 22) == INTERNET6
        assert not from_outside(MADE, 23, 0.5)
        assert greeting("2001:db8:1::1", ECHO_PORT, timeout=0.5) == "", "no server there"
        assert greeting(INTERNET6, ECHO_PORT) == ADDRESS6
        assert vps.sources(sent) == {MAC}
    assert command("check").out == ""
    with Service():
        killed = proxies()
        for process in killed:
            os.kill(int(process), signal.SIGKILL)
        wait_for(lambda: len({*proxies()} - {*killed}) == 2, timeout=20, what="both again")
        assert wait_for(lambda: from_outside(MADE, 22, 1.0), what="an answer") == INTERNET6
    # The router is made anew; nothing of ours stays behind in what was its namespace.
    assert len(proxies()) == 2
    assert command("router", "down", "--force").status == 0
    assert len(proxies()) == 1
    assert command("router", "up").status == 0
    assert len(proxies()) == 2
    assert wait_for(lambda: from_outside(MADE, 22, 1.0), what="the first answer") == INTERNET6
    # Another network cannot have a part of it.
    define_network(dual("d", "virbr13", address6="2001:db8:1:0:d::1", prefix=80))
    cleanup.callback(virsh, "net-undefine", "d")
    failed = virsh("net-start", "d", check=False).stderr
    assert "another network has a part of 2001:db8:1:0:d::/80" in failed


@pytest.mark.parametrize("vps", ["routed"], indirect=True)
def test_a_routed_prefix_and_repairs(vps: Vps, cleanup: ExitStack, command: Command) -> None:
    assert command("router", "up").status == 0
    own = own_address()
    lab_vps.provider("ip", "route", "add", ROUTED, "via", own, "dev", lab_vps.SWITCH)
    guest = private(cleanup, "a", "virbr10", 8001)
    made = slaac(guest, "2001:db8:100:")
    # The guest has forgotten it with its link.
    run("ip", "-n", guest.name, "address", "add", f"{PRIVATE}/64", "dev", "eth0", "nodad",
        "preferred_lft", "0")  # fmt: skip
    assert seen_of(guest) == made
    assert not from_outside(made, 22, 0.5)
    for damage in (
        ("-6", "route", "del", "2001:db8:100::/64"),
        ("-6", "address", "flush", "dev", "transit", "scope", "global"),
        ("-6", "address", "del", f"{own}/128", "dev", NIC),
    ):
        run("ip", "-n", ROUTER, *damage)
        assert "router wan" in command("check").out, damage
        assert command("sync").status == 0
        assert command("check").out == ""
        assert seen_of(guest) == made
    assert from_outside(own, 8001) == INTERNET6
    # A router that is made anew hangs its networks on it again.
    assert command("router", "down", "--force").status == 0
    assert command("router", "up").status == 0
    assert own_address() == own, "the same each time"
    assert command("check").out == ""
    assert seen_of(guest) == made
