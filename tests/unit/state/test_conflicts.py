# SPDX-License-Identifier: LGPL-2.1-or-later
"""Conflicts of addresses: a move once a start, and a memory that ends."""

from ipaddress import IPv4Address, IPv6Address

from libvirt_natns.state.address_conflicts import LIMIT, MEMORY, Conflicts

A = IPv4Address("192.0.2.1")
B = IPv6Address("2001:db8::1")


def test_a_start_moves_once() -> None:
    conflicts = Conflicts()
    assert conflicts.may_move("a", 1)
    assert not conflicts.may_move("a", 1)
    assert conflicts.may_move("a", 2)
    assert conflicts.may_move("b", 1)


def test_taken_addresses_are_remembered_for_a_while() -> None:
    now = [0.0]
    conflicts = Conflicts(lambda: now[0])
    conflicts.note("provider", A)
    conflicts.note("other", B)
    assert conflicts.taken("provider") == {A}
    now[0] = MEMORY / 2
    conflicts.note("provider", B)
    now[0] = MEMORY + 1
    assert conflicts.taken("provider") == {B}


def test_the_memory_is_bounded() -> None:
    conflicts = Conflicts()
    for number in range(2 * LIMIT):
        conflicts.note("provider", IPv4Address(number))
        conflicts.may_move(f"{number}", 1)
    assert len(conflicts.taken("provider")) == LIMIT
    # The oldest start is forgotten, and the youngest is not.
    assert conflicts.may_move("0", 1)
    assert not conflicts.may_move(f"{2 * LIMIT - 1}", 1)
