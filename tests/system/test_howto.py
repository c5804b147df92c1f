# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each situation's page, typed as it stands on a machine that is in that situation."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from lab import (
    CHECKOUT,
    INTERNET,
    FastGuest,
    Host,
    Libvirtd,
    Provider,
    define_network,
    isolated,
    run,
    virsh,
)
from lab_documents import clone_of, type_page
from lab_domains import define, domain, nic
from lab_hosts_netplan import in_force, lines_of
from lab_package import WRITABLE
from lab_vps import ADDRESS, MAC, NAMESPACE, Vps

PAGES = CHECKOUT / "docs" / "how-to"
PROGRAM = Path("/usr/bin/virt-natns")
BRIDGE = "virbr10"
GUEST_MAC = "52:54:00:00:00:05"


@pytest.fixture(scope="module")
def machine(libvirtd: Libvirtd) -> None:
    """/usr of our own: pages install the program as anybody does."""
    run("sh", "-euc", WRITABLE)


@pytest.fixture
def clone(machine: None, tmp_path: Path) -> Iterator[Path]:
    """A clone that pages are typed in; what they have installed is taken away again."""
    yield clone_of(CHECKOUT, tmp_path / "clone")
    virsh("net-destroy", "lab", check=False)
    virsh("net-undefine", "lab", check=False)
    if PROGRAM.exists():
        run(CHECKOUT / "contrib" / "install", "--uninstall")
    Path("/etc/libvirt-natns/config.toml").unlink(missing_ok=True)


def lab_is_active() -> None:
    """The network "lab" as virt-manager makes one, and as libvirt alone runs it."""
    define_network(isolated("lab", BRIDGE))
    virsh("net-start", "lab")


@contextmanager
def guest_in_lab() -> Iterator[FastGuest]:
    """A guest that has booted there, and reaches the outside."""
    with FastGuest(BRIDGE, GUEST_MAC) as guest:
        guest.dhcp()
        assert guest.curl(f"http://{INTERNET}/")
        yield guest


def test_home_server_with_a_bridge(clone: Path) -> None:
    with Provider() as provider:
        lab_is_active()
        type_page(PAGES / "bridge-at-home.md", clone)
        desk = provider.neighbour("desk", "192.168.0.20/24")
        with guest_in_lab() as guest:
            guest.serve("http", 80)
            assert desk.curl("http://192.168.0.150:8080/")


def test_laptop_on_wifi(clone: Path) -> None:
    with ExitStack() as stack:
        provider = stack.enter_context(Provider(host_address=None))
        # A card of its own, and no bridge that the host has an address on.
        run("ip", "link", "add", "wlan0", "type", "veth", "peer", "name", "radio")
        stack.callback(run, "ip", "link", "delete", "wlan0")
        run("ip", "link", "set", "radio", "master", provider.bridge, "up")
        run("ip", "address", "add", "192.168.0.2/24", "dev", "wlan0")
        run("ip", "link", "set", "wlan0", "up")
        run("ip", "route", "add", "default", "via", "192.168.0.1")
        lab_is_active()
        type_page(PAGES / "laptop.md", clone)
        with guest_in_lab():
            pass


def test_a_data_centre_with_dhcp(clone: Path) -> None:
    with Provider(dhcp=("192.168.0.50", "192.168.0.50")):
        lab_is_active()
        type_page(PAGES / "data-centre.md", clone)
        with guest_in_lab():
            pass


@pytest.mark.parametrize("section", ["The server routes", "A bridge with the card"])
def test_a_server_with_more_addresses(section: str, clone: Path) -> None:
    """The provider's router asks for each address by ARP, and leads it to the server's card."""
    page, router = PAGES / "more-addresses.md", "51.0.113.254"
    with ExitStack() as stack:
        stack.callback(run, "sysctl", "-qw", "net.ipv4.ip_forward=0")
        provider = stack.enter_context(
            Provider(bridge="switch", subnet="51.0.113.0/24", gateway=router, host_address=None)
        )
        run("ip", "link", "add", "ens3", "type", "veth", "peer", "name", "cable")
        stack.callback(run, "ip", "link", "del", "ens3")
        run("ip", "link", "set", "cable", "master", "switch", "up")
        provider.router.run("ip", "route", "add", "198.51.100.8/29", "dev", "eth0")
        in_force(stack, lines_of(page, section))
        lab_is_active()
        type_page(page, clone, section)
        with guest_in_lab() as guest:
            assert guest.curl(f"http://{INTERNET}/").partition(":")[0] == "198.51.100.8"


def test_a_vps(clone: Path) -> None:
    page = PAGES / "vps.md"
    with Vps() as vps, vps.sniff() as seen:
        define_network(isolated("lab", BRIDGE, hosts=[Host(GUEST_MAC, "10.0.0.5")]))
        define(domain("web", nic("lab", GUEST_MAC)))
        try:
            type_page(page, clone, "")
            virsh("start", "--paused", "web")
            with FastGuest(BRIDGE, GUEST_MAC) as guest:
                guest.dhcp()
                guest.serve("http", 80)
                assert guest.ping(INTERNET)
                assert run("curl", "-s", f"http://{ADDRESS}:8080/", namespace=NAMESPACE).stdout
            virsh("destroy", "web")
            type_page(page, clone, "Take it back")
        finally:
            virsh("destroy", "web", check=False)
            virsh("undefine", "web", check=False)
        assert vps.sources(seen) == {MAC}
