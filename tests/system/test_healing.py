# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is broken behind our back is whole again within two seconds, and nothing else is touched.

The parts of the service that see and repair damage run inside the test; the
hooks do their work in processes of their own, as without a service.
"""

import os
import re
import signal
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from healing import PATIENCE, Net, Parts, Stream, heals, network, open_files
from lab import (
    ECHO_PORT,
    FastGuest,
    Provider,
    forward_at_once,
    isolated,
    remove_config,
    run,
    start_network,
    virsh,
    wait_for,
    write_config,
)

from libvirt_natns import names
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine.observer import HOST
from libvirt_natns.kernel import netns
from libvirt_natns.service import healer
from libvirt_natns.service.kernel_watch import KernelWatch
from libvirt_natns.service.repair import repair
from libvirt_natns.service.watched import ENDED, Watched


@pytest.fixture(scope="module")
def world(installed: None) -> Iterator[Provider]:
    """The provider network and the hooks, for all tests of this file."""
    with Provider() as provider:
        write_config(provider.config(firewall="nftables", more="probe = 0"))
        yield provider
        remove_config()


@pytest.fixture(scope="module")
def pair(world: Provider) -> Iterator[tuple[Net, Net]]:
    """Two networks with one subnet."""
    with network("a", "virbr10") as first, network("b", "virbr11") as second:
        for bridge in ("virbr10", "virbr11"):
            forward_at_once(bridge)
            state = Path("/sys/class/net", bridge, "operstate")
            wait_for(lambda: state.read_text() == "up\n", what=f"{bridge}")  # noqa: B023
        yield first, second


@pytest.fixture(scope="module")
def guest(pair: tuple[Net, Net]) -> Iterator[FastGuest]:
    """A guest in the first of them."""
    with FastGuest("virbr10") as machine:
        machine.static("10.0.0.5/24", "10.0.0.1")
        assert machine.ping("192.168.0.1", timeout=5)
        yield machine


@pytest.fixture(scope="module")
def all_parts(world: Provider) -> Iterator[Parts]:
    with Parts() as running:
        yield running


@pytest.fixture
def parts(all_parts: Parts, pair: tuple[Net, Net]) -> Parts:
    """Watch and healer, which look after the pair and remember nothing of it."""
    for each in pair:
        all_parts.healer.forget(each.uuid)
    all_parts.healer.forget(HOST)
    all_parts.follow(*pair)
    wait_for(all_parts.idle, timeout=PATIENCE, what="idle healer")
    return all_parts


UNCONCERNED = {
    "default route": "ip -n {ns} route delete default",
    "foreign address": "ip -n {ns} address add 10.9.9.9/24 dev upstream",
    "dnsmasq": "kill -KILL {dnsmasq}",
    "forwarding": "ip netns exec {ns} sysctl -qw net.ipv4.ip_forward=0",
    "strict paths": "ip netns exec {ns} sysctl -qw net.ipv4.conf.all.rp_filter=0",
    "rules flushed": "ip netns exec {ns} nft flush table inet natns",
    "a rule more": "ip netns exec {ns} nft insert rule inet natns input drop",
    "private port detached": "ip link set {private} nomaster",
    "upstream port detached": "ip link set {upstream} nomaster",
    "private port down": "ip link set {private} down",
    "upstream port down": "ip link set {upstream} down",
    "address back on the bridge": "ip address add 10.0.0.1/24 dev virbr10",
    "MTU": "ip -n {ns} link set upstream mtu 1400",
    "private patch, outer end": "ip link delete {private}",
    "private patch, inner end": "ip -n {ns} link delete virbr10",
    "gateway": "ip -n {ns} address delete 10.0.0.1/24 dev virbr10",
    "private link down": "ip -n {ns} link set virbr10 down",
}
"""Damage after which connections go on."""

CONCERNED = {
    "namespace": "ip netns delete {ns}",
    "rules deleted": "ip netns exec {ns} nft delete table inet natns",
    "upstream patch, outer end": "ip link delete {upstream}",
    "upstream patch, inner end": "ip -n {ns} link delete upstream",
    "upstream link down": "ip -n {ns} link set upstream down",
    "upstream address": "ip -n {ns} address flush dev upstream",
}
"""Damage that may end connections: the kernel forgets what it translated to an address
that goes, and answers itself what comes in while nothing is translated."""

KEEPS_RULES = {
    "default route", "foreign address", "dnsmasq", "forwarding", "strict paths",
    "private port detached", "upstream port detached", "MTU", "gateway",
}  # fmt: skip
KEEPS_DNSMASQ = UNCONCERNED.keys() - {
    "dnsmasq", "private patch, outer end", "private patch, inner end",
}  # fmt: skip


@pytest.mark.parametrize("what", UNCONCERNED)
def test_heals_under_a_stream(
    what: str, parts: Parts, pair: tuple[Net, Net], guest: FastGuest, world: Provider
) -> None:
    net, other = pair
    table, daemon, untouched = net.table, net.dnsmasq, other.identity
    stream = Stream(guest, world.gateway)
    try:
        assert stream.flows()
        heals(parts, UNCONCERNED[what], net)
        assert stream.flows()
    finally:
        stream.close()
    if what in KEEPS_RULES:
        assert net.table == table
    if what in KEEPS_DNSMASQ:
        assert net.dnsmasq == daemon
    assert net.dnsmasq is not None
    assert other.identity == untouched
    assert not parts.said("healed", other.name)


@pytest.mark.parametrize("what", CONCERNED)
def test_heals(
    what: str, parts: Parts, pair: tuple[Net, Net], guest: FastGuest, world: Provider
) -> None:
    net, other = pair
    untouched = other.identity
    heals(parts, CONCERNED[what], net)
    with guest.connect(world.gateway, ECHO_PORT, timeout=PATIENCE) as stream:
        assert stream.recv(100).startswith(b"192.168.0.1")
    assert other.identity == untouched


def test_several_at_once_are_one_repair(parts: Parts, pair: tuple[Net, Net]) -> None:
    earlier = len(parts.said("healed", "a"))
    heals(
        parts, "ip -n {ns} route delete default; kill -KILL {dnsmasq}; ip link delete {private}",
        pair[0],
    )  # fmt: skip
    wait_for(parts.idle, timeout=PATIENCE)
    assert len(parts.said("healed", "a")) == earlier + 1


OWN_ADDRESS = (
    '<natns:nat xmlns:natns="urn:libvirt-natns:1"><natns:ip address="10.0.0.1" prefix="24"/>'
    "</natns:nat>"
)

HOSTS = {
    "transit bridge": "ip link delete natns-host",
    "transit address": "ip address flush dev natns-host",
    "transit down": "ip link set natns-host down",
    "forwarding": "sysctl -qw net.ipv4.conf.natns-host.forwarding=0",
    "rules": "nft delete table inet natns",
}


def test_heals_the_hosts_part(parts: Parts, guest: FastGuest) -> None:
    metadata = (
        '<natns:nat xmlns:natns="urn:libvirt-natns:1"><natns:upstream name="host"/></natns:nat>'
    )
    with network("shared", "virbr12", metadata) as net, FastGuest("virbr12", name="g2") as other:
        other.static("10.0.0.6/24", "10.0.0.1")
        parts.follow(net)
        for what, command in HOSTS.items():
            parts.healer.forget(HOST)
            wait_for(parts.idle, timeout=PATIENCE)
            heals(parts, command, net, "host")
            wait_for(lambda: not parts.wrong(net.uuid), timeout=PATIENCE, what=what)
            assert other.ping("192.168.0.1", timeout=5), what
    parts.healer.forget(net.uuid)


def test_damage_during_our_own_change_of_the_host_heals(parts: Parts) -> None:
    metadata = (
        '<natns:nat xmlns:natns="urn:libvirt-natns:1"><natns:upstream name="host"/></natns:nat>'
    )
    with network("shared", "virbr12", metadata) as net:
        parts.follow(net)
        wait_for(parts.idle, timeout=PATIENCE)
        with parts.watch.changing(HOST):
            run("ip", "address", "flush", "dev", "natns-host")
            time.sleep(0.2)  # the kernel's messages are read meanwhile
        wait_for(lambda: not parts.wrong(), timeout=PATIENCE, what="natns-host's address")
    parts.healer.forget(net.uuid)


def test_damage_during_our_own_change_of_a_network_heals(
    parts: Parts, pair: tuple[Net, Net]
) -> None:
    """The kernel does not tell who has changed what, so the network is looked at afterwards."""
    net = pair[0]
    with parts.watch.changing(net.uuid):
        run("ip", "-n", net.namespace, "route", "delete", "default")
        time.sleep(0.2)  # the kernel's message is read meanwhile
    wait_for(lambda: not parts.wrong(net.uuid), timeout=PATIENCE, what="the default route")
    parts.healer.forget(net.uuid)


def test_damage_to_a_network_that_is_not_yet_watched_heals(parts: Parts) -> None:
    """The service looks at each network that it begins to watch."""
    parts.finds_new_networks = False
    with network("unwatched", "virbr12") as net:
        run("ip", "-n", net.namespace, "route", "delete", "default")
        parts.watch.follow([net.uuid])
        wait_for(lambda: not parts.wrong(net.uuid), timeout=PATIENCE, what="the default route")
    parts.finds_new_networks = True
    parts.healer.forget(net.uuid)


def test_an_address_where_libvirt_sets_none_heals(parts: Parts) -> None:
    """A network with its address in the metadata: guests would find two gateways."""
    xml = isolated("own", "virbr17", address=None, metadata=OWN_ADDRESS)
    start_network(xml)
    try:
        net = Net("own")
        parts.follow(net)
        heals(parts, "ip address add 10.0.0.1/24 dev virbr17", net)
        assert "10.0.0.1" not in run("ip", "address", "show", "dev", "virbr17").stdout
    finally:
        virsh("net-destroy", "own", check=False)
        virsh("net-undefine", "own")


@contextmanager
def fighter(command: str) -> Iterator[None]:
    """Somebody who undoes something all the time."""
    loop = f"while :; do {command} 2>/dev/null; sleep 0.05; done"
    process = subprocess.Popen(["sh", "-c", loop], start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


FOUGHT = {
    "table": ("ip netns exec nat-a nft delete table inet natns", "firewall of nat-a is missing"),
    "route": ("ip -n nat-a route delete default", "route default via 192.168.0.1"),
}


@pytest.mark.parametrize("what", FOUGHT)
def test_gives_up_loudly(what: str, parts: Parts, pair: tuple[Net, Net]) -> None:
    command, told = FOUGHT[what]
    net, other = pair
    earlier = len(parts.said("given up", "a"))
    with fighter(command):
        wait_for(lambda: net.uuid in parts.healer.health(), timeout=60, what="giving up")
        assert told in parts.healer.health()[net.uuid]
        lines = parts.said("given up", "a")
        assert len(lines) == earlier + 1
        assert lines[-1].startswith("level=error")
        healed = len(parts.said("healed", "a"))
        heals(parts, UNCONCERNED["MTU"], other)
        assert len(parts.said("healed", "a")) == healed
        assert other.uuid not in parts.healer.health()
    assert parts.wrong(net.uuid)
    # Somebody brings it up again.
    parts.healer.relent("a")
    assert not parts.healer.health()
    parts.healer.suspect(net.uuid)
    wait_for(lambda: not parts.wrong(net.uuid), timeout=PATIENCE)
    heals(parts, UNCONCERNED["MTU"], net)


def test_what_cannot_be_repaired_is_given_up_until_something_changes(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, world: Provider
) -> None:
    monkeypatch.setattr(healer, "AGAIN", 0.05)
    monkeypatch.setattr(healer, "BRIDGE_PAUSE", 0.05)
    monkeypatch.setattr(healer, "RECHECK", 0.1)
    with network("c", "virbr14") as net:
        parts.follow(net)
        run("ip", "link", "set", "virbr14", "name", "away")
        try:
            wait_for(lambda: net.uuid in parts.healer.health(), timeout=PATIENCE)
            assert "virbr14" in parts.healer.health()[net.uuid]
            assert len(parts.said("given up", "c")) == 1
        finally:
            run("ip", "link", "set", "away", "name", "virbr14")
        # Nobody told the healer; it has seen the bridge come back.
        wait_for(lambda: net.uuid not in parts.healer.health(), timeout=PATIENCE)
        assert parts.said("recovered", "c") or parts.said("healed", "c")


def test_own_verbs_are_no_damage(parts: Parts, pair: tuple[Net, Net]) -> None:
    net = pair[0]
    before = parts.log.getvalue()
    for _ in range(5):
        with parts.sessions.engine() as engine:
            record = engine.store.networks.get(net.uuid)
            assert record is not None
            parsed = libvirt_xml.parse_network(record.document)
            engine.down(net.uuid)
            engine.up(parsed, record.document)
    assert parts.watch.settled(PATIENCE)
    wait_for(parts.idle, timeout=PATIENCE)
    assert parts.log.getvalue() == before
    heals(parts, "ip -n {ns} route delete default", net)


def test_networks_that_start_and_stop_elsewhere_are_no_damage(
    parts: Parts, world: Provider
) -> None:
    with network("d", "virbr15") as net:
        for _ in range(3):
            virsh("net-destroy", "d")
            virsh("net-start", "d")
        healed = parts.said("healed", "d")
        failed = parts.said("not healed", "d")
        # Nobody has told us of it: its namespace did.
        wait_for(lambda: parts.watch.follows(net.uuid), timeout=PATIENCE)
        wait_for(parts.idle, timeout=PATIENCE)
        assert not healed
        assert not failed
        heals(parts, "ip -n {ns} route delete default", net)
    wait_for(lambda: not parts.watch.follows(net.uuid), timeout=PATIENCE)
    assert not netns.exists("nat-d")


def test_a_network_that_goes_down_meanwhile_stays_down(parts: Parts, world: Provider) -> None:
    """Its end comes between the look at its record and the lock."""
    with network("e", "virbr16") as net:
        with parts.sessions.engine() as engine:
            record = engine.store.networks.get(net.uuid)
            assert record is not None
            virsh("net-destroy", "e")
            # Nor would an interface of that name be enough.
            run("ip", "link", "add", "virbr16", "type", "bridge")
            run("ip", "link", "set", "virbr16", "up")
            try:
                with pytest.raises(Exception, match="is not up"):
                    repair(engine, net.uuid, record)
            finally:
                run("ip", "link", "delete", "virbr16")
            again = engine.store.networks.get(net.uuid)
            assert again is not None
            assert again.state == "down"
    assert not netns.exists("nat-e")


def test_idle_costs_nothing(parts: Parts, pair: tuple[Net, Net]) -> None:
    threads = [
        thread for thread in threading.enumerate() if re.match("watch$|healer-", thread.name)
    ]
    assert len(threads) == 1 + healer.WORKERS
    clocks = [time.pthread_getcpuclockid(thread.ident) for thread in threads if thread.ident]

    def used() -> float:
        return sum(map(time.clock_gettime, clocks))

    before = used()
    time.sleep(3)  # idleness is what is measured
    assert used() - before < 0.03


def test_many_networks_leave_nothing() -> None:
    """Fifty namespaces, each with a process, as the watch sees them."""
    watched: dict[str, Watched] = {}
    suspected: list[str] = []
    watch = KernelWatch(watched.get, suspected.append)
    watch.start()
    try:
        descriptors = open_files()
        tracemalloc.start()
        with many(50, watched) as processes:
            empty = tracemalloc.get_traced_memory()[0]
            watch.follow(watched)
            assert watch.settled(PATIENCE)
            assert suspected == []
            each = (tracemalloc.get_traced_memory()[0] - empty) / 50
            assert each < 30_000
            run("ip", "-n", "many-7", "link", "set", "lo", "up")
            wait_for(lambda: suspected, what="an event")
            assert set(suspected) == {"uuid-7"}
            suspected.clear()
            # The watch looks again for a daemon: who has started one ends as well.
            watched["uuid-9"] = replace(watched["uuid-9"], dnsmasq=ENDED)
            processes[9].kill()
            wait_for(lambda: "uuid-9" in suspected, what="a process's end")
            # The kernel tells of a link that came up in several messages.
            assert set(suspected) <= {"uuid-7", "uuid-9"}
            gone = list(watched)
            watched.clear()
            watch.follow(gone)
            assert watch.settled(PATIENCE)
        assert open_files() == descriptors
    finally:
        tracemalloc.stop()
        watch.stop()


@contextmanager
def many(count: int, watched: dict[str, Watched]) -> Iterator[list[subprocess.Popen[bytes]]]:
    names_of = [f"many-{number}" for number in range(count)]
    processes = []
    try:
        for number, name in enumerate(names_of):
            run("ip", "netns", "add", name)
            process = subprocess.Popen(["sleep", "1000"])
            processes.append(process)
            uuid = f"uuid-{number}"
            ports = (f"natin-{number}", f"natup-{number}")
            watched[uuid] = Watched(uuid, name, f"br-{number}", ports, process.pid)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for name in names_of:
            run("ip", "netns", "delete", name, check=False)


def test_the_directory_of_namespaces_may_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "netns"
    monkeypatch.setattr(names, "NETNS_DIRECTORY", directory)
    suspected: list[str] = []
    appeared: list[str] = []
    watch = KernelWatch(
        lambda uuid: Watched(uuid, "nat-x", "br", ()), suspected.append, appeared.append
    )
    watch.start()
    try:
        watch.follow(["x"])
        assert watch.settled(PATIENCE)
        # Its namespace is missing, which is told once.
        assert suspected == ["x"]
        directory.mkdir()
        (directory / "nat-y").touch()
        (directory / "other").touch()
        wait_for(lambda: appeared, what="a namespace of ours")
        assert appeared == ["nat-y"]
        (directory / "nat-x").touch()
        wait_for(lambda: len(suspected) == 2, what="the network's")
        with watch.changing("x"), watch.changing("x"):
            (directory / "nat-x").unlink()
        assert watch.settled(PATIENCE)
        (directory / "nat-x").touch()
        wait_for(lambda: len(suspected) == 3, what="the network's")
        assert appeared == ["nat-y"]
    finally:
        watch.stop()
