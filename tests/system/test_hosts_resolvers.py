# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hosts as people have them: their resolvers, and names of guests wherever the host has names."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from lab import (
    INTERNET,
    FastGuest,
    Provider,
    Service,
    define_network,
    isolated,
    natns,
    remove_config,
    run,
    virsh,
    wait_for,
    write_config,
)
from lab_domains import networks
from lab_hosts_resolvers import (
    HERE,
    LINK_LOCAL,
    RESOLV_CONF,
    ROUTER,
    ROUTER6,
    dns,
    host_asks,
    lan,
    resolvers,
    resolves,
    write_resolvers,
)
from lab_service import services_log

from libvirt_natns.model.transit_segment import RELAY_PORT

pytestmark = pytest.mark.usefixtures("installed")

ANSWER, OTHER = "198.51.100.7", "198.51.100.8"
NAME = "www.example.test"

HOSTS = {
    # unbound, Pi-hole or a dnsmasq of the host's.
    "loopback": ("127.0.0.1", None, "127.0.0.1"),
    "stub": ("127.0.0.53", None, "127.0.0.53"),
    "loopback6": ("::1", None, "::1"),
    "own address": (HERE, None, HERE),
    "router": (ROUTER, "lan", ROUTER),
    "router6": (ROUTER6, "lan", ROUTER6),
    "link-local": (f"{LINK_LOCAL}%p-lan", "lan", ""),
    # A server for each moment: the first is silent.
    "second": (ROUTER, "lan", ROUTER),
}
"""Each with the server in resolv.conf, and with the place and address where it listens."""


@contextmanager
def network_with_guest(name: str = "a", bridge: str = "virbr10") -> Iterator[FastGuest]:
    with networks(isolated(name, bridge)), FastGuest(bridge, name=f"g-{name}") as guest:
        guest.dhcp()
        yield guest


def health(network: str = "a") -> tuple[str, str]:
    """A network's health, and why its guests have no names."""
    shown = json.loads(natns("status", "--json").stdout)["networks"]
    (status,) = [each for each in shown if each["network"] == network]
    return status["health"], "; ".join(each["reason"] for each in status["obstacles"])


def transit() -> str:
    shown = run("ip", "-o", "-4", "address", "show", "natns-host").stdout
    return shown.split()[3].partition("/")[0]


# -- the host's resolver, wherever it is -------------------------------------------


@contextmanager
def resolver(host: str) -> Iterator[list[str]]:
    """A host with that resolver running; the servers for its resolv.conf."""
    named, place, address = HOSTS[host]
    with dns(place, ANSWER, address=address):
        yield ["192.168.7.99", named] if host == "second" else [named]


@pytest.mark.parametrize("host", ["loopback", "link-local"])
def test_guests_find_what_the_host_finds(host: str) -> None:
    with ExitStack() as stack:
        stack.enter_context(lan())
        stack.enter_context(resolvers(*stack.enter_context(resolver(host))))
        guest = stack.enter_context(network_with_guest())
        assert host_asks(NAME) == [ANSWER], "the control"
        assert resolves(guest, NAME, ANSWER)
        assert health() == ("ok", "")
        assert natns("check").stdout == ""


def test_guests_find_it_while_the_resolver_moves() -> None:
    """A network runs all the time, without the service."""
    with ExitStack() as stack:
        stack.enter_context(lan())
        stack.enter_context(resolvers())
        guest = stack.enter_context(network_with_guest())
        for host in HOSTS:
            with resolver(host) as servers:
                write_resolvers(*servers)
                name = f"{host.replace(' ', '-')}.test"
                assert host_asks(name) == [ANSWER], f"the control, {host}"
                found = lambda name=name: resolves(guest, name, ANSWER, "+time=2")  # noqa: E731
                wait_for(found, timeout=5, what=host)
        assert natns("check").stdout == ""


def test_the_resolver_has_the_address_of_the_guests_gateway() -> None:
    """A café's Wi-Fi has the subnet of a lab that runs."""
    with ExitStack() as stack:
        guest = stack.enter_context(network_with_guest())
        node = stack.enter_context(lan())
        node.add_address("10.0.0.1/24")
        run("ip", "address", "add", "10.0.0.2/24", "dev", "p-lan")
        stack.enter_context(resolvers("10.0.0.1"))
        stack.enter_context(dns("lan", ANSWER, address="10.0.0.1"))
        assert host_asks(NAME) == [ANSWER], "the control"
        assert resolves(guest, NAME, ANSWER)
        assert health() == ("ok", "")


def test_a_stub_divides_domains_among_servers() -> None:
    """As systemd-resolved does for a VPN; the file behind the stub lists both servers."""
    with ExitStack() as stack:
        node = stack.enter_context(lan())
        node.add_address("192.168.7.3/24")
        stack.enter_context(dns("lan", ANSWER, address=ROUTER))
        stack.enter_context(dns("lan", OTHER, address="192.168.7.3"))
        divided = ("--server=192.168.7.1", "--server=/corp.test/192.168.7.3")
        stack.enter_context(dns(None, "", *divided, address="127.0.0.53"))
        stack.enter_context(resolvers("127.0.0.53"))
        guest = stack.enter_context(network_with_guest())
        assert (host_asks(NAME), host_asks("db.corp.test")) == ([ANSWER], [OTHER]), "the control"
        assert resolves(guest, NAME, ANSWER) and resolves(guest, "db.corp.test", OTHER)


def test_answers_of_any_size_and_kind() -> None:
    long = ",".join("x" * 200 for _ in range(30))
    with ExitStack() as stack:
        stack.enter_context(resolvers("127.0.0.1"))
        records = (f"--txt-record=long.test,{long}", "--host-record=six.test,2001:db8::6")
        stack.enter_context(dns(None, "", *records, address="127.0.0.1"))
        guest = stack.enter_context(network_with_guest())
        assert len(guest.dig("long.test", "TXT")[0]) > 6000
        assert guest.dig("six.test", "AAAA") == ["2001:db8::6"]
        assert guest.dig("six.test", "AAAA", "+tcp") == ["2001:db8::6"]
        assert guest.dig("six.test", "AAAA", "+dnssec", "+bufsize=1232") == ["2001:db8::6"]


SIX = """<network><name>six</name><bridge name='virbr12'/>
<ip family='ipv6' address='fd00:10::1' prefix='64'/></network>"""


def test_a_network_with_ipv6_alone_and_a_resolver_with_ipv4_alone() -> None:
    with ExitStack() as stack:
        stack.enter_context(lan())
        run("ip", "-6", "route", "add", "default", "via", ROUTER6)
        stack.enter_context(dns("lan", ANSWER, address=ROUTER))
        stack.enter_context(resolvers(ROUTER))
        stack.enter_context(networks(SIX))
        guest = stack.enter_context(FastGuest("virbr12"))
        run("ip", "-n", "guest", "address", "add", "fd00:10::5/64", "dev", "eth0", "nodad")
        found = lambda: guest.dig(NAME, server="fd00:10::1") == [ANSWER]  # noqa: E731
        wait_for(found, timeout=10, what="a name")
        assert health("six") == ("ok", "")


def test_the_relays_port_is_not_published() -> None:
    everywhere = f"<range start='{RELAY_PORT}'/>"
    more = everywhere.replace("range", "natns:range")
    forward = f"<natns:portForward proto='udp' guestAddress='10.0.0.5'>{more}</natns:portForward>"
    nat = f"<metadata><natns:nat xmlns:natns='urn:libvirt-natns:1'>{forward}</natns:nat></metadata>"
    with network_with_guest():
        define_network(isolated("b", "virbr11", more=nat))
        started = run("virsh", "net-start", "b", check=False)
        assert f"listens on udp port {RELAY_PORT}" in started.stderr
        virsh("net-undefine", "b")


# -- changes ------------------------------------------------------------------------


def test_a_host_without_a_resolver_gets_one() -> None:
    """As a laptop before its login; all commands agree."""
    with ExitStack() as stack:
        stack.enter_context(lan())
        stack.enter_context(dns("lan", ANSWER, address=ROUTER))
        stack.enter_context(resolvers())
        guest = stack.enter_context(network_with_guest())
        state, why = health()
        assert state == "no names" and "/etc/resolv.conf names no server" in why
        assert f"a: {why}\n" in natns("check", check=False).stdout
        assert why in natns("doctor", check=False).stdout
        write_resolvers(ROUTER)
        wait_for(lambda: resolves(guest, NAME, ANSWER), timeout=10, what="a name")
        assert health() == ("ok", "")


def test_a_resolver_of_the_host_that_is_not_there_is_said() -> None:
    with lan(), resolvers("127.0.0.1"), network_with_guest():
        state, why = health()
        assert state == "no names" and "127.0.0.1" in why


def test_a_link_in_place_of_the_file_leads_elsewhere() -> None:
    """systemd-resolved is started, and stopped again; with the service."""
    directory = Path("/run/resolvers")
    stub, real = directory / "stub", directory / "real" / "resolv.conf"
    with ExitStack() as stack:
        stack.enter_context(lan())
        stack.enter_context(dns("lan", ANSWER, address=ROUTER))
        stack.enter_context(dns(None, OTHER, address="127.0.0.53"))
        stack.enter_context(resolvers(ROUTER))
        stack.enter_context(Service())
        stack.callback(run, "rm", "-r", directory)
        RESOLV_CONF.unlink()
        # The directory is missing yet, as before the first login.
        RESOLV_CONF.symlink_to(real)
        guest = stack.enter_context(network_with_guest())
        assert health()[0] == "no names"
        real.parent.mkdir(parents=True)
        write_resolvers(ROUTER, file=real)
        wait_for(lambda: resolves(guest, NAME, ANSWER), timeout=10, what="the server")
        write_resolvers("127.0.0.53", file=stub)
        fresh = RESOLV_CONF.with_suffix(".new")
        fresh.symlink_to(stub)
        fresh.rename(RESOLV_CONF)
        wait_for(lambda: resolves(guest, NAME, OTHER), timeout=10, what="the stub")
        assert health() == ("ok", "")


# -- other programs of the host --------------------------------------------------------


ADDRESSED = """<network><name>a</name><bridge name='virbr10'/><metadata>
<natns:nat xmlns:natns='urn:libvirt-natns:1'><natns:ip address='10.0.0.1' prefix='24'><natns:dhcp>
<natns:range start='10.0.0.100' end='10.0.0.200'/></natns:dhcp></natns:ip></natns:nat>
</metadata></network>"""
"""libvirt itself runs no dnsmasq for the network: it could not, beside another on all addresses."""


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_dns_server_of_the_host_listens_on_all_addresses(first: bool) -> None:
    with ExitStack() as stack:
        stack.enter_context(resolvers("127.0.0.1"))
        server = dns(None, ANSWER)
        if first:
            stack.enter_context(server)
        stack.enter_context(networks(ADDRESSED))
        guest = stack.enter_context(FastGuest("virbr10"))
        guest.dhcp()
        if not first:
            stack.enter_context(server)
        assert resolves(guest, NAME, ANSWER)


def test_the_relays_port_is_taken() -> None:
    """Networks do without the relay as long as they must."""
    with ExitStack() as stack:
        stack.enter_context(lan())
        stack.enter_context(dns("lan", ANSWER, address=ROUTER))
        stack.enter_context(resolvers(ROUTER))
        with socket.create_server(("0.0.0.0", RELAY_PORT)):
            guest = stack.enter_context(network_with_guest())
            assert resolves(guest, NAME, ANSWER)
            # The host's resolver serves all that the relay would.
            assert natns("check").stdout == ""
            assert "Address already in use" in natns("doctor", check=False).stdout
        natns("sync")
        assert natns("check").stdout == ""
        write_resolvers("127.0.0.1")
        with dns(None, OTHER, address="127.0.0.1"):
            wait_for(lambda: resolves(guest, "b.test", OTHER), timeout=5, what="the relay")


GUARD = """table inet guard
delete table inet guard
table inet guard {
  chain input {
    type filter hook input priority 0; policy drop;
    iif lo accept
    ct state established,related accept
    icmpv6 type != 0 accept
  }
}
"""
LINE = f'iifname "natns-host" th dport {RELAY_PORT} accept'


@pytest.mark.parametrize("served", [True, False], ids=["service", "hooks"])
def test_the_hosts_firewall_drops_questions(served: bool, tmp_path: Path) -> None:
    """The rules come while a network runs; another network finds them when it starts."""
    guard = tmp_path / "guard.nft"
    guard.write_text(GUARD)

    def does_without(guest: FastGuest) -> None:
        wait_for(lambda: resolves(guest, NAME, ANSWER), timeout=40, what="a name")
        assert natns("check").stdout == ""
        for command in ("status", "doctor"):
            assert LINE in natns(command, check=False).stdout

    with ExitStack() as stack:
        stack.enter_context(lan())
        stack.enter_context(dns("lan", ANSWER, address=ROUTER))
        stack.enter_context(resolvers(ROUTER))
        if served:
            stack.enter_context(Service())
        stack.callback(run, "nft", "delete", "table", "inet", "guard", check=False)
        with network_with_guest() as guest:
            run("nft", "-f", guard)
            if not served:
                assert LINE in health()[1]
                assert LINE in natns("check", check=False).stdout
                natns("sync")
            does_without(guest)
            run("nft", "insert", "rule", "inet", "guard", "input", *LINE.replace('"', "").split())
            if not served:
                natns("sync")
            write_resolvers("127.0.0.1")
            with dns(None, OTHER, address="127.0.0.1"):
                wait_for(lambda: resolves(guest, NAME, OTHER), timeout=40, what="the relay")
                assert natns("check").stdout == ""
        write_resolvers(ROUTER)
        run("nft", "-f", guard)
        with network_with_guest() as guest:
            does_without(guest)
            # Now the host's own resolver cannot be asked at all.
            write_resolvers("127.0.0.1")
            if not served:
                natns("sync")
            wait_for(lambda: LINE in health()[1], timeout=40, what="the reason")


# -- the relay --------------------------------------------------------------------------


@pytest.mark.parametrize("firewall", ["nftables", "iptables"])
def test_nobody_but_networks_asks_the_relay(firewall: str) -> None:
    write_config(f'firewall = "{firewall}"\n')
    with ExitStack() as stack:
        stack.callback(remove_config)
        node = stack.enter_context(lan())
        stack.enter_context(resolvers("127.0.0.1"))
        stack.enter_context(dns(None, ANSWER, address="127.0.0.1"))
        guest = stack.enter_context(network_with_guest())
        asked = (f"-p{RELAY_PORT}", "+time=1", "+tries=1", "+short", NAME, f"@{transit()}")
        clients = ("nat-a", guest.name, node.name, None)
        questions = [(client, way) for client in clients for way in ("+notcp", "+tcp")]
        with ThreadPoolExecutor() as pool:
            found = pool.map(
                lambda each: run("dig", each[1], *asked, namespace=each[0], check=False), questions
            )
        answered = [
            question
            for question, done in zip(questions, found, strict=True)
            if done.stdout.split() == [ANSWER]
        ]
        assert answered == questions[:2], "the network itself, and nobody else"


def test_a_relay_that_ends_is_started_again() -> None:
    with ExitStack() as stack:
        stack.enter_context(resolvers("127.0.0.1"))
        stack.enter_context(dns(None, ANSWER, address="127.0.0.1"))
        guest = stack.enter_context(network_with_guest())
        pid = Path("/run/libvirt-natns/relay-natns-host/pid")
        run("kill", "-9", pid.read_text().strip())
        assert "the DNS relay on natns-host is not running" in natns("check", check=False).stdout
        natns("sync")
        assert resolves(guest, NAME, ANSWER)
        stack.enter_context(Service())
        run("kill", "-9", pid.read_text().strip())
        wait_for(lambda: resolves(guest, "b.test", ANSWER), timeout=10, what="another relay")


def test_a_flood_of_questions_takes_no_other_networks_names() -> None:
    """The host's resolver answers no question of the flood."""
    with ExitStack() as stack:
        stack.enter_context(lan())
        silent = ("--server=/flood.test/192.168.7.99", "--address=/example.test/" + ANSWER)
        stack.enter_context(dns(None, "", *silent, address="127.0.0.1"))
        stack.enter_context(resolvers("127.0.0.1"))
        hostile = stack.enter_context(network_with_guest())
        other = stack.enter_context(network_with_guest("b", "virbr11"))
        with hostile.open_socket("udp") as opened:
            for number in range(3000):
                name = f"{number:04}"
                words = b"\4" + name.encode() + b"\5flood\4test\0\0\1\0\1"
                opened.sendto(
                    number.to_bytes(2, "big") + b"\1\0\0\1\0\0\0\0\0\0" + words, ("10.0.0.1", 53)
                )
        assert resolves(other, NAME, ANSWER)


def test_a_network_with_servers_of_its_own_needs_no_relay() -> None:
    write_config('[upstreams.host]\nkind = "host"\ndns = ["192.168.7.1"]\n')
    with ExitStack() as stack:
        stack.callback(remove_config)
        stack.enter_context(lan())
        stack.enter_context(dns("lan", ANSWER, address=ROUTER))
        stack.enter_context(resolvers("127.0.0.1"))
        guest = stack.enter_context(network_with_guest())
        assert resolves(guest, NAME, ANSWER)
        assert not Path("/run/libvirt-natns/relay-natns-host").exists()
        assert health() == ("ok", "")


# -- a bridge to a provider, without dns of its own ----------------------------------------


@pytest.mark.parametrize("attach", ["bridge", "macvlan"])
def test_a_bridge_without_servers_that_guests_reach(attach: str, provider: Provider) -> None:
    """All commands say so, and with the service names are there as soon as a server is."""
    more = f'probe = 0\nattach = "{attach}"'
    write_config(provider.config(more=more).replace(f'dns = ["{provider.gateway}"]', ""))
    behind = Path("/run/systemd/resolve")
    with ExitStack() as stack:
        stack.callback(remove_config)
        stack.enter_context(resolvers("127.0.0.53"))
        stack.enter_context(Service())
        guest = stack.enter_context(network_with_guest())
        state, why = health()
        assert state == "no names" and "set 'dns' in [upstreams.provider]" in why
        assert f"a: {why}\n" in natns("check", check=False).stdout
        assert why in natns("doctor", check=False).stdout
        gauge = 'libvirt_natns_network_obstacle{network="a",obstacle="no names"} 1'
        wait_for(lambda: gauge in natns("metrics").stdout, timeout=10, what="the metric")
        wait_for(lambda: why in services_log(), timeout=10, what="a line in the log")
        behind.mkdir(parents=True)
        stack.callback(run, "rm", "-r", behind.parent)
        write_resolvers(provider.gateway, file=behind / "resolv.conf")
        wait_for(lambda: resolves(guest, NAME, INTERNET), timeout=10, what="the server")
        assert health() == ("ok", "")
        # The stub ends, and the file names the server itself.
        write_resolvers(provider.gateway)
        wait_for(lambda: natns("check", check=False).stdout == "", timeout=10, what="peace")
        assert resolves(guest, NAME, INTERNET)
