# SPDX-License-Identifier: LGPL-2.1-or-later
"""A network's life: what net-start makes, who is left alone, and that net-destroy takes all.

The fixture ``nothing_left`` compares the host before and after each test.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lab
import pytest
from lab import (
    ECHO_PORT,
    INTERNET,
    FastGuest,
    Host,
    LabError,
    Libvirtd,
    Provider,
    Snapshot,
    define_network,
    natns,
    remove_config,
    run,
    snapshot,
    start_network,
    virsh,
    wait_for,
    write_config,
)
from lab_ipv6 import slaac
from views import (
    addresses,
    by_altname,
    links,
    namespaces,
    routes,
    settled,
    status,
    upstream_address,
)

from libvirt_natns import names

REAL_INTERPRETER = True
NAT = '<natns:nat xmlns:natns="urn:libvirt-natns:1">{}</natns:nat>'
OFF = '<natns:nat xmlns:natns="urn:libvirt-natns:1" enabled="no"/>'

MAC = "52:54:00:00:00:05"


def isolated(name: str, bridge: str, **options: Any) -> str:  # noqa: ANN401
    """A network that reserves 10.0.0.5 for MAC: dnsmasq offers that without a delay."""
    if options.get("address", True):
        options.setdefault("hosts", [Host(MAC, "10.0.0.5")])
    return lab.isolated(name, bridge, **options)


@pytest.fixture
def upstream(installed: None, provider: Provider) -> Iterator[Provider]:
    """The provider's bridge is the default upstream."""
    write_config(provider.config())
    yield provider
    remove_config()


@pytest.fixture
def no_config(installed: None, provider: Provider) -> Provider:
    """No configuration file: the built-in upstream "host", on the provider's network."""
    remove_config()
    return provider


# -- what is made, and taken away ----------------------------------------------


def check_namespace(bridge: str, gateway: str) -> None:
    """The namespace of network a, whose stock XML says 10.0.0.1/24."""
    assert namespaces() == {"nat-a"}
    assert set(links("nat-a")) == {"lo", "upstream", bridge}
    assert {link["operstate"] for link in links("nat-a").values()} <= {"UP", "UNKNOWN"}
    assert addresses(bridge, "nat-a") == ["10.0.0.1/24"]
    assert routes("nat-a")["default"] == f"{gateway} upstream"
    assert run("cat", "/proc/sys/net/ipv4/ip_forward", namespace="nat-a").stdout == "1\n"


def check_host(bridge: str, upstream_bridge: str) -> None:
    """The host's side of it: two ports without IP, no address, no route."""
    for patch, master in (("private", bridge), ("upstream", upstream_bridge)):
        port = by_altname(f"natns-{patch}-a")
        assert port["master"] == master
        assert port["linkinfo"]["info_kind"] == "veth"
        assert len(port["ifname"]) <= 15
        shown = run("ip", "-o", "address", "show", "dev", port["ifname"]).stdout
        assert not shown, f"{port['ifname']} speaks IP: {shown}"
    assert addresses(bridge) == []
    assert "10.0.0.0/24" not in routes()


def check_guest(bridge: str, seen: str) -> None:
    """A guest gets its address and the world, which sees ``seen``."""
    with FastGuest(bridge, MAC) as guest:
        assert guest.dhcp()["router"] == "10.0.0.1"
        assert guest.curl(f"http://{INTERNET}/").partition(":")[0] == seen
        assert guest.dig("www.example.test") == [INTERNET]


def check_gone(before: Snapshot) -> None:
    """net-destroy leaves the lease in the database, and nothing else."""
    kept = status("a")["address"]
    virsh("net-destroy", "a")
    wait_for(lambda: namespaces() == set(), what="the namespace's end")
    assert not os.path.exists("/run/libvirt-natns")  # noqa: PTH110
    assert not [name for name in links() if name.startswith(("natin-", "natup-", "natns-"))]
    with suppress(LabError):
        wait_for(lambda: snapshot() == before, what="the host as it was")
    assert before.diff(snapshot()) == ""
    assert status("a")["address"] == kept
    assert status("a")["health"] == "down"


def test_bridge_upstream_from_start_to_destroy(upstream: Provider) -> None:
    define_network(isolated("a", "virbr10"))
    before = settled()
    virsh("net-start", "a")
    check_namespace("virbr10", upstream.gateway)
    check_host("virbr10", "br0")
    seen = upstream_address("a")
    assert seen.startswith("192.168.0.1")
    check_guest("virbr10", seen)
    assert status("a")["health"] == "ok"
    assert natns("check").stdout == ""
    check_gone(before)


def test_host_upstream_without_configuration(no_config: Provider) -> None:
    define_network(isolated("a", "virbr10"))
    before = settled()
    virsh("net-start", "a")
    transit = addresses("natns-host")[0].partition("/")[0]
    check_namespace("virbr10", transit)
    check_host("virbr10", "natns-host")
    check_guest("virbr10", str(no_config.address))
    assert natns("check").stdout == ""
    check_gone(before)


def test_transient_network(upstream: Provider) -> None:
    file = Path("/run/tmp/transient.xml")
    file.write_text(isolated("a", "virbr10"))
    virsh("net-create", os.fspath(file))
    file.unlink()
    assert namespaces() == {"nat-a"}
    check_guest("virbr10", upstream_address("a"))
    virsh("net-destroy", "a")
    assert "a" not in virsh("net-list", "--all", "--name").stdout.split()
    wait_for(lambda: namespaces() == set(), what="the namespace's end")


# -- who is left alone ---------------------------------------------------------


def check_untouched(xml: str, bridge: str, address: str | None) -> None:
    """A network that starts as if libvirt-natns were not there, and ends so."""
    name = start_network(xml)
    assert namespaces() == set(), xml
    assert addresses(bridge) == ([address] if address else []), xml
    assert "natns" not in run("ip", "link").stdout
    virsh("net-destroy", name)


@pytest.fixture
def forwarding() -> Iterator[None]:
    """libvirt switches forwarding on for <forward> networks, and never off again."""
    yield
    run("sysctl", "-qw", "net.ipv4.ip_forward=0")


@pytest.mark.parametrize("mode", ["nat", "route", "open"])
def test_forward_networks_are_left_alone(upstream: Provider, forwarding: None, mode: str) -> None:
    """Also where the metadata asks for us: libvirt's own routing wins."""
    xml = isolated("a", "virbr10", more=f"<forward mode='{mode}'/>", metadata=NAT.format(""))
    check_untouched(xml, "virbr10", "10.0.0.1/24")


def test_bridge_network_is_left_alone(upstream: Provider) -> None:
    start_network("<network><name>b</name><forward mode='bridge'/><bridge name='br0'/></network>")
    assert namespaces() == set()
    assert addresses("br0") == ["192.168.0.2/24"]


def test_isolated_networks_that_are_left_alone(upstream: Provider) -> None:
    check_untouched(isolated("off", "virbr10", metadata=OFF), "virbr10", "10.0.0.1/24")
    check_untouched(isolated("bare", "virbr11", address=None), "virbr11", None)


def test_scope_annotated(installed: None, provider: Provider) -> None:
    write_config(provider.config(scope="annotated"))
    check_untouched(isolated("plain", "virbr10"), "virbr10", "10.0.0.1/24")
    start_network(isolated("a", "virbr11", metadata=NAT.format("")))
    assert namespaces() == {"nat-a"}
    check_guest("virbr11", upstream_address("a"))
    remove_config()


# -- names ---------------------------------------------------------------------

AWKWARD = ("Büro Süd", "Büro,Süd", "客户网络's & 1", "x" * 90)


def test_names_that_are_no_file_names(upstream: Provider) -> None:
    for number, name in enumerate(AWKWARD):
        define_network(isolated(name, f"virbr2{number}", domain=None))
        virsh("net-start", name)
    assert namespaces() == {names.namespace(name) for name in AWKWARD}
    assert len(namespaces()) == len(AWKWARD)
    for number, name in enumerate(AWKWARD):
        assert addresses(f"virbr2{number}", names.namespace(name)) == ["10.0.0.1/24"]
        assert by_altname(names.altname("upstream", name))["master"] == "br0"
    assert natns("check").stdout == ""
    for number, name in ((0, AWKWARD[0]), (2, AWKWARD[2])):
        with FastGuest(f"virbr2{number}", MAC) as guest:
            guest.dhcp()
            seen = upstream_address("", names.namespace(name))
            assert guest.curl(f"http://{INTERNET}/").partition(":")[0] == seen
        assert "virbr2" in natns("exec", name, "--", "ip", "-br", "link").stdout
    for name in AWKWARD:
        virsh("net-destroy", name)
    wait_for(lambda: namespaces() == set(), what="the namespaces' end")


# -- libvirtd comes and goes ---------------------------------------------------


def test_autostart(upstream: Provider, libvirtd: Libvirtd) -> None:
    define_network(isolated("a", "virbr10"))
    virsh("net-autostart", "a")
    libvirtd.stop()
    # libvirt's note that it has done so since the machine was started.
    Path("/run/libvirt/network/autostarted").unlink(missing_ok=True)
    libvirtd.start()
    wait_for(lambda: namespaces() == {"nat-a"}, timeout=20, what="autostart")
    wait_for(lambda: natns("check", "a", check=False).returncode == 0, timeout=20)
    check_guest("virbr10", upstream_address("a"))
    virsh("net-autostart", "a", "--disable")


def test_connections_outlive_libvirtd(upstream: Provider, libvirtd: Libvirtd) -> None:
    start_network(isolated("a", "virbr10"))
    with FastGuest("virbr10", MAC) as guest:
        guest.dhcp()
        with guest.connect(INTERNET, ECHO_PORT) as stream:
            stream.recv(100)
            for change in (libvirtd.reload, libvirtd.restart):
                change()
                stream.sendall(b"still there")
                assert stream.recv(100) == b"still there"
                assert addresses("virbr10") == []
                assert natns("check").stdout == ""
            start_network(isolated("b", "virbr11"))
            assert upstream_address("b") != upstream_address("a")
            stream.sendall(b"and now")
            assert stream.recv(100) == b"and now"
    virsh("net-destroy", "a")
    wait_for(lambda: namespaces() == {"nat-b"}, what="the namespace's end")


# -- more than one address -----------------------------------------------------

MANY = """
  <ip address="10.1.0.1" netmask="255.255.255.0"/>
  <ip family="ipv6" address="fd00:1::1" prefix="64"/>
  <route address="10.9.0.0" prefix="24" gateway="10.0.0.9"/>
"""


def fetched_from(guest: FastGuest, source: str) -> str:
    """What address the world sees of a guest that uses one of its own."""
    return guest.curl(f"http://{INTERNET}/", "--interface", source).partition(":")[0]


def test_several_subnets_routes_and_ipv6(upstream: Provider) -> None:
    start_network(isolated("a", "virbr10", more=MANY))
    seen = upstream_address("a")
    assert sorted(addresses("virbr10", "nat-a")) == ["10.0.0.1/24", "10.1.0.1/24"]
    assert routes("nat-a")["10.9.0.0/24"] == "10.0.0.9 virbr10"
    assert not [subnet for subnet in routes() if subnet.startswith("10.")]
    with FastGuest("virbr10", MAC) as guest:
        # A router to 10.9.0.0/24, itself in both subnets.
        assert guest.dhcp()["router"] == "10.0.0.1"
        for address in ("10.0.0.9/24", "10.1.0.5/24", "10.9.0.7/32"):
            guest.add_address(address)
        for source in ("10.0.0.9", "10.1.0.5", "10.9.0.7"):
            assert fetched_from(guest, source) == seen
        assert guest.ping("10.1.0.1")
        check_ipv6_stays_inside(guest)
    assert natns("check").stdout == ""


def check_ipv6_stays_inside(guest: FastGuest) -> None:
    """The upstream has none: guests have a gateway that they are not told to leave by."""
    assert addresses("virbr10", family="inet6") == []
    assert addresses("virbr10", "nat-a", family="inet6") == ["fd00:1::1/64"]
    assert slaac(guest, "fd00:1::")
    assert guest.run("busybox", "ping", "-6", "-c", "1", "-W", "3", "fd00:1::1").returncode == 0
    assert "default" not in guest.run("ip", "-6", "route").stdout


NATNS_IP = NAT.format(
    '<natns:ip address="10.0.0.1" prefix="24"><natns:dhcp>'
    '<natns:range start="10.0.0.100" end="10.0.0.200"/>'
    f'<natns:host mac="{MAC}" name="web" ip="10.0.0.5"/>'
    "</natns:dhcp></natns:ip>"
)


def test_natns_ip(upstream: Provider) -> None:
    start_network(isolated("a", "virbr10", address=None, metadata=NATNS_IP))
    check_host("virbr10", "br0")
    with FastGuest("virbr10", MAC) as guest:
        offer: dict[str, Any] = guest.dhcp()
        assert (offer["ip"], offer["router"]) == ("10.0.0.5", "10.0.0.1")
        assert guest.curl(f"http://{INTERNET}/").partition(":")[0] == upstream_address("a")
        assert guest.dig("web.a") == ["10.0.0.5"]
    assert natns("check").stdout == ""
