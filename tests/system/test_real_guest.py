# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real guests, booted, that publish a port: one number, one MAC, one private address."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from lab import (
    Node,
    Provider,
    RealGuest,
    isolated,
    natns,
    remove_config,
    start_network,
    virsh,
    write_config,
)
from views import upstream_address

REAL_INTERPRETER = True
MAC = "52:54:00:00:00:05"
NETWORKS = {"a": "virbr10", "b": "virbr11"}
PORT = 8080

FORWARD = f"""
    <natns:nat xmlns:natns="urn:libvirt-natns:1">
      <natns:portForward><natns:range start="{PORT}" to="80"/></natns:portForward>
    </natns:nat>
"""

pytestmark = pytest.mark.usefixtures("installed")


@dataclass(frozen=True)
class Twins:
    """A booted guest in each of two networks that differ in name and bridge alone."""

    provider: Provider
    guests: tuple[RealGuest, RealGuest]
    neighbour: Node

    def url(self, guest: RealGuest) -> str:
        """Where a guest is published."""
        return f"http://{upstream_address(guest.network)}:{PORT}/"

    def check_pages(self) -> None:
        """Each one's page is had from upstream, from its twin, and by itself."""
        for guest, twin in (self.guests, self.guests[::-1]):
            page = f"this is {guest.name}"
            assert self.neighbour.curl(self.url(guest)) == page
            assert twin.fetch(self.url(guest)) == page
            assert guest.fetch(self.url(guest)) == page


@pytest.fixture
def twins(provider: Provider) -> Iterator[Twins]:
    write_config(provider.config(firewall="nftables"))
    with ExitStack() as stack:
        stack.callback(remove_config)
        for name, bridge in NETWORKS.items():
            # No <host>: the address is the reservation that the forward needs.
            start_network(isolated(name, bridge))
        one, two = (
            stack.enter_context(RealGuest(f"web-{name}", name, MAC, metadata=FORWARD))
            for name in NETWORKS
        )
        one.wait_ready()
        two.wait_ready()
        neighbour = stack.enter_context(provider.neighbour("neighbour", "192.168.0.77/24"))
        yield Twins(provider, (one, two), neighbour)


def test_pages_of_booted_twins(twins: Twins) -> None:
    """From the first boot on; behind the other backend; and after one of them has gone."""
    one, two = twins.guests
    assert one.address == two.address is not None
    assert twins.url(one) != twins.url(two)
    for guest in twins.guests:
        assert f" {guest.address}/" in virsh("domifaddr", guest.name).stdout
    twins.check_pages()
    check_nothing_else_is_open(twins)

    write_config(twins.provider.config(firewall="iptables"))
    natns("sync")
    twins.check_pages()

    gone = twins.url(one)
    one.down()
    assert twins.neighbour.curl(gone, check=False, timeout=1) == ""
    assert twins.neighbour.curl(twins.url(two)) == f"this is {two.name}"


def check_nothing_else_is_open(twins: Twins) -> None:
    """Not the service's own port, although the service answers there."""
    for guest in twins.guests:
        own = twins.url(guest).replace(f":{PORT}", ":80")
        assert twins.neighbour.curl(own, check=False, timeout=1) == ""
