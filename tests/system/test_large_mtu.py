# SPDX-License-Identifier: LGPL-2.1-or-later
"""A large MTU in a network's XML: guests are told what the way outside carries of it."""

import pytest
from lab import FastGuest, Provider, isolated, remove_config, start_network, write_config

pytestmark = pytest.mark.usefixtures("installed")


@pytest.mark.parametrize(("outside", "told"), [(9000, "9000"), (4000, "4000"), (1500, "1500")])
def test_dhcp_says_what_the_upstream_carries(nothing_left: None, outside: int, told: str) -> None:
    with Provider(mtu=outside) as provider:
        write_config(provider.config())
        start_network(isolated("a", "virbr10", mtu=9000))
        with FastGuest("virbr10", mtu=9000) as guest:
            assert guest.dhcp(apply=False).get("mtu") == told
        remove_config()


def test_the_transit_bridge_carries_the_usual(nothing_left: None) -> None:
    """Whatever the host's own NICs carry."""
    with Provider(mtu=9000):
        start_network(isolated("a", "virbr10", mtu=9000))
        with FastGuest("virbr10", mtu=9000) as guest:
            assert guest.dhcp(apply=False).get("mtu") == "1500"
