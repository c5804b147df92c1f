# SPDX-License-Identifier: LGPL-2.1-or-later
"""Upstream addresses by a real DHCP server: got, renewed, followed, given back."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab import (
    INTERNET,
    FastGuest,
    Host,
    Node,
    Provider,
    Service,
    define_network,
    install_natns,
    isolated,
    natns,
    remove_config,
    run,
    start_network,
    uninstall_natns,
    virsh,
    wait_for,
    write_config,
)
from lab_bench import Bench, FailAt, InjectedError, settles_as
from lab_dhcp import DhcpServer
from packets import FOREIGN
from views import (
    addresses,
    links,
    namespaces,
    redefine,
    refusal,
    routes,
    settled,
    status,
    upstream_address,
)

from libvirt_natns import names
from libvirt_natns.daemons import udhcpc
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.kernel import processes
from libvirt_natns.operations.addressing import Gateways
from libvirt_natns.operations.daemon_operations import Leasing
from libvirt_natns.operations.firewall_operations import Firewall

UUID = "6f2b9c1e-0000-4000-8000-0000000000d1"
DIRECTORY = names.dhcp_directory(UUID)
NAT = '<natns:nat xmlns:natns="urn:libvirt-natns:1">{}</natns:nat>'
PUBLISHED = NAT.format(
    '<natns:portForward guestAddress="10.0.0.5"><natns:range start="8080" to="80"/>'
    "</natns:portForward>"
)
# With an address of its own dnsmasq does not look for a free one first, for 3 s.
GUEST = Host("52:54:00:0a:00:05", "10.0.0.5")
GATEWAY = "10.0.0.1"
BRIDGE_MAC = '<mac address="52:54:00:aa:bb:cc"/>'
NO_LEASE = "no DHCP server on bridge br0 has leased an address yet"


@pytest.fixture
def configured(installed: None, provider: Provider) -> Iterator[None]:
    configure()
    yield
    remove_config()


def configure(*more: str, firewall: str = "auto") -> None:
    """The default upstream: br0, all else as a DHCP server says."""
    lines = [f'firewall = "{firewall}"', 'upstream = "office"', "[upstreams.office]",
             'kind = "bridge"', 'bridge = "br0"', 'pool = "dhcp"', *more]  # fmt: skip
    write_config("\n".join(lines) + "\n")


def network(name: str = "a", metadata: str = "", address: str = GATEWAY) -> str:
    hosts = [GUEST] if address == GATEWAY else []
    return isolated(name, "virbr10", uuid=UUID, metadata=metadata, address=address, hosts=hosts)


def client() -> int:
    """The process id of the network's DHCP client."""
    pid = udhcpc.process(DIRECTORY, "nat-a")
    assert pid is not None
    return pid


def renew() -> None:
    """Have the client renew now, rather than after half of the lease's time."""
    os.kill(client(), signal.SIGUSR1)


def answers(outside: Node, address: str) -> bool:
    """Whether the published port leads to the guest's web server."""
    return outside.curl(f"http://{address}:8080/name", check=False, timeout=1) == "guest"


def gets_out(guest: FastGuest) -> str:
    """The address that a server outside sees the guest's packets come from."""
    return guest.curl(f"http://{INTERNET}/").partition(":")[0]


# -- a lease -------------------------------------------------------------------


def test_a_network_lives_by_its_lease(configured: None, provider: Provider) -> None:
    """Without the service: address, routes, MTU and resolvers; sticky, and given back."""
    provider.neighbour("branch", "192.168.0.7/24")
    before = settled()
    options = (
        "--dhcp-option=option:mtu,1400",
        "--dhcp-option=option:dns-server,192.168.0.1",
        "--dhcp-option=121,0.0.0.0/0,192.168.0.1,172.30.0.0/16,192.168.0.7",
    )
    with DhcpServer("192.168.0.50", "192.168.0.90", *options) as server:
        with as_on_debian():
            start_network(network())
        address = upstream_address("a")
        found = status("a")
        assert (found["address"], found["health"]) == (address, "ok")
        assert 0 < found["lease_seconds"] <= 120
        assert f"{address} (1" in natns("status").stdout
        assert natns("check").stdout == ""
        assert routes("nat-a")["default"] == "192.168.0.1 upstream"
        assert routes("nat-a")["172.30.0.0/16"] == "192.168.0.7 upstream"
        # Less at the namespace's end alone: a bridge takes its ports' least.
        assert links("nat-a")["upstream"]["mtu"] == 1400
        assert links()["br0"]["mtu"] == 1500
        with FastGuest("virbr10", GUEST.mac) as guest:
            assert guest.dhcp()["mtu"] == "1400"
            assert gets_out(guest) == address
            assert guest.dig("www.example.test") == [INTERNET]
            assert ("www.example.test", address) in provider.queries()
        ((_, mac),) = server.seen("DHCPACK")
        assert mac == links("nat-a")["upstream"]["address"]
        ids = server.leased()
        assert ids[address].replace(":", "") == names.client_id(UUID)
        virsh("net-destroy", "a")
        assert (address, mac) in server.seen("DHCPRELEASE")
        wait_for(lambda: address not in server.leased(), what="the address to be free")
        assert not DIRECTORY.exists()
        virsh("net-start", "a")
        assert upstream_address("a") == address
        assert server.leased() == ids
        virsh("net-destroy", "a")
    settles_as(before)


@contextmanager
def as_on_debian() -> Iterator[None]:
    """Nothing below /run can be run itself."""
    run("mount", "-o", "remount,noexec", "/run")
    try:
        yield
    finally:
        run("mount", "-o", "remount,exec", "/run")


def test_wanted_addresses(configured: None, provider: Provider) -> None:
    """A server may give the one that is wanted; a guest gets none of its own."""
    wanting = NAT.format('<natns:upstream address="192.168.0.77"/>')
    with DhcpServer("192.168.0.70", "192.168.0.79") as server:
        start_network(network(metadata=wanting))
        assert upstream_address("a") == "192.168.0.77"
        virsh("net-destroy", "a")
        redefine(network(metadata=wanting.replace("0.77", "0.99")))
        before = settled()
        said = refusal("a")
        assert "instead of the wanted address 192.168.0.99" in said
        assert names.mac(UUID, "upstream") in said
        settles_as(before)
        # What it got all the same was given back.
        wait_for(lambda: not server.leased())
        assert namespaces() == set()


def test_past_a_firewall_that_drops(
    configured: None, provider: Provider, request: pytest.FixtureRequest
) -> None:
    """Docker has the host's firewall drop what bridges carry: DHCP gets through all the same."""
    docker = FOREIGN["iptables-nft"]
    run("sh", "-c", docker)
    undo = docker.replace("FORWARD DROP", "FORWARD ACCEPT").replace(" -A ", " -D ")
    request.addfinalizer(lambda: run("sh", "-c", undo))
    with DhcpServer():
        start_network(network())
        start_network(isolated("b", "virbr11"))
        assert status("b")["health"] == "ok"
        assert natns("check").stdout == ""
        virsh("net-destroy", "b")
        assert natns("check").stdout == ""
        renew()
        with FastGuest("virbr10", GUEST.mac) as guest:
            guest.static(f"{GUEST.ip}/24", GATEWAY)
            assert gets_out(guest) == upstream_address("a")
        virsh("net-destroy", "a")


def test_an_overlapping_lease_is_refused(configured: None, provider: Provider) -> None:
    with DhcpServer() as server:
        define_network(network(address="192.168.0.1"))
        said = refusal("a")
        assert "its subnet 192.168.0.0/24 overlaps 192.168.0.0/24 of upstream office" in said
        assert namespaces() == set()
        wait_for(lambda: not server.leased())
        assert server.seen("DHCPRELEASE")


# -- renewing and healing ------------------------------------------------------


def test_a_client_of_another_version_goes_on(configured: None, provider: Provider) -> None:
    """An upgrade brings the command that a changed lease runs; no lease is given up for it."""
    with DhcpServer() as server:
        start_network(network())
        address, first = upstream_address("a"), client()

        def older_is_seen() -> bool:
            (DIRECTORY / "command").write_text("exec /usr/bin/false\n")
            found = natns("check", check=False).stdout
            return "DHCP client of nat-a runs the command of another version" in found

        # The client's first event may still run the command, which mends the text.
        wait_for(older_is_seen)
        natns("sync")
        assert natns("check").stdout == ""
        assert (client(), upstream_address("a")) == (first, address)
        assert len(server.seen("DHCPACK")) == 1
        virsh("net-destroy", "a")


@pytest.mark.parametrize("remedy", ["sync", "end"])
def test_a_client_without_its_pid_file_is_ended(
    remedy: str, configured: None, provider: Provider
) -> None:
    """On a full disk the file is empty, and the client runs."""
    with DhcpServer("192.168.0.50", "192.168.0.60"):
        start_network(network())
        earlier = client()
        (DIRECTORY / "pid").write_bytes(b"")
        if remedy == "sync":
            assert "DHCP client of nat-a is not running" in natns("sync").stdout
            assert client() != earlier
            assert natns("check").stdout == ""
        virsh("net-destroy", "a")
        assert not any(processes.command(earlier))
        assert processes.with_word(f"{DIRECTORY}/pid") == []


def test_the_client_needs_no_service(provider: Provider, service: Service) -> None:
    """Renewals go on while the service is dead; a client that was killed is replaced."""
    configure()
    with DhcpServer() as server:
        start_network(network())
        address, first = upstream_address("a"), client()
        service.kill()
        renew()
        wait_for(lambda: len(server.seen("DHCPACK")) == 2, what="a renewal")
        assert client() == first
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: udhcpc.process(DIRECTORY, "nat-a") is None)
        assert "DHCP client of nat-a is not running" in natns("check", check=False).stdout
        service.start()
        wait_for(lambda: len(server.seen("DHCPACK")) == 3, what="its lease")
        # While the service is up, too.
        os.kill(client(), signal.SIGKILL)
        wait_for(lambda: len(server.seen("DHCPACK")) == 4, timeout=20, what="the next one's lease")
        assert {each for each, _ in server.seen("DHCPACK")} == {address}
        assert upstream_address("a") == address
        wait_for(lambda: natns("check", check=False).stdout == "")
        virsh("net-destroy", "a")


@pytest.mark.parametrize("resident", [True, False], ids=["service-nftables", "hooks-iptables"])
def test_a_changed_address_is_followed(
    configured: None, provider: Provider, resident: bool, request: pytest.FixtureRequest
) -> None:
    """Another server refuses the address and gives another: forwards and all go along."""
    if resident:
        request.getfixturevalue("service")
    configure(firewall="nftables" if resident else "iptables")
    with DhcpServer("192.168.0.50", "192.168.0.59"):
        start_network(network(metadata=PUBLISHED))
        before = upstream_address("a")
    with FastGuest("virbr10", GUEST.mac) as guest:
        guest.dhcp()
        guest.serve("http", 80)
        assert answers(provider.router, before)
        if not resident:
            with DhcpServer("192.168.0.0", "static"):
                loses_its_lease(guest)
        with DhcpServer("192.168.0.80", "192.168.0.89") as second:
            if resident:
                renew()
            wait_for(lambda: held().startswith("192.168.0.8"), timeout=30, what="another address")
            after = upstream_address("a")
            # A server says no by broadcast, and need not say it twice.
            assert len(second.seen("DHCPNAK")) == int(resident)
            wait_for(lambda: answers(provider.router, after), timeout=10)
            assert not answers(provider.router, before)
            assert gets_out(guest) == after
            found = status("a")
            assert (found["address"], found["health"]) == (after, "ok")
            assert found["forwards"][0]["address"] == after
            virsh("net-destroy", "a")


def held() -> str:
    """The namespace's upstream address; "" without one."""
    return "".join(addresses("upstream", "nat-a"))


def loses_its_lease(guest: FastGuest) -> None:
    """The server knows nobody: the address goes, and the namespace stays."""
    renew()
    wait_for(lambda: not held(), timeout=20, what="the address to go")
    assert guest.ping(GATEWAY)
    wait_for(lambda: "default" not in routes("nat-a"))
    wait_for(lambda: status("a")["differences"] == [NO_LEASE], timeout=10)
    found = status("a")
    assert (found["address"], found["lease_seconds"]) == (None, None)


# -- nobody answers ------------------------------------------------------------


def test_in_the_background(configured: None, provider: Provider) -> None:
    """Inside all works at once; outside it does as soon as there is a server."""
    configure('dhcp = "background"', "dhcp_timeout = 0")
    start_network(network(metadata=PUBLISHED))
    assert addresses("upstream", "nat-a") == []
    assert status("a")["differences"] == [NO_LEASE]
    assert "(no lease):8080" in natns("forward", "list").stdout
    with FastGuest("virbr10", GUEST.mac) as guest:
        assert guest.dhcp()["ip"] == GUEST.ip
        guest.serve("http", 80)
        assert guest.dig("a.", server=GATEWAY) == []
        assert not guest.ping(INTERNET)
        with DhcpServer():
            wait_for(lambda: addresses("upstream", "nat-a") != [], timeout=30)
            address = upstream_address("a")
            wait_for(lambda: answers(provider.router, address), timeout=10)
            assert gets_out(guest) == address
            wait_for(lambda: natns("check", check=False).stdout == "")
            virsh("net-destroy", "a")


# -- failing -------------------------------------------------------------------


def test_whichever_step_fails_nothing_stays(configured: None, provider: Provider) -> None:
    """Neither a client nor, at the server, a lease."""
    configure("probe = 0")
    inside = f'<natns:ip address="{GATEWAY}" prefix="24"/>'
    xml = isolated("a", "virbr10", uuid=UUID, address=None, metadata=NAT.format(inside))
    bench = Bench(xml.replace("<bridge", f"{BRIDGE_MAC}<bridge").encode(), address=None)
    parsed = libvirt_xml.parse_network(bench.xml)
    with DhcpServer() as server:
        before = settled()
        rehearsal = FailAt()
        bench.start(rehearsal)
        assert bench.differences() == []
        bench.stop()
        settles_as(before)
        for index in telling(rehearsal.steps):
            failing = FailAt(index)
            bench.make_bridge()
            with bench.engine(failing) as verbs, pytest.raises(InjectedError):
                verbs.prepare(parsed, bench.xml)
                verbs.up(parsed, bench.xml)
            bench.delete_bridge()
            settles_as(before)
            assert not server.leased()
        # The same by a process that builds ahead.
        resident = Bench(bench.xml, service=True, address=None)
        resident.start()
        assert resident.differences() == []
        resident.stop()
        settles_as(before)


def telling(steps: list[object]) -> list[int]:
    """Steps that a lease has a part in, before and after there is one."""
    kinds = [step if isinstance(step, str) else type(step) for step in steps]
    first = kinds.index("lease an address")
    chosen = (
        "lease an address", Leasing, "await a DHCP lease", "await its turn",
        "let others start", Firewall, Gateways, "note that it is up",
    )  # fmt: skip
    return [kinds.index(kind, first) for kind in chosen]


# -- commands ------------------------------------------------------------------


def test_plan_leases_nothing_and_uninstall_ends_the_client(
    provider: Provider, configured: None, tmp_path: Path
) -> None:
    file = tmp_path / "a.xml"
    file.write_text(network())
    with DhcpServer() as server:
        told = natns("plan", str(file)).stdout
        assert "DHCP client on upstream in nat-a\n" in told
        assert "address none on upstream in nat-a\n" in told
        assert not server.seen("DHCPDISCOVER")
        assert "addresses by DHCP" in natns("doctor", check=False).stdout
        start_network(network())
        assert server.leased()
        uninstall_natns()
        try:
            assert not DIRECTORY.exists()
            wait_for(lambda: not server.leased())
            virsh("net-destroy", "a")
        finally:
            install_natns()


def test_another_configuration_has_another_way_out(configured: None, provider: Provider) -> None:
    """sync takes a running network from DHCP to a pool and back; the client goes and comes."""
    with DhcpServer() as server:
        start_network(network())
        leased = upstream_address("a")
        write_config(provider.config(pool="192.168.0.200", more="probe = 0"))
        assert natns("sync").stdout == "a: moves from upstream office to provider\n"
        assert upstream_address("a") == "192.168.0.200"
        assert not DIRECTORY.exists()
        wait_for(lambda: not server.leased())
        configure()
        natns("sync")
        wait_for(lambda: held().startswith(f"{leased}/"), what="the address that it had")
        released = server.seen("DHCPRELEASE")

        def told() -> bool:
            (DIRECTORY / "script").write_text("# of an earlier version\n")
            return "DHCP client of nat-a runs with other settings" in natns("sync").stdout

        # Who follows the lease may be at it still, and mends that by the way.
        wait_for(told, timeout=15)
        assert held().startswith(f"{leased}/")
        assert server.seen("DHCPRELEASE") == released
        run("ip", "netns", "del", "nat-a")
        assert "namespace nat-a is missing" in natns("sync").stdout
        wait_for(lambda: held().startswith(f"{leased}/"))
        assert routes("nat-a")["default"] == "192.168.0.1 upstream"
        virsh("net-destroy", "a")


def test_a_guest_gets_no_address_of_its_own(configured: None, provider: Provider) -> None:
    wanted = NAT.format("<natns:address/>")
    with DhcpServer():
        start_network(network())
        xml = (
            f"<domain type='qemu'><name>g</name><metadata>{wanted}</metadata>"
            "<memory unit='MiB'>32</memory><os><type>hvm</type></os><devices>"
            "<interface type='network'><mac address='52:54:00:00:00:01'/>"
            "<source network='a'/></interface></devices></domain>"
        )
        file = Path("/run/tmp/g.xml")
        file.write_text(xml)
        virsh("define", str(file))
        file.unlink()
        result = virsh("start", "g", check=False)
        assert result.returncode != 0
        assert "guest g: upstream office has no address for <natns:address>" in (result.stderr)
        virsh("net-destroy", "a")
