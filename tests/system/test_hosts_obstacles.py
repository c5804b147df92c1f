# SPDX-License-Identifier: LGPL-2.1-or-later
"""A network whose guests have no way out is not "ok", and each place says the same reason."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from lab import (
    FastGuest,
    Provider,
    Service,
    isolated,
    natns,
    remove_config,
    run,
    wait_for,
    write_config,
)
from lab_domains import asked, networks
from test_hosts import HERE, INTERNET, PORT, THERE, way_out

PROHIBITED = "rule add pref 100 iif natns-host prohibit"


@contextmanager
def network_with_a_guest(served: bool) -> Iterator[Service | None]:
    with ExitStack() as stack:
        service = stack.enter_context(Service()) if served else None
        stack.enter_context(networks(isolated("a", "virbr10")))
        stack.enter_context(FastGuest("virbr10", name="guest")).dhcp()
        yield service


def leaves() -> bool:
    return asked("guest", "tcp", INTERNET, PORT, timeout=1.0) == HERE


def told() -> str:
    """Return the obstacle that check tells; status and doctor must agree."""
    (line,) = natns("check", check=False).stdout.splitlines() or [""]
    obstacle = line.removeprefix("a: ")
    status, doctor = natns("status").stdout, natns("doctor", check=False).stdout
    if obstacle:
        assert f"  - {obstacle}" in status.splitlines()
        assert f"broken  ways out: {line}" in doctor
    else:
        assert "ok      ways out:" in doctor
    return obstacle


def gauge() -> str:
    (line,) = (
        each
        for each in natns("metrics").stdout.splitlines()
        if each.startswith("libvirt_natns_network_obstacle") and '"no way out"' in each
    )
    return line


@pytest.mark.parametrize("served", [True, False], ids=["service", "hooks"])
def test_a_host_without_a_way_out(served: bool, installed: None) -> None:
    with network_with_a_guest(served) as service:
        assert not leaves()
        assert told().startswith("no way out: the host forwards no IPv4 from natns-host")
        if service:
            wait_for(lambda: gauge().endswith(" 1.0"), timeout=20, what="the metric")
            assert "event=obstacle network=a" in service.log()
        with way_out("route add default via 10.8.0.1"):
            if not served:
                natns("sync")
            wait_for(leaves, timeout=20, what="the way out")
            assert told() == ""
            if service:
                wait_for(lambda: gauge().endswith(" 0.0"), timeout=20, what="the metric")
                assert 'event=passable network=a obstacle="no way out"' in service.log()
        assert "Network is unreachable" in told()


def test_a_lab_without_a_gateway_is_in_order(installed: None) -> None:
    """Guests reach what the host reaches: the networks on its links."""
    with way_out(name="lab"), network_with_a_guest(False):
        assert asked("guest", "tcp", THERE, PORT) == HERE
        assert told() == ""
        run("ip", "route", "add", "unreachable", "default")
        assert told().startswith("no way out: the host forwards no IPv4 from natns-host")
        run("ip", "route", "del", "unreachable", "default")


def test_a_rule_of_the_hosts_that_stops_guests_alone(installed: None) -> None:
    with way_out("route add default via 10.8.0.1", PROHIBITED), network_with_a_guest(False):
        assert asked(None, "tcp", INTERNET, PORT) == HERE, "the control"
        assert not leaves()
        assert "forwards no IPv4 from natns-host to the outside (Permission denied)" in told()
        run("ip", *PROHIBITED.replace(" add ", " del ").split())
        assert leaves()
        assert told() == ""


def test_a_providers_gateway_that_does_not_answer(installed: None) -> None:
    with Provider() as provider, ExitStack() as stack:
        write_config(provider.config())
        stack.callback(remove_config)
        stack.enter_context(networks(isolated("a", "virbr10")))
        assert told() == ""
        provider.router.run("ip", "link", "set", "eth0", "down")
        run("ip", "-n", "nat-a", "neighbour", "flush", "all")
        assert "gateway 192.168.0.1 of upstream provider does not answer on bridge br0" in told()
