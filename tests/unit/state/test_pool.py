# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which address a network gets; the segment is a set of addresses that answer."""

import multiprocessing
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Network
from pathlib import Path

import pytest

from libvirt_natns.addresses import Address, AddressRange, Family, parsed
from libvirt_natns.errors import LeaseError
from libvirt_natns.kernel.boot_clock import boot_id, now
from libvirt_natns.model.metadata import NatMetadata
from libvirt_natns.model.network import Network
from libvirt_natns.model.publication import StaticNat
from libvirt_natns.model.segment import BridgeSegment
from libvirt_natns.model.subnet import Subnet
from libvirt_natns.model.upstream import BridgeUpstream
from libvirt_natns.state import pool
from libvirt_natns.state.applicants import Applicant, applicant
from libvirt_natns.state.claim_scope import ClaimScope
from libvirt_natns.state.claims import Claims
from libvirt_natns.state.networks import NetworkRecord, NetworkState
from libvirt_natns.state.store import Store

HOST = IPv4Address("192.168.0.2")
PROCESSES = 16


def span(first: str, last: str) -> AddressRange:
    return AddressRange(IPv4Address(first), IPv4Address(last))


PROVIDER = BridgeSegment.of(
    BridgeUpstream(
        name="provider",
        bridge="br0",
        subnet=IPv4Network("192.168.0.0/24"),
        gateway=IPv4Address("192.168.0.1"),
        pool=(span("192.168.0.100", "192.168.0.102"),),
    )
)


@dataclass
class Segment:
    """Stations that answer ARP, and how often they were asked."""

    taken: set[str] = field(default_factory=set)
    asked: list[list[str]] = field(default_factory=list)

    def probe(self, addresses: Collection[Address]) -> set[Address]:
        self.asked.append([str(address) for address in addresses])
        return {address for address in addresses if str(address) in self.taken}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def segment() -> Segment:
    return Segment()


def network(name: str, wanted: str | None = None) -> Network:
    return Network(
        uuid=f"uuid-{name}",
        name=name,
        bridge=f"virbr-{name}",
        subnets=(Subnet(IPv4Interface("10.0.0.1/24")),),
        nat=NatMetadata(address=IPv4Address(wanted)) if wanted else None,
    )


def note(store: Store, name: str, state: NetworkState, upstream: BridgeSegment = PROVIDER) -> None:
    store.networks.put(
        NetworkRecord(
            uuid=f"uuid-{name}",
            name=name,
            namespace=f"nat-{name}",
            bridge=f"virbr-{name}",
            upstream=upstream.name,
            kind=upstream.kind,
            subnets=(IPv4Network("10.0.0.0/24"),),
            taken_over=True,
            state=state,
            boot=boot_id(),
            since=now(),
            document=b"",
        )
    )


def start(
    store: Store,
    segment: Segment,
    name: str,
    wanted: str | None = None,
    upstream: BridgeSegment = PROVIDER,
) -> str:
    """What the engine does with the pool when a network starts."""
    note(store, name, "preparing", upstream)
    found = pool.reserve(store, applicant(network(name, wanted)), upstream, segment.probe, {HOST})
    store.networks.set_state(f"uuid-{name}", "up")
    return str(found)


def stop(store: Store, *names: str) -> None:
    for name in names:
        store.networks.set_state(f"uuid-{name}", "down")


# -- kept and new --------------------------------------------------------------


def test_addresses_in_the_pools_order(store: Store, segment: Segment) -> None:
    assert [start(store, segment, name) for name in "abc"] == [
        "192.168.0.100",
        "192.168.0.101",
        "192.168.0.102",
    ]
    assert segment.asked == [["192.168.0.100"], ["192.168.0.101"], ["192.168.0.102"]]


def test_an_address_is_kept(store: Store, segment: Segment) -> None:
    assert start(store, segment, "a") == "192.168.0.100"
    start(store, segment, "b")
    stop(store, "a", "b")
    assert start(store, segment, "b") == "192.168.0.101"
    assert start(store, segment, "c") == "192.168.0.102", "not that of a, which rests"
    assert start(store, segment, "a") == "192.168.0.100"


@pytest.mark.parametrize(
    "changed",
    [
        replace(PROVIDER, pool=(span("192.168.0.101", "192.168.0.102"),)),
        replace(PROVIDER, gateway=IPv4Address("192.168.0.100")),
        replace(PROVIDER, dns=(IPv4Address("192.168.0.100"),)),
    ],
)
def test_kept_address_that_the_configuration_rules_out(
    store: Store, segment: Segment, changed: BridgeSegment
) -> None:
    assert start(store, segment, "a") == "192.168.0.100"
    stop(store, "a")
    assert start(store, segment, "a", upstream=changed) == "192.168.0.101"


def test_kept_address_that_another_machine_took(store: Store, segment: Segment) -> None:
    assert start(store, segment, "a") == "192.168.0.100"
    stop(store, "a")
    segment.taken = {"192.168.0.100"}
    assert start(store, segment, "a") == "192.168.0.101"


def test_reserved_addresses_are_never_handed_out(store: Store, segment: Segment) -> None:
    whole = replace(
        PROVIDER,
        subnet=IPv4Network("192.168.0.0/29"),
        pool=(span("192.168.0.0", "192.168.0.7"),),
        dns=(IPv4Address("192.168.0.3"),),
    )
    found = [start(store, segment, name, upstream=whole) for name in "abc"]
    assert found == ["192.168.0.4", "192.168.0.5", "192.168.0.6"]
    with pytest.raises(LeaseError, match="is free"):
        start(store, segment, "d", upstream=whole)


# -- full pools ----------------------------------------------------------------


def test_full_pool_is_one_line(store: Store, segment: Segment) -> None:
    segment.taken = {"192.168.0.101"}
    for name in "ab":
        start(store, segment, name)
    with pytest.raises(LeaseError) as caught:
        start(store, segment, "c")
    assert str(caught.value) == (
        "network c: no address of upstream provider is free, all are in use,"
        " 1 of them by other machines: enlarge its pool"
        " (192.168.0.100-192.168.0.102) or stop a network"
    )


def test_longest_unused_lease_is_reclaimed(store: Store, segment: Segment) -> None:
    for name in "abc":
        start(store, segment, name)
    stop(store, "b", "a")
    assert start(store, segment, "d") == "192.168.0.101"
    assert start(store, segment, "e") == "192.168.0.100"
    with pytest.raises(LeaseError, match="no address"):
        start(store, segment, "f")
    stop(store, "c")
    assert start(store, segment, "b") == "192.168.0.102"


def test_nothing_is_reclaimed_while_others_are_free(store: Store, segment: Segment) -> None:
    for name in "ab":
        start(store, segment, name)
    stop(store, "a", "b")
    assert start(store, segment, "c") == "192.168.0.102"
    assert start(store, segment, "a") == "192.168.0.100"


def test_reclaimed_addresses_are_probed_for(store: Store, segment: Segment) -> None:
    for name in "abc":
        start(store, segment, name)
    stop(store, "a", "b")
    segment.taken = {"192.168.0.100"}
    assert start(store, segment, "d") == "192.168.0.101"


# -- large pools ---------------------------------------------------------------


def test_a_huge_pool_is_not_counted_out(store: Store, segment: Segment) -> None:
    huge = replace(
        PROVIDER,
        subnet=IPv4Network("10.0.0.0/8"),
        gateway=IPv4Address("10.0.0.1"),
        pool=(span("10.0.0.0", "10.255.255.255"),),
    )
    assert start(store, segment, "a", upstream=huge) == "10.0.0.2"
    assert str(pool.next_address(store, applicant(network("b")), huge, ())) == "10.0.0.3"


def test_many_squatters_are_asked_for_in_few_probes(store: Store, segment: Segment) -> None:
    wide = replace(
        PROVIDER,
        subnet=IPv4Network("192.168.0.0/16"),
        pool=(span("192.168.4.0", "192.168.255.254"),),
    )
    first = int(IPv4Address("192.168.4.0"))
    segment.taken = {str(IPv4Address(first + number)) for number in range(1000)}
    assert start(store, segment, "a", upstream=wide) == "192.168.7.232"
    assert len(segment.asked) < 12
    assert max(map(len, segment.asked)) <= pool.BATCH


def test_several_ranges(store: Store, segment: Segment) -> None:
    parts = replace(PROVIDER, pool=(span("192.168.0.9", "192.168.0.9"), *PROVIDER.pool))
    assert start(store, segment, "a", upstream=parts) == "192.168.0.9"
    assert start(store, segment, "b", upstream=parts) == "192.168.0.100"


# -- wanted --------------------------------------------------------------------


def test_wanted_address_replaces_the_kept_one(store: Store, segment: Segment) -> None:
    assert start(store, segment, "a") == "192.168.0.100"
    stop(store, "a")
    assert start(store, segment, "a", "192.168.0.150") == "192.168.0.150"
    assert start(store, segment, "b") == "192.168.0.100", "the earlier one is free again"
    stop(store, "a")
    assert start(store, segment, "a") == "192.168.0.101", "outside the pool only where wanted"


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ("10.1.1.1", "is not in its subnet"),
        ("192.168.0.1", "is its gateway"),
        (str(HOST), "is an address of the host: choose another"),
        ("192.168.0.100", "is leased to network holder: choose another, or stop that network"),
        ("192.168.0.77", "is in use by another machine: choose another address, or free it"),
    ],
)
def test_wanted_address_is_refused(
    store: Store, segment: Segment, wanted: str, problem: str
) -> None:
    segment.taken = {"192.168.0.77"}
    start(store, segment, "holder")
    with pytest.raises(LeaseError, match=f"network a: the wanted address {wanted}.*{problem}"):
        start(store, segment, "a", wanted)
    assert store.leases.of("provider", "uuid-a").address is None


def test_wanted_address_of_a_network_at_rest(store: Store, segment: Segment) -> None:
    start(store, segment, "a")
    stop(store, "a")
    assert start(store, segment, "b", "192.168.0.100") == "192.168.0.100"
    assert start(store, segment, "a") == "192.168.0.101"


def test_wanted_address_from_another_upstreams_pool(store: Store, segment: Segment) -> None:
    """Two upstreams on one bridge: the address is the segment's, not the pool's."""
    other = replace(
        PROVIDER,
        upstream=replace(PROVIDER.upstream, name="other"),
        pool=(span("192.168.0.150", "192.168.0.151"),),
    )
    assert start(store, segment, "a", "192.168.0.150") == "192.168.0.150"
    assert start(store, segment, "b", upstream=other) == "192.168.0.151"
    with pytest.raises(LeaseError, match="is leased to network a"):
        start(store, segment, "c", "192.168.0.150", upstream=other)


def test_preview_leases_nothing(store: Store) -> None:
    assert str(pool.next_address(store, applicant(network("a")), PROVIDER, ())) == "192.168.0.100"
    wanted = network("a", "192.168.0.150")
    assert str(pool.next_address(store, applicant(wanted), PROVIDER, ())) == "192.168.0.150"
    assert store.leases.in_segment("br0") == set()


# -- many processes ------------------------------------------------------------


def _start_in_a_process(job: tuple[Path, int, BridgeSegment]) -> str:
    directory, number, upstream = job
    store = Store(directory)
    try:
        return start(store, Segment(), f"n{number}", upstream=upstream)
    except LeaseError:
        return "full"
    finally:
        store.close()


@pytest.mark.parametrize(("size", "refused"), [(40, 0), (30, 10)])
def test_no_address_is_handed_out_twice(tmp_path: Path, size: int, refused: int) -> None:
    first = IPv4Address("192.168.0.100")
    upstream = replace(PROVIDER, pool=(AddressRange(first, first + size - 1),))
    with multiprocessing.get_context("fork").Pool(PROCESSES) as workers:
        jobs = [(tmp_path, number, upstream) for number in range(40)]
        found = workers.map(_start_in_a_process, jobs, chunksize=1)
    assert found.count("full") == refused
    assert len(set(found) - {"full"}) == size


def test_a_guest_is_called_a_guest(store: Store) -> None:
    guest = Applicant("guest/mac", "guest web", PROVIDER.gateway, "natns:address")
    with pytest.raises(
        LeaseError, match=r"^guest web: the wanted address .* is its gateway"
    ) as told:
        pool.reserve(store, guest, PROVIDER, lambda _: set())
    assert "<natns:address address='...'/>" in told.value.remedy


def test_wanted_address_that_a_guest_has(store: Store, segment: Segment) -> None:
    """Its namespace answers for it, yet it is no other machine's."""
    own = IPv4Address("192.168.0.150")
    assert store.leases.reserve("provider", "br0", "web/m1", own)
    static = StaticNat("web", "guest web", "n", own, IPv4Address("10.0.0.5"))
    scopes = {"n": ClaimScope("provider", False)}
    store.claims.put(Claims("web", (), (static,)), scopes, published=True)
    segment.taken = {str(own)}
    for who in (applicant(network("a", str(own))), Applicant("mail/m2", "guest mail", own)):
        with pytest.raises(LeaseError, match=f"{own} of upstream provider belongs to guest web: "):
            pool.reserve(store, who, PROVIDER, segment.probe)
    assert segment.asked == []


@pytest.mark.parametrize(
    "first, last",
    [("10.0.0.0", "10.255.255.255"), ("2001:db8::1:0:0:0", "2001:db8::1:ffff:ffff:ffff")],
)
def test_a_station_that_answers_for_every_address_ends_the_search(
    store: Store, first: str, last: str
) -> None:
    """However large the pool is: a few hundred questions, and no address twice."""
    family: Family = 6 if ":" in first else 4
    huge = AddressRange(parsed(first), parsed(last))
    many = (
        replace(PROVIDER, pool6=(huge,), subnet6=IPv6Network("2001:db8::/64"))
        if family == 6
        else replace(PROVIDER, subnet=IPv4Network("10.0.0.0/8"), pool=(huge,), gateway=None)
    )
    note(store, "a", "preparing", many)
    asked: list[Address] = []

    def liar(addresses: Collection[Address]) -> set[Address]:
        asked.extend(addresses)
        return set(addresses)

    began = time.monotonic()
    with pytest.raises(LeaseError, match="a station on bridge br0 answered the probes for all"):
        pool.reserve(store, applicant(network("a"), family), many, liar, {HOST})
    assert time.monotonic() - began < 1
    assert len(asked) == len(set(asked)) < 1500
    assert store.leases.of("provider", "uuid-a").of(family) is None


def test_a_search_ends_in_time(
    store: Store, segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A station that is slow to claim addresses costs a hook no more than the limit."""
    monkeypatch.setattr(pool, "SEARCH_LIMIT", 0.0)
    large = replace(PROVIDER, pool=(span("192.168.0.100", "192.168.0.199"),))
    segment.taken = {f"192.168.0.{last}" for last in range(100, 200)}
    with pytest.raises(LeaseError, match="all 1 addresses of upstream provider"):
        start(store, segment, "a", upstream=large)
    assert len(segment.asked) == 1
