# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stations on the upstream that claim addresses of ours, at once or late, few or all.

A network that runs keeps its address and its connections.  A start moves at most once,
and the search for a free address ends.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address, ip_network

import pytest
from lab import (
    ECHO_PORT,
    FastGuest,
    Service,
    define_network,
    isolated,
    natns,
    remove_config,
    virsh,
    wait_for,
    write_config,
)
from lab_domains import create, destroy, domain, nic, ports
from lab_ipv6 import DualProvider, dual
from lab_liars import lying
from views import addresses, refusal, upstream_address

MAC = "52:54:00:00:00:05"
LATE = 0.02
"""Seconds: later than the 6 ms for which the service lets a start wait."""

WATCHED = 2.0
"""Seconds in which a network that could move would have moved many times."""

POOL6 = ip_network("2001:db8:77::100/120")


def claims_all(address: object) -> bool:
    """Every address of both pools."""
    found = ip_address(str(address))
    return found in POOL6 or found in ip_network("192.168.0.96/27")


@pytest.fixture
def dual_service(installed: None) -> Iterator[tuple[DualProvider, Service]]:
    """The service on a provider with both families, which probes for 0.1 s."""
    with DualProvider() as provider:
        write_config(provider.config6().replace("probe = 0.05", "probe = 0.1"))
        with Service() as resident:
            yield provider, resident
        remove_config()


def test_a_network_that_runs_keeps_its_address(dual_service: tuple[DualProvider, Service]) -> None:
    """Whatever neighbours claim: guests start and stop, and a stream goes on."""
    provider, service = dual_service
    define_network(dual("a", "virbr10"))
    virsh("net-start", "a")
    first, first6 = upstream_address("a"), addresses("upstream", "nat-a", "inet6")
    service.idle()
    liar = provider.neighbour("liar", "192.168.0.60/24")
    forward = ports("start='8080' to='7'")
    with FastGuest("virbr10", MAC) as guest, lying(liar, claims_all, LATE):
        guest.dhcp()
        with guest.connect("192.168.0.1", ECHO_PORT) as stream:
            create(domain("web", nic("a", MAC), publishes=forward))
            began = time.monotonic()
            while time.monotonic() - began < WATCHED:
                assert upstream_address("a") == first
                assert addresses("upstream", "nat-a", "inet6") == first6
                time.sleep(0.05)
            destroy("web")
            stream.sendall(b"still here\n")
            assert stream.recv(100)
    assert not service.logged("event=relocate"), service.log()
    virsh("net-destroy", "a")


def test_a_start_moves_once(dual_service: tuple[DualProvider, Service]) -> None:
    """With a station that claims all of both pools, late: one move, then the address stays."""
    provider, service = dual_service
    define_network(dual("a", "virbr10"))
    liar = provider.neighbour("liar", "192.168.0.60/24")

    def claims(address: object) -> bool:
        return address in first or claims_all(address)

    virsh("net-start", "a")
    first = {ip_address(upstream_address("a"))}
    virsh("net-destroy", "a")
    # Later than the whole probe: only the background's second probe hears the first answer.
    with lying(liar, claims, LATE):
        virsh("net-start", "a")
        wait_for(lambda: service.logged("event=relocate"), timeout=10)
        time.sleep(WATCHED)
        told = service.logged("event=relocate")
        # One for each family at most: moved, or said that no other address is free.
        assert len(told) <= 2, told
        assert len(service.logged("event=failed")) <= 4, service.log()
        stays = upstream_address("a")
        time.sleep(0.5)
        assert upstream_address("a") == stays
    assert natns("check", check=False).returncode == 0
    virsh("net-destroy", "a")


PATIENCE = 20.0
"""Seconds within which a hook refuses: libvirt's own patience is a multiple of it."""


def test_a_station_that_answers_for_every_address(installed: None) -> None:
    """Pools without an end, in both families: the start is refused in time, and says why."""
    wide = "2001:db8:77:0:1::-2001:db8:77:0:1:ffff:ffff:ffff"
    with DualProvider() as provider, ExitStack() as cleanup:
        cleanup.callback(remove_config)
        liar = provider.neighbour("liar", "192.168.0.60/24")
        define_network(isolated("a", "virbr10"))
        define_network(dual("b", "virbr11", ipv4=False))
        four = provider.config(pool="10.9.0.1-10.9.255.254").replace(
            "192.168.0.0/24", "10.9.0.0/16"
        )
        # A batch has 128 addresses, and the station answers in Python.
        six = provider.config6(ipv4=False, pool6=wide).replace("probe = 0.05", "probe = 0.5")
        assert "probe = 0.5" in six
        heard = cleanup.enter_context(lying(liar, lambda _: True))
        for network, config in (("a", four.replace('gateway = "192.168.0.1"', "")), ("b", six)):
            write_config(config)
            heard.answered.clear()
            began = time.monotonic()
            told = refusal(network)
            assert time.monotonic() - began < PATIENCE
            assert "answered the probes for all" in told, told
            assert "br0" in told
            # Some hundreds, and none from the start again.
            assert len(set(heard.answered)) < 1500


def test_the_service_ends_the_search_as_well(dual_service: tuple[DualProvider, Service]) -> None:
    """Its first look is short, so the start may go on: the background's search is bounded."""
    provider, service = dual_service
    wide = "2001:db8:77:0:1::-2001:db8:77:0:1:ffff:ffff:ffff"
    write_config(provider.config6(ipv4=False, pool6=wide))
    liar = provider.neighbour("liar", "192.168.0.60/24")
    define_network(dual("b", "virbr11", ipv4=False))
    with lying(liar, lambda _: True) as heard:
        began = time.monotonic()
        virsh("net-start", "b", check=False)

        def ended() -> bool:
            """No free address was found, or a free one that turned out to be claimed late."""
            told = service.logged("answered the probes for all")
            return bool(told or service.logged("event=conflict", "network=b"))

        wait_for(ended, timeout=PATIENCE)
        assert time.monotonic() - began < PATIENCE
        service.idle()
        assert len(heard.answered) < 4000
