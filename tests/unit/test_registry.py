# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guests' tables: one claim a port, whoever asks, and what is kept for good."""

import multiprocessing
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from libvirt_natns.addresses import Address
from libvirt_natns.errors import ConflictError
from libvirt_natns.model.publication import Forward, PortSet, StaticNat
from libvirt_natns.records import replace
from libvirt_natns.state import guests as module
from libvirt_natns.state import networks as store_module
from libvirt_natns.state.guests import Claims, PortKey, Registry, Scope
from libvirt_natns.state.networks import Store

A, B = IPv4Address("192.168.0.100"), IPv4Address("192.168.0.101")
GUEST = IPv4Address("10.0.0.5")
BRIDGE = {"a": Scope("provider", False), "b": Scope("provider", False)}
SHARED = {"a": Scope("", True), "b": Scope("", True)}
PROCESSES = 8


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def registry(store: Store) -> Registry:
    return Registry(store)


def forward(owner: str, first: int, last: int = 0, **changes: object) -> Forward:
    plain = Forward(
        owner, f"guest {owner}", "a", "tcp", A, first, last or first, GUEST, first, last or first
    )
    return replace(plain, **changes)


def claim(
    registry: Registry, *forwards: Forward, where: dict[str, Scope] = BRIDGE, published: bool = True
) -> None:
    registry.claim(Claims(forwards[0].owner, forwards), where, published)


@pytest.mark.parametrize(
    ("first", "last"), [(2222, 2222), (2000, 2222), (2222, 3000), (2000, 3000), (2225, 2226)]
)
def test_overlapping_ports_are_refused(registry: Registry, first: int, last: int) -> None:
    claim(registry, forward("web", 2222, 2230))
    with pytest.raises(ConflictError, match=r"guest late: .* is forwarded to guest web already"):
        claim(registry, forward("late", first, last))
    assert [each.owner for each in registry.forwards()] == ["web"]


@pytest.mark.parametrize(
    "other",
    [
        forward("late", 2221),
        forward("late", 2231),
        forward("late", 2222, proto="udp"),
        forward("late", 2222, address=B, network="b"),
    ],
)
def test_what_is_no_conflict(registry: Registry, other: Forward) -> None:
    claim(registry, forward("web", 2222, 2230))
    claim(registry, other)
    assert len(registry.forwards()) == 2


def test_the_hosts_ports_are_shared_by_all_networks(registry: Registry) -> None:
    claim(registry, forward("web", 2222, address=IPv4Address(0)), where=SHARED)
    with pytest.raises(ConflictError, match="tcp port 2222 of the host"):
        claim(registry, forward("late", 2222, address=B, network="b"), where=SHARED)


def test_a_refused_claim_leaves_the_earlier_one(registry: Registry) -> None:
    claim(registry, forward("web", 2222))
    claim(registry, forward("late", 3333))
    with pytest.raises(ConflictError):
        claim(registry, forward("late", 4444), forward("late", 2222))
    assert [each.first for each in registry.forwards(owner="late")] == [3333]


def test_a_guest_replaces_its_own(registry: Registry) -> None:
    claim(registry, forward("web", 2222), published=False)
    assert registry.forwards(owner="web") == ()
    assert len(registry.forwards(owner="web", published=False)) == 1
    again = forward("web", 2222, sources=(IPv4Network("192.168.0.0/24"),))
    claim(registry, again)
    assert registry.forwards("a") == (again,)
    registry.drop_claims("web")
    assert registry.forwards(published=False) == ()


def test_claims_of_an_earlier_boot_are_nobodys(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(registry, forward("web", 2222))
    monkeypatch.setattr(module, "boot_id", lambda: "the next")
    assert registry.forwards() == ()
    claim(registry, forward("late", 2222))
    assert [each.owner for each in registry.forwards()] == ["late"]


def _claim_with_others(directory: Path, owner: str) -> str:
    store = Store(directory)
    try:
        claim(Registry(store), forward(owner, 2222))
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


def test_addresses_of_guests_own(registry: Registry, store: Store) -> None:
    static = StaticNat("web", "guest web", "a", B, GUEST, (PortSet("tcp", 80, 90),))
    assert store.reserve("provider", "br0", "web/m1", B)
    registry.claim(Claims("web", (), (static,)), BRIDGE, published=True)
    assert registry.static_nats("a") == (static,)
    late = replace(static, owner="late", owner_name="guest late")
    with pytest.raises(ConflictError, match="belongs to guest web already"):
        registry.claim(Claims("late", (), (late,)), BRIDGE, published=True)
    registry.set_published("web", False)
    assert registry.static_nats("a") == ()
    # Kept as long as it is claimed at all; by uuid, for names change, and two may have one.
    registry.check_static("provider", B, "web", "guest renamed")
    registry.claim(
        Claims("web", (), (replace(static, owner_name="guest renamed"),)), BRIDGE, published=False
    )
    namesake = replace(late, owner_name="guest renamed")
    with pytest.raises(ConflictError, match="belongs to guest renamed already"):
        registry.claim(Claims("late", (), (namesake,)), BRIDGE, published=True)
    assert [each.owner for each in registry.static_nats(published=False)] == ["web"]


def test_address_that_a_network_leased_ahead_of_the_claim(registry: Registry, store: Store) -> None:
    """A guest's lease counts as in use from its claim on, so it must be there still."""
    assert store.reserve("provider", "br0", "web/m1", B)
    assert store.reserve("provider", "br0", "uuid-of-a-network", B)
    static = StaticNat("web", "guest web", "a", B, GUEST)
    with pytest.raises(ConflictError, match=f"guest web: address {B} was leased to another mean"):
        registry.claim(Claims("web", (), (static,)), BRIDGE, published=False)
    assert registry.static_nats(published=False) == ()


def test_address_of_an_earlier_boot_is_nobodys(
    registry: Registry, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = StaticNat("web", "guest web", "a", B, GUEST)
    assert store.reserve("provider", "br0", "web/m1", B)
    registry.claim(Claims("web", (), (static,)), BRIDGE, published=True)
    for each in (module, store_module):
        monkeypatch.setattr(each, "boot_id", lambda: "the next")
    assert store.reserve("provider", "br0", "late/m2", B)
    late = replace(static, owner="late", owner_name="guest late")
    registry.claim(Claims("late", (), (late,)), BRIDGE, published=True)
    assert registry.static_nats() == (late,)


def test_a_network_that_moves_takes_its_forwards_along(registry: Registry, store: Store) -> None:
    assert store.reserve("provider", "br0", "web/m1", B)
    own = StaticNat("web", "guest web", "a", B, GUEST)
    claims = Claims("web", (forward("web", 1), forward("web", 2, address=B)), (own,))
    registry.claim(claims, BRIDGE, published=True)
    moved = IPv4Address("192.168.0.120")
    registry.move("a", moved)
    assert {(each.first, each.address) for each in registry.forwards()} == {(1, moved), (2, B)}


FREE = [IPv4Address("10.0.0.100"), IPv4Address("10.0.0.101")]


def reserve(registry: Registry, network: str, mac: str, owner: str = "") -> Address:
    return registry.reserve(network, mac, owner or f"guest-{mac}", FREE, lambda _: True)


def test_reservations_are_unique_and_kept(registry: Registry) -> None:
    for mac in ("m1", "m2", "m3"):
        registry.put_guest(f"guest-{mac}", mac, b"<domain/>", published=True)
    assert reserve(registry, "a", "m1") == FREE[0]
    assert reserve(registry, "a", "m2") == FREE[1]
    assert registry.reserve("a", "m1", "guest-m1", reversed(FREE), lambda _: True) == FREE[0]
    assert reserve(registry, "b", "m2") == FREE[0]
    with pytest.raises(ConflictError, match="no DHCP address is left for m3"):
        reserve(registry, "a", "m3")
    registry.forget_guest("whoever")
    assert registry.reservations("a") == {"m1": FREE[0], "m2": FREE[1]}
    registry.drop_reservation("a", "m1")
    assert reserve(registry, "a", "m3") == FREE[0]


def test_reservations_of_guests_that_ran_before_the_reboot_are_taken_last(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.put_guest("ran", "ran", b"<domain/>", published=True)
    reserve(registry, "a", "m1", "ran")
    reserve(registry, "a", "m2", "gone")
    monkeypatch.setattr(module, "boot_id", lambda: "the next")
    assert reserve(registry, "a", "m3") == FREE[1]


def test_reservation_goes_over_to_another_guest_with_that_mac(registry: Registry) -> None:
    reserve(registry, "a", "m1", "former")
    assert reserve(registry, "a", "m1", "now") == FREE[0]
    reserve(registry, "a", "m2")
    registry.put_guest("now", "now", b"<domain/>", published=True)
    assert reserve(registry, "a", "m3") == FREE[1]


def test_dhcp_knows_of_some_reservations_of_guests_that_are_gone(registry: Registry) -> None:
    """Those of guests that have published something, others as long as there is room."""
    for mac, owner in (("m1", "web"), ("m2", "gone")):
        reserve(registry, "a", mac, owner)
    claim(registry, forward("web", 2222))
    assert registry.reservations_known("a", 0) == {"m1": FREE[0]}
    assert registry.reservations_known("a", 1) == {"m1": FREE[0]}
    assert registry.reservations_known("a", 2) == {"m1": FREE[0], "m2": FREE[1]}
    registry.set_published("web", False)
    assert registry.reservations_known("a", 0) == {}
    # The one that was used last.
    assert registry.reservations_known("a", 1) == {"m1": FREE[0]}
    registry.forget_guest("web")
    assert registry.reservations_known("a", 1) == {"m1": FREE[0]}


def test_guests_are_forgotten_but_for_their_ports(registry: Registry) -> None:
    registry.put_guest("web", "web", b"<domain/>", published=True)
    key = PortKey("web", "a", "tcp", "", 22)
    registry.choose_port(key, 20000)
    claim(registry, forward("web", 20000))
    registry.forget_guest("web")
    assert registry.guest("web") is None
    assert registry.forwards(published=False) == ()
    assert registry.chosen_port(key) == 20000
    assert registry.chosen_ports() == {("tcp", 20000)}
