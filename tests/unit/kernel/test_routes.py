# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ways out among routes, as the kernel tells them."""

import socket
import struct
from ipaddress import IPv6Address, IPv6Network

import pytest

from libvirt_natns.kernel import netlink, rtnetlink
from libvirt_natns.kernel.channel import NetlinkChannel, Sockets
from libvirt_natns.kernel.routes import Routes

ROUTER, OTHER = IPv6Address("2001:db8::1"), IPv6Address("2001:db8::2")


def message(to: str, gateway: IPv6Address) -> bytes:
    destination = IPv6Network(to)
    header = struct.pack(
        "=BBBBBBBBI",
        socket.AF_INET6,
        destination.prefixlen,
        0,
        0,
        netlink.RT_TABLE_MAIN,
        4,
        0,
        1,
        0,
    )
    attributes = [
        (netlink.RTA_DST, destination.network_address.packed),
        (netlink.RTA_GATEWAY, gateway.packed),
        netlink.u32(netlink.RTA_OIF, 7),
    ]
    return header + netlink.pack(attributes)


@pytest.mark.parametrize("way_out", ["::/0", "2000::/3"])
def test_routers_of_any_way_out(way_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [message(way_out, ROUTER), message("2001:db8:5::/48", OTHER)]
    monkeypatch.setattr(rtnetlink.Session, "dump", lambda *_: listed)
    routes = Routes(NetlinkChannel(Sockets(), None))
    assert routes.default_gateways(6) == {ROUTER}
    assert routes.destinations() == {IPv6Network("2001:db8:5::/48")}
