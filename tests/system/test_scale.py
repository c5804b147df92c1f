# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many networks: the last one's start costs what the first one's did; sync hurts nobody.

What is counted is work (queries, calls of functions, bytes that the kernel tells),
not time.  The networks' bridges are there without libvirt, which takes longer to
make them than we for the rest.
"""

import shutil
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import pytest
from lab import (
    ECHO_PORT,
    FastGuest,
    Node,
    Provider,
    isolated,
    remove_config,
    run,
    wait_for,
    write_config,
)

from libvirt_natns import names
from libvirt_natns.documents import config, libvirt_xml
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.reconcile import comparison, repairs, sync
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.state.store import Store

MANY = 40
SETTLED = 5
"""By the fifth network all that is made once is there."""

BRIDGE_NF = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
NATNS = """\
<natns:nat xmlns:natns="urn:libvirt-natns:1">
  <natns:upstream name="{upstream}"/>
  <natns:ip address="10.0.0.1" prefix="24"/>
  <natns:portForward guestAddress="10.0.0.5">
    <natns:range start="{first}" end="{last}"/><natns:range start="{single}" to="80"/>
  </natns:portForward>
</natns:nat>"""


@dataclass(frozen=True)
class Work:
    """What a start took."""

    queries: int
    calls: int


def uuid_of(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012x}"


def xml_of(number: int, upstream: str) -> bytes:
    first = 20000 + 10 * number
    metadata = NATNS.format(upstream=upstream, first=first, last=first + 4, single=first + 5)
    text = isolated(
        f"n{number}", f"virbr{number}", address=None, metadata=metadata, uuid=uuid_of(number),
        more='<dns enable="no"/>',
    )  # fmt: skip
    return text.encode()


class World:
    """The provider's network, and many of ours on an upstream."""

    def __init__(self, provider: Provider, upstream: str) -> None:
        self.provider = provider
        self.upstream = upstream
        self.settings = config.load()
        self.store = Store()
        self.active: dict[str, bytes] = {}

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        with Kernel() as kernel:
            yield Engine(self.settings, self.store, kernel)

    def start(self, number: int) -> None:
        """Make a network's bridge as libvirt does, and bring the network up."""
        bridge = f"virbr{number}"
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "link", "set", bridge, "up")
        xml = xml_of(number, self.upstream)
        self.active[uuid_of(number)] = xml
        with self.engine() as engine:
            network = libvirt_xml.parse_network(xml)
            engine.prepare(network, xml)
            engine.up(network, xml)

    def sync(self) -> repairs.Outcome:
        with self.engine() as engine:
            return sync.sync_all(engine, lambda: self.active)

    def stop_all(self) -> None:
        with self.engine() as engine:
            for uuid in self.active:
                engine.down(uuid)
        for number in range(1, len(self.active) + 1):
            run("ip", "link", "del", f"virbr{number}", check=False)


@pytest.fixture(params=["provider", "host"])
def world(request: pytest.FixtureRequest, provider: Provider) -> Iterator[World]:
    """On a host whose bridged frames pass through iptables, which costs us most."""
    write_config(provider.config(more="probe = 0"))
    before = BRIDGE_NF.read_text() if BRIDGE_NF.exists() else ""
    if before:
        BRIDGE_NF.write_text("1")
    made = World(provider, str(request.param))
    yield made
    made.stop_all()
    made.store.close()
    if before:
        BRIDGE_NF.write_text(before)
    remove_config()


@contextmanager
def counted(world: World) -> Iterator[list[Work]]:
    """Count what the body does, in this thread; the list has the result at its end."""
    found: list[Work] = []
    queries: list[str] = []
    calls = 0

    def called(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    with world.store.transaction() as db:
        db.set_trace_callback(queries.append)
    sys.setprofile(called)
    try:
        yield found
    finally:
        sys.setprofile(None)
        with world.store.transaction() as db:
            db.set_trace_callback(None)
    found.append(Work(len(queries), calls))


@contextmanager
def packets(guest: Node, world: World) -> Iterator[list[int]]:
    """Send a numbered datagram to the provider's router every 10 ms; collects the lost ones."""
    lost: list[int] = []
    over = threading.Event()

    def talk() -> None:
        number = 0
        with closing(guest.open_socket("udp", timeout=2)) as sender:
            while not over.wait(0.01):
                number += 1
                sender.sendto(str(number).encode(), (world.provider.gateway, ECHO_PORT))
                try:
                    answered = sender.recv(100).endswith(f"\n{number}".encode())
                except TimeoutError:
                    answered = False
                lost.extend([] if answered else [number])
        assert number

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield lost
    finally:
        over.set()
        thread.join()


def reboot(world: World) -> None:
    """What a reboot leaves of many networks: bridges that libvirt has made again."""
    for namespace in names.NETNS_DIRECTORY.glob("nat-*"):
        run("ip", "netns", "delete", namespace.name)
    for link in Path("/sys/class/net").glob("natns-*"):
        run("ip", "link", "del", link.name, check=False)
    run("nft", "delete", "table", "inet", "natns", check=False)
    shutil.rmtree(names.RUN_DIRECTORY)
    with closing(sqlite3.connect(world.store.path)) as db, db:
        for table in ("network", "forward", "host_part"):
            db.execute(f"UPDATE {table} SET boot = 'earlier'")


def test_many_networks(world: World) -> None:
    taken = []
    for number in range(1, MANY + 1):
        with counted(world) as work:
            world.start(number)
        taken += work
    early, late = taken[SETTLED - 1], taken[-1]
    assert late.queries == early.queries
    # Some calls are repeated while the kernel or another program is at work, so the least of
    # three starts counts.
    early_calls = min(work.calls for work in taken[SETTLED - 3 : SETTLED])
    assert min(work.calls for work in taken[-3:]) <= 1.1 * early_calls

    with world.engine() as engine:
        assert comparison.host_differences(engine) == []
    with FastGuest("virbr1", name="first") as first, FastGuest(f"virbr{MANY}", name="last") as last:
        for guest in (first, last):
            guest.static("10.0.0.5/24", "10.0.0.1")
            wait_for(partial(guest.ping, world.provider.gateway))
        with packets(first, world) as lost:
            assert world.sync() == repairs.Outcome([], [])
        assert lost == []

        reboot(world)
        outcome = world.sync()
        assert outcome.errors == []
        told = {name for name, what in outcome.repaired if what.startswith(comparison.NO_ROUTER)}
        assert told == {f"n{number}" for number in range(1, MANY + 1)}
        for guest in (first, last):
            wait_for(partial(guest.ping, world.provider.gateway))
        assert world.sync() == repairs.Outcome([], [])


def test_one_leaves_and_the_others_stay(world: World) -> None:
    """A network that goes takes its part of the host's rules along, and no other."""
    for number in (1, 2, 3):
        world.start(number)
    before = run("nft", "-s", "list", "ruleset").stdout
    assert "virbr2" in before
    with world.engine() as engine:
        engine.down(uuid_of(2))
        assert "virbr2" not in run("nft", "-s", "list", "ruleset").stdout
        assert comparison.host_differences(engine) == []
        xml = world.active[uuid_of(2)]
        network = libvirt_xml.parse_network(xml)
        engine.up(network, xml)
        assert comparison.host_differences(engine) == []
        # Somebody takes the rules away: the next change puts all of them back.
        run("nft", "delete", "table", "inet", "natns")
        engine.up(network, xml)
        assert comparison.host_differences(engine) == []
