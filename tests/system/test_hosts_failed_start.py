# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts that fail: of a guest after its `prepare` hook, and of a network by its name."""

import json
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from lab import Provider, Service, define_network, isolated, natns, run, virsh, write_config
from lab_domains import create, destroy, domain, networks, nic, ports, uuid_of

LOG = "/var/log/libvirt/qemu/shared-serial.log"
SERIAL = f"<serial type='pty'><log file='{LOG}' append='on'/></serial></devices>"
FIRST, SECOND = "52:54:00:00:00:05", "52:54:00:00:00:06"

pytestmark = pytest.mark.usefixtures("installed")


@pytest.fixture(params=[True, False], ids=["service", "hooks"])
def served(request: pytest.FixtureRequest, provider: Provider) -> Iterator[None]:
    write_config(provider.config(more="probe = 0"))
    with ExitStack() as stack:
        if request.param:
            stack.enter_context(Service())
        stack.enter_context(networks(isolated("a", "virbr10")))
        stack.callback(destroy, "first", "second")
        yield


def guest(name: str, mac: str, port: int) -> str:
    """A guest with a DHCP address of its own, whose serial log is that of others."""
    publishes = ports(f"start='{port}' to='22'")
    return domain(name, nic("a", mac), publishes=publishes).replace("</devices>", SERIAL)


def health() -> str:
    shown = json.loads(natns("status", "--json", "a").stdout)["networks"][0]
    return str(shown["health"])


def test_a_serial_log_in_use(served: None) -> None:
    create(guest("first", FIRST, 2222))
    assert health() == "ok"
    failed = create(guest("second", SECOND, 2223), check=False)
    assert failed.returncode != 0
    assert "libvirt-natns" not in failed.stderr
    assert natns("check").stdout == ""
    assert health() == "ok"
    destroy("first")
    create(guest("second", SECOND, 2223))
    assert natns("check").stdout == ""


def test_the_namespace_of_another_network_is_not_to_be_deleted(provider: Provider) -> None:
    write_config(provider.config(more="probe = 0"))
    with ExitStack() as stack:
        stack.enter_context(networks(isolated("a", "virbr10")))
        stack.callback(run, "ip", "netns", "delete", "nat-b")
        run("ip", "netns", "add", "nat-b")
        alias = f"libvirt-natns {uuid_of('a')}"
        run("ip", "-n", "nat-b", "link", "set", "lo", "alias", alias)
        define_network(isolated("b", "virbr11"))
        stack.callback(virsh, "net-undefine", "b")
        said = virsh("net-start", "b", check=False).stderr
        expected = "namespace nat-b belongs to network a: rename one of the two networks"
        assert f"network b: {expected}" in said
        assert "delete" not in said
