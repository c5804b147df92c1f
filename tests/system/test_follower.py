# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libvirt tells of and no hook: applied, in packets, within a second.

"web" in network a is what happens to; the follower runs in this process.
"""

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from lab import (
    FastGuest,
    Libvirtd,
    Node,
    RealGuest,
    clear,
    isolated,
    natns,
    objects,
    remaining,
    virsh,
    wait_for,
)
from lab_domains import (
    asked,
    carries,
    create,
    destroy,
    domain,
    greeted,
    nat,
    networks,
    nic,
    ports,
    provider_world,
    settle,
    unordered,
    upstream,
    uuid_of,
)
from views import rules_of

from libvirt_natns.daemons import libvirt, libvirt_events
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.guests.guest_engine import Guests
from libvirt_natns.engine.reconcile import sync
from libvirt_natns.errors import NatnsError
from libvirt_natns.model.configuration import Config
from libvirt_natns.service.engine_pool import EnginePool
from libvirt_natns.service.libvirt_watch import HOOKS_FIRST, LibvirtWatch
from libvirt_natns.service.log import Log

MAC, SECOND = "52:54:00:00:00:05", "52:54:00:00:00:15"
A, B = "192.168.0.150", "192.168.0.160"
CLIENT = "192.168.0.77"
NAMESPACE = "urn:libvirt-natns:1"
HOOKS = Path("/etc/libvirt/hooks")
PROMISED = 1.0
"""Seconds within which a change of metadata applies."""


@pytest.fixture(autouse=True)
def nothing_left(libvirtd: Libvirtd) -> Iterator[None]:
    """As for all tests, but for the order of libvirtd's rules."""
    kept, before = objects(), unordered()
    yield
    libvirtd.start()
    clear(kept)
    assert not remaining(before, unordered)


class Looks(EnginePool):
    """Engines of the follower, which takes one to look at a guest or network."""

    def __init__(self) -> None:
        super().__init__()
        self.over = 0
        self.last = 0.0

    @contextmanager
    def engine(self, settings: Config | None = None) -> Iterator[Engine]:
        try:
            with super().engine(settings) as engine:
                yield engine
        finally:
            self.over += 1
            self.last = time.monotonic()


class Following:
    """A follower at work, and its log."""

    def __init__(self) -> None:
        self._stream = io.StringIO()
        self.sessions = Looks()
        self.rounds = 0
        self.follower = LibvirtWatch(self.sessions, Log(self._stream), self._reconcile)

    def _reconcile(self) -> None:
        with self.sessions.engine() as engine:
            sync.sync_all(
                engine,
                partial(libvirt.active_networks, wake=False),
                partial(libvirt.active_domains, wake=False),
            )
        self.rounds += 1

    def lines(self, *words: str) -> list[str]:
        """The lines of the log that contain all of these."""
        lines = self._stream.getvalue().splitlines()
        return [line for line in lines if all(word in line for word in words)]

    @contextmanager
    def settles(self) -> Iterator[None]:
        """Wait, after the body, until the follower has looked at what was started there.

        The look comes a moment after a start.  It might see a later edit, which has its
        own look.
        """
        before = self.sessions.over
        yield
        wait_for(lambda: self.sessions.over > before, what="the look after a start")
        wait_for(lambda: time.monotonic() - self.sessions.last > 2 * HOOKS_FIRST, what="rest")

    def wait_connected(self, times: int = 1) -> None:
        """Until all drivers have been connected that often, and all was reconciled since."""

        def connected() -> bool:
            lines = self.lines("event=connected")
            return all(
                sum(f"{scheme}:///" in line for line in lines) >= times
                for scheme in ("qemu", "lxc", "network")
            )

        wait_for(connected, timeout=15, what="all drivers to be connected")
        wait_for(lambda: self.rounds >= times, timeout=15, what="the reconciliation")

    @contextmanager
    def running(self) -> Iterator["Following"]:
        self.follower.start()
        try:
            self.wait_connected()
            yield self
            assert not self.lines("event=fault")
        finally:
            self.follower.stop()
            self.sessions.close()


@dataclass
class World:
    client: Node
    web: FastGuest

    def open(self, port: int) -> bool:
        """Whether a port of web's answers; looked at often, so it may not take long."""
        return asked("client", "tcp", A, port, timeout=0.15) == CLIENT


@pytest.fixture(scope="module")
def module_world(installed: None) -> Iterator[World]:
    with provider_world() as provider, ExitStack() as cleanup:
        cleanup.enter_context(
            networks(
                isolated("a", "virbr10", metadata=upstream(A)),
                isolated("plain", "virbr12", address="10.0.9.1", metadata=nat("").replace(
                    "natns:nat ", "natns:nat enabled='no' ", 1)),
            )
        )  # fmt: skip
        settle("virbr10")
        web = cleanup.enter_context(FastGuest("virbr10", MAC, "web"))
        web.dhcp()
        web.serve("tcp", 22)
        yield World(provider.neighbour("client", f"{CLIENT}/24"), web)


@pytest.fixture
def world(module_world: World, nothing_left: None) -> Iterator[World]:
    yield module_world
    destroy("web", "other")
    settle("virbr10")


@pytest.fixture
def following(world: World) -> Iterator[Following]:
    with Following().running() as running:
        yield running


def publish(inside: str, guest: str = "web") -> None:
    """Edit a running guest's metadata behind our back."""
    virsh("metadata", guest, NAMESPACE, "--live", "--key", "natns", "--set", f"<nat>{inside}</nat>")


def forwards(*ranges: str) -> str:
    """The same as ``ports``, for ``virsh metadata``, which adds the prefix itself."""
    return ports(*ranges).replace("natns:", "")


def rules(network: str = "a") -> str:
    return rules_of(network)


def gone(port: str) -> bool:
    return port not in rules()


@contextmanager
def without_hooks() -> Iterator[None]:
    """libvirt runs no hooks of any kind."""
    away = HOOKS.with_name("hooks-away")
    HOOKS.rename(away)
    Libvirtd().reload()
    try:
        yield
    finally:
        away.rename(HOOKS)
        Libvirtd().reload()


# -- metadata ------------------------------------------------------------------


def test_metadata_comes_changes_and_goes(world: World, following: Following) -> None:
    create(domain("web", nic("a", MAC)))
    publish(forwards("start='2222' to='22'", "start='2224' to='22'"))
    wait_for(lambda: world.open(2222), PROMISED, "the forward")
    with greeted(world.client, A, 2222) as moved, greeted(world.client, A, 2224) as other:
        publish(forwards("start='2223' to='22'", "start='2224' to='22'"))
        wait_for(lambda: world.open(2223), PROMISED, "the other port")
        wait_for(lambda: not carries(moved), what="the end of the moved port's connection")
        assert not world.open(2222)
        virsh("metadata", "web", "urn:somebody:else", "--live", "--key", "x", "--set", "<nat/>")
        assert carries(other)
        virsh("metadata", "web", NAMESPACE, "--live", "--remove")
        wait_for(
            lambda: len(following.lines("event=followed", "guest=web", "seconds=")) == 3,
            PROMISED, "the forwards' end",
        )  # fmt: skip
        assert not carries(other)
    assert not world.open(2223)


def test_forward_command(world: World, following: Following) -> None:
    """It has done itself what the event then tells of."""
    create(domain("web", nic("a", MAC)))
    natns("forward", "add", "web", "2222:22")
    assert world.open(2222)
    natns("forward", "remove", "web", "2222")
    assert not world.open(2222)
    assert natns("check").stdout == ""


def test_bad_metadata_changes_nothing(world: World, following: Following) -> None:
    """What is against the schema, and what another guest has already."""
    with following.settles():
        create(domain("other", nic("a", SECOND), publishes=ports("start='3333' to='22'")))
        create(domain("web", nic("a", MAC), publishes=ports("start='2222' to='22'")))
    before = rules()
    with greeted(world.client, A, 2222) as stream:
        for bad, said in (
            ("<portForward proto='tpc'/>", "tpc"),
            (forwards("start='3333' to='22'"), "is forwarded to guest other already"),
        ):
            publish(bad)
            line = wait_for(partial(following.lines, "level=warning", said))
            assert len(line) == 1
            assert "guest=web" in line[0]
        assert carries(stream)
        assert rules() == before
        publish(forwards("start='2223' to='22'"))
        wait_for(lambda: world.open(2223), PROMISED, "the forward")
        wait_for(lambda: not carries(stream), what="the connection's end")
    assert len(following.lines("level=warning")) == 2


def republish(world: World, following: Following, *ranges: str) -> None:
    """Edit the running network a's metadata; before libvirt 9.8, as if that were possible."""
    target = f"guestAddress='{world.web.addresses()[0].partition('/')[0]}'"
    inside = upstream(A, "".join(ports(each, more=target) for each in ranges))
    if libvirt_events.NETWORK_METADATA is not None:
        edited = inside.replace(f' xmlns:natns="{NAMESPACE}"', "").replace("natns:", "")
        virsh("net-metadata", "a", NAMESPACE, "--live", "--key", "natns", "--set", edited)
        return
    head, _, rest = virsh("net-dumpxml", "a").stdout.partition("<metadata>")
    xml = f"{head}<metadata>{inside}</metadata>{rest.partition('</metadata>')[2]}".encode()
    with following.sessions.engine() as engine, suppress(NatnsError):
        sync.network_changed(engine, uuid_of("a"), lambda: xml)


def test_what_is_followed_during_a_reconciliation_stays(world: World) -> None:
    """Its listing is older than the event; no other event comes."""
    create(domain("web", nic("a", MAC), publishes=ports('start="8080" to="22"')))
    sessions = EnginePool()
    uuid = virsh("domuuid", "web").stdout.strip()

    def followed() -> libvirt.ActiveDomains:
        listed = libvirt.active_domains()
        if not asked_for:
            publish(forwards('start="8081" to="22"'))
            with sessions.engine() as other:
                Guests(other).follow(uuid, lambda: libvirt.active_domains().domains[uuid])
        asked_for.append(listed)
        return listed

    asked_for: list[libvirt.ActiveDomains] = []
    try:
        with sessions.engine() as engine:
            outcome = sync.sync_all(engine, libvirt.active_networks, followed)
        assert not outcome.errors
        assert world.open(8081)
        assert not world.open(8080)
    finally:
        sessions.close()


def test_what_is_followed_while_a_reconciliation_waits_stays(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event holds the guest's lock, and the reconciliation has compared the row before."""
    create(domain("web", nic("a", MAC), publishes=ports('start="8080" to="22"')))
    sessions = EnginePool()
    uuid = virsh("domuuid", "web").stdout.strip()
    waited = Guests.locked

    def locked(guests: Guests, owner: str) -> AbstractContextManager[None]:
        monkeypatch.setattr(Guests, "locked", waited)
        publish(forwards('start="8081" to="22"'))
        with sessions.engine() as other:
            Guests(other).follow(uuid, lambda: libvirt.active_domains().domains[uuid])
        return guests.locked(owner)

    try:
        with sessions.engine() as engine:
            # The row differs from libvirt's XML, or there were nothing to wait for.
            engine.store.guests.put(uuid, "web", b"<domain><name>web</name></domain>", True)
            monkeypatch.setattr(Guests, "locked", locked)
            outcome = sync.sync_all(engine, libvirt.active_networks, libvirt.active_domains)
        assert not outcome.errors
        assert Guests.locked is waited, "the reconciliation has waited"
        assert world.open(8081)
        assert not world.open(8080)
    finally:
        sessions.close()


def test_network_metadata(world: World, following: Following) -> None:
    """A network's own forwards come, change alone, and go; refused ones change nothing."""
    create(domain("other", nic("a", SECOND), publishes=ports("start='3333' to='22'")))
    republish(world, following, "start='4444' to='22'", "start='4446' to='22'")
    wait_for(lambda: world.open(4444), PROMISED, "the forward")
    with greeted(world.client, A, 4444) as moved, greeted(world.client, A, 4446) as stays:
        republish(world, following, "start='4445' to='22'", "start='4446' to='22'")
        wait_for(lambda: world.open(4445), PROMISED, "the other port")
        wait_for(lambda: not carries(moved), what="the end of the moved port's connection")
        before = rules()
        republish(world, following, "start='3333' to='22'")
        if libvirt_events.NETWORK_METADATA is not None:
            wait_for(partial(following.lines, "level=warning", "network=a", "3333"))
        assert carries(stays)
        assert rules() == before
        assert world.open(4445)
        republish(world, following)
        wait_for(lambda: gone("4446"), PROMISED, "the forwards' end")
        wait_for(lambda: not carries(stays), what="the connection's end")
    assert "3333" in rules()


# -- devices -------------------------------------------------------------------


def test_nic_on_a_bridge(world: World, following: Following) -> None:
    """No hook tells of it; the guest must have booted to let it go.

    That the metadata names a NIC that has gone is no reason to keep it published.
    """
    named = nat(ports("start='2222' to='22'", more=f"mac='{MAC}'"))
    on_bridge = (
        f"<interface type='bridge'><mac address='{MAC}'/><source bridge='virbr10'/>"
        "<model type='virtio'/><rom enabled='no'/></interface>"
    )
    with RealGuest("web", "plain", metadata=named, interfaces=[on_bridge]) as guest:
        guest.wait_ready()
        with greeted(world.client, A, 2222) as stream:
            virsh("detach-interface", "web", "bridge", "--mac", MAC, "--live")
            wait_for(lambda: gone("2222"), timeout=20, what="the forward's end")
            wait_for(lambda: not carries(stream), what="the connection's end")
        assert not world.open(2222)
        virsh("attach-interface", "web", "bridge", "virbr10", "--mac", MAC, "--live",
              "--model", "virtio")  # fmt: skip
        wait_for(lambda: world.open(2222), PROMISED, "the forward")


# -- libvirt comes and goes -------------------------------------------------------


def test_libvirtd_restarts(world: World, following: Following) -> None:
    create(domain("web", nic("a", MAC)))
    for times, port in ((2, 2222), (3, 2223)):
        Libvirtd().restart()
        following.wait_connected(times)
        publish(forwards(f"start='{port}' to='22'"))
        wait_for(partial(world.open, port), PROMISED, "the forward")
    assert len(following.lines("event=disconnected")) == 6


def test_stopped_libvirtd_is_left_alone(world: World, following: Following) -> None:
    """Whoever stopped it wants it to stay so; what changes meanwhile is found later."""
    create(domain("web", nic("a", MAC), publishes=ports("start='2222' to='22'")))
    qemu = int(Path("/run/libvirt/qemu/web.pid").read_text())
    daemon = Libvirtd().pid
    assert daemon is not None
    os.kill(daemon, signal.SIGKILL)
    os.kill(qemu, signal.SIGKILL)
    wait_for(lambda: len(following.lines("event=disconnected")) == 3)
    assert world.open(2222)
    # The file of the killed daemon is there; so would be sockets of systemd's.
    assert Path("/run/libvirtd.pid").exists()
    Libvirtd().start()
    following.wait_connected(2)
    wait_for(lambda: gone("2222"), what="the end of the dead guest's forward")


def test_stuck_libvirtd_does_not_keep_the_follower(world: World) -> None:
    daemon = Libvirtd().pid
    assert daemon is not None
    before = threading.active_count()
    following = Following()
    with following.running():
        os.kill(daemon, signal.SIGSTOP)
        try:
            # Its last words to libvirt wait for an answer.
            stopping = threading.Thread(target=following.follower.stop)
            stopping.start()
            stopping.join(15)
            assert not stopping.is_alive()
        finally:
            os.kill(daemon, signal.SIGCONT)
    wait_for(lambda: threading.active_count() == before, timeout=15, what="the threads' end")


# -- what hooks did not tell ---------------------------------------------------


def test_guest_without_hooks(world: World, following: Following) -> None:
    """First its end and then its start."""
    xml = domain("web", nic("a", MAC), publishes=ports("start='2222' to='22'"))
    create(xml)
    assert world.open(2222)
    with without_hooks():
        destroy("web")
        wait_for(lambda: gone("2222"), what="the forward's end")
        create(xml)
        wait_for(lambda: world.open(2222), what="the forward")
    assert natns("check").stdout == ""


def test_network_without_hooks(world: World, following: Following) -> None:
    """Guests in it count from then on."""
    namespace = Path("/run/netns/nat-b")
    with networks(isolated("b", "virbr11", metadata=upstream(B))), without_hooks():
        virsh("net-destroy", "b")
        wait_for(lambda: not namespace.exists(), what="the namespace's end")
        wait_for(lambda: following.lines("event=followed", "network=b", "removed"))
        virsh("net-start", "b")
        create(domain("web", nic("b", MAC), publishes=ports("start='2222' to='22'")))
        wait_for(namespace.exists, what="the namespace")
        # From then on the address is reserved that the guest is to lease.
        wait_for(lambda: "2222" in rules("b"), timeout=15, what="the forward")
        with FastGuest("virbr11", MAC, "web-in-b") as web:
            web.dhcp()
            web.serve("tcp", 22)
            assert asked("client", "tcp", B, 2222) == CLIENT
        assert natns("check").stdout == ""
        destroy("web")
