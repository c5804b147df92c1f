# SPDX-License-Identifier: LGPL-2.1-or-later
"""What holds in a process that lives on: sessions, namespaces, many threads.

The engine itself is driven, with bridges made by the test.
"""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from socket import create_server

import pytest
from lab import (
    Provider,
    Snapshot,
    isolated,
    remaining,
    remove_config,
    run,
    snapshot,
    wait_for,
    write_config,
)

from libvirt_natns import names
from libvirt_natns.daemons import dnsmasq
from libvirt_natns.documents import config, libvirt_xml
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.prebuilt import Built
from libvirt_natns.engine.reconcile.comparison import network_differences
from libvirt_natns.errors import FirewallError, NatnsError
from libvirt_natns.firewall import limits, nft, nftables
from libvirt_natns.kernel import listening_ports, netns
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.kernel.veth import VethPair
from libvirt_natns.service.engine_pool import EnginePool
from libvirt_natns.state.store import Store

OWNER = "c0ffee00-0000-4000-8000-000000000001"
METADATA = (
    '<natns:nat xmlns:natns="urn:libvirt-natns:1"><natns:ip address="10.0.0.1" prefix="24">'
    '<natns:dhcp><natns:range start="10.0.0.100" end="10.0.0.200"/></natns:dhcp></natns:ip>'
    '<natns:portForward guestAddress="10.0.0.5"><natns:range start="{port}" to="80"/>'
    "</natns:portForward></natns:nat>"
)
WORKERS = 4
NETWORKS = 12


@pytest.fixture
def upstream(provider: Provider) -> Iterator[Provider]:
    write_config(provider.config(more="probe = 0"))
    yield provider
    remove_config()


def settles_as(before: Snapshot) -> None:
    assert remaining(before) == ""


# -- namespaces ------------------------------------------------------------------


def test_namespaces_are_those_of_ip() -> None:
    """ip(8) lists, enters and deletes a namespace that a session has made."""
    assert "nat-" not in run("ip", "netns", "list").stdout
    with Kernel() as kernel:
        for name in ("nat-first", "nat-second"):
            kernel.create_namespace(name, OWNER)
        inodes = {name: netns.inode(name) for name in ("nat-first", "nat-second", None)}
        assert len(set(inodes.values())) == 3
        for name in ("nat-first", "nat-second"):
            assert name in run("ip", "netns", "list").stdout
            assert run("ip", "-n", name, "-br", "link").stdout.split()[:2] == ["lo", "DOWN"]
            assert kernel.namespace_owner(name) == OWNER
            run("ip", "netns", "delete", name)
            assert kernel.namespace_owner(name) is None
            # Missing is success.
            kernel.delete_namespace(name)


def test_a_session_does_not_keep_a_namespace_that_another_deletes() -> None:
    """Its end shows in that of its links."""
    with Kernel() as first, Kernel() as second:
        with first.work():
            first.create_namespace("nat-shared", OWNER)
            mac = names.mac(OWNER, "inner")
            first.patches.create(
                VethPair("nat-shared", "inner", mac, "outer", mac, "natns-test", 1500)
            )
            first.at("nat-shared").links.set_up("inner")
            assert first.at("nat-shared").addresses.of("inner") == set()
        assert second.namespace_owner("nat-shared") == OWNER
        second.delete_namespace("nat-shared")
        wait_for(lambda: second.host.links.get("outer") is None)
        # One of the same name is not taken for the first.
        second.create_namespace("nat-shared", OWNER)
        assert first.at("nat-shared").links.get("inner") is None
        second.delete_namespace("nat-shared")


def test_ports_of_the_host_are_listed_while_another_thread_is_in_a_namespace() -> None:
    """The service's threads work for several networks at once, each in its namespace."""
    with Kernel() as kernel, create_server(("", 0)) as server, ThreadPoolExecutor(1) as pool:
        kernel.create_namespace("nat-first", OWNER)
        try:
            # A thread begins in the namespace of the thread that starts it.
            assert pool.submit(netns.inode, None).result() == netns.inode(None)
            with netns.entered("nat-first"):
                assert listening_ports.listening("tcp") == set()
                found = pool.submit(listening_ports.listening, "tcp").result()
            assert server.getsockname()[1] in found
        finally:
            kernel.delete_namespace("nat-first")


# -- firewall --------------------------------------------------------------------


def test_one_change_of_the_rules_is_one_generation() -> None:
    script = "table inet natns {\n chain x {\n  meta l4proto { tcp, udp } counter accept\n }\n}\n"
    run("ip", "netns", "add", "rules")
    try:
        assert nftables.listing("rules") == ""
        before = int(nftables.generation("rules"))
        nft.load("rules", script)
        assert int(nftables.generation("rules")) == before + 1
        listing = nftables.listing("rules")
        assert "meta l4proto { 6, 17 } counter" in listing
        with pytest.raises(FirewallError, match="nft refused the rules"):
            nft.load("rules", "add rule inet natns nowhere accept\n")
        assert nftables.listing("rules") == listing
        assert int(nftables.generation("rules")) == before + 1
        nftables.clear("rules")
        assert nftables.listing("rules") == ""
    finally:
        run("ip", "netns", "delete", "rules")


def test_the_whole_ruleset_is_json() -> None:
    nft.load(None, "table inet natns { chain x { counter accept; }; }\n")
    try:
        items = json.loads(nft.ruleset_json())["nftables"]
        tables = [item["table"] for item in items if "table" in item]
        assert ("inet", "natns") in {(table["family"], table["name"]) for table in tables}
        rules = [item["rule"] for item in items if "rule" in item]
        (own,) = (rule for rule in rules if rule["table"] == "natns")
        # Without numbers of packets.
        assert own["expr"] == [{"counter": None}, {"accept": None}]
        assert "counter accept" in nft.list_chain("inet natns x")
    finally:
        nftables.clear(None)


def test_both_tables_are_listed_as_each_alone() -> None:
    run("ip", "netns", "add", "rules")
    try:
        for table in ("inet natns", "arp natns"):
            nft.load("rules", f"table {table} {{ chain x {{ counter accept; }}; }}\n")
        tables = [nftables.TABLE, limits.ARP_TABLE]
        nft.load("rules", "table ip foreign { chain x { counter accept; }; }\n")
        assert nftables._existing_tables("rules") == tables
        listed = [
            run("ip", "netns", "exec", "rules", "nft", "-s", "list", "table", *table.split())
            for table in tables
        ]
        assert nftables.listing("rules") == "".join(done.stdout for done in listed)
    finally:
        run("ip", "netns", "delete", "rules")


# -- many threads ----------------------------------------------------------------


class Resident:
    """What a resident process shares between its threads; each has an engine of its own."""

    def __init__(self) -> None:
        self._built = Built()
        self._own = threading.local()
        self._opened: list[Engine] = []
        self._threads: list[threading.Thread] = []

    def later(self, work: Callable[[], None]) -> None:
        def quietly() -> None:
            # What is done later may find its network gone.
            with suppress(NatnsError):
                work()

        self._threads.append(threading.Thread(target=quietly))
        self._threads[-1].start()

    @property
    def engine(self) -> Engine:
        if not hasattr(self._own, "engine"):
            kernel = Kernel()
            self._own.engine = Engine(
                config.load(), Store(), kernel, later=self.later, built=self._built
            )
            self._opened.append(self._own.engine)
        found: Engine = self._own.engine
        return found

    def close(self) -> None:
        for thread in self._threads:
            thread.join()
        for engine in self._opened:
            engine.kernel.close()


def test_what_was_seen_ahead_of_the_lock_is_seen_anew(upstream: Provider) -> None:
    """Another one may have repaired the network while this one waited for its lock."""
    xml = xml_of(1)
    network = libvirt_xml.parse_network(xml)
    run("ip", "link", "add", network.bridge or "", "type", "bridge")
    run("ip", "link", "set", network.bridge or "", "up")
    resident = EnginePool()
    try:
        with resident.engine() as engine:
            engine.prepare(network, xml)
            engine.up(network, xml)
            record = engine.store.networks.get(network.uuid)
            assert record is not None
        port = names.private_patch(network.uuid)
        with resident.engine() as engine:
            run("ip", "link", "set", port, "nomaster")
            assert network_differences(engine, record)
            run("ip", "link", "set", port, "master", network.bridge or "")
            assert engine.up(network, xml) == []
    finally:
        with resident.engine() as engine:
            engine.down(network.uuid)
        resident.close()
        run("ip", "link", "delete", network.bridge or "")


def test_a_network_that_others_made_anew_is_seen_as_it_is(upstream: Provider) -> None:
    """The look before the lock has opened sockets in a namespace that is gone by now."""
    xml = xml_of(1)
    network = libvirt_xml.parse_network(xml)
    run("ip", "link", "add", network.bridge or "", "type", "bridge")
    run("ip", "link", "set", network.bridge or "", "up")
    resident = EnginePool()
    try:
        for verb in ("repair", "up"):
            with resident.engine() as engine, resident.engine() as other:
                other.prepare(network, xml)
                other.up(network, xml)
                record = engine.store.networks.get(network.uuid)
                assert record is not None
                assert network_differences(engine, record) == []
                other.down(network.uuid)
                other.prepare(network, xml)
                other.up(network, xml)
                patch = engine.kernel.host.links.get(names.private_patch(network.uuid))
                did = engine.repair(record) if verb == "repair" else engine.up(network, xml)
                assert did == []
                assert engine.kernel.host.links.get(names.private_patch(network.uuid)) == patch
                other.down(network.uuid)
    finally:
        with resident.engine() as engine:
            engine.down(network.uuid)
        resident.close()
        run("ip", "link", "delete", network.bridge or "")


def xml_of(number: int) -> bytes:
    uuid = f"c0ffee00-0000-4000-8000-{number:012x}"
    metadata = METADATA.format(port=8000 + number)
    return isolated(
        f"n{number}", f"virbr{50 + number}", address=None, metadata=metadata, uuid=uuid
    ).encode()


def test_threads_that_share_a_process(upstream: Provider) -> None:
    before = snapshot()
    resident = Resident()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))

    def start(number: int) -> None:
        xml = xml_of(number)
        network = libvirt_xml.parse_network(xml)
        resident.engine.prepare(network, xml)
        resident.engine.build(network, xml)
        run("ip", "link", "add", network.bridge or "", "type", "bridge")
        run("ip", "link", "set", network.bridge or "", "up")
        resident.engine.up(network, xml)

    def check(number: int) -> list[str]:
        network = libvirt_xml.parse_network(xml_of(number))
        record = resident.engine.store.networks.get(network.uuid)
        assert record is not None
        assert dnsmasq.running(network.uuid, record.namespace)
        return network_differences(resident.engine, record)

    def stop(number: int) -> None:
        network = libvirt_xml.parse_network(xml_of(number))
        run("ip", "link", "delete", network.bridge or "")
        resident.engine.down(network.uuid)

    with ThreadPoolExecutor(WORKERS) as workers:
        for _ in range(2):
            list(workers.map(start, range(NETWORKS)))
            assert list(workers.map(check, range(NETWORKS))) == [[]] * NETWORKS
            list(workers.map(stop, range(NETWORKS)))
            settles_as(before)
    resident.close()
    # A database each; nothing for each network.
    assert len(list(Path("/proc/self/fd").iterdir())) < descriptors + 4 * WORKERS
