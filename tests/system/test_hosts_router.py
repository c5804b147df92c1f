# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rented servers as they are, behind a router: the outside notices nothing."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import cycle

import lab_vps
import pytest
from lab import (
    FastGuest,
    Server,
    isolated,
    remove_config,
    run,
    start_network,
    virsh,
    write_config,
)
from lab_hosts_router import (
    ADDRESS,
    FAR,
    FLOATING,
    SSH,
    THIRD,
    seen6,
    server,
    sources,
    typed_by_ssh,
    typed_over,
)
from lab_sides import Command, in_process
from lab_vps import (
    ADDRESS6,
    CONFIG,
    GATEWAY,
    GATEWAY6,
    NAMESPACE,
    NIC,
    greeting,
    state_of_host,
)

OTHER6, FAR_SUBNET6, ROUTER6 = "2001:db8:1::11", "2001:db8:2::10", "2001:db8:fffe::1"
BACKENDS = ("nftables", "iptables")
OLD_HOST = 2222


@pytest.fixture(autouse=True)
def nothing_kept(nothing_left: None) -> Iterator[None]:
    yield
    remove_config()
    shutil.rmtree(lab_vps.STATE, ignore_errors=True)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return in_process(capsys)


def configure(firewall: str = "auto", more: str = "") -> None:
    write_config(f'firewall = "{firewall}"\nupstream = "wan"\n{CONFIG}{more}')


# -- IPv6 of the host ----------------------------------------------------------

DEFAULT6 = f"-6 route add default via {GATEWAY6} dev {NIC}"
HOSTS6: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # An address alone, and a gateway that is on the link, or made so by a route or a flag.
    "alone": ((f"{ADDRESS6}/128",), (DEFAULT6,)),
    "off link": (
        (f"{ADDRESS6}/128",),
        (
            f"-6 route add {ROUTER6} dev {NIC}",
            f"-6 route add default via {ROUTER6} dev {NIC}",
        ),
    ),
    "onlink": (
        (f"{ADDRESS6}/128", f"{OTHER6}/128"),
        (f"-6 route add default via {ROUTER6} dev {NIC} onlink",),
    ),
    # A second address, of the subnet or of another.
    "second": ((f"{ADDRESS6}/64", f"{OTHER6}/128", f"{FAR_SUBNET6}/64"), (DEFAULT6,)),
    "newest": ((f"{ADDRESS6}/64", f"{OTHER6}/64"), (DEFAULT6,)),
    "named": ((f"{ADDRESS6}/64", f"{OTHER6}/64"), (f"{DEFAULT6} src {ADDRESS6}",)),
    "named for one": (
        (f"{ADDRESS6}/64", f"{OTHER6}/64"),
        (DEFAULT6, f"-6 route add 2001:db8:ffff::81 via {GATEWAY6} dev {NIC} src {ADDRESS6}"),
    ),
    "deprecated": ((f"{ADDRESS6}/64", f"{OTHER6}/64 preferred_lft 0"), (DEFAULT6,)),
}


@pytest.mark.parametrize(("addresses", "routes"), HOSTS6.values(), ids=HOSTS6)
def test_ipv6_of_the_host_stays_as_it_was(
    addresses: tuple[str, ...], routes: tuple[str, ...], command: Command
) -> None:
    configure()
    lines = [f"-6 address add {address} dev {NIC} nodad" for address in addresses]
    own = tuple(address.partition("/")[0] for address in addresses)
    provided = (
        f"address add {ROUTER6}/128 dev {lab_vps.SWITCH} nodad",
        f"route add 2001:db8:2::/64 dev {lab_vps.SWITCH}",
    )
    with (
        server(*lines, *routes, provided=provided),
        closing(Server(None, "tcp", SSH, address="::")),
    ):
        host, before = state_of_host(), seen6(own)
        assert all(before.values())
        assert command("router", "up").err == ""
        assert seen6(own) == before
        assert "wan: up\n" in command("router", "status").out
        assert command("router", "down").err == ""
        assert seen6(own) == before
        after = state_of_host()
        assert after == host, host.diff(after)


def test_a_boot_keeps_the_order_of_the_addresses(command: Command) -> None:
    """The newest is the source of packets, also where the boot has left out some."""
    configure()
    own = (ADDRESS6, OTHER6)
    lines = [f"-6 address add {address}/64 dev {NIC} nodad" for address in own]
    with server(*lines, DEFAULT6), closing(Server(None, "tcp", SSH, address="::")):
        before = seen6(own)
        assert command("router", "up").status == 0
        assert command("router", "down").status == 0
        run("ip", "-6", "address", "del", f"{OTHER6}/64", "dev", NIC)
        run("ip", "-6", "route", "del", "default")
        assert command("router", "up", "--boot").err == ""
        assert seen6(own) == before


# -- sources -------------------------------------------------------------------

STATIC = (f"address add {ADDRESS}/24 dev {NIC}", f"address add {FLOATING}/32 dev {NIC}")
DEFAULT = f"route add default via {GATEWAY}"
SOURCES = {
    "default": (*STATIC, f"{DEFAULT} src {FLOATING}"),
    "one route": (*STATIC, DEFAULT, f"route add {FAR[1]} via {GATEWAY} src {FLOATING}"),
    "nested": (
        *STATIC,
        f"address add {THIRD}/32 dev {NIC}",
        f"{DEFAULT} src {FLOATING}",
        f"route add 203.0.113.82/31 via {GATEWAY} src {THIRD}",
        f"route add {FAR[2]} via {GATEWAY} src {ADDRESS}",
    ),
    "metrics": (
        *STATIC,
        f"{DEFAULT} src {ADDRESS} metric 200",
        f"{DEFAULT} src {FLOATING} metric 100",
    ),
    "rules": (
        *STATIC,
        DEFAULT,
        f"{DEFAULT} src {FLOATING} table 100",
        f"rule add to {FAR[1]} lookup 100 priority 1000",
        f"rule add to {FAR[2]}/31 lookup 100 priority 1001",
        f"rule add to {FAR[2]} lookup main priority 999",
    ),
    "suppressed": (
        *STATIC,
        f"{DEFAULT} src {ADDRESS}",
        f"route add {FAR[1]} via {GATEWAY} src {ADDRESS}",
        f"{DEFAULT} src {FLOATING} table 100",
        "rule add lookup main suppress_prefixlength 0 priority 999",
        "rule add lookup 100 priority 1000",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "backend"), zip(SOURCES.values(), cycle(BACKENDS), strict=False), ids=SOURCES
)
def test_packets_leave_by_the_source_that_routes_named(
    lines: tuple[str, ...], backend: str, command: Command
) -> None:
    configure(backend)
    with server(*lines):
        host, before = state_of_host(), sources()
        assert len({*before.values()}) > 1 or FLOATING in before.values()
        assert command("router", "up").err == ""
        assert sources() == before
        assert "wan: up\n" in command("router", "status").out
        assert command("router", "down").err == ""
        assert sources() == before
        after = state_of_host()
        assert after == host, host.diff(after)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guests_leave_by_the_same_source(
    backend: str, installed: None, nothing_kept: None, command: Command
) -> None:
    configure(backend)
    with ExitStack() as stack:
        stack.enter_context(server(*SOURCES["nested"]))
        expected = sources()
        assert command("router", "up").err == ""
        start_network(isolated("a", "virbr10"))
        stack.callback(virsh, "net-undefine", "a", check=False)
        stack.callback(virsh, "net-destroy", "a", check=False)
        guest = stack.enter_context(FastGuest("virbr10", "52:54:00:00:00:05", "guest-a"))
        guest.static("10.0.0.5/24", "10.0.0.1")
        assert sources(guest.name) == expected


# -- the session in which it is typed ------------------------------------------

PLAIN = (f"address add {ADDRESS}/24 dev {NIC}", DEFAULT)


def test_a_session_is_not_cut(command: Command) -> None:
    """Its port is found by sshd's variable, which sudo removes, or by the connection itself."""
    configure()
    with server(*PLAIN, f"-6 address add {ADDRESS6}/64 dev {NIC} nodad", DEFAULT6):
        host = state_of_host()
        said = typed_by_ssh(f"{FAR[0]} 50000 {ADDRESS} {OLD_HOST}", "router", "up")
        assert (said.returncode, said.stderr.count("\n")) == (1, 1)
        assert f"tcp port {OLD_HOST}" in said.stderr and '"tcp/2222"' in said.stderr
        said2 = typed_over(OLD_HOST, ADDRESS, NAMESPACE, "router", "up")
        assert said2.startswith("1 ") and f"tcp port {OLD_HOST}" in said2
        after = state_of_host()
        assert after == host, host.diff(after)
        # In IPv6 all ports stay; other addresses are reached as before; a client is no server.
        for connection in (
            f"2001:db8:ffff::80 50000 {ADDRESS6} {OLD_HOST}",
            f"192.0.2.9 50000 192.0.2.1 {OLD_HOST}",
            f"{FAR[0]} 50000 {ADDRESS} {SSH}",
        ):
            assert typed_by_ssh(connection, "router", "up").returncode == 0
            assert command("router", "down").status == 0
        configure(more=f'host_ports = ["tcp/{SSH}", "tcp/{OLD_HOST}"]\n')
        said2 = typed_over(OLD_HOST, ADDRESS, NAMESPACE, "router", "up")
        assert said2.startswith("0 "), said2


def test_changed_ports_do_not_cut_the_session(command: Command) -> None:
    """A session through the router comes in by the host's private address."""
    configure(more=f'host_ports = ["tcp/{SSH}", "tcp/{OLD_HOST}"]\n')
    with server(*PLAIN):
        assert command("router", "up").status == 0
        configure()
        for verb in (("router", "up"), ("sync",)):
            said = typed_over(OLD_HOST, ADDRESS, NAMESPACE, *verb)
            assert f"tcp port {OLD_HOST}" in said, verb
        with closing(Server(None, "tcp", OLD_HOST)):
            assert greeting(ADDRESS, OLD_HOST, NAMESPACE), "still forwarded"
        assert command("router", "up").status == 0, "at the console"
        with closing(Server(None, "tcp", OLD_HOST)):
            assert not greeting(ADDRESS, OLD_HOST, NAMESPACE, timeout=0.5)
