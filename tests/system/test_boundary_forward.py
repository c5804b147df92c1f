# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest of ours gets no farther than a guest of libvirt's own NAT network, iptables-nft."""

from collections.abc import Iterator

import pytest
from boundary import check_kinds, check_later_network, check_notes, check_order
from lab_boundary import House, house, nothing_more
from lab_firewalls import KINDS


@pytest.fixture(scope="module", params=["nftables", "iptables"])
def world(request: pytest.FixtureRequest, installed: None) -> Iterator[House]:
    with house("nft", request.param) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_left(world: House) -> Iterator[None]:
    """Compare all but our own rules, which come back with the next sync."""
    with nothing_more(ours=False):
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_no_farther_than_libvirts_own(world: House, kind: str) -> None:
    check_kinds(world, kind)


def test_a_network_that_starts_later(world: House) -> None:
    check_later_network(world)


def test_others_rules_come_first_whatever_the_order(world: House) -> None:
    check_order(world)


def test_chains_of_an_administrator_are_named(world: House) -> None:
    check_notes(world)
