# SPDX-License-Identifier: LGPL-2.1-or-later
"""A rented server with one NIC, at a provider who drops all frames but those of its MAC."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import lab_vps
import pytest
from lab import (
    ECHO_PORT,
    INTERNET,
    Server,
    remove_config,
    run,
    spawn,
    wait_for,
    write_config,
)
from lab_base import end
from lab_json import valid
from lab_sides import Command, in_process
from lab_vps import (
    ADDRESS,
    ADDRESS6,
    CONFIG,
    GATEWAY,
    HOST_LINK,
    INTERNET6,
    MAC,
    NAMESPACE,
    NIC,
    ROUTER,
    Vps,
    greeting,
    provider,
    state_of_host,
)

from libvirt_natns.kernel.netns import entered

STATIC = ("203.0.113.77/32", "198.51.100.12/24")
SSH = 22
OTHER = 2222


@pytest.fixture(autouse=True)
def nothing_kept(nothing_left: None) -> Iterator[None]:
    yield
    remove_config()
    shutil.rmtree(lab_vps.STATE, ignore_errors=True)


@pytest.fixture
def vps(nothing_kept: None) -> Iterator[Vps]:
    with Vps() as world:
        yield world


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return in_process(capsys)


def configure(firewall: str = "auto", more: str = "") -> None:
    write_config(f'firewall = "{firewall}"\n{CONFIG}{more}')


def test_snapshot_sees_what_matters(vps: Vps) -> None:
    """The lab could not judge what it does not see."""
    before = state_of_host()
    for change, back in (
        (("link", "set", NIC, "mtu", "1400"), ("link", "set", NIC, "mtu", "1500")),
        (("route", "add", "192.0.2.0/24", "dev", NIC, "table", "7"),
         ("route", "del", "192.0.2.0/24", "dev", NIC, "table", "7")),
        (("neighbour", "add", "198.51.100.9", "lladdr", "02:00:00:00:00:09", "dev", NIC),
         ("neighbour", "del", "198.51.100.9", "dev", NIC)),
    ):  # fmt: skip
        run("ip", *change)
        assert state_of_host() != before
        run("ip", *back)
    assert state_of_host() == before


def test_provider_drops_other_macs(vps: Vps) -> None:
    run("ip", "link", "add", "link", NIC, "name", "foreign", "type", "macvlan")
    try:
        run("ip", "link", "set", "foreign", "up")
        run("ip", "address", "add", "198.51.100.66/24", "dev", "foreign")
        assert greeting(INTERNET, ECHO_PORT)
        run("ip", "route", "add", INTERNET, "via", GATEWAY, "dev", "foreign")
        assert not greeting(INTERNET, ECHO_PORT, timeout=0.5)
    finally:
        run("ip", "link", "del", "foreign")


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
def test_packets_both_ways(vps: Vps, command: Command, backend: str) -> None:
    """All directions, and one MAC on the wire."""
    configure(backend, f'host_ports = ["tcp/{SSH}", "tcp/{OTHER}-{OTHER + 2}"]\n')
    with (
        closing(Server(None, "tcp", SSH)) as ssh,
        closing(Server(None, "tcp", OTHER + 1)),
        closing(Server(None, "tcp", 8080)),
        closing(Server(None, "tcp", SSH, address=ADDRESS6)),
        vps.sniff() as seen,
    ):
        assert command("router", "up", "wan").err == ""
        assert not Path("/sys/class/net", NIC).exists()
        # The host goes out, by the router's address and by its own.
        assert greeting(INTERNET, ECHO_PORT) == ADDRESS
        assert greeting(INTERNET6, ECHO_PORT) == ADDRESS6
        # The outside comes in.
        assert greeting(ADDRESS, SSH, NAMESPACE, source=INTERNET) == INTERNET
        assert ssh.addresses() == {INTERNET}, "sshd sees its client"
        assert greeting(ADDRESS, OTHER + 1, NAMESPACE) == GATEWAY
        assert greeting(ADDRESS6, SSH, NAMESPACE, source=INTERNET6) == INTERNET6
        assert not greeting(ADDRESS, 8080, NAMESPACE, timeout=0.5), "not a port of the host's"
        # The host asks for itself.
        assert greeting(ADDRESS, SSH)
        assert greeting(ADDRESS6, SSH) == ADDRESS6
        assert provider("busybox", "ping", "-c1", "-W2", ADDRESS)
        assert provider("busybox", "ping", "-c1", "-W2", ADDRESS6)
        # A neighbour is no way into what is behind.
        provider("ip", "route", "add", "192.168.158.0/24", "via", ADDRESS)
        assert not greeting("192.168.158.2", 8080, NAMESPACE, timeout=0.5)
        assert vps.sources(seen) == {MAC}
        assert command("router", "down").err == ""
    assert greeting(INTERNET, ECHO_PORT) == ADDRESS


def test_connections(vps: Vps, command: Command) -> None:
    """Those over IPv6 live on both ways; in IPv4 the host's address changes."""
    configure()
    with closing(Server(None, "tcp", SSH, address=ADDRESS6)):
        stream = lab_vps.connection(ADDRESS6, SSH, NAMESPACE)
        with stream:
            for verb in ("up", "down"):
                assert command("router", verb).status == 0
                stream.sendall(b"still there?")
                assert stream.recv(100) == b"still there?"


def test_status_and_repair(vps: Vps, command: Command) -> None:
    configure()
    assert json.loads(command("router", "status", "--json").out)["routers"][0]["state"] == "down"
    command("router", "up")
    (found,) = valid("router_status", command("router", "status", "--json").out)["routers"]
    assert (found["state"], found["mac"]) == ("up", MAC)
    # And one for networks with IPv6.
    assert (found["addresses"][0], len(found["addresses"])) == (f"{ADDRESS}/24", 2)
    assert found["host"]["addresses6"] == [ADDRESS6]
    assert set(found["dropped"]) == {"in", "out"}
    assert "is up already" in command("router", "up").out
    damages = (
        ("ip", "netns", "exec", ROUTER, "nft", "flush", "ruleset"),
        ("ip", "-n", ROUTER, "route", "del", "default"),
        ("ip", "-n", ROUTER, "-6", "neighbour", "del", "proxy", ADDRESS6, "dev", NIC),
        ("ip", "-n", ROUTER, "address", "flush", "dev", NIC),
        ("ip", "link", "set", HOST_LINK, "down"),
        ("ip", "link", "del", HOST_LINK),
        ("ip", "-n", ROUTER, "link", "del", "transit"),
    )
    for damage in damages:
        run(*damage)
        assert "damaged" in command("router", "status").out, damage
        assert command("router", "up").status == 0
        assert "wan: up\n" in command("router", "status").out, damage
    assert greeting(INTERNET, ECHO_PORT) == ADDRESS
    assert greeting(INTERNET6, ECHO_PORT) == ADDRESS6
    command("router", "down")


def test_namespace_deleted(vps: Vps, command: Command) -> None:
    """A NIC of a real device goes home then; the router is made again."""
    configure()
    command("router", "up")
    run("ip", "-n", ROUTER, "link", "set", NIC, "netns", "1")
    run("ip", "netns", "del", ROUTER)
    assert "damaged" in command("router", "status").out
    assert command("router", "up").status == 0
    assert greeting(INTERNET, ECHO_PORT) == ADDRESS
    command("router", "down")


def test_without_ipv6(vps: Vps, command: Command) -> None:
    """A host that has turned IPv6 off gets none by a router."""
    for name in ("all", "default"):
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
    try:
        configure()
        before = state_of_host()
        assert command("router", "up").err == ""
        assert greeting(INTERNET, ECHO_PORT) == ADDRESS
        assert run("ip", "-6", "address", "show", HOST_LINK).stdout == ""
        assert "wan: up\n" in command("router", "status").out
        assert command("router", "down").err == ""
        after = state_of_host()
        assert after == before, before.diff(after)
    finally:
        for name in ("all", "default"):
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("0")


def test_another_address_for_the_host(vps: Vps, command: Command) -> None:
    """The router keeps the NIC's IPv6 address where the host has another one."""
    configure(more='host_address6 = "2001:db8:1::22"\n')
    command("router", "up")
    assert ADDRESS6 in run("ip", "address", "show", NIC, namespace=ROUTER).stdout
    assert greeting(INTERNET6, ECHO_PORT) == "2001:db8:1::22"
    assert provider("busybox", "ping", "-c1", "-W2", ADDRESS6)
    command("router", "down")


OTHER_NETWORK = """\
link add other type veth peer other-peer
link set other up
link set other-peer up
address add 203.0.113.2/24 dev other
route add default via 203.0.113.1
"""


@pytest.mark.parametrize("own", [False, True])
def test_another_link_leads_the_default_route(vps: Vps, command: Command, own: bool) -> None:
    """The NIC leads IPv6 only: in IPv4 the router gets what the NIC led to, and no more."""
    if not own:
        run("ip", "-4", "address", "flush", "dev", NIC)
    else:
        run("ip", "-4", "route", "del", "default")
        run("ip", "route", "add", "192.0.2.0/24", "via", GATEWAY)
    try:
        for line in OTHER_NETWORK.splitlines():
            run("ip", *line.split())
        before = state_of_host()
        configure()
        assert command("router", "up").err == ""
        assert way_of("203.0.114.1") == way_of("203.0.113.1") == "other"
        assert way_of("192.0.2.1") == way_of(GATEWAY) == (HOST_LINK if own else "other")
        assert way_of(INTERNET6) == HOST_LINK
        assert greeting(INTERNET6, ECHO_PORT) == ADDRESS6
        assert "wan: up\n" in command("router", "status").out
        if own:
            with closing(Server(None, "tcp", SSH)):
                assert greeting(ADDRESS, SSH, NAMESPACE) == GATEWAY
        command("router", "down")
        after = state_of_host()
        assert after == before, before.diff(after)
    finally:
        run("ip", "link", "del", "other", check=False)


def test_another_link_leads_the_default_route_of_ipv6(vps: Vps, command: Command) -> None:
    run("ip", "-6", "route", "del", "default")
    run("ip", "link", "add", "other", "type", "veth", "peer", "other-peer")
    try:
        for link in ("other", "other-peer"):
            run("ip", "link", "set", link, "up")
        run("ip", "-6", "route", "add", "default", "via", "fe80::99", "dev", "other")
        before = state_of_host()
        configure()
        assert command("router", "up").err == ""
        assert way_of(INTERNET6) == "other"
        assert way_of("2001:db8:1::77") == way_of(INTERNET) == HOST_LINK
        assert "wan: up\n" in command("router", "status").out
        command("router", "down")
        after = state_of_host()
        assert after == before, before.diff(after)
    finally:
        run("ip", "link", "del", "other", check=False)


GONE = {
    "deleted": ("link del other",),
    "reused": ("link del other", "link add newer index {index} up type bridge"),
    "down": ("link set other down",),
}


@pytest.mark.parametrize("gone", GONE.values(), ids=GONE)
def test_a_link_of_a_foreign_route_has_gone(
    vps: Vps, command: Command, gone: tuple[str, ...]
) -> None:
    """The way back ends all the same, whoever has the link's number now."""
    run("ip", "link", "add", "other", "up", "type", "bridge")
    try:
        (index,) = (each["ifindex"] for each in links() if each["ifname"] == "other")
        run("ip", "route", "add", "192.0.2.64/26", "dev", "other", "src", ADDRESS)
        run("ip", "rule", "add", "from", ADDRESS, "iif", NIC, "priority", "1000", "lookup", "main")
        rules = run("ip", "rule").stdout
        configure()
        command("router", "up")
        for line in gone:
            run("ip", *line.format(index=index).split())
        assert command("router", "down").err == ""
        assert "192.0.2.64" not in run("ip", "route").stdout
        assert run("ip", "rule").stdout == rules
        assert greeting(INTERNET, ECHO_PORT) == ADDRESS
    finally:
        run("ip", "rule", "del", "priority", "1000", check=False)
        for link in ("other", "newer"):
            run("ip", "link", "del", link, check=False)


def links() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("ip", "-j", "link").stdout)
    return found


def way_of(address: str) -> str:
    """The link by which the host sends to an address."""
    (found,) = json.loads(run("ip", "-j", "route", "get", address).stdout)
    return str(found["dev"])


def test_after_a_boot_without_addresses(vps: Vps, command: Command) -> None:
    """Nobody configures the NIC: what it had when it was confirmed counts."""
    configure()
    assert "never confirmed" in command("router", "up", "--boot").out
    command("router", "up")
    command("router", "down")
    before = state_of_host()
    run("ip", "address", "flush", "dev", NIC)
    run("ip", "link", "set", NIC, "down")
    assert command("router", "up", "--boot").status == 0
    assert greeting(INTERNET, ECHO_PORT) == ADDRESS
    assert greeting(INTERNET6, ECHO_PORT) == ADDRESS6
    command("router", "down")
    wait_for(lambda: state_of_host() == before)


def test_after_a_boot_on_another_machine(vps: Vps, command: Command) -> None:
    """The server was made anew, with a MAC and an address of its own, and IPv6 is yet to come."""
    configure()
    command("router", "up")
    command("router", "down")
    mac, address = "52:54:00:00:03:33", "198.51.100.33"
    provider("bridge", "fdb", "replace", mac, "dev", lab_vps.PORT, "master", "static")
    run("ip", "address", "flush", "dev", NIC)
    run("ip", "link", "set", NIC, "down", "address", mac)
    run("ip", "link", "set", NIC, "up")
    run("ip", "address", "add", f"{address}/24", "dev", NIC)
    run("ip", "route", "add", "default", "via", GATEWAY)
    assert command("router", "up", "--boot").err == ""
    assert mac in run("ip", "link", "show", NIC, namespace=ROUTER).stdout
    assert greeting(INTERNET, ECHO_PORT) == address
    assert ADDRESS6 not in run("ip", "address", "show", HOST_LINK).stdout
    command("router", "down")


def test_after_a_boot_with_ipv6_still_to_come(vps: Vps, command: Command) -> None:
    """What is missing is completed; the MAC is the hardware's also where nothing was configured."""
    configure()
    command("router", "up")
    command("router", "down")
    run("ip", "-6", "address", "flush", "dev", NIC, "scope", "global")
    run("ip", "-6", "route", "flush", "default")
    assert command("router", "up", "--boot").err == ""
    assert greeting(INTERNET, ECHO_PORT) == ADDRESS
    assert greeting(INTERNET6, ECHO_PORT) == ADDRESS6
    command("router", "down")
    mac = "52:54:00:00:03:33"
    provider("bridge", "fdb", "replace", mac, "dev", lab_vps.PORT, "master", "static")
    run("ip", "address", "flush", "dev", NIC)
    run("ip", "link", "set", NIC, "down", "address", mac)
    assert command("router", "up", "--boot").err == ""
    shown = run("ip", "address", "show", NIC, namespace=ROUTER).stdout
    assert mac in shown
    assert "fe80::5054:ff:fe00:310/" not in shown, "it is of the MAC that was"
    assert greeting(INTERNET, ECHO_PORT) == ADDRESS
    command("router", "down")


def test_a_boot_makes_what_was_confirmed(vps: Vps, command: Command) -> None:
    """A configuration that nobody confirmed shuts nobody out."""
    configure()
    command("router", "up")
    command("router", "down")
    kept = (lab_vps.STATE / "wan.kept").read_bytes()
    configure(more='host_ports = []\nhost_subnet = "10.99.0.0/24"\ndns = ["192.0.2.53"]\n')
    assert command("router", "up", "--boot").status == 0
    with closing(Server(None, "tcp", SSH)):
        assert greeting(ADDRESS, SSH, NAMESPACE, source=INTERNET) == INTERNET
    assert "192.168.158.2/24" in run("ip", "address", "show", HOST_LINK).stdout
    assert "192.0.2.53" not in Path("/etc/resolv.conf").read_text()
    command("router", "down")
    assert (lab_vps.STATE / "wan.kept").read_bytes() == kept, "a boot confirms nothing"
    # As an earlier version has kept it.
    old = json.loads(kept)
    del old["target"]
    (lab_vps.STATE / "wan.kept").write_text(json.dumps(old))
    configure()
    run("ip", "address", "flush", "dev", NIC)
    assert command("router", "up", "--boot").err == ""
    assert greeting(INTERNET, ECHO_PORT) == ADDRESS
    command("router", "down")


def test_a_boot_keeps_to_the_confirmed_address_of_the_host(vps: Vps, command: Command) -> None:
    configure(more='host_address6 = "2001:db8:1::22"\n')
    command("router", "up")
    command("router", "down")
    configure()
    assert "host_address6 differs" in command("router", "up", "--boot").err
    assert greeting(INTERNET6, ECHO_PORT) == "2001:db8:1::22"
    command("router", "down")


def test_refused_at_a_boot(vps: Vps, command: Command) -> None:
    """Where nobody else configures the NIC, the host has its addresses all the same."""
    configure()
    command("router", "up")
    command("router", "down")
    mac = "52:54:00:00:03:33"
    provider("bridge", "fdb", "replace", mac, "dev", lab_vps.PORT, "master", "static")
    run("ip", "address", "flush", "dev", NIC)
    run("ip", "link", "set", NIC, "down", "address", mac)
    run("ip", "route", "add", "192.168.158.128/25", "dev", "lo")
    try:
        refused = command("router", "up", "--boot")
        assert refused.status == 1
        assert "overlaps 192.168.158.0/24" in refused.err
        assert mac in run("ip", "link", "show", NIC).stdout
        assert greeting(INTERNET, ECHO_PORT) == ADDRESS
        assert greeting(INTERNET6, ECHO_PORT) == ADDRESS6
        # One in a bridge has none for a reason.
        run("ip", "address", "flush", "dev", NIC)
        run("ip", "link", "add", "br9", "type", "bridge")
        run("ip", "link", "set", NIC, "master", "br9")
        assert "is part of a bridge" in command("router", "up", "--boot").err
        assert ADDRESS not in run("ip", "address", "show", NIC).stdout
    finally:
        run("ip", "link", "del", "br9", check=False)
        run("ip", "route", "del", "192.168.158.128/25", "dev", "lo")


def test_changed_ports(vps: Vps, command: Command) -> None:
    """They are reported, applied to a router that is up, and wait for confirmation if told to."""
    configure()
    command("router", "up")
    kept = (lab_vps.STATE / "wan.kept").read_text()
    with closing(Server(None, "tcp", SSH)), closing(Server(None, "tcp", OTHER)):
        configure(more=f'host_ports = ["tcp/{OTHER}"]\n')
        assert "host_ports differ from the configuration" in command("router", "status").out
        assert "host_ports differ" in command("check").out
        assert command("router", "up", "--boot").status == 0
        assert greeting(ADDRESS, SSH, NAMESPACE), "nobody has ordered them yet"
        assert command("router", "up", "--confirm-within", "60s").status == 0
        assert greeting(ADDRESS, OTHER, NAMESPACE)
        assert not greeting(ADDRESS, SSH, NAMESPACE, timeout=0.5)
        assert (lab_vps.STATE / "wan.kept").read_text() == kept
        assert command("router", "confirm").status == 0
        assert (lab_vps.STATE / "wan.kept").read_text() != kept
        assert "wan: up\n" in command("router", "status").out
        configure(more=f'host_ports = ["tcp/{SSH}"]\n')
        assert "host_ports differ" in command("sync").out
        assert greeting(ADDRESS, SSH, NAMESPACE)
        assert "is up already" in command("router", "up").out
        assert (lab_vps.STATE / "wan.kept").read_text() == kept
    command("router", "down")


def test_changes_for_a_new_router(vps: Vps, command: Command) -> None:
    configure()
    command("router", "up")
    configure(more='host_subnet = "10.99.0.0/24"\nhost_address6 = "2001:db8:1::22"\n')
    for key in ("host_subnet", "host_address6"):
        said = f"{key} differs from the configuration: virt-natns router down wan, then up"
        assert said in command("router", "status").out
        assert said in command("router", "up").err
    command("router", "down")
    assert command("router", "up").err == ""
    assert "wan: up\n" in command("router", "status").out
    command("router", "down")


REFUSALS = (
    ("link add br9 type bridge", f"link set {NIC} master br9", "is part of a bridge",
     f"link set {NIC} nomaster", "link del br9"),
    ("link add link {nic} name above type macvlan", "", "carries above", "", "link del above"),
    ("route add 192.168.158.128/25 dev lo", "", "overlaps 192.168.158.0/24", "",
     "route del 192.168.158.128/25 dev lo"),
    ("link add natns-wan type bridge", "", "a link natns-wan exists", "", "link del natns-wan"),
    ("netns add natns-router-wan", "", "is not ours", "", "netns del natns-router-wan"),
    ("link set {nic} down", "", "is down", "", "link set {nic} up"),
)  # fmt: skip


def test_refused_before_anything_is_changed(vps: Vps, command: Command) -> None:
    configure()
    for *damages, said, back, last in REFUSALS:
        for damage in damages:
            if damage:
                run("ip", *damage.format(nic=NIC).split())
        before = state_of_host()
        answer = command("router", "up")
        assert answer.status == 1
        assert said in answer.err
        assert answer.err.count("\n") == 1
        assert state_of_host() == before
        for step in (back, last):
            if step:
                run("ip", *step.format(nic=NIC).split())
    assert "no default route leads over" in command("router", "up").err  # it went with the link
    run("tc", "qdisc", "add", "dev", NIC, "root", "handle", "1:", "tbf", "rate", "10mbit",
        "burst", "10k", "latency", "50ms", check=False)  # fmt: skip
    write_config('[upstreams.wan]\nkind = "router"\nnic = "nic9"\n')
    assert "nic9 does not exist" in command("router", "up").err
    remove_config()
    assert "no router is configured" in command("router", "up").err


# -- addresses that somebody gives -------------------------------------------


def test_dhcp(vps: Vps, command: Command) -> None:
    """The lease goes on in the namespace; a changed one is followed; the client ends with it."""
    run("ip", "-4", "address", "flush", "dev", NIC)
    run("ip", "address", "add", f"{ADDRESS}/24", "dev", NIC, "valid_lft", "600",
        "preferred_lft", "600")  # fmt: skip
    # Others that nobody leases, one of them in the lease's subnet.
    for static in STATIC:
        run("ip", "address", "add", static, "dev", NIC)
    run("ip", "route", "add", "default", "via", GATEWAY)
    before = state_of_host()
    configure()
    applied = Path("/run/libvirt-natns/routers/wan/applied")
    with dhcp_server(ADDRESS):
        assert command("router", "up").err == ""
        assert greeting(INTERNET, ECHO_PORT) == ADDRESS
        wait_for(lambda: applied.exists(), what="a lease that is kept up")
        assert all(each in nic_addresses() for each in (ADDRESS, *STATIC))
        assert "600sec" not in nic_addresses()
        assert "wan: up\n" in command("router", "status").out
    with dhcp_server("198.51.100.33"):
        # A minute later it would have renewed; that is refused, and it asks for another.
        os.kill(int(Path("/run/libvirt-natns/routers/wan/pid").read_text()), signal.SIGUSR1)
        wait_for(lambda: "198.51.100.33" in nic_addresses(), timeout=30, what="the new address")
        assert f"{ADDRESS}/" not in nic_addresses()
        wait_for(lambda: all(each in nic_addresses() for each in STATIC), what="the others")
        wait_for(lambda: greeting(INTERNET, ECHO_PORT) == "198.51.100.33")
        assert "wan: up\n" in command("router", "status").out
    command("router", "down")
    after = state_of_host()
    assert after == before, before.diff(after)


def nic_addresses() -> str:
    return run("ip", "-4", "address", "show", NIC, namespace=ROUTER).stdout


@contextmanager
def dhcp_server(address: str) -> Iterator[None]:
    """A server that leases one address, for as short as it can."""
    process = spawn(
        "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--port=0",
        "--user=root", "--bind-interfaces", f"--interface={lab_vps.SWITCH}", "--no-ping",
        "--dhcp-leasefile=/dev/null", "--dhcp-authoritative",
        f"--dhcp-range={address},{address},2m", "--dhcp-option=3," + GATEWAY,
        namespace=NAMESPACE,
    )  # fmt: skip
    try:
        wait_for(lambda: ":0043 " in provider("cat", "/proc/net/udp"), what="the DHCP server")
        yield
    finally:
        end(process)


def test_router_advertisements(command: Command) -> None:
    """The default route and the host's address came by an advertisement, and still do."""
    configure()
    with Vps(ipv6=False) as vps:
        advertiser = spawn(
            "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--port=0",
            "--user=root", "--bind-interfaces", f"--interface={lab_vps.SWITCH}", "--enable-ra",
            "--dhcp-range=2001:db8:1::,ra-only,64,120", "--dhcp-leasefile=/dev/null",
            "--ra-param=switch,4,60", namespace=NAMESPACE,
        )  # fmt: skip
        try:
            provider("ip", "address", "add", "2001:db8:1::1/64", "dev", lab_vps.SWITCH, "nodad")
            wait_for(lambda: "2001:db8:1:" in own_address6(), timeout=20, what="an address")
            address = own_address6()
            assert greeting(INTERNET6, ECHO_PORT) == address
            before = state_of_host()
            command("router", "up")
            assert greeting(INTERNET6, ECHO_PORT) == address
            with vps.sniff() as seen:
                run("ip", "-n", ROUTER, "-6", "route", "del", "default", "dev", NIC)
                run("ip", "-n", ROUTER, "-6", "route", "flush", "proto", "ra")
                solicit()
                wait_for(
                    lambda: "proto ra" in run("ip", "-n", ROUTER, "-6", "route").stdout,
                    timeout=20, what="an advertisement that counts",
                )  # fmt: skip
                assert greeting(INTERNET6, ECHO_PORT) == address
                assert vps.sources(seen) == {MAC}
            assert address not in run("ip", "address", "show", NIC, namespace=ROUTER).stdout
            command("router", "down")
            after = state_of_host()
            assert after == before, before.diff(after)
        finally:
            end(advertiser)


def test_advertised_routes_are_not_repaired(vps: Vps, command: Command) -> None:
    """The provider's router is another one by now: a repair keeps what the kernel has learnt."""
    learnt = ("proto", "ra", "dev", NIC, "expires", "900")
    run("ip", "-6", "route", "del", "default")
    run("ip", "-6", "route", "add", "default", "via", "fe80::aa", *learnt)
    run("ip", "address", "change", f"{ADDRESS6}/64", "dev", NIC, "valid_lft", "900",
        "preferred_lft", "900")  # fmt: skip
    configure(more='host_address6 = "2001:db8:1::22"\n')
    command("router", "up")
    assert default_routers() == {"fe80::aa"}
    run("ip", "-n", ROUTER, "-6", "route", "del", "default")
    run("ip", "-n", ROUTER, "-6", "route", "add", "default", "via", "fe80::bb", *learnt)
    assert "wan: up\n" in command("router", "status").out
    run("ip", "-n", ROUTER, "address", "add", "192.0.2.1/32", "dev", NIC)
    run("ip", "-n", ROUTER, "-6", "neighbour", "del", "proxy", "2001:db8:1::22", "dev", NIC)
    assert "damaged" in command("router", "status").out
    assert command("router", "up").status == 0
    assert "192.0.2.1" not in nic_addresses()
    assert default_routers() == {"fe80::bb"}
    addresses = run("ip", "-6", "-o", "address", "show", NIC, "scope", "global", namespace=ROUTER)
    assert ADDRESS6 in addresses.stdout
    assert "900sec" not in addresses.stdout, "nobody renews it"
    assert "sec " not in addresses.stdout.replace("forever", "")
    # What a NIC that was down has lost is put back, for want of anything newer.
    run("ip", "-n", ROUTER, "link", "set", NIC, "down")
    assert command("router", "up").status == 0
    assert default_routers() == {"fe80::aa"}
    command("router", "down")


def default_routers() -> set[str]:
    shown = run("ip", "-6", "-j", "route", "show", "default", namespace=ROUTER).stdout
    return {each["gateway"] for each in json.loads(shown)}


def solicit() -> None:
    """Ask for an advertisement, rather than wait for the next one."""
    with entered(ROUTER):
        asking = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    with asking:
        asking.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        with entered(ROUTER):
            index = socket.if_nametoindex(NIC)
        asking.sendto(bytes([133, *bytes(7)]), ("ff02::2", 0, 0, index))


def own_address6() -> str:
    for line in run(
        "ip", "-6", "-o", "address", "show", NIC, "scope", "global"
    ).stdout.splitlines():
        if "tentative" not in line:
            return line.split()[3].partition("/")[0]
    return ""
