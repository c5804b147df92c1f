# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host forwards for its networks alone; its filters of bridged frames hold."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lab import (
    FastGuest,
    Node,
    Provider,
    isolated,
    natns,
    remove_config,
    run,
    start_network,
    virsh,
    write_config,
)
from lab_boundary import MGMT, NOT_OURS, on_a_link, reaches
from lab_domains import create, domain, nic
from lab_ipv6 import DualProvider, dual, settle, static6
from lab_nodes import Capture, forward_at_once
from lab_servers import WEB_PORT

FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
FORWARDING6 = Path("/proc/sys/net/ipv6/conf/all/forwarding")
BRIDGE_NF = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
MGMT6 = "fd00:30::5"
TARGET, CLOSED, OPEN = "52:54:00:00:03:01", 22, 23

FILTER = f"""<filter name='no-ssh' chain='root'>
  <rule action='accept' direction='in' priority='100'><tcp state='ESTABLISHED'/></rule>
  <rule action='drop' direction='in' priority='500'><tcp dstportstart='{CLOSED}'/></rule>
</filter>"""
CHAINS = ("libvirt-in", "libvirt-out", "libvirt-in-post", "libvirt-host-in")
"""Chains of libvirt's network filters in the host's table filter."""

FILTERED = "<filterref filter='no-ssh'/></interface>"

pytestmark = pytest.mark.usefixtures("installed")


@pytest.fixture(params=["nftables", "iptables"])
def kind_host(request: pytest.FixtureRequest, nothing_left: None) -> Iterator[str]:
    """Run the test once a firewall backend, behind the host itself."""
    write_config(f'firewall = "{request.param}"\n')
    yield str(request.param)
    remove_config()
    FORWARDING.write_text("0")


def test_neighbours_gain_no_way_through_the_host(kind_host: str) -> None:
    with ExitStack() as stack:
        provider = stack.enter_context(Provider())
        mgmt = on_a_link(stack, "mgmt", "p-mgmt", "172.30.0.1", MGMT)
        mgmt.serve("http", WEB_PORT)
        outsider = provider.neighbour("outsider", "192.168.0.9/24")
        outsider.add_route("172.30.0.0/24", "192.168.0.2")
        outsider.serve("http", WEB_PORT)
        assert not reaches(outsider, MGMT, WEB_PORT), "before there is a network"
        start_network(isolated("a", "virbr10"))
        guest = stack.enter_context(FastGuest("virbr10"))
        guest.static("10.0.0.5/24", "10.0.0.1")
        assert FORWARDING.read_text().strip() == "0"
        assert reaches(guest, MGMT, WEB_PORT)
        assert reaches(guest, "192.168.0.9", WEB_PORT)
        assert not reaches(outsider, MGMT, WEB_PORT)
        assert not reaches(mgmt, "192.168.0.9", WEB_PORT)
        # An administrator who wants a router gets one.
        FORWARDING.write_text("1")
        natns("sync")
        assert reaches(outsider, MGMT, WEB_PORT), "the control"
        assert reaches(guest, MGMT, WEB_PORT)


def test_neighbours_gain_no_way_in_ipv6(kind_host: str) -> None:
    with ExitStack() as stack:
        provider = stack.enter_context(DualProvider())
        mgmt = on_a_link(stack, "mgmt", "p-mgmt", "172.30.0.1", MGMT)
        mgmt.serve("http", WEB_PORT, address="::")
        stack.callback(FORWARDING6.write_text, "0")
        run("ip", "address", "add", "fd00:30::1/64", "dev", "p-mgmt", "nodad")
        static6(mgmt, f"{MGMT6}/64", "fd00:30::1")
        outsider = provider.neighbour("outsider", "192.168.0.9/24")
        settle(outsider)
        static6(outsider, "2001:db8:77::99/64")
        address = provider_address()
        outsider.run("ip", "-6", "route", "replace", "fd00:30::/64", "via", address)
        assert FORWARDING6.read_text().strip() == "0"
        assert not reaches(outsider, MGMT6, WEB_PORT), "before there is a network"
        start_network(dual("a", "virbr10"))
        assert FORWARDING6.read_text().strip() == "1"
        assert not reaches(outsider, MGMT6, WEB_PORT)
        virsh("net-destroy", "a")
        FORWARDING6.write_text("1")
        assert reaches(outsider, MGMT6, WEB_PORT), "the control"
        virsh("net-start", "a")
        assert reaches(outsider, MGMT6, WEB_PORT), "an administrator's own router goes on"
        virsh("net-destroy", "a")


def provider_address() -> str:
    """The host's global IPv6 address on the provider's bridge."""
    shown = run("ip", "-6", "-o", "address", "show", "dev", "br0", "scope", "global").stdout
    return shown.split()[3].partition("/")[0]


@pytest.fixture
def bridged(kind_host: str) -> Iterator[None]:
    """Bridged frames pass through iptables."""
    before = BRIDGE_NF.read_text()
    BRIDGE_NF.write_text("1")
    yield
    BRIDGE_NF.write_text(before)
    virsh("nwfilter-undefine", "no-ssh", check=False)
    # libvirt leaves its chains, empty.
    for program in ("iptables", "ip6tables"):
        for chain in CHAINS:
            builtin = "INPUT" if "host" in chain else "FORWARD"
            run(program, "-D", builtin, "-j", chain, check=False)
            run(program, "-X", chain, check=False)


@pytest.mark.usefixtures("bridged")
def test_network_filters_hold() -> None:
    """What a filter of libvirt's drops stays dropped, as in a network that is none of ours."""
    file = Path("/run/tmp/no-ssh.xml")
    file.write_text(FILTER)
    virsh("nwfilter-define", str(file))
    with Provider() as provider, ExitStack() as stack:
        assert provider
        start_network(isolated("a", "virbr10"))
        start_network(isolated("stock", "virbr20", metadata=NOT_OURS))
        clients = {}
        for network, bridge in (("a", "virbr10"), ("stock", "virbr20")):
            name = f"filtered-{network}"
            mac = TARGET if network == "a" else TARGET[:-1] + "2"
            create(domain(name, nic(network, mac).replace("</interface>", FILTERED)))
            stack.callback(virsh, "destroy", name, check=False)
            client = stack.enter_context(FastGuest(bridge, name=f"client-{network}"))
            client.static("10.0.0.6/24", "10.0.0.1")
            client.add_neighbour("10.0.0.9", mac)
            forward_at_once(bridge)
            clients[network] = client
        natns("sync")
        for network, client in clients.items():
            tap = virsh("domiflist", f"filtered-{network}").stdout.split("vnet")[1].split()[0]
            assert frames_at(f"vnet{tap}", client, OPEN), network
            assert not frames_at(f"vnet{tap}", client, CLOSED), network
        assert natns("check").stdout == ""


def frames_at(tap: str, client: Node, port: int) -> list[str]:
    """Return the frames that the bridge hands to a guest while a client connects."""
    seen = Capture(None, tap, f"tcp dst port {port}")
    try:
        assert not reaches(client, "10.0.0.9", port), "a paused guest answers nothing"
        return seen.lines()
    finally:
        seen.close()
