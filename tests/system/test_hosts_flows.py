# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of UDP that sends since before its port is published: answered when the port is."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import lab_vps
import pytest
from lab import Host, Server, natns, run, virsh, write_config
from lab_domains import NAMESPACE, create, destroy, domain, nat, networks, nic, ports
from lab_hosts_packets import Caller, Place, place, serving_guest
from lab_ipv6 import dual

MAC = "52:54:00:00:00:05"
PORT = 2222
RANGE = f"start='{PORT}' to='22'"
PUBLISHED = "".join(
    ports(RANGE, more=f"proto='udp' guestAddress='{guest}'") for guest in ("10.0.0.5", "fd00:10::5")
)

pytestmark = pytest.mark.usefixtures("installed")


def network(where: Place, publishes: str = "") -> str:
    return dual("a", "virbr10", metadata=nat(where.metadata + publishes))


@contextmanager
def calling(where: Place, *more: str) -> Iterator[list[Caller]]:
    """Clients of each address in each place, which have begun before the body does."""
    with ExitStack() as stack:
        callers = [
            stack.enter_context(Caller(client, address, PORT))
            for client in (*where.clients, *more)
            for address in where.addresses
        ]
        for caller in callers:
            caller.goes_on()
        yield callers


@pytest.mark.parametrize(
    ("kind", "firewall"),
    [
        ("host", "nftables"),
        ("host", "iptables"),
        ("bridge", "nftables"),
        ("macvlan", "iptables"),
        ("router", "nftables"),
    ],
)
def test_a_guest_that_comes_goes_and_comes_again(kind: str, firewall: str) -> None:
    web = domain("web", nic("a", MAC), publishes=PUBLISHED)
    with ExitStack() as stack:
        where = stack.enter_context(place(kind, firewall))
        stack.enter_context(networks(network(where)))
        stack.enter_context(serving_guest("virbr10"))
        stack.callback(destroy, "web")
        callers = stack.enter_context(calling(where, "guest"))
        for _ in range(2):
            create(web)
            for caller in callers:
                caller.is_answered()
            virsh("destroy", "web")
            for caller in callers:
                caller.is_silent()
        assert natns("check").stdout == ""


@pytest.mark.parametrize("kind", ["host", "router"])
def test_a_network_that_starts_with_forwards(kind: str) -> None:
    """On a bridge, the address does not answer at all before the network starts."""
    with ExitStack() as stack:
        # Without a rule of anybody's that asks for them, the kernel tracks no flows.
        run("nft", "add table ip other; add chain ip other c { type nat hook input priority 0; }")
        stack.callback(run, "nft", "delete table ip other")
        where = stack.enter_context(place(kind, "nftables"))
        callers = stack.enter_context(calling(where))
        stack.enter_context(networks(network(where, PUBLISHED)))
        stack.enter_context(serving_guest("virbr10"))
        for caller in callers:
            caller.is_answered()


@pytest.mark.parametrize("kind", ["host", "bridge"])
def test_rules_that_were_flushed(kind: str) -> None:
    """A client that begins while the rules are away is answered after the repair."""
    with ExitStack() as stack:
        where = stack.enter_context(place(kind, "nftables"))
        stack.enter_context(networks(network(where, PUBLISHED)))
        stack.enter_context(serving_guest("virbr10"))
        run("nft", "delete table inet natns", check=False)
        run("nft", "flush ruleset", namespace="nat-a")
        callers = stack.enter_context(calling(where))
        for caller in callers:
            caller.is_silent()
        natns("sync")
        for caller in callers:
            caller.is_answered()


def test_ports_of_a_routers_host() -> None:
    with ExitStack() as stack:
        where = stack.enter_context(place("router", "nftables"))
        stack.callback(Server(None, "udp", PORT).close)
        caller = stack.enter_context(Caller(lab_vps.NAMESPACE, where.addresses[0], PORT))
        caller.is_silent()
        write_config(f'upstream = "wan"\n{lab_vps.CONFIG}host_ports = ["udp/{PORT}"]\n')
        natns("sync")
        caller.is_answered()


def test_ports_of_a_guests_own_address() -> None:
    """The address answers before: the guest lets in one port more."""
    own = "192.168.0.151"
    first, second = (f"<natns:allow proto='udp' start='{port}'/>" for port in (23, 22))
    address = f"<natns:address address='{own}'>{first}</natns:address>"
    with ExitStack() as stack:
        stack.enter_context(place("bridge", "nftables"))
        stack.enter_context(networks(dual("a", "virbr10", hosts=[Host(MAC, "10.0.0.5")])))
        stack.enter_context(serving_guest("virbr10"))
        stack.callback(destroy, "web")
        create(domain("web", nic("a", MAC), publishes=address))
        caller = stack.enter_context(Caller("client", own, 22))
        caller.is_silent()
        both = f"<nat>{address.replace(first, first + second)}</nat>".replace("natns:", "")
        virsh("metadata", "web", NAMESPACE, "--live", "--key", "natns", "--set", both)
        natns("sync")
        caller.is_answered()
