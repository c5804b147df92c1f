# SPDX-License-Identifier: LGPL-2.1-or-later
"""The machine after a reboot with a router of its own; then the package goes."""

from pathlib import Path

from lab import FastGuest, run, virsh, wait_for
from lab_machine import (
    LONG,
    NIC,
    PUBLIC_PORT,
    apt_get,
    assert_nothing_wrong,
    healthy,
    is_active,
    passes,
    systemctl,
    virt_natns,
)

ROUTER = "libvirt-natns-router@wan.service"


def test_the_router_comes_up_with_the_machine(guest: FastGuest, public: FastGuest) -> None:
    wait_for(lambda: healthy("lab", "twin", "public"), LONG, "networks to be up", 1.0)
    assert is_active(ROUTER)
    assert not Path("/sys/class/net", NIC).exists()
    assert "router wan: up" in virt_natns("router", "status").stdout
    passes(guest)
    passes(public, PUBLIC_PORT)


def test_the_router_gives_the_nic_back(guest: FastGuest) -> None:
    virsh("net-destroy", "public")
    systemctl("disable", "--now", ROUTER)
    assert Path("/sys/class/net", NIC).exists()
    passes(guest)


def test_removal_gives_networks_back_to_libvirt() -> None:
    apt_get("remove", "libvirt-natns")
    assert "inet 10.0.0.1/24" in run("ip", "address", "show", "virbr10").stdout
    assert "nat-" not in run("ip", "netns").stdout
    virsh("net-destroy", "lab")
    virsh("net-start", "lab")
    assert "inet 10.0.0.1/24" in run("ip", "address", "show", "virbr10").stdout


def test_purge_removes_the_state() -> None:
    apt_get("purge", "libvirt-natns")
    assert not Path("/var/lib/libvirt-natns").exists()


def test_nothing_went_wrong() -> None:
    assert_nothing_wrong()
