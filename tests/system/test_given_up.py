# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts that libvirt gives up after our `start` hook has agreed: nothing of them stays.

With the service, a second later.  Without it, after the next event of any network.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import product
from pathlib import Path

import pytest
from lab import (
    Libvirtd,
    Provider,
    Service,
    Snapshot,
    define_network,
    isolated,
    natns,
    remaining,
    remove_config,
    run,
    spawn,
    start_network,
    virsh,
    wait_for,
    write_config,
)
from lab_domains import (
    STATE,
    create,
    destroy,
    domain,
    file_of,
    networks,
    nic,
    ports,
    settle,
    unordered,
)
from views import namespaces

from libvirt_natns import names

PROMISE = 1.0
"""Seconds from libvirt's refusal until nothing is left, with the service."""

SLOWEST_EVENT = 10.0
"""Seconds that the next event may take on a busy machine; a start counts as stuck after 30."""

NETWORKS = Path("/run/libvirt-natns/networks")
GUESTS = Path("/run/libvirt-natns/guests")
OPTION = (
    '<dnsmasq:options xmlns:dnsmasq="http://libvirt.org/schemas/network/dnsmasq/1.0">'
    '<dnsmasq:option value="no-such-option"/></dnsmasq:options>'
)
IP = '<ip address="10.0.0.1" netmask="255.255.255.0">{}</ip>'
TFTP = IP.format('<tftp root="/nonexistent"/>')
NETBOOT = IP.format(
    '<tftp root="/nonexistent"/><dhcp><range start="10.0.0.100" end="10.0.0.200"/>'
    '<bootp file="pxelinux.0"/></dhcp>'
)
BANDWIDTH = '<bandwidth><inbound average="1000" peak="5000" burst="5120"/></bandwidth>'
UUID = "c0ffee00-0000-4000-8000-00000000bad0"


def given_up(kind: str, name: str = "bad", bridge: str = "virbr20", uuid: str = UUID) -> str:
    """A network whose start libvirt itself refuses, past our `start` hook."""
    if kind in ("tftp root", "netboot"):
        more = TFTP if kind == "tftp root" else NETBOOT
        return isolated(name, bridge, address=None, uuid=uuid, more=more)
    if kind == "zone":
        plain = isolated(name, bridge, uuid=uuid)
        return plain.replace("<bridge ", '<bridge zone="nowhere" ')
    more = OPTION if kind == "dnsmasq option" else BANDWIDTH
    return isolated(name, bridge, uuid=uuid, more=more)


KINDS = ("dnsmasq option", "tftp root", "netboot", "zone", "bandwidth")


@contextmanager
def tc(script: str = "echo 'no scheduler' >&2; exit 2") -> Iterator[None]:
    """Another tc(8); by default it refuses, as without the kernel's schedulers.

    libvirt runs it last of all, for a network with a ``<bandwidth>``.
    """
    other = Path("/run/tmp/tc")
    other.write_text(f"#!/bin/sh\n{script}\n")
    other.chmod(0o755)
    run("mount", "--bind", "/run/tmp/tc", "/usr/sbin/tc")
    try:
        yield
    finally:
        run("umount", "/usr/sbin/tc")


def refuse(name: str = "bad") -> None:
    """Have libvirt give up a start."""
    with tc():
        done = virsh("net-start", name, check=False)
    assert done.returncode != 0
    assert "libvirt-natns" not in done.stderr, done.stderr


def ours() -> set[str]:
    """All that a network has in the host, at a glance."""
    links = {link.name for link in Path("/sys/class/net").glob("nat[iu][np]*")}
    return links | namespaces() | {each.name for each in NETWORKS.glob("*")}


def settles_as(before: Snapshot) -> None:
    """The host is as it was."""
    assert remaining(before, unordered) == ""


def check() -> str:
    """What `virt-natns check` finds; "" for nothing."""
    done = natns("check", check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@contextmanager
def defined(*documents: str) -> Iterator[None]:
    with ExitStack() as cleanup:
        for xml in documents:
            define_network(xml)
            name = xml.partition("<name>")[2].partition("</name>")[0]
            cleanup.callback(virsh, "net-undefine", name, check=False)
        yield


@pytest.fixture(params=["provider"])
def upstream(
    request: pytest.FixtureRequest, installed: None, provider: Provider
) -> Iterator[Provider]:
    """The provider's bridge or the built-in transit as the upstream; no service runs yet."""
    for file in STATE.glob("state.db*"):
        file.unlink()
    write_config(provider.config(more="probe = 0") if request.param == "provider" else "")
    yield provider
    remove_config()


@pytest.fixture
def good(upstream: Provider) -> Iterator[str]:
    """A network that runs all the time."""
    with networks(isolated("good", "virbr10", address="10.9.0.1")):
        settle("virbr10")
        yield "good"


every_kind = pytest.mark.parametrize(
    ("upstream", "kind"),
    [*(("provider", kind) for kind in KINDS), ("host", "netboot")],
    indirect=["upstream"],
)


@every_kind
def test_nothing_is_left_a_second_later(kind: str, good: str) -> None:
    with Service() as service:
        # Its first look runs programs.
        service.idle()
        before, had = unordered(), ours()
        with defined(given_up(kind)):
            refuse()
            wait_for(lambda: ours() == had, timeout=PROMISE, what="nothing of the start")
            settles_as(before)
            assert check() == ""
        assert not service.logged("event=failed")


@every_kind
def test_nothing_is_left_after_the_next_event(kind: str, good: str) -> None:
    with networks(isolated("next", "virbr11", address="10.9.1.1")):
        settle("virbr11")
        before = unordered()
        with defined(given_up(kind)):
            refuse()
            assert "bad: is left over from a start that libvirt gave up" in check()
            began = time.monotonic()
            virsh("net-destroy", "good")
            assert time.monotonic() - began < SLOWEST_EVENT
            assert check() == ""
        virsh("net-start", "good")
        settle("virbr10")
        settles_as(before)


# -- what comes next -----------------------------------------------------------


@pytest.mark.parametrize("resident", [True, False], ids=["service", "hooks"])
def test_the_bridge_is_free_at_once(resident: bool, upstream: Provider) -> None:
    """Also for a network of another uuid: one that was created without being defined."""
    with ExitStack() as stack:
        if resident:
            stack.enter_context(Service())
        for number in range(2):
            with tc():
                file = file_of(given_up("bandwidth", f"bad{number}", uuid=f"{UUID[:-1]}{number}"))
                assert virsh("net-create", file, check=False).returncode != 0
        stack.enter_context(networks(isolated("other", "virbr20", address="10.0.0.1")))
        assert namespaces() == {"nat-other"}
        assert check() == ""


@pytest.mark.parametrize("tagged", [True, False], ids=["tagged", "no tag yet"])
def test_a_network_that_was_renamed_since(upstream: Provider, tagged: bool) -> None:
    """Its namespace under the former name goes, also where no service is left to do it."""
    with defined(given_up("bandwidth")), Service() as service:
        with tc("sleep 2; exit 2"):
            starting = spawn("virsh", "net-start", "bad")
            wait_for(lambda: "nat-bad" in namespaces())
            service.kill()
            starting.wait(timeout=20)
        assert namespaces() == {"nat-bad"}
        if not tagged:
            # As where the kill comes between the namespace's name and its tag.
            run("ip", "-n", "nat-bad", "link", "set", "lo", "alias", "")
            (names.network_directory(UUID) / "namespace").touch()
        virsh("net-undefine", "bad")
        with networks(isolated("renamed", "virbr20", uuid=UUID)):
            assert namespaces() == {"nat-renamed"}
            assert check() == ""
        # For its socket.
        service.start()


@pytest.mark.parametrize("noted", [True, False], ids=["pid file", "no pid file yet"])
def test_libvirtd_is_killed_while_a_network_starts(
    noted: bool, upstream: Provider, libvirtd: Libvirtd, good: str
) -> None:
    """Nothing stays of the start, nor of what libvirt had made."""
    with Service() as service, defined(given_up("bandwidth")):
        service.idle()
        before, had = unordered(), ours()
        with tc("exec sleep 5"):
            starting = spawn("virsh", "net-start", "bad")
            wait_for(lambda: Path("/run/libvirt/network/bad.pid").exists())
            if not noted:
                Path("/run/libvirt/network/bad.pid").unlink()
            assert libvirtd.pid
            os.kill(libvirtd.pid, signal.SIGKILL)
            wait_for(lambda: ours() == had, timeout=PROMISE, what="nothing of the start")
            assert not Path("/sys/class/net/virbr20").exists()
            starting.wait(timeout=20)
        libvirtd.start()
        wait_for(lambda: service.logged("event=connected", "network:"))
        settles_as(before)
        assert check() == ""


def test_a_dnsmasq_that_libvirt_knows_nothing_of_any_more(
    upstream: Provider, libvirtd: Libvirtd
) -> None:
    """It would keep the address from the one of the next start."""
    with defined(isolated("bad", "virbr20", uuid=UUID)):
        virsh("net-start", "bad")
        assert libvirtd.pid
        os.kill(libvirtd.pid, signal.SIGKILL)
        wait_for(lambda: libvirtd.pid is None, what="libvirtd's end")
        Path("/run/libvirt/network/bad.xml").unlink()
        run("ip", "link", "delete", "virbr20")
        # It would take out the rules of one start only.
        for program, table in product(("iptables", "ip6tables"), ("filter", "mangle")):
            for rule in run(program, "-t", table, "-S").stdout.splitlines():
                if "virbr20" in rule:
                    run(program, "-t", table, "-D", *rule.split()[1:])
        libvirtd.start()
        natns("sync")
        assert not namespaces()
        virsh("net-start", "bad")
        assert check() == ""
        virsh("net-destroy", "bad")


def test_slow_starts_are_no_failed_ones(upstream: Provider) -> None:
    """One takes longer than starts usually have; its twin waits for it."""
    slow = isolated("slow", "virbr20", more=BANDWIDTH)
    with Service() as service, defined(slow, isolated("twin", "virbr21")):
        with tc("sleep 0.6"):
            first = spawn("virsh", "net-start", "slow")
            wait_for(lambda: Path("/sys/class/net/virbr20").exists())
            second = spawn("virsh", "net-start", "twin")
            for each in (first, second):
                assert each.wait(timeout=30) == 0
        assert namespaces() == {"nat-slow", "nat-twin"}
        assert check() == ""
        assert not service.logged("event=give"), service.log()
        assert len(service.logged("event=up", "joined the prebuilt namespace")) == 2
        virsh("net-destroy", "slow")
        virsh("net-destroy", "twin")


# -- guests --------------------------------------------------------------------

LOGGED = "<serial type='pty'><log file='/run/tmp/guest.log' append='off'/></serial></devices>"


def guest(name: str, mac: str, port: int, *, logs: bool = False) -> str:
    """A guest that publishes its port 80; ``logs``: into a file that only one can have."""
    xml = domain(name, nic("good", mac), publishes=ports(f'start="{port}" to="80"'))
    return xml.replace("</devices>", LOGGED) if logs else xml


@pytest.mark.parametrize("resident", [True, False], ids=["service", "hooks"])
def test_a_guest_whose_start_fails_after_prepare(resident: bool, good: str) -> None:
    with Service() if resident else nullcontext():
        assert create(guest("first", "52:54:00:00:00:05", 8080, logs=True)).returncode == 0
        done = create(guest("second", "52:54:00:00:00:06", 8081, logs=True), check=False)
        assert "guest.log" in done.stderr
        assert check() == ""
        assert len(list(GUESTS.glob("*"))) == 1
        # Nothing of it is in the way of another.
        assert create(guest("third", "52:54:00:00:00:07", 8081)).returncode == 0
        destroy("first", "third")
        assert check() == ""


@pytest.mark.parametrize("resident", [True, False], ids=["service", "hooks"])
def test_a_network_that_goes_under_a_running_guest(
    resident: bool, good: str, upstream: Provider
) -> None:
    """Nothing counts as published; what the guest publishes comes back with the network."""
    with Service() if resident else nullcontext():
        create(guest("first", "52:54:00:00:00:05", 8080))
        xml = virsh("net-dumpxml", "good").stdout
        virsh("net-destroy", "good")
        virsh("net-undefine", "good")
        assert check() == ""
        if resident:
            time.sleep(0.5)
        natns("sync")
        assert check() == ""
        start_network(xml)
        assert check() == ""
        assert "8080" in natns("status", "good").stdout
        destroy("first")
        assert check() == ""
        assert not GUESTS.exists()


@pytest.mark.parametrize("resident", [True, False], ids=["service", "hooks"])
def test_one_of_a_guests_networks_goes(resident: bool, good: str) -> None:
    """What the guest publishes through its other NIC stays; the rest comes back."""
    one, other = "52:54:00:00:00:05", "52:54:00:00:00:06"
    published = ports('start="8080" to="80"', more=f'mac="{one}"')
    published += ports('start="8081" to="80"', more=f'mac="{other}"')
    both = nic("good", one) + nic("next", other)
    with (
        Service() if resident else nullcontext(),
        networks(isolated("next", "virbr11", address="10.9.1.1")),
    ):
        create(domain("first", both, publishes=published))
        virsh("net-destroy", "good")
        wait_for(lambda: check() == "", what="nothing wrong")
        natns("sync")
        assert check() == ""
        assert "8081" in natns("status", "next").stdout
        virsh("net-start", "good")
        assert check() == ""
        assert "8080" in natns("status", "good").stdout
        destroy("first")
        assert check() == ""
