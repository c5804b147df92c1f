# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a network with IPv6 gets out on upstreams of each kind, and with one family alone."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from lab import (
    ECHO_PORT,
    FastGuest,
    Node,
    Service,
    natns,
    remove_config,
    run,
    virsh,
    wait_for,
    write_config,
)
from lab_domains import STATE, asked, create, destroy, domain, networks, nic, ports
from lab_ipv6 import (
    GATEWAY6,
    HOST6,
    INTERNET6,
    SUBNET6,
    DualProvider,
    dual,
    route_to_host,
    slaac,
    static6,
)

MAC = "52:54:00:00:00:05"
CLIENT = "2001:db8:77::77"
GUEST = "fd00:10::5"
HOST_KIND = 'upstream = "host"\n'
ACCEPT_RA = Path("/proc/sys/net/ipv6/conf/br0/accept_ra")
FORWARDING = Path("/proc/sys/net/ipv6/conf/all/forwarding")

pytestmark = pytest.mark.usefixtures("installed")


@pytest.fixture
def provider(nothing_left: None) -> Iterator[DualProvider]:
    with DualProvider() as world:
        for file in STATE.glob("state.db*"):
            file.unlink()
        yield world
        remove_config()


@pytest.fixture
def client(provider: DualProvider) -> Node:
    node = provider.neighbour("client", "192.168.0.77/24")
    static6(node, f"{CLIENT}/64", GATEWAY6)
    return node


@contextmanager
def guest_in(bridge: str, name: str = "guest") -> Iterator[FastGuest]:
    with FastGuest(bridge, MAC, name) as guest:
        guest.static("10.0.0.5/24", "10.0.0.1")
        static6(guest, f"{GUEST}/64", "fd00:10::1")
        guest.resolve_with("fd00:10::1")
        guest.serve("tcp", 22)
        guest.serve("tcp", 22, address="::")
        yield guest


def leased(network: str) -> tuple[str | None, str | None, str | None]:
    """A network's addresses and its prefix."""
    shown = json.loads(natns("status", "--json", network).stdout)["networks"][0]
    return shown["address"], shown["address6"], shown["prefix"]


# -- one family alone ----------------------------------------------------------


def test_an_upstream_with_ipv6_alone(provider: DualProvider) -> None:
    write_config(provider.config6(ipv4=False))
    with networks(dual("a", "virbr10")), guest_in("virbr10") as guest:
        address, address6, _ = leased("a")
        assert (address, address6) == (None, "2001:db8:77::100")
        assert asked("guest", "tcp", INTERNET6, ECHO_PORT) == address6
        assert asked("guest", "tcp", "192.168.0.1", ECHO_PORT, timeout=0.3) is None
        assert guest.dig("www6.example.test", "AAAA") == [INTERNET6]
        assert natns("check").stdout == ""


def test_an_upstream_with_ipv4_alone(provider: DualProvider) -> None:
    write_config(provider.config())
    with networks(dual("a", "virbr10")), guest_in("virbr10") as guest:
        assert leased("a") == ("192.168.0.100", None, None)
        assert asked("guest", "tcp", "192.168.0.1", ECHO_PORT) == "192.168.0.100"
        assert asked("guest", "tcp", GATEWAY6, ECHO_PORT, timeout=0.3) is None
        # Inside all goes on, and nobody believes that there was a way out.
        assert guest.ping("fd00:10::1")
        assert guest.dig("www6.example.test", "AAAA") == [INTERNET6]
        assert slaac(guest, "fd00:10::5054")
        assert "default" not in guest.run("ip", "-6", "route").stdout
        assert natns("check").stdout == ""


def test_a_network_with_ipv6_alone(provider: DualProvider) -> None:
    write_config(provider.config6(gateway6=None))
    with networks(dual("a", "virbr10", ipv4=False)), guest_in("virbr10") as guest:
        assert leased("a") == (None, "2001:db8:77::100", None)
        # Without a gateway there is only the link.
        assert asked("guest", "tcp", GATEWAY6, ECHO_PORT) == "2001:db8:77::100"
        assert guest.ping(GATEWAY6)
        assert natns("check").stdout == ""


# -- the host itself -----------------------------------------------------------


def test_guests_talk_over_the_host_alone(provider: DualProvider, client: Node) -> None:
    """NAT66 by the host; ports published on all of its addresses, as in IPv4."""
    write_config(HOST_KIND)
    assert FORWARDING.read_text() == "0\n"
    publishes = ports("start='2222' to='22'", more=f"guestAddress='{GUEST}'") + ports(
        "start='2223' to='22'", more=f"guestAddress='{GUEST}' address='{HOST6}'"
    )
    with ExitStack() as cleanup:
        cleanup.enter_context(networks(dual("a", "virbr10"), dual("b", "virbr11")))
        cleanup.callback(destroy, "web")
        create(domain("web", nic("a", MAC), publishes=publishes))
        for bridge, name in (("virbr10", "guest"), ("virbr11", "twin")):
            guest = cleanup.enter_context(guest_in(bridge, name))
            assert asked(name, "tcp", INTERNET6, ECHO_PORT) == HOST6
            assert asked(name, "tcp", "192.168.0.1", ECHO_PORT) == "192.168.0.2"
            assert guest.ping(INTERNET6)
            assert guest.dig("www6.example.test", "AAAA") == [INTERNET6]
        for port in (2222, 2223):
            assert asked("client", "tcp", HOST6, port) == CLIENT
            assert asked(None, "tcp", HOST6, port)
            assert asked("twin", "tcp", HOST6, port)
            assert asked("guest", "tcp", HOST6, port)
        assert asked("client", "tcp", HOST6, 22, timeout=0.3) is None
        assert natns("check").stdout == ""
    assert FORWARDING.read_text() == "0\n"


@pytest.mark.parametrize("firewall", ["nftables", "iptables"])
def test_a_prefix_routed_by_the_host(provider: DualProvider, client: Node, firewall: str) -> None:
    chosen = f'firewall = "{firewall}"\n' + HOST_KIND
    write_config(chosen + '[upstreams.host]\nprefixes6 = ["2001:db8:100::/60"]\n')
    route_to_host(provider, "2001:db8:100::/60")
    publishes = ports("start='22'", more="guestAddress='2001:db8:100::5'")
    with networks(dual("a", "virbr10")), guest_in("virbr10") as guest:
        create(domain("web", nic("a", MAC), publishes=publishes))
        try:
            run("ip", "-n", "guest", "address", "add", "2001:db8:100::5/64", "dev", "eth0", "nodad")
            assert asked("guest", "tcp", INTERNET6, ECHO_PORT) == "2001:db8:100::5"
            assert asked("client", "tcp", "2001:db8:100::5", 22) == CLIENT
            assert client.ping("2001:db8:100::5")
            guest.serve("tcp", 23, address="::")
            assert asked("client", "tcp", "2001:db8:100::5", 23, timeout=0.3) is None
            assert natns("check").stdout == ""
        finally:
            destroy("web")


def test_a_host_without_ipv6(provider: DualProvider) -> None:
    write_config(HOST_KIND)
    run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    try:
        with networks(dual("a", "virbr10", ipv4=True)), guest_in("virbr10"):
            assert asked("guest", "tcp", "192.168.0.1", ECHO_PORT) == "192.168.0.2"
            assert leased("a")[1:] == (None, None)
            assert natns("check").stdout == ""
    finally:
        run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=0")


# -- a part of the provider's own subnet ----------------------------------------


def test_a_proxied_subnet(provider: DualProvider) -> None:
    """Guests make themselves addresses in the provider's own subnet."""
    write_config(provider.config6())
    network = dual("a", "virbr10", address6="2001:db8:77::a", ipv4=True)
    publishes = ports("start='22'", more="guestAddress='2001:db8:77:0:5054:ff:fe00:5'")
    with networks(network), FastGuest("virbr10", MAC, "guest") as guest:
        create(domain("web", nic("a", MAC), publishes=publishes))
        try:
            address = slaac(guest, "2001:db8:77:")
            assert asked("guest", "tcp", INTERNET6, ECHO_PORT) == address
            guest.serve("tcp", 22, address="::")
            guest.serve("tcp", 23, address="::")
            assert asked("upstream", "tcp", address, 22) == GATEWAY6
            assert asked("upstream", "tcp", address, 23, timeout=0.3) is None
            assert provider.router.ping(address)
            # Nobody answers for an address that no guest has.
            assert not provider.router.ping("2001:db8:77:0:5054:ff:fe00:6")
            assert natns("check").stdout == ""
        finally:
            destroy("web")


@pytest.mark.parametrize(
    ("address6", "prefix"), [("2001:db8:77:0:a::1", 80), ("2001:db8:77::a", 64)]
)
def test_a_part_of_the_hosts_own_subnet(provider: DualProvider, address6: str, prefix: int) -> None:
    """The provider's router finds guests by the host, which answers for them."""
    write_config(HOST_KIND + f'[upstreams.host]\nsubnet6 = "{SUBNET6}"\n')
    made = "2001:db8:77:0:5054:ff:fe00:5"
    guest_address = made if prefix == 64 else "2001:db8:77:0:a::15"
    publishes = ports("start='22'", more=f"guestAddress='{guest_address}'")
    network = dual("a", "virbr10", address6=address6, prefix=prefix)
    with networks(network), FastGuest("virbr10", MAC, "guest") as guest:
        create(domain("web", nic("a", MAC), publishes=publishes))
        try:
            if prefix == 64:
                assert slaac(guest, "2001:db8:77:") == made
            else:
                static6(guest, f"{guest_address}/{prefix}", address6)
            guest.serve("tcp", 22, address="::")
            guest.serve("tcp", 23, address="::")
            # Two proxies ask one after the other, the first time.
            wait_for(lambda: guest.ping(INTERNET6), what="the first answer")
            assert asked("guest", "tcp", INTERNET6, ECHO_PORT) == guest_address
            assert asked("upstream", "tcp", guest_address, 22) == GATEWAY6
            assert asked("upstream", "tcp", guest_address, 23, timeout=0.3) is None
            assert asked(None, "tcp", GATEWAY6, ECHO_PORT) == HOST6
            assert natns("check").stdout == ""
        finally:
            destroy("web")


# -- a router that advertises itself ---------------------------------------------


def test_a_host_that_believes_its_router() -> None:
    """It goes on to, as long as it is a router itself; and so do namespaces."""

    def learned() -> str:
        return run("ip", "-6", "route", "show", "default", "proto", "ra").stdout

    with DualProvider(advertised=True, host6=False) as provider:
        wait_for(learned, timeout=30, what="the host's router")
        write_config(provider.config6(gateway6=None, prefixes6=["2001:db8:100::/56"]))
        route_to_host(provider)
        try:
            with networks(dual("a", "virbr10")), guest_in("virbr10") as guest:
                assert learned()
                assert FORWARDING.read_text() == "1\n"
                wait_for(lambda: guest.ping(INTERNET6), timeout=15, what="a way out")
                assert ACCEPT_RA.read_text() == "2\n"
                assert learned()
            assert FORWARDING.read_text() == "0\n"
        finally:
            remove_config()


# -- lasting -------------------------------------------------------------------


def test_addresses_and_prefixes_are_kept(provider: DualProvider) -> None:
    write_config(provider.config6(prefixes6=["2001:db8:100::/56"]))
    with networks(dual("a", "virbr10"), dual("b", "virbr11")):
        before = leased("a"), leased("b")
        assert before[0][1:] == ("2001:db8:77::100", "2001:db8:100::/64")
        assert before[1][1:] == ("2001:db8:77::101", "2001:db8:100:1::/64")
        for name in "ab":
            virsh("net-destroy", name)
        for name in "ba":
            virsh("net-start", name)
        assert (leased("a"), leased("b")) == before


def test_an_address_that_somebody_has_is_not_taken(provider: DualProvider) -> None:
    static6(provider.neighbour("squatter"), "2001:db8:77::100/64")
    write_config(provider.config6())
    with networks(dual("a", "virbr10")):
        assert leased("a")[1] == "2001:db8:77::101"


def whole() -> bool:
    """Whether the namespace has its addresses and its way out."""
    told = run("ip", "-n", "nat-a", "-6", "address").stdout
    told += run("ip", "-n", "nat-a", "-6", "route").stdout
    return all(each in told for each in ("2001:db8:77::100/64", "fd00:10::1/64", "default via"))


def test_the_service_heals(provider: DualProvider) -> None:
    write_config(provider.config6(prefixes6=["2001:db8:100::/56"]))
    with Service(), networks(dual("a", "virbr10")), guest_in("virbr10"):
        assert asked("guest", "tcp", INTERNET6, ECHO_PORT) == "2001:db8:77::100"
        for damage in (
            "ip -n nat-a -6 address flush dev upstream scope global",
            "ip -n nat-a -6 route del default",
            "ip -n nat-a -6 address del fd00:10::1/64 dev virbr10",
        ):
            run(*damage.split())
            # Flows are translated to the address even while it is not there.
            wait_for(whole, timeout=10, what=f"the mending of {damage}")
            assert asked("guest", "tcp", INTERNET6, ECHO_PORT, timeout=3)
        run(*["ip", "-6", "route", "del", "2001:db8:100::/64"])
        wait_for(
            lambda: "2001:db8:100::/64" in run("ip", "-6", "route").stdout,
            timeout=10,
            what="the host's route",
        )
        assert natns("check").stdout == ""
