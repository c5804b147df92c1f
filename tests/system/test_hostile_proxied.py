# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest in the provider's own prefix that claims addresses of machines outside."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from lab import (
    FastGuest,
    Node,
    Service,
    natns,
    remove_config,
    run,
    wait_for,
    write_config,
)
from lab_domains import STATE, networks
from lab_ipv6 import GATEWAY6, HOST6, SUBNET6, DualProvider, dual, slaac, static6
from lab_nodes import INTERFACE

MAC = "52:54:00:00:00:05"
CLIENT = "2001:db8:77::77"
HONEST = "2001:db8:77:0:5054:ff:fe00:5"
KINDS = ("bridge", "host")

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


def configure(provider: DualProvider, kind: str, firewall: str = "auto") -> None:
    of_host = f'upstream = "host"\n[upstreams.host]\nsubnet6 = "{SUBNET6}"\n'
    write_config(provider.config6(firewall=firewall) if kind == "bridge" else of_host)


@contextmanager
def claiming() -> Iterator[FastGuest]:
    """A guest with an address of its own, that takes the host's and a machine's, too."""
    with FastGuest("virbr10", MAC, "guest") as guest:
        assert slaac(guest, "2001:db8:77:") == HONEST
        # ndppd asks once, and the first question may come before its answer is of use.
        wait_for(partial(guest.ping, GATEWAY6), what="a way out")
        for address in (HOST6, CLIENT):
            run("ip", "-n", "guest", "address", "add", f"{address}/128", "dev", INTERFACE, "nodad")
        yield guest


def told(provider: DualProvider, address: str) -> set[str]:
    """The MAC address by which the provider's router reaches an address, asked anew."""
    run("ip", "-n", "upstream", "-6", "neigh", "flush", "dev", INTERFACE, "to", address)
    provider.router.ping(address)
    shown = run("ip", "-n", "upstream", "-6", "neigh", "show", address, "dev", INTERFACE).stdout
    return {mac.lower() for mac in re.findall(r"lladdr (\S+)", shown)}


def owned_by(provider: DualProvider, address: str, macs: set[str]) -> bool:
    return told(provider, address) == macs


def mac_of(node: Node | None, link: str) -> str:
    where = ("-n", node.name) if node else ()
    shown = run("ip", *where, "-br", "link", "show", "dev", link).stdout
    return shown.split()[2].lower()


@pytest.mark.parametrize("kind", KINDS)
def test_claimed_addresses_stay_their_owners(
    provider: DualProvider, client: Node, kind: str
) -> None:
    configure(provider, kind)
    owners = {HOST6: {mac_of(None, provider.bridge)}, CLIENT: {mac_of(client, INTERFACE)}}
    with Service(), networks(dual("a", "virbr10", address6="2001:db8:77::a", ipv4=True)):
        with claiming() as guest:
            for address, macs in owners.items():
                wait_for(partial(owned_by, provider, address, macs), timeout=10, what=address)
            # The guest's own address is answered for, by the one that answered for the others.
            assert told(provider, HONEST)
            assert guest.ping(GATEWAY6, "-I", HONEST)
            assert natns("check").stdout == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_machine_that_comes_later_has_its_address(provider: DualProvider, kind: str) -> None:
    configure(provider, kind)
    with Service(), networks(dual("a", "virbr10", address6="2001:db8:77::a", ipv4=True)):
        with claiming():
            # An address that no machine outside has is the guest's.
            wait_for(lambda: told(provider, CLIENT), timeout=10, what="the guest's answer")
            late = provider.neighbour("client", "192.168.0.77/24")
            static6(late, f"{CLIENT}/64", GATEWAY6)
            own = {mac_of(late, INTERFACE)}
            # The service asks again a minute after it asked last, sync at once.
            natns("sync")
            wait_for(lambda: told(provider, CLIENT) == own, timeout=10, what="the machine alone")


def test_without_the_service_sync_looks(provider: DualProvider, client: Node) -> None:
    configure(provider, "bridge", "iptables")
    own = {mac_of(client, INTERFACE)}
    with networks(dual("a", "virbr10", address6="2001:db8:77::a", ipv4=True)):
        with claiming():
            # The host's own address is known without asking.
            wait_for(
                lambda: told(provider, HOST6) == {mac_of(None, provider.bridge)},
                what="the host's address",
            )
            natns("sync")
            wait_for(lambda: told(provider, CLIENT) == own, timeout=10, what="the machine alone")
            assert told(provider, HONEST)
