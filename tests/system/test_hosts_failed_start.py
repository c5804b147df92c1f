# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest whose start fails after its `prepare` hook leaves a network that is well at once."""

import json
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from lab import Provider, Service, isolated, natns, write_config
from lab_domains import create, destroy, domain, networks, nic, ports

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
