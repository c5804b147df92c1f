# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages about firewalls of others, typed as they stand on a host that routes for "lab" itself."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import CHECKOUT, PYTHON, FastGuest, isolated, natns, run
from lab_boundary import nothing_more, on_a_link, reaches
from lab_documents import type_page
from lab_domains import STATE, asked, networks
from lab_firewalls import UFW_IN_A_SANDBOX
from lab_hosts_firewalls import libvirts_rules_kept, without_bridge_nf
from test_hosts import HERE, INTERNET, LAN, PORT, ROUTER, TABLE, leaves_as, way_out

PAGES = CHECKOUT / "docs" / "how-to"
NEAR, BEHIND = "172.30.0.5", "192.168.9.5"
"""Servers that the pages keep guests off."""


@dataclass
class World:
    cleanup: ExitStack

    def guest(self) -> FastGuest:
        """A guest in lab, which has come when the page had been typed."""
        guest = self.cleanup.enter_context(FastGuest("virbr10", name="guest"))
        guest.dhcp()
        return guest


@pytest.fixture(autouse=True)
def nothing_left(installed: None) -> Iterator[None]:
    with nothing_more(ours=True), libvirts_rules_kept():
        yield


@pytest.fixture
def world(installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    program = tmp_path / "virt-natns"
    program.write_text(
        f'#!/bin/sh\nexec env PYTHONPATH={CHECKOUT} {PYTHON} -m libvirt_natns "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for file in STATE.glob("state.db*"):
        file.unlink()
    with ExitStack() as stack:
        stack.enter_context(without_bridge_nf())
        stack.enter_context(
            way_out(f"route add default via {ROUTER}", name="lan", here=LAN, there=ROUTER)
        )
        peer = on_a_link(stack, "peer", "p-peer", "172.30.0.1", NEAR)
        run("ip", "-n", peer.name, "address", "add", f"{BEHIND}/32", "dev", "lo")
        run("ip", "route", "add", f"{BEHIND}/32", "via", NEAR)
        peer.serve("http", 80)
        stack.enter_context(networks(isolated("lab", "virbr10")))
        yield World(stack)


def test_a_firewall_of_ones_own(world: World, tmp_path: Path) -> None:
    conf = Path("/etc/nftables.conf")
    before = conf.read_text() if conf.exists() else ""
    world.cleanup.callback(conf.write_text, before)
    world.cleanup.callback(run, "nft", "delete table inet filter", check=False)
    type_page(PAGES / "own-firewall.md", tmp_path)
    guest = world.guest()
    assert leaves_as(LAN)
    assert reaches(None, BEHIND, 80), "the control"
    assert reaches(guest, NEAR, 80)
    assert not reaches(guest, BEHIND, 80)


def test_ufw(world: World, tmp_path: Path) -> None:
    run("sh", "-ec", UFW_IN_A_SANDBOX)
    world.cleanup.callback(run, "sh", "-c", "ufw --force reset; ufw --force disable")
    type_page(PAGES / "ufw.md", tmp_path)
    guest = world.guest()
    assert leaves_as(LAN)
    assert reaches(None, NEAR, 80), "the control"
    assert reaches(guest, BEHIND, 80)
    assert not reaches(guest, NEAR, 80)


def test_vpn(world: World) -> None:
    page = PAGES / "vpn.md"
    world.guest()
    world.cleanup.callback(run, "nft", "delete", "table", "inet", "vpnguard", check=False)
    world.cleanup.callback(run, "ip", "route", "flush", "table", "100", check=False)
    world.cleanup.callback(run, "ip", "rule", "del", "pref", "100", check=False)
    with way_out(*TABLE, link="wg0"):
        natns("sync")
        type_page(page, CHECKOUT, "")
        type_page(page, CHECKOUT, "A kill switch")
        assert leaves_as(HERE)
        run("ip", "route", "flush", "table", "51820")
        assert asked(None, "tcp", INTERNET, PORT) == LAN, "the control"
        assert not leaves_as(LAN)
        run("nft", "delete", "table", "inet", "vpnguard")
        run("ip", *TABLE[0].split())
        assert leaves_as(HERE)
        type_page(page, CHECKOUT, "Some networks beside the VPN")
        assert asked(None, "tcp", INTERNET, PORT) == HERE, "the control"
        assert leaves_as(LAN)
