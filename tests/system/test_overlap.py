# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks with the same subnet, guests with the same IP and the same MAC, all at once."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from lab import (
    ECHO_PORT,
    INTERNET,
    FastGuest,
    Host,
    Node,
    Provider,
    define_network,
    isolated,
    natns,
    remove_config,
    snapshot,
    start_network,
    virsh,
    write_config,
)
from views import (
    addresses,
    namespaces,
    redefine,
    refusal,
    routes,
    settled,
    upstream_address,
)

MAC = "52:54:00:00:00:05"
GUEST = "10.0.0.5"
PORT = 5555

pytestmark = pytest.mark.usefixtures("installed")


def stock(name: str, bridge: str) -> str:
    """Networks that differ in name and bridge alone."""
    return isolated(name, bridge, hosts=[Host(MAC, GUEST)], domain=None)


@pytest.fixture(params=["bridge", "host"])
def kind(request: pytest.FixtureRequest, backend: str, provider: Provider) -> str:
    """Both kinds of upstream, on both firewall backends."""
    if request.param == "host":
        write_config(f'firewall = "{backend}"\n')
    return str(request.param)


# -- two of them ---------------------------------------------------------------


@pytest.fixture
def twins(kind: str) -> Iterator[tuple[FastGuest, FastGuest]]:
    """Guests with the same MAC and IP in networks a and b."""
    start_network(stock("a", "virbr10"))
    start_network(stock("b", "virbr11"))
    with FastGuest("virbr10", MAC, "guest-a") as one, FastGuest("virbr11", MAC, "guest-b") as two:
        for guest in (one, two):
            assert guest.dhcp()["ip"] == GUEST
            assert guest.mac == MAC
        yield one, two


def seen_by_server(kind: str, provider: Provider) -> tuple[str | None, str | None]:
    """The addresses under which the world sees the guests of a and b."""
    if kind == "host":
        return provider.address, provider.address
    return upstream_address("a"), upstream_address("b")


def check_distinct(kind: str, seen: list[str], expected: tuple[str | None, str | None]) -> None:
    """``seen``: what the server said of each twin, as ADDRESS:PORT."""
    assert tuple(peer.partition(":")[0] for peer in seen) == expected
    assert len(set(seen)) == 2, "the server cannot tell the twins apart"
    if kind == "bridge":
        assert [peer.partition(":")[2] for peer in seen] == [str(PORT)] * 2


def test_twins_talk_at_once(
    kind: str, provider: Provider, twins: tuple[FastGuest, FastGuest]
) -> None:
    """The same five-tuple by TCP and UDP, and the same ICMP, from both sides of the mirror."""
    expected = seen_by_server(kind, provider)
    with ExitStack() as stack:
        check_tcp(kind, expected, [stack.enter_context(tcp(guest)) for guest in twins])
        check_udp(
            kind, expected, [stack.enter_context(udp(guest, provider.gateway)) for guest in twins]
        )
    assert all(guest.ping(INTERNET) for guest in twins)
    assert "10.0.0.0/24" not in routes()
    assert addresses("virbr10") == addresses("virbr11") == []
    assert natns("check").stdout == ""


def tcp(guest: Node) -> socket.socket:
    return guest.connect(INTERNET, ECHO_PORT, PORT)


def check_tcp(
    kind: str, expected: tuple[str | None, str | None], streams: list[socket.socket]
) -> None:
    assert {stream.getsockname() for stream in streams} == {(GUEST, PORT)}
    check_distinct(kind, [stream.recv(100).decode().strip() for stream in streams], expected)
    for turn in range(5):
        said = [f"{who} {turn}".encode() for who in "ab"]
        for stream, words in zip(streams, said, strict=True):
            stream.sendall(words)
        assert [stream.recv(100) for stream in streams] == said


def udp(guest: Node, server: str) -> socket.socket:
    opened = guest.open_socket("udp", PORT, address=GUEST)
    opened.connect((server, ECHO_PORT))
    return opened


def check_udp(
    kind: str, expected: tuple[str | None, str | None], sockets: list[socket.socket]
) -> None:
    for each, who in zip(sockets, ("a", "b"), strict=True):
        each.send(who.encode())
    answers = [each.recv(100).decode().splitlines() for each in sockets]
    assert [said for _, said in answers] == ["a", "b"]
    check_distinct(kind, [peer for peer, _ in answers], expected)


# -- the upstream's own subnet -------------------------------------------------


@pytest.mark.parametrize(
    ("config", "upstreams"),
    [("", "192.168.0.0/24"), ('[upstreams.host]\nsubnet = "172.20.8.0/24"\n', "172.20.8.0/24")],
    ids=["bridge", "host"],
)
def test_upstreams_own_subnet_is_refused(provider: Provider, config: str, upstreams: str) -> None:
    write_config(config or provider.config())
    head = upstreams.removesuffix(".0/24")
    define_network(isolated("a", "virbr10"))
    before = settled()
    for address, netmask in (
        (f"{head}.1", "255.255.255.0"),
        (f"{head}.129", "255.255.255.128"),
        (f"{head}.1", "255.255.0.0"),
    ):
        redefine(isolated("a", "virbr10", address=address, netmask=netmask, dhcp=None))
        said = refusal("a")
        assert f"overlaps {upstreams}" in said, said
        assert before.diff(snapshot()) == ""
    redefine(isolated("a", "virbr10"))
    virsh("net-start", "a")
    assert namespaces() == {"nat-a"}
    remove_config()


def test_built_in_transit_subnet_makes_way(provider: Provider) -> None:
    """It is ours to choose, so a network that comes first may have its favourite."""
    remove_config()
    start_network(isolated("a", "virbr10"))
    transit = addresses("natns-host")[0]
    taken = transit.replace("/22", "")
    define_network(isolated("b", "virbr11", address=taken, netmask="255.255.252.0", dhcp=None))
    assert "of upstream host" in refusal("b")
    assert namespaces() == {"nat-a"}
