# SPDX-License-Identifier: LGPL-2.1-or-later
"""Links whose names are not UTF-8: the kernel takes all bytes but a few."""

import os
from pathlib import Path

import pytest

from libvirt_natns.kernel import outward_links, routes
from libvirt_natns.kernel.channel import NetlinkChannel, Sockets

ODD = b"uplink\xff"
IPV4 = b"Iface\tDestination\tGateway\n%s\t00000000\t0100000A\t0003\n" % ODD
IPV6 = b"%032d 00 %032d 00 %032d 00000400 00000001 00000000 00000003 %s\n" % (0, 0, 1, ODD)


@pytest.fixture(autouse=True)
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing tables of the test's own."""
    for content, owners in (
        (IPV4, ((outward_links, "ROUTES"), (routes, "IPV4_ROUTES"))),
        (IPV6, ((outward_links, "ROUTES6"), (routes, "IPV6_ROUTES"))),
    ):
        file = tmp_path / owners[0][1]
        file.write_bytes(content)
        for module, name in owners:
            monkeypatch.setattr(module, name, file)


def test_routes_lead_over_any_link() -> None:
    assert routes.Routes(NetlinkChannel(Sockets(), None)).links(4) == {os.fsdecode(ODD)}
    assert routes.Routes(NetlinkChannel(Sockets(), None)).links(6) == {os.fsdecode(ODD)}


def test_a_bridge_with_any_name_leads_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = os.fsdecode(ODD)
    monkeypatch.setattr(outward_links, "LINKS", tmp_path / "links")
    (tmp_path / "links" / name / "bridge").mkdir(parents=True)
    assert outward_links.bridges(()) == (name,)
