# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a lease to a network's upstream and plan: no server, no kernel."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

import pytest

from libvirt_natns import names
from libvirt_natns.addresses import is_placeholder
from libvirt_natns.daemons.dhcp_lease import DhcpLease
from libvirt_natns.engine.facts import services
from libvirt_natns.engine.plan.network_plan import ahead_of_lease, make
from libvirt_natns.engine.plan.surroundings import Surroundings
from libvirt_natns.errors import LeaseError
from libvirt_natns.firewall import iptables, nftables
from libvirt_natns.firewall.namespace_policy import Policy
from libvirt_natns.firewall.namespace_rules import ruleset
from libvirt_natns.kernel.boot_clock import boot_id
from libvirt_natns.model.metadata import NatMetadata
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import BridgeSegment, DhcpSegment, LeasedSegment, Segment
from libvirt_natns.model.subnet import StaticRoute, Subnet
from libvirt_natns.model.upstream import DhcpUpstream, Outside
from libvirt_natns.operations.addressing import Gateways
from libvirt_natns.operations.daemon_operations import Leasing
from libvirt_natns.operations.operation import Operation, describe_plan
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import dhcp

OFFICE = DhcpUpstream(name="office", bridge="br0", probe=0.0)
UNLEASED = DhcpSegment.of(OFFICE)
NETWORK = Network(
    "6f2b9c1e-0000-4000-8000-0000000000d1",
    "a",
    "virbr10",
    subnets=(Subnet(IPv4Interface("10.0.0.1/24")),),
)
LEASE = DhcpLease(
    IPv4Interface("192.168.0.50/24"),
    server=IPv4Address("192.168.0.1"),
    gateway=IPv4Address("192.168.0.1"),
    dns=(IPv4Address("192.168.0.1"),),
    mtu=1400,
    routes=(StaticRoute(IPv4Network("172.30.0.0/16"), IPv4Address("192.168.0.7")),),
)
AROUND = Surroundings(1500, 1500, "nftables", None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def operations(upstream: Segment, address: IPv4Address, kind: type) -> list[Operation]:
    made = make(NETWORK, upstream, Outside(address), AROUND)
    return [operation for operation in made if isinstance(operation, kind)]


# -- the upstream --------------------------------------------------------------


def test_a_lease_completes_the_upstream() -> None:
    assert not UNLEASED.known
    found = dhcp.completed(OFFICE, LEASE)
    assert found.known
    assert found.leased == IPv4Address("192.168.0.50")
    assert found.subnet == IPv4Network("192.168.0.0/24")
    assert (found.gateway, found.dns, found.mtu) == (LEASE.gateway, LEASE.dns, 1400)


def test_what_is_configured_goes_first() -> None:
    gateway, dns = IPv4Address("192.168.0.254"), (IPv4Address("9.9.9.9"),)
    found = dhcp.completed(replace(OFFICE, gateway=gateway, dns=dns), LEASE)
    assert (found.gateway, found.dns) == (gateway, dns)


@pytest.mark.parametrize(
    ("network", "upstream", "said"),
    [
        (NETWORK, OFFICE, None),
        (
            replace(NETWORK, subnets=(Subnet(IPv4Interface("192.168.0.1/24")),)),
            OFFICE,
            "overlaps 192.168.0.0/24",
        ),
        (NETWORK, replace(OFFICE, subnet=IPv4Network("10.9.0.0/16")), "not in 10.9.0.0/16"),
    ],
)
def test_leases_that_cannot_be_used(
    network: Network, upstream: DhcpUpstream, said: str | None
) -> None:
    found = dhcp.problem(network, upstream, LEASE)
    assert said in str(found) if said else found is None


# -- the plan ------------------------------------------------------------------


def test_plan_with_a_lease() -> None:
    found = dhcp.completed(OFFICE, LEASE)
    address = IPv4Address("192.168.0.50")
    (gateways,) = operations(found, address, Gateways)
    assert gateways.describe().splitlines() == [
        "route default via 192.168.0.1 on upstream in nat-a",
        "route 172.30.0.0/16 via 192.168.0.7 on upstream in nat-a",
    ]
    told = describe_plan(make(NETWORK, found, Outside(address), AROUND))
    assert "to upstream in nat-a, MTU 1500 (1400 there)\n" in told
    assert "address 192.168.0.50/24 on upstream in nat-a\n" in told
    assert "announce 192.168.0.50 " in told


def test_plan_without_a_lease() -> None:
    told = describe_plan(make(NETWORK, UNLEASED, Outside(), AROUND))
    assert "address none on upstream in nat-a\n" in told
    assert "no route through upstream in nat-a\n" in told
    assert "announce 0" not in told


def test_a_lease_for_the_upstream_patch_alone() -> None:
    client = dhcp.client(NETWORK, UNLEASED)
    told = describe_plan(ahead_of_lease(NETWORK, UNLEASED, 1500, Leasing(client)))
    assert "virbr10" not in told
    assert told.endswith("link upstream up in nat-a\nDHCP client on upstream in nat-a\n")


@pytest.mark.parametrize("backend", [nftables, iptables])
def test_a_server_that_says_no_is_heard(backend: object) -> None:
    inner, gateway = (IPv4Network("10.0.0.0/24"),), (IPv4Address("10.0.0.1"),)
    policy = Policy("virbr10", "upstream", inner, gateway, IPv4Address("192.168.0.50"))
    without = str(backend.render(ruleset(policy)))  # type: ignore[attr-defined]
    found = str(backend.render(ruleset(replace(policy, by_dhcp=True))))  # type: ignore[attr-defined]
    assert "255.255.255.255" not in without
    assert found.count("255.255.255.255") == 2


# -- the address ---------------------------------------------------------------


def record(uuid: str, name: str) -> NetworkRecord:
    return NetworkRecord(uuid, name, f"nat-{name}", f"br-{name}", "office", "bridge",
                  (), True, "up", boot_id(), 0.0, b"")  # fmt: skip


def test_stand_ins_are_nobodys_address_and_unique(store: Store) -> None:
    store.networks.put(record(NETWORK.uuid, "a"))
    first = dhcp.settle(store, NETWORK, UNLEASED)
    assert is_placeholder(first)
    assert first in IPv4Network("0.0.0.0/8")
    assert dhcp.settle(store, NETWORK, UNLEASED) == first
    # Another network whose likeliest one is taken.
    other = replace(NETWORK, uuid="other", name="b")
    store.networks.put(record("other", "b"))
    store.leases.reserve("office", "br0", NETWORK.uuid, next(dhcp.stand_ins("other")))
    assert dhcp.settle(store, other, UNLEASED) != store.leases.of("office", NETWORK.uuid).address


def test_a_leased_address_is_recorded(store: Store) -> None:
    store.networks.put(record(NETWORK.uuid, "a"))
    known = dhcp.completed(OFFICE, LEASE)
    assert dhcp.settle(store, NETWORK, known) == LEASE.address.ip
    assert store.leases.of("office", NETWORK.uuid).address == LEASE.address.ip
    lost = dhcp.settle(store, NETWORK, UNLEASED)
    assert is_placeholder(lost)


def test_an_address_that_another_network_has_is_not_used(store: Store) -> None:
    store.networks.put(record("other", "b"))
    assert store.leases.reserve("office", "br0", "other", LEASE.address.ip)
    known = dhcp.completed(OFFICE, LEASE)
    with pytest.raises(LeaseError, match=r"gives 192\.168\.0\.50, which network b has"):
        dhcp.settle_first(store, NETWORK, known)
    assert is_placeholder(dhcp.settle(store, NETWORK, known))


def test_a_client_asks_for_what_it_had(store: Store) -> None:
    def requested(network: Network = NETWORK) -> IPv4Address | None:
        return dhcp.requested(store, network, UNLEASED)

    assert requested() is None
    store.networks.put(record(NETWORK.uuid, "a"))
    dhcp.settle(store, NETWORK, UNLEASED)
    assert requested() is None, "a placeholder address is asked for"
    dhcp.settle(store, NETWORK, dhcp.completed(OFFICE, LEASE))
    assert requested() == LEASE.address.ip
    wanted = IPv4Address("192.168.0.77")
    assert requested(replace(NETWORK, nat=NatMetadata(address=wanted))) == wanted
    assert services.leasing(store, NETWORK, BridgeSegment.of(OFFICE)) is None
    client = dhcp.client(NETWORK, UNLEASED)
    assert client.client_id == names.client_id(NETWORK.uuid)


def test_what_check_says(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path)
    mine = record(NETWORK.uuid, "a")
    store.networks.put(mine)

    def said(network: Network = NETWORK) -> list[str]:
        upstream = dhcp.complete(network, OFFICE)
        return dhcp.differences(store, mine, network, upstream)

    assert said() == ["no DHCP server on bridge br0 has leased an address yet"]
    directory = names.dhcp_directory(NETWORK.uuid)
    directory.mkdir(parents=True)
    (directory / "lease").write_text("ip=192.168.0.50\nmask=24\n")
    assert said() == ["the leased address 192.168.0.50 is not in force"]
    dhcp.settle(store, NETWORK, dhcp.complete(NETWORK, OFFICE))
    assert said() == []
    (told,) = said(replace(NETWORK, nat=NatMetadata(address=IPv4Address("192.168.0.9"))))
    assert "gives 192.168.0.50 instead of the wanted address 192.168.0.9" in told
    (told,) = said(replace(NETWORK, subnets=(Subnet(IPv4Interface("192.168.0.1/16")),)))
    assert "its subnet 192.168.0.0/16 overlaps 192.168.0.0/24 of upstream office" in told
    # Given to somebody else of ours meanwhile.
    store.networks.put(record("other", "b"))
    dhcp.settle(store, NETWORK, UNLEASED)
    assert store.leases.reserve("office", "br0", "other", LEASE.address.ip)
    (told,) = said()
    assert "gives 192.168.0.50, which network b has" in told


# -- hostile renewals ----------------------------------------------------------


def leased_in(segment: DhcpSegment) -> IPv4Address | None:
    return segment.leased if isinstance(segment, LeasedSegment) else None


def leased(directory: Path, *lines: str, until: int | None = None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "lease").write_text("".join(f"{line}\n" for line in lines))
    seconds = 0 if until is None else until
    (directory / "times").write_text(f"1 0 {seconds}\n")


@pytest.mark.parametrize(
    "renewed",
    [
        ("ip=192.168.0.50", "mask=0"),
        ("ip=192.168.0.50", "mask=32", "router=10.0.0.1", "routes=x"),
        ("ip=127.0.0.1", "mask=8"),
        ("ip=192.168.0.255", "mask=24"),
        ("ip=10.0.0.1", "mask=24"),
    ],
)
def test_a_network_keeps_what_it_has(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renewed: tuple[str, ...]
) -> None:
    """Whatever a renewal brings: the address stays, and the log hears of it once."""
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path)
    store.networks.put(record(NETWORK.uuid, "a"))
    directory = names.dhcp_directory(NETWORK.uuid)
    good = ("ip=192.168.0.50", "mask=24", "router=192.168.0.1")
    leased(directory, *good, until=1 << 30)
    first = dhcp.complete(NETWORK, OFFICE)
    assert dhcp.settle(store, NETWORK, first) == IPv4Address("192.168.0.50")
    assert dhcp.news(NETWORK, UNLEASED) == []

    leased(directory, *renewed, until=1 << 30)
    found = dhcp.complete(NETWORK, OFFICE)
    assert leased_in(found) == IPv4Address("192.168.0.50")
    assert dhcp.settle(store, NETWORK, found) == IPv4Address("192.168.0.50")
    if "mask=32" not in renewed:
        assert found == first
        (told,) = dhcp.news(NETWORK, UNLEASED)
        assert "is not used" in told or "overlaps" in told
        assert dhcp.news(NETWORK, UNLEASED) == []
    # And makes sense again.
    leased(directory, *good, until=1 << 30)
    assert dhcp.complete(NETWORK, OFFICE) == first


def test_a_lost_lease_is_lost(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease of use that is over serves no more, nor where the client has none at all."""
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path)
    store.networks.put(record(NETWORK.uuid, "a"))
    directory = names.dhcp_directory(NETWORK.uuid)
    leased(directory, "ip=192.168.0.50", "mask=24", until=1)
    dhcp.settle(store, NETWORK, dhcp.complete(NETWORK, OFFICE))
    leased(directory, "ip=10.0.0.1", "mask=24", until=1 << 30)
    assert leased_in(dhcp.complete(NETWORK, OFFICE)) is None
    (directory / "lease").unlink()
    assert leased_in(dhcp.complete(NETWORK, OFFICE)) is None


def test_the_end_of_a_refused_lease_is_no_loss(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client gives up what could not be used, and asks anew: the address stays."""
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path)
    store.networks.put(record(NETWORK.uuid, "a"))
    directory = names.dhcp_directory(NETWORK.uuid)

    def follow() -> IPv4Address | None:
        upstream = dhcp.complete(NETWORK, OFFICE)
        dhcp.settle(store, NETWORK, upstream)
        return leased_in(upstream)

    leased(directory, "ip=192.168.0.50", "mask=24", until=1 << 30)
    assert follow() == LEASE.address.ip
    leased(directory, "ip=127.0.0.1", "mask=8", until=1 << 30)
    assert follow() == LEASE.address.ip
    (directory / "lease").unlink()
    assert follow() == LEASE.address.ip
    leased(directory, "ip=10.0.0.1", "mask=24", until=1 << 30)
    assert follow() == LEASE.address.ip
    leased(directory, "ip=192.168.0.60", "mask=24", until=1 << 30)
    assert follow() == IPv4Address("192.168.0.60")
    # A lease that was of use, and is lost, does not come back by a refused one.
    (directory / "lease").unlink()
    assert follow() is None
    leased(directory, "ip=10.0.0.1", "mask=24", until=1 << 30)
    assert follow() is None
