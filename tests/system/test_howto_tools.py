# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages about tools that use libvirt, typed as they stand.

The guests are real domains with an empty disk: what a booted guest would send comes
from a ``FastGuest`` with the same MAC.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pytest
from lab import (
    CHECKOUT,
    INTERNET,
    PYTHON,
    FastGuest,
    Node,
    define_network,
    isolated,
    natns,
    virsh,
)
from lab_documents import type_page
from lab_domains import define, domain, networks, nic, ports, provider_world, start

PAGES = CHECKOUT / "docs" / "how-to"
IMAGES = Path("/var/lib/libvirt/images")
PATIENCE = 300
"""Seconds for a page: virt-install alone takes some."""

ADDRESS, SECOND = "192.168.0.100", "192.168.0.101"
"""Upstream addresses of lab, and of the network that comes next."""


@dataclass
class World:
    desk: Node
    cleanup: ExitStack

    def boot(self, domain: str) -> FastGuest:
        """The machine behind a domain's NIC: it takes a lease, and serves its name."""
        network, _, mac = virsh("domiflist", domain).stdout.split()[2:5]
        bridge = virsh("net-info", network).stdout.split()[-1]
        guest = self.cleanup.enter_context(FastGuest(bridge, mac, name=domain))
        guest.dhcp()
        guest.serve("http", 80)
        return guest

    def answers(self, address: str, port: int) -> str:
        """Return the name of the guest that answers there to a machine upstream."""
        return self.desk.curl(f"http://{address}:{port}/name", check=False).strip()


@pytest.fixture
def world(installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    program = tmp_path / "virt-natns"
    program.write_text(
        f'#!/bin/sh\nexec env PYTHONPATH={CHECKOUT} {PYTHON} -m libvirt_natns "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    IMAGES.mkdir(exist_ok=True)
    with ExitStack() as stack:
        provider = stack.enter_context(provider_world())
        yield World(provider.neighbour("desk", "192.168.0.20/24"), stack)


@pytest.fixture
def lab(world: World) -> World:
    """The network "lab" runs there, as virt-manager makes one."""
    world.cleanup.enter_context(networks(isolated("lab", "virbr10")))
    return world


def disk(name: str) -> Path:
    """An empty disk, from which a machine does not boot."""
    image = IMAGES / name
    with image.open("wb") as opened:
        opened.truncate(1 << 20)
    return image


def published(guest: str) -> dict[tuple[str, int], tuple[str, int]]:
    """Published ports of a guest: protocol and guest's port, and the address and port outside."""
    listed = json.loads(natns("forward", "list", "--json", guest).stdout)["forwards"]
    return {(one["proto"], one["target_first"]): (one["address"], one["first"]) for one in listed}


def test_virt_install(lab: World, tmp_path: Path) -> None:
    disk("web.img")
    disk("db.img")
    type_page(PAGES / "virt-install.md", tmp_path, timeout=PATIENCE)
    lab.boot("web")
    lab.boot("db")
    assert lab.answers(ADDRESS, 8080) == "web"
    assert published("db")["tcp", 80][0] == ADDRESS
    assert lab.answers(*published("db")["tcp", 80]) == "db"


def test_virt_clone(lab: World, tmp_path: Path) -> None:
    nothing_to_boot = (
        f"<disk type='file'><source file='{disk('web.img')}'/><target dev='vda'/></disk>"
        "<interface type='network'><source network='lab'/><rom enabled='no'/></interface>"
    )
    define(domain("web", nothing_to_boot, publishes=ports("start='8080' to='80'")))
    type_page(PAGES / "virt-clone.md", tmp_path, timeout=PATIENCE)
    for guest in "web", "shop", "web-b", "web-2":
        lab.boot(guest)
    assert lab.answers(ADDRESS, 8081) == "shop"
    assert lab.answers(SECOND, 8080) == "web-b"
    for guest in "web", "web-2":
        assert published(guest)["tcp", 80][0] == ADDRESS
        assert lab.answers(*published(guest)["tcp", 80]) == guest


def test_virt_manager(lab: World, tmp_path: Path) -> None:
    forward = ports("start='8080' to='80'")
    define(domain("web", nic("lab", "52:54:00:00:00:05"), publishes=forward))
    define(domain("shop", nic("lab", "52:54:00:00:00:06"), publishes=forward))
    start("web")
    guest = lab.boot("web")
    type_page(PAGES / "virt-manager.md", tmp_path)
    assert guest.curl(f"http://{INTERNET}/").startswith(f"{ADDRESS}:"), "isolated, and yet outside"
    assert lab.answers(ADDRESS, 8080) == "web"


def test_vagrant(world: World, tmp_path: Path) -> None:
    type_page(PAGES / "vagrant.md", tmp_path)
    for network, address in (("lab-a", ADDRESS), ("lab-b", SECOND)):
        define(domain(network, nic(network, "52:54:00:00:00:05")))
        start(network)
        box = world.boot(network)
        assert box.addresses() == ["10.0.0.5/24"]
        assert box.curl(f"http://{INTERNET}/").startswith(f"{address}:")


def test_terraform(lab: World, tmp_path: Path) -> None:
    define(domain("web", nic("lab", "52:54:00:00:00:05")))
    type_page(PAGES / "terraform.md", tmp_path)
    lab.boot("web")
    assert lab.answers(ADDRESS, 8080) == "web"


def test_virt_net(world: World, tmp_path: Path) -> None:
    """The module's work is done by virsh, with the page's own template and names."""
    page = PAGES / "virt-net.md"
    blocks = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", page.read_text())
    template, playbook, _ = (text for language, text in blocks if not language)
    for name in playbook.partition("networks: [")[2].partition("]")[0].split(", "):
        define_network(jinja2.Template(template).render(item=name))
        virsh("net-start", name)
    type_page(page, tmp_path)
    define(domain("web", nic("lab-a", "52:54:00:00:00:05")))
    start("web")
    assert world.boot("web").addresses() == ["10.0.0.5/24"]
