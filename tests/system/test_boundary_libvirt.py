# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host forwards for libvirt's own networks, and for them alone, while ours run."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from lab import (
    FastGuest,
    Node,
    Service,
    define_network,
    isolated,
    natns,
    remove_config,
    run,
    start_network,
    virsh,
    wait_for,
    write_config,
)
from lab_boundary import MGMT, nat_network, on_a_link, reaches
from lab_ipv6 import DualProvider, dual, settle, static6
from lab_servers import WEB_PORT

FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
FORWARDING6 = Path("/proc/sys/net/ipv6/conf/all/forwarding")
MGMT6, HOST6 = "fd00:30::5", "2001:db8:77::2"
ROUTED, ROUTED6 = "192.168.170.5", "fd00:70::5"
SOON = 20.0
"""Seconds within which the host is right after libvirt's network has started."""

pytestmark = pytest.mark.usefixtures("installed")


@pytest.fixture(params=["nftables", "iptables"])
def kind_host(request: pytest.FixtureRequest, nothing_left: None) -> Iterator[str]:
    """Run the test once a firewall backend, behind the host itself."""
    write_config(f'firewall = "{request.param}"\n')
    yield str(request.param)
    remove_config()
    FORWARDING.write_text("0")
    FORWARDING6.write_text("0")


def routed_network(name: str, bridge: str, *, six: bool) -> str:
    """The XML of a network of libvirt's that the host routes, in IPv4 or both families."""
    ip6 = "<ip family='ipv6' address='fd00:70::1' prefix='64'/>" if six else ""
    return (
        f"<network><name>{name}</name><forward mode='route'/><bridge name='{bridge}' delay='0'/>"
        f"<ip address='192.168.170.1' netmask='255.255.255.0'/>{ip6}</network>"
    )


def forwards(path: Path) -> bool:
    return path.read_text().strip() == "1"


def is_well() -> bool:
    return natns("check", check=False).stdout == ""


def serve_both(node: Node) -> None:
    """Have a machine serve in both families."""
    node.serve("http", WEB_PORT)
    node.serve("http", WEB_PORT, address="::")


class Hosts:
    """A machine on the provider's link, and one behind another NIC of the host's."""

    def __init__(self, stack: ExitStack) -> None:
        self.provider = stack.enter_context(DualProvider())
        self.mgmt = on_a_link(stack, "mgmt", "p-mgmt", "172.30.0.1", MGMT)
        serve_both(self.mgmt)
        run("ip", "address", "add", "fd00:30::1/64", "dev", "p-mgmt", "nodad")
        static6(self.mgmt, f"{MGMT6}/64", "fd00:30::1")
        self.outsider = self.provider.neighbour("outsider", "192.168.0.9/24")
        settle(self.outsider)
        static6(self.outsider, "2001:db8:77::99/64")
        for prefix in ("fd00:30::/64", "fd00:70::/64"):
            self.outsider.run("ip", "-6", "route", "replace", prefix, "via", HOST6)
        for subnet in ("172.30.0.0/24", "192.168.170.0/24"):
            self.outsider.add_route(subnet, "192.168.0.2")


@contextmanager
def routed_guest() -> Iterator[None]:
    """Start a network of libvirt's that the host routes, with a guest that serves."""
    virsh("net-start", "routed")
    with FastGuest("virbr70", name="routed") as guest:
        settle(guest)
        guest.static(f"{ROUTED}/24", "192.168.170.1")
        static6(guest, f"{ROUTED6}/64", "fd00:70::1")
        serve_both(guest)
        yield
    virsh("net-destroy", "routed")


def test_ipv4_networks_of_libvirt_open_no_way_in_ipv6(kind_host: str) -> None:
    with ExitStack() as stack:
        hosts = Hosts(stack)
        start_network(nat_network("stock", "virbr50", "192.168.150"))
        assert not forwards(FORWARDING6)
        start_network(dual("a", "virbr10"))
        assert forwards(FORWARDING6)
        assert not reaches(hosts.outsider, MGMT6, WEB_PORT)
        assert reaches(hosts.outsider, MGMT, WEB_PORT), "libvirt made it a router in IPv4"
        assert natns("check").stdout == ""
        virsh("net-destroy", "a")
        assert not forwards(FORWARDING6)
        # The control: libvirt itself has the host forward IPv6.
        start_network(routed_network("routed", "virbr70", six=True))
        assert reaches(hosts.outsider, MGMT6, WEB_PORT)
        virsh("net-start", "a")
        assert reaches(hosts.outsider, MGMT6, WEB_PORT)
        virsh("net-destroy", "a")
        assert forwards(FORWARDING6)


@pytest.mark.parametrize("served", [False, True], ids=["hooks", "service"])
def test_routed_networks_that_start_later_are_reached(kind_host: str, served: bool) -> None:
    with ExitStack() as stack:
        hosts = Hosts(stack)
        if served:
            stack.enter_context(Service())
        define_network(routed_network("routed", "virbr70", six=True))

        def is_reached() -> bool:
            return all(reaches(hosts.outsider, to, WEB_PORT) for to in (ROUTED, ROUTED6))

        with routed_guest():
            wait_for(is_reached, timeout=SOON, what="the control")
        # libvirt leaves it on.
        for path in (FORWARDING, FORWARDING6):
            path.write_text("0")
        start_network(dual("a", "virbr10"))
        assert not forwards(FORWARDING)
        for address in (MGMT, MGMT6):
            assert not reaches(hosts.outsider, address, WEB_PORT)
        with routed_guest():
            wait_for(is_reached, timeout=SOON)
            wait_for(is_well, timeout=SOON)
        # The host forwards IPv6 because of us alone again.
        wait_for(lambda: not reaches(hosts.outsider, MGMT6, WEB_PORT), timeout=SOON)
        wait_for(is_well, timeout=SOON)
        virsh("net-destroy", "a")
        assert not forwards(FORWARDING6)


def test_the_service_hears_of_an_administrators_router(kind_host: str) -> None:
    with ExitStack() as stack:
        hosts = Hosts(stack)
        stack.enter_context(Service())
        start_network(isolated("a", "virbr10"))
        assert not reaches(hosts.outsider, MGMT, WEB_PORT)
        FORWARDING.write_text("1")
        wait_for(lambda: reaches(hosts.outsider, MGMT, WEB_PORT), timeout=SOON)
        FORWARDING.write_text("0")
        with FastGuest("virbr10") as guest:
            guest.static("10.0.0.5/24", "10.0.0.1")
            wait_for(lambda: reaches(guest, MGMT, WEB_PORT), timeout=SOON)
        wait_for(lambda: not reaches(hosts.outsider, MGMT, WEB_PORT), timeout=SOON)
        virsh("net-destroy", "a")
