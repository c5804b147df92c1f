# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tables of guests in the state database: a port has one claim, and reservations are for good."""

import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from libvirt_natns.addresses import Address
from libvirt_natns.errors import ConflictError
from libvirt_natns.kernel import boot_clock
from libvirt_natns.model.publication import Forward, PortSet, StaticNat
from libvirt_natns.state.chosen_ports import PortKey
from libvirt_natns.state.claim_scope import ClaimScope
from libvirt_natns.state.claims import Claims
from libvirt_natns.state.store import Store

A, B = IPv4Address("192.168.0.100"), IPv4Address("192.168.0.101")
GUEST = IPv4Address("10.0.0.5")
BRIDGE = {"a": ClaimScope("provider", False), "b": ClaimScope("provider", False)}
SHARED = {"a": ClaimScope("", True), "b": ClaimScope("", True)}
PROCESSES = 8


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path)
    yield opened
    opened.close()


def forward(owner: str, first: int, last: int = 0, **changes: Any) -> Forward:  # noqa: ANN401
    plain = Forward(
        owner, f"guest {owner}", "a", "tcp", A, first, last or first, GUEST, first, last or first
    )
    return replace(plain, **changes)


def claim(
    store: Store, *forwards: Forward, where: dict[str, ClaimScope] = BRIDGE, published: bool = True
) -> None:
    store.claims.put(Claims(forwards[0].owner, forwards), where, published)


@pytest.mark.parametrize(
    ("first", "last"), [(2222, 2222), (2000, 2222), (2222, 3000), (2000, 3000), (2225, 2226)]
)
def test_overlapping_ports_are_refused(store: Store, first: int, last: int) -> None:
    claim(store, forward("web", 2222, 2230))
    with pytest.raises(ConflictError, match=r"guest late: .* is forwarded to guest web already"):
        claim(store, forward("late", first, last))
    assert [each.owner for each in store.claims.forwards()] == ["web"]


@pytest.mark.parametrize(
    "other",
    [
        forward("late", 2221),
        forward("late", 2231),
        forward("late", 2222, proto="udp"),
        forward("late", 2222, address=B, network="b"),
    ],
)
def test_what_is_no_conflict(store: Store, other: Forward) -> None:
    claim(store, forward("web", 2222, 2230))
    claim(store, other)
    assert len(store.claims.forwards()) == 2


def test_the_hosts_ports_are_shared_by_all_networks(store: Store) -> None:
    claim(store, forward("web", 2222, address=IPv4Address(0)), where=SHARED)
    with pytest.raises(ConflictError, match="tcp port 2222 of the host"):
        claim(store, forward("late", 2222, address=B, network="b"), where=SHARED)


def test_a_refused_claim_leaves_the_earlier_one(store: Store) -> None:
    claim(store, forward("web", 2222))
    claim(store, forward("late", 3333))
    with pytest.raises(ConflictError):
        claim(store, forward("late", 4444), forward("late", 2222))
    assert [each.first for each in store.claims.forwards(owner="late")] == [3333]


def test_a_guest_replaces_its_own(store: Store) -> None:
    claim(store, forward("web", 2222), published=False)
    assert store.claims.forwards(owner="web") == ()
    assert len(store.claims.forwards(owner="web", published=False)) == 1
    again = forward("web", 2222, sources=(IPv4Network("192.168.0.0/24"),))
    claim(store, again)
    assert store.claims.forwards("a") == (again,)
    store.claims.drop("web")
    assert store.claims.forwards(published=False) == ()


def test_claims_of_an_earlier_boot_are_nobodys(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(store, forward("web", 2222))
    monkeypatch.setattr(boot_clock, "boot_id", lambda: "the next")
    assert store.claims.forwards() == ()
    claim(store, forward("late", 2222))
    assert [each.owner for each in store.claims.forwards()] == ["late"]


def _claim_with_others(directory: Path, owner: str) -> str:
    store = Store(directory)
    try:
        claim(store, forward(owner, 2222))
    except ConflictError:
        return ""
    finally:
        store.close()
    return owner


def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        names = [f"guest-{number}" for number in range(PROCESSES)]
        won = pool.starmap(_claim_with_others, [(tmp_path, name) for name in names])
    assert len(list(filter(None, won))) == 1


def test_addresses_of_guests_own(store: Store) -> None:
    static = StaticNat("web", "guest web", "a", B, GUEST, (PortSet("tcp", 80, 90),))
    assert store.leases.reserve("provider", "br0", "web/m1", B)
    store.claims.put(Claims("web", (), (static,)), BRIDGE, published=True)
    assert store.claims.static_nats("a") == (static,)
    late = replace(static, owner="late", owner_name="guest late")
    with pytest.raises(ConflictError, match="belongs to guest web already"):
        store.claims.put(Claims("late", (), (late,)), BRIDGE, published=True)
    store.claims.set_published("web", False)
    assert store.claims.static_nats("a") == ()
    # Kept as long as it is claimed at all; by uuid, for names change, and two may have one.
    store.claims.check_address("provider", B, "web", "guest renamed")
    store.claims.put(
        Claims("web", (), (replace(static, owner_name="guest renamed"),)), BRIDGE, published=False
    )
    namesake = replace(late, owner_name="guest renamed")
    with pytest.raises(ConflictError, match="belongs to guest renamed already"):
        store.claims.put(Claims("late", (), (namesake,)), BRIDGE, published=True)
    assert [each.owner for each in store.claims.static_nats(published=False)] == ["web"]


def test_address_that_a_network_leased_ahead_of_the_claim(store: Store) -> None:
    """A guest's lease counts as in use from its claim on, so it must be there still."""
    assert store.leases.reserve("provider", "br0", "web/m1", B)
    assert store.leases.reserve("provider", "br0", "uuid-of-a-network", B)
    static = StaticNat("web", "guest web", "a", B, GUEST)
    with pytest.raises(ConflictError, match=f"guest web: address {B} was just leased"):
        store.claims.put(Claims("web", (), (static,)), BRIDGE, published=False)
    assert store.claims.static_nats(published=False) == ()


def test_address_of_an_earlier_boot_is_nobodys(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = StaticNat("web", "guest web", "a", B, GUEST)
    assert store.leases.reserve("provider", "br0", "web/m1", B)
    store.claims.put(Claims("web", (), (static,)), BRIDGE, published=True)
    monkeypatch.setattr(boot_clock, "boot_id", lambda: "the next")
    assert store.leases.reserve("provider", "br0", "late/m2", B)
    late = replace(static, owner="late", owner_name="guest late")
    store.claims.put(Claims("late", (), (late,)), BRIDGE, published=True)
    assert store.claims.static_nats() == (late,)


def test_a_network_that_moves_takes_its_forwards_along(store: Store) -> None:
    assert store.leases.reserve("provider", "br0", "web/m1", B)
    own = StaticNat("web", "guest web", "a", B, GUEST)
    claims = Claims("web", (forward("web", 1), forward("web", 2, address=B)), (own,))
    store.claims.put(claims, BRIDGE, published=True)
    moved = IPv4Address("192.168.0.120")
    store.claims.move("a", moved)
    assert {(each.first, each.address) for each in store.claims.forwards()} == {(1, moved), (2, B)}


FREE = [IPv4Address("10.0.0.100"), IPv4Address("10.0.0.101")]


def reserve(store: Store, network: str, mac: str, owner: str = "") -> Address:
    return store.reservations.reserve(network, mac, owner or f"guest-{mac}", FREE, lambda _: True)


def test_reservations_are_unique_and_kept(store: Store) -> None:
    for mac in ("m1", "m2", "m3"):
        store.guests.put(f"guest-{mac}", mac, b"<domain/>", published=True)
    assert reserve(store, "a", "m1") == FREE[0]
    assert reserve(store, "a", "m2") == FREE[1]
    assert (
        store.reservations.reserve("a", "m1", "guest-m1", reversed(FREE), lambda _: True) == FREE[0]
    )
    assert reserve(store, "b", "m2") == FREE[0]
    with pytest.raises(ConflictError, match="no DHCP address is left for m3"):
        reserve(store, "a", "m3")
    store.guests.forget("whoever")
    assert store.reservations.all("a") == {"m1": FREE[0], "m2": FREE[1]}
    store.reservations.drop("a", "m1")
    assert reserve(store, "a", "m3") == FREE[0]


def test_reservations_of_guests_that_ran_before_the_reboot_are_taken_last(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.guests.put("ran", "ran", b"<domain/>", published=True)
    reserve(store, "a", "m1", "ran")
    reserve(store, "a", "m2", "gone")
    monkeypatch.setattr(boot_clock, "boot_id", lambda: "the next")
    assert reserve(store, "a", "m3") == FREE[1]


def test_reservation_goes_over_to_another_guest_with_that_mac(store: Store) -> None:
    reserve(store, "a", "m1", "former")
    assert reserve(store, "a", "m1", "now") == FREE[0]
    reserve(store, "a", "m2")
    store.guests.put("now", "now", b"<domain/>", published=True)
    assert reserve(store, "a", "m3") == FREE[1]


def test_dhcp_knows_of_some_reservations_of_guests_that_are_gone(store: Store) -> None:
    """Those of guests that have published something, others as long as there is room."""
    for mac, owner in (("m1", "web"), ("m2", "gone")):
        reserve(store, "a", mac, owner)
    claim(store, forward("web", 2222))
    assert store.reservations.for_dhcp("a", 0) == {"m1": FREE[0]}
    assert store.reservations.for_dhcp("a", 1) == {"m1": FREE[0]}
    assert store.reservations.for_dhcp("a", 2) == {"m1": FREE[0], "m2": FREE[1]}
    store.claims.set_published("web", False)
    assert store.reservations.for_dhcp("a", 0) == {}
    # The one that was used last.
    assert store.reservations.for_dhcp("a", 1) == {"m1": FREE[0]}
    store.guests.forget("web")
    assert store.reservations.for_dhcp("a", 1) == {"m1": FREE[0]}


def test_guests_are_forgotten_but_for_their_ports(store: Store) -> None:
    store.guests.put("web", "web", b"<domain/>", published=True)
    key = PortKey("web", "a", "tcp", "", 22)
    store.chosen_ports.put(key, 20000)
    claim(store, forward("web", 20000))
    store.guests.forget("web")
    assert store.guests.get("web") is None
    assert store.claims.forwards(published=False) == ()
    assert store.chosen_ports.get(key) == 20000
    assert store.chosen_ports.all() == {("tcp", 20000)}
