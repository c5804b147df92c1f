# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which values of a DHCP lease are used: by sense, whatever a server sends."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import pytest

from libvirt_natns.daemons import lease_check
from libvirt_natns.daemons.dhcp_lease import DhcpLease, parse
from libvirt_natns.daemons.lease_check import MOST_ROUTES, MOST_SERVERS, Checked
from libvirt_natns.model.subnet import StaticRoute

PRIVATE = (IPv4Network("10.0.0.0/24"), IPv4Network("172.20.0.0/16"))
LEASE = DhcpLease(IPv4Interface("192.168.0.50/24"), gateway=IPv4Address("192.168.0.1"))
NEIGHBOUR = IPv4Address("192.168.0.7")


def bounded(lease: DhcpLease) -> Checked:
    return lease_check.bounded(lease, PRIVATE)


def with_routes(*routes: tuple[str, str]) -> DhcpLease:
    return replace(
        LEASE,
        routes=tuple(StaticRoute(IPv4Network(to), IPv4Address(by)) for to, by in routes),
    )


# -- as a whole ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1/8", "is not a host address"),
        ("169.254.1.1/16", "is not a host address"),
        ("224.0.0.5/24", "is not a host address"),
        ("255.255.255.255/32", "is not a host address"),
        ("0.0.0.5/24", "is not a host address"),
        ("192.168.0.0/24", "is the network or broadcast address of its subnet"),
        ("192.168.0.255/24", "is the network or broadcast address of its subnet"),
        ("192.168.0.50/0", "wider than /8"),
        ("192.168.0.50/7", "wider than /8"),
        ("10.0.0.9/24", "overlaps the private subnet 10.0.0.0/24"),
        ("10.3.0.9/8", "overlaps the private subnet 10.0.0.0/24"),
        ("10.0.0.128/32", "overlaps the private subnet 10.0.0.0/24"),
    ],
)
def test_leases_that_are_refused(address: str, why: str) -> None:
    told = lease_check.refused(replace(LEASE, address=IPv4Interface(address)), PRIVATE)
    assert told is not None
    assert why in told


@pytest.mark.parametrize(
    "address", ["192.168.0.50/24", "192.0.2.0/31", "192.0.2.1/31", "192.0.2.1/32", "11.0.0.1/8"]
)
def test_leases_that_are_used(address: str) -> None:
    assert lease_check.refused(replace(LEASE, address=IPv4Interface(address)), PRIVATE) is None


@pytest.mark.parametrize("mask", ["0.0.0.255", "255.0.255.0", "255.255.255.1", "33", "-1"])
def test_a_mask_that_is_none(mask: str) -> None:
    assert parse(f"ip=192.168.0.50\nmask={mask}\n") is None


@pytest.mark.parametrize(("mask", "prefix"), [("255.255.255.0", 24), ("0.0.0.0", 0), ("24", 24)])
def test_masks(mask: str, prefix: int) -> None:
    found = parse(f"ip=192.168.0.50\nmask={mask}\n")
    assert found is not None
    assert found.address.network.prefixlen == prefix


# -- the gateway ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("gateway", "why"),
    [
        ("192.168.0.50", "is the leased address itself"),
        ("192.168.0.0", "is the network or broadcast address of its subnet"),
        ("192.168.0.255", "is the network or broadcast address of its subnet"),
        ("127.0.0.1", "is not a host address"),
        ("224.0.0.1", "is not a host address"),
        ("10.0.0.1", "is in a private subnet"),
        ("192.168.1.1", "is not in 192.168.0.0/24"),
    ],
)
def test_gateways_that_are_left_out(gateway: str, why: str) -> None:
    found = bounded(replace(LEASE, gateway=IPv4Address(gateway)))
    assert found.lease.gateway is None
    assert found.cuts == (f"gateway {gateway}: {why}",)


def test_gateways_outside_of_the_subnet() -> None:
    """A single address has one anywhere; elsewhere a route says that it is on the link."""
    alone = DhcpLease(IPv4Interface("203.0.113.5/32"), gateway=IPv4Address("172.31.1.1"))
    assert bounded(alone) == Checked(alone)
    linked = replace(
        LEASE, gateway=IPv4Address("192.168.9.1"), on_link=(IPv4Network("192.168.9.1/32"),)
    )
    assert bounded(linked) == Checked(linked)


# -- routes --------------------------------------------------------------------


@pytest.mark.parametrize(
    "destination",
    [
        "10.0.0.0/24",
        "10.0.0.128/25",
        "10.0.0.1/32",
        "172.20.5.0/24",
        "127.0.0.0/8",
        "169.254.169.254/32",
        "224.0.0.0/4",
        "255.255.255.255/32",
        "192.168.0.0/24",
        "192.168.0.1/32",
        "0.0.0.0/8",
    ],
)
def test_routes_that_are_left_out(destination: str) -> None:
    found = bounded(with_routes((destination, str(NEIGHBOUR)), ("172.30.0.0/16", str(NEIGHBOUR))))
    assert [str(each.destination) for each in found.lease.routes] == ["172.30.0.0/16"]
    (cut,) = found.cuts
    assert cut.startswith(f"route {destination} via {NEIGHBOUR}: leads into")


@pytest.mark.parametrize("gateway", ["192.168.0.50", "10.0.0.1", "127.0.0.1", "192.168.9.9"])
def test_routes_by_gateways_that_are_none(gateway: str) -> None:
    found = bounded(with_routes(("172.30.0.0/16", gateway)))
    assert found.lease.routes == ()
    assert len(found.cuts) == 1


def test_wider_routes_are_harmless() -> None:
    """Companies route all of 10/8; the kernel prefers the longer prefix of the private subnet."""
    wide = with_routes(
        ("10.0.0.0/8", str(NEIGHBOUR)),
        ("0.0.0.0/1", str(NEIGHBOUR)),
        ("128.0.0.0/1", str(NEIGHBOUR)),
        ("192.168.0.0/16", str(NEIGHBOUR)),
    )
    assert bounded(wide) == Checked(wide)


def test_a_thousand_routes() -> None:
    many = [(f"20.{n // 250}.{n % 250}.0/24", str(NEIGHBOUR)) for n in range(1000)]
    found = bounded(with_routes(*many, many[0]))
    assert len(found.lease.routes) == MOST_ROUTES
    assert len(found.cuts) == lease_check.MOST_SAID + 1
    (line,) = lease_check.said(found.cuts)
    assert line.endswith(f"{1001 - MOST_ROUTES - lease_check.MOST_SAID} more")
    assert len(line) < 500


def test_one_route_a_destination() -> None:
    found = bounded(with_routes(("20.0.0.0/8", "192.168.0.7"), ("20.0.0.0/8", "192.168.0.8")))
    assert [each.gateway for each in found.lease.routes] == [NEIGHBOUR]


# -- resolvers -----------------------------------------------------------------


def test_a_hundred_resolvers() -> None:
    servers = tuple(IPv4Address(f"9.9.9.{n}") for n in range(100))
    found = bounded(replace(LEASE, dns=servers + servers))
    assert found.lease.dns == servers[:MOST_SERVERS]


def test_resolvers_that_are_none() -> None:
    own, cloud = LEASE.address.ip, IPv4Address("169.254.169.254")
    odd = (own, IPv4Address("127.0.0.53"), IPv4Address("255.255.255.255"), cloud)
    assert bounded(replace(LEASE, dns=odd)).lease.dns == (cloud,)


def test_nothing_is_said_of_a_lease_that_is_well() -> None:
    found = bounded(LEASE)
    assert found == Checked(LEASE)
    assert not list(lease_check.said(found.cuts))
