# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses of a host that come and go: a failover address, a VPN's, a lease's.

A guest and a network publish a port on such an address.  Until the host has it, another machine
may have it, and is reached there.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from lab import FastGuest, Node, Service, natns, remove_config, run, virsh, wait_for, write_config
from lab_domains import asked, create, domain, nic, ports, settle
from lab_domains import networks as running
from lab_ipv6 import DualProvider, dual, static6
from lab_ipv6 import settle as settle6

MAC = "52:54:00:00:00:05"
HERE = {4: "192.168.0.55", 6: "2001:db8:77::55"}
LENGTH = {4: 24, 6: 64}
CLIENT = {4: "192.168.0.20", 6: "2001:db8:77::20"}
GUEST = {4: "10.0.0.5", 6: "fd00:10::5"}
OF_GUEST, OF_NETWORK, TARGET = 8080, 8081, 2222
NETWORK = dual(
    "a", "virbr10",
    metadata="<natns:nat xmlns:natns='urn:libvirt-natns:1'>"
    + "".join(
        f"<natns:portForward address='{HERE[family]}' guestAddress='{GUEST[family]}'>"
        f"<natns:range start='{OF_NETWORK}' to='{TARGET}'/></natns:portForward>"
        for family in HERE
    )
    + "</natns:nat>",
)  # fmt: skip
WEB = domain(
    "web", nic("a", MAC),
    publishes="".join(
        ports(
            f"start='{OF_GUEST}' to='{TARGET}'",
            more=f"address='{HERE[family]}' guestAddress='{GUEST[family]}'",
        )
        for family in HERE
    ),
)  # fmt: skip


@pytest.fixture(autouse=True, params=["nftables", "iptables"])
def provider(request: pytest.FixtureRequest, installed: None) -> Iterator[DualProvider]:
    write_config(f'firewall = "{request.param}"\n')
    with DualProvider() as world:
        station(world, "client", CLIENT)
        yield world
    remove_config()


def station(provider: DualProvider, name: str, addresses: dict[int, str]) -> Node:
    """A machine on the provider's Ethernet with these addresses."""
    node = provider.neighbour(name, f"{addresses[4]}/24")
    settle6(node)
    static6(node, f"{addresses[6]}/64")
    return node


@contextmanager
def owned_by_host() -> Iterator[None]:
    """The host has the address in both families."""
    words = [(f"{HERE[family]}/{LENGTH[family]}", "dev", "br0") for family in HERE]
    for each in words:
        run("ip", "address", "add", *each, *(["nodad"] if ":" in each[0] else []))
    try:
        yield
    finally:
        for each in words:
            run("ip", "address", "del", *each)


def answered() -> list[bool]:
    """Whether the guest answers a client outside, for each family and port."""
    return [
        asked("client", "tcp", HERE[family], port, timeout=1) == CLIENT[family]
        for family in HERE
        for port in (OF_GUEST, OF_NETWORK)
    ]


def states() -> set[str]:
    """The states of all forwards, as listed."""
    lines = natns("forward", "list").stdout.splitlines()[1:]
    assert len(lines) == len(HERE) * 2
    return {line.split()[-1] for line in lines}


def test_a_forward_waits_for_its_address(served: bool, provider: DualProvider) -> None:
    with ExitStack() as stack:
        if served:
            stack.enter_context(Service())
        stack.enter_context(running(NETWORK))
        create(WEB)
        stack.callback(virsh, "destroy", "web")
        settle("virbr10")
        guest = stack.enter_context(FastGuest("virbr10", name="guest"))
        settle6(guest)
        guest.static(f"{GUEST[4]}/24", "10.0.0.1")
        static6(guest, f"{GUEST[6]}/64", "fd00:10::1")
        for address in ("", "::"):
            guest.serve("tcp", TARGET, address=address)
        assert states() == {"waiting"}
        assert f"(waits for {HERE[4]})" in natns("status").stdout
        another_machine_is_reached(provider)
        for _ in range(2):
            with owned_by_host():
                wait_for(lambda: all(answered()), timeout=20, what="the forwards to be live")
                assert states() == {"published"}
                assert natns("check").stdout == ""
            wait_for(lambda: not any(answered()), timeout=20, what="the forwards to be withdrawn")
            assert states() == {"waiting"}
            assert natns("check").stdout == ""


def another_machine_is_reached(provider: DualProvider) -> None:
    """By the host itself and by guests: the address is not the host's."""
    owner = station(provider, "owner", HERE)
    for address in ("", "::"):
        for port in (OF_GUEST, OF_NETWORK):
            owner.serve("tcp", port, address=address)
    for family in HERE:
        for client in (None, "guest", "client"):
            assert asked(client, "tcp", HERE[family], OF_GUEST), (family, client)
        assert asked("client", "tcp", HERE[family], OF_GUEST) == CLIENT[family]
    owner.down()
    run("ip", "neighbour", "flush", "dev", "br0")
    for name in ("client", "upstream"):
        run("ip", "-n", name, "neighbour", "flush", "dev", "eth0")


def test_forward_add_says_that_it_waits(provider: DualProvider) -> None:
    with running(dual("a", "virbr10")):
        create(domain("web", nic("a", MAC)))
        try:
            said = natns("forward", "add", "web", f"{HERE[4]}:8080:80").stdout
            assert f"(waits until the host has {HERE[4]})" in said
            with owned_by_host():
                said = natns("forward", "add", "web", f"{HERE[4]}:8081:80").stdout
                assert "waits" not in said
        finally:
            virsh("destroy", "web")
