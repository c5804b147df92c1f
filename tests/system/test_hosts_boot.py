# SPDX-License-Identifier: LGPL-2.1-or-later
"""A boot in which the upstream comes later than libvirt, which autostarts a network once."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lab import (
    Libvirtd,
    Service,
    define_network,
    isolated,
    natns,
    remove_config,
    run,
    virsh,
    wait_for,
    write_config,
)

STAMP = Path("/run/libvirt/network/autostarted")
QUIET = 4.0
"""Seconds of waiting for what should not come: several looks of the service."""


@pytest.fixture(autouse=True, params=["bridge", "macvlan"])
def configured(request: pytest.FixtureRequest, installed: None) -> Iterator[None]:
    write_config(
        'upstream = "late"\n[upstreams.late]\nkind = "bridge"\nbridge = "late0"\n'
        f'attach = "{request.param}"\nsubnet = "192.168.9.0/24"\ngateway = "192.168.9.1"\n'
        'pool = ["192.168.9.100-192.168.9.109"]\nprobe = 0\n'
    )
    yield
    remove_config()


@pytest.fixture
def network(libvirtd: Libvirtd) -> Iterator[None]:
    """A network with autostart, at a boot: libvirt has just tried to start it."""
    define_network(isolated("a", "virbr10"))
    virsh("net-autostart", "a")
    libvirtd.stop()
    STAMP.unlink(missing_ok=True)
    libvirtd.start()
    yield
    virsh("net-destroy", "a", check=False)
    virsh("net-autostart", "a", "--disable", check=False)
    virsh("net-undefine", "a", check=False)


def upstream_comes(stack: ExitStack) -> None:
    run("ip", "link", "add", "late0", "type", "bridge")
    stack.callback(run, "ip", "link", "del", "late0", check=False)
    time.sleep(0.1)
    assert not is_active(), "a bridge that is down is not there yet"
    run("ip", "link", "set", "late0", "up")


def is_active() -> bool:
    return "a" in virsh("net-list", "--name").stdout.split()


def waits() -> bool:
    found = json.loads(natns("status", "--json").stdout)["waiting"]
    return [each["network"] for each in found] == ["a"]


@pytest.fixture
def first(request: pytest.FixtureRequest) -> str:
    """What is there at the boot."""
    return "service" if request.node.callspec.params["configured"] == "bridge" else "hooks"


def test_the_network_starts_when_its_upstream_is_there(
    first: str, libvirtd: Libvirtd, request: pytest.FixtureRequest
) -> None:
    """``hooks``: the service comes later as well, and finds the note of the hook."""
    with ExitStack() as stack:
        if first == "service":
            stack.enter_context(Service())
        request.getfixturevalue("network")
        if first == "hooks":
            stack.enter_context(Service())
        wait_for(waits, what="a network that waits")
        assert "a: waits to be started: network a: " in natns("status").stdout
        upstream_comes(stack)
        wait_for(is_active, timeout=20, what="the network")
        assert not waits()
        # Stopped by hand, it stays so.
        virsh("net-destroy", "a")
        time.sleep(QUIET)
        assert not is_active()
        assert not waits()


def test_a_network_without_autostart_is_never_started(network: None) -> None:
    with ExitStack() as stack:
        virsh("net-autostart", "a", "--disable")
        assert virsh("net-start", "a", check=False).returncode
        stack.enter_context(Service())
        assert not waits()
        upstream_comes(stack)
        time.sleep(QUIET)
        assert not is_active()
        virsh("net-autostart", "a")
