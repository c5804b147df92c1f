# SPDX-License-Identifier: LGPL-2.1-or-later
"""Links whose names are not UTF-8: the kernel takes all bytes but a few."""

import os
import socket
import struct
from pathlib import Path

import pytest

from libvirt_natns.kernel import netlink, outward_links, routes, rtnetlink
from libvirt_natns.kernel.channel import NetlinkChannel, Sockets

ODD = b"uplink\xff"
INDEX = 7


def default_route(family: int, router: bytes) -> bytes:
    """The kernel's message of a default route by a router."""
    header = struct.pack("=BBBBBBBBI", family, 0, 0, 0, netlink.RT_TABLE_MAIN, 3, 0, 1, 0)
    return header + netlink.pack(
        [(netlink.RTA_GATEWAY, router), netlink.u32(netlink.RTA_OIF, INDEX)]
    )


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing tables of the test's own: the kernel's would need root."""

    def dump(_: rtnetlink.Session, kind: int, body: bytes) -> list[bytes]:
        assert kind == netlink.RTM_GETROUTE
        return [default_route(body[0], bytes(4 if body[0] == socket.AF_INET else 16))]

    monkeypatch.setattr(rtnetlink.Session, "dump", dump)
    monkeypatch.setattr(socket, "if_indextoname", {INDEX: os.fsdecode(ODD)}.__getitem__)


def test_routes_lead_over_any_link() -> None:
    listed = routes.Routes(NetlinkChannel(Sockets(), None))
    assert listed.links(4) == {os.fsdecode(ODD)}
    assert listed.links(6) == {os.fsdecode(ODD)}
    assert listed.leading() == {os.fsdecode(ODD): True}


def test_a_bridge_with_any_name_leads_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = os.fsdecode(ODD)
    monkeypatch.setattr(outward_links, "LINKS", tmp_path / "links")
    (tmp_path / "links" / name / "bridge").mkdir(parents=True)
    routed = routes.Routes(NetlinkChannel(Sockets(), None)).leading()
    assert outward_links.bridges(routed, ()) == (name,)
