# SPDX-License-Identifier: LGPL-2.1-or-later
"""What guests reach through their network's namespace, and do not.

Each probe is made from a guest of a stock libvirt network as well: of one with
<forward mode='nat'/>, or of an isolated one that is not handled.
"""

import errno
import socket
import time
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
    write_config,
)

FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
METADATA = "169.254.169.254"
GATEWAY, WEB, PEER = "10.0.0.1", "10.0.0.5", "10.0.0.6"
NAT = "<forward mode='nat'/>"
NOT_OURS = "<natns:nat xmlns:natns='urn:libvirt-natns:1' enabled='no'/>"
PUBLISHED = """<natns:nat xmlns:natns='urn:libvirt-natns:1'>
  <natns:portForward address='127.0.0.1' guestAddress='10.0.0.5'>
    <natns:range start='8080' to='80'/></natns:portForward>
  <natns:portForward source='192.168.0.0/24' guestAddress='10.0.0.5'>
    <natns:range start='8081' to='80'/></natns:portForward>
  <natns:portForward guestAddress='10.0.0.5'><natns:range start='8082' to='80'/></natns:portForward>
</natns:nat>"""

pytestmark = pytest.mark.usefixtures("installed")


def host_config(firewall: str, more: str = "") -> str:
    return f'firewall = "{firewall}"\nupstream = "host"\n[upstreams.host]\nkind = "host"\n{more}'


@pytest.fixture(params=["nftables", "iptables"])
def kind_host(request: pytest.FixtureRequest, provider: Provider) -> Iterator[str]:
    """Run the test once a firewall backend, behind the host itself."""
    name = str(request.param)
    write_config(host_config(name))
    yield name
    remove_config()
    # libvirt switches it on for a network with NAT, and leaves it.
    FORWARDING.write_text("0")


def guest_on(stack: ExitStack, bridge: str, name: str, address: str, gateway: str) -> FastGuest:
    guest = stack.enter_context(FastGuest(bridge, name=name))
    guest.static(f"{address}/24", gateway)
    return guest


def why(client: Node, address: str, port: int) -> str:
    """Why a connection is not made, by the error's name; "" where it is made."""
    try:
        client.connect(address, port, timeout=1.0).close()
    except TimeoutError:
        return "timeout"
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


# -- metadata of clouds ------------------------------------------------------------


def test_metadata_is_refused_unless_it_is_allowed(kind_host: str, provider: Provider) -> None:
    run("ip", "route", "add", METADATA, "via", provider.gateway)
    run("ip", "address", "add", f"{METADATA}/32", "dev", "lo", namespace="upstream")
    with ExitStack() as stack:
        stack.callback(run, "ip", "route", "del", METADATA)
        start_network(isolated("a", "virbr10"))
        start_network(isolated("stock", "virbr20", address="10.0.20.1", more=NAT))
        ours = guest_on(stack, "virbr10", "ours", WEB, GATEWAY)
        stock = guest_on(stack, "virbr20", "stock", "10.0.20.5", "10.0.20.1")
        assert why(stock, METADATA, 7) == "", "the control"
        assert why(ours, provider.gateway, 7) == ""
        start = time.monotonic()
        assert why(ours, METADATA, 7) == "EHOSTUNREACH"
        assert time.monotonic() - start < 0.5, "a guest that boots need not wait"
        write_config(host_config(kind_host, 'link_local = "forward"\n'))
        natns("sync")
        assert why(ours, METADATA, 7) == ""
        assert natns("check").stdout == ""


# -- isolated ports -----------------------------------------------------------------


def isolate(guest: FastGuest) -> None:
    """As libvirt does for <port isolated='yes'/>."""
    run("bridge", "link", "set", "dev", guest.port, "isolated", "on")


def by_gateway(client: FastGuest, address: str, gateway: str) -> None:
    """Have a client send to its neighbour by the router, whatever the neighbour's subnet."""
    client.run("sysctl", "-qw", "net.ipv4.conf.eth0.accept_redirects=0")
    client.add_route(f"{address}/32", gateway)


def test_isolated_ports_stay_apart(kind_host: str, provider: Provider) -> None:
    with ExitStack() as stack:
        start_network(isolated("a", "virbr10", metadata=PUBLISHED))
        start_network(isolated("stock", "virbr20", address="10.0.20.1", metadata=NOT_OURS))
        for bridge, net in (("virbr10", "10.0.0"), ("virbr20", "10.0.20")):
            web = guest_on(stack, bridge, f"web-{bridge[-2:]}", f"{net}.5", f"{net}.1")
            peer = guest_on(stack, bridge, f"peer-{bridge[-2:]}", f"{net}.6", f"{net}.1")
            for here, there in ((web, f"{net}.6"), (peer, f"{net}.5")):
                here.serve("tcp", 80)
                assert why(here, there, 80) in ("", "ECONNREFUSED"), "the way is there"
            for here, there in ((web, f"{net}.6"), (peer, f"{net}.5")):
                isolate(here)
                by_gateway(here, there, f"{net}.1")
            # One way is enough to cross the boundary.
            with web.sniff(f"host {net}.6") as seen:
                assert why(peer, f"{net}.5", 80) in ("timeout", "EHOSTUNREACH", "ENETUNREACH")
                with peer.open_socket("udp") as out:
                    out.sendto(b"?", (f"{net}.5", 9))
                time.sleep(0.3)
                assert [line for line in seen.lines() if "ARP" not in line] == [], bridge
            if bridge == "virbr10":
                # What is published is reached from everywhere, by the host's address.
                assert why(peer, "192.168.0.2", 8082) == ""
                assert why(peer, provider.gateway, 7) == ""


# -- listen addresses ----------------------------------------------------------------


def test_listen_addresses_hold_on_the_transit(kind_host: str, provider: Provider) -> None:
    with ExitStack() as stack:
        start_network(isolated("a", "virbr10", metadata=PUBLISHED))
        start_network(isolated("b", "virbr11"))
        start_network(isolated("stock", "virbr20", address="10.0.20.1", more=NAT))
        web = guest_on(stack, "virbr10", "web", WEB, GATEWAY)
        web.serve("tcp", 80)
        clients = [
            guest_on(stack, "virbr11", "twin", WEB, GATEWAY),
            guest_on(stack, "virbr10", "own", PEER, GATEWAY),
            guest_on(stack, "virbr20", "stock", "10.0.20.5", "10.0.20.1"),
        ]
        transit = transit_address("a")
        for client in clients:
            for port in (8080, 8081, 8082):
                assert why(client, transit, port) in ("timeout", "EHOSTUNREACH"), client.name
            assert why(client, "192.168.0.2", 8082) == "", client.name
            assert why(client, "192.168.0.2", 8080) != "", client.name
        with socket.create_connection(("127.0.0.1", 8080), 2):
            pass


def transit_address(network: str) -> str:
    shown = run("ip", "-o", "-4", "-n", f"nat-{network}", "address", "show", "upstream").stdout
    return shown.split()[3].partition("/")[0]


# -- settings that a namespace would inherit --------------------------------------------


HOSTILE = ("proxy_arp", "accept_local", "route_localnet", "arp_accept", "accept_source_route")
"""What a host may have switched on before it makes the namespace."""


@pytest.mark.usefixtures("backend")
def test_settings_are_the_networks_own(provider: Provider) -> None:
    """A namespace is made with the settings of the machine's first one."""
    neighbour = provider.neighbour("near", "192.168.0.77/24")
    neighbour.run("ip", "route", "add", "10.0.0.0/24", "dev", "eth0")
    start_network(isolated("a", "virbr10"))

    def answers() -> bool:
        """Whether the namespace claims a private address on the provider's segment."""
        neighbour.run("ip", "neigh", "flush", "all")
        neighbour.run("busybox", "ping", "-c", "1", "-W", "1", PEER, check=False)
        return "lladdr" in neighbour.run("ip", "neigh", "show", PEER).stdout

    assert not answers()
    for key in HOSTILE:
        for which in ("all", "default"):
            path = f"net.ipv4.conf.{which}.{key}"
            run("sysctl", "-qw", f"{path}=1", namespace="nat-a")
    assert answers(), "the control"
    told = natns("check", check=False).stdout
    assert all(f"conf/all/{key} is 1" in told for key in HOSTILE), told
    natns("sync")
    assert not answers()
    assert natns("check").stdout == ""
