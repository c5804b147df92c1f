# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's life as libvirt has it: what it publishes comes and goes with it, and alone.

"web" in network a is what each test starts and ends; "other" in network b, a twin
with the same MAC, runs all along, and its connection must outlive everything.
"""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import (
    FastGuest,
    Libvirtd,
    Node,
    Provider,
    RealGuest,
    clear,
    isolated,
    natns,
    objects,
    remaining,
    run,
    virsh,
    wait_for,
    write_config,
)
from lab_domains import (
    asked,
    carries,
    create,
    define,
    destroy,
    domain,
    greeted,
    nat,
    networks,
    nic,
    ports,
    provider_world,
    refusal,
    settle,
    start,
    unordered,
    upstream,
)
from views import rules_of

MAC, SECOND = "52:54:00:00:00:05", "52:54:00:00:00:15"
A, B = "192.168.0.150", "192.168.0.160"
CLIENT = "192.168.0.77"
GUESTS = Path("/run/libvirt-natns/guests")
HOOK = Path("/etc/libvirt/hooks/qemu")
PUBLISHED = ports("start='2222' to='22'") + ports("start='2222' to='22'", more="proto='udp'")


@dataclass
class World:
    provider: Provider
    client: Node
    stream: socket.socket

    def open(self, port: int = 2222, address: str = A) -> bool:
        return asked("client", "tcp", address, port, timeout=0.7) == CLIENT

    def lives(self) -> bool:
        """Whether the other guest's connection still carries something."""
        return carries(self.stream)


def serving(bridge: str, name: str) -> FastGuest:
    guest = FastGuest(bridge, MAC, name)
    guest.dhcp()
    guest.serve("tcp", 22)
    guest.serve("udp", 22)
    return guest


@pytest.fixture(autouse=True)
def nothing_left(libvirtd: Libvirtd) -> Iterator[None]:
    """As for all tests, but for that order."""
    kept, before = objects(), unordered()
    yield
    clear(kept)
    assert not remaining(before, unordered)


@pytest.fixture(scope="module")
def module_world(installed: None) -> Iterator[World]:
    with provider_world() as provider, ExitStack() as cleanup:
        cleanup.enter_context(
            networks(
                isolated("a", "virbr10", metadata=upstream(A)),
                isolated("b", "virbr11", metadata=upstream(B)),
            )
        )
        settle("virbr10")
        settle("virbr11")
        cleanup.callback(destroy, "other")
        create(domain("other", nic("b", MAC), publishes=ports("start='2223' to='22'")))
        cleanup.enter_context(serving("virbr11", "other"))
        client = provider.neighbour("client", f"{CLIENT}/24")
        yield World(provider, client, cleanup.enter_context(greeted(client, B, 2223)))


@pytest.fixture
def world(module_world: World, nothing_left: None) -> Iterator[World]:
    """The other guest is there before and after, and nothing of web is left."""
    records = sorted(GUESTS.iterdir())
    yield module_world
    assert module_world.lives()
    virsh("destroy", "web", check=False)
    assert sorted(GUESTS.iterdir()) == records


@pytest.fixture
def web(world: World) -> Iterator[FastGuest]:
    """The domain web, defined and started, and the guest that speaks for it."""
    define(domain("web", nic("a", MAC), publishes=PUBLISHED))
    start("web")
    with serving("virbr10", "web") as guest:
        assert world.open()
        yield guest


def rules(network: str = "a") -> str:
    return rules_of(network)


def test_crash(world: World, web: FastGuest) -> None:
    """qemu is killed; libvirt notices."""
    os.kill(int(Path("/run/libvirt/qemu/web.pid").read_text()), signal.SIGKILL)
    wait_for(lambda: "2222" not in rules(), what="the end of the crashed guest's forwards")
    assert not world.open()


def test_suspended_and_reset(world: World, web: FastGuest) -> None:
    """One life as far as libvirt is concerned: connections go on."""
    with greeted(world.client, A, 2222) as stream:
        for verb in ("resume", "suspend", "resume", "reset", "suspend"):
            virsh(verb, "web")
            assert carries(stream), verb
        assert world.open()


def test_saved_and_restored(world: World, web: FastGuest) -> None:
    """A real save: restoring would take anything on stdout for the guest's XML."""
    image = Path("/var/lib/libvirt/qemu/web.saved")
    for save, restore in (
        (("save", "web", os.fspath(image)), ("restore", "--paused", os.fspath(image))),
        (("managedsave", "web"), ("start", "--paused", "web")),
    ):
        virsh(*save)
        assert not world.open(), save
        assert "10.0.0.100" not in rules()
        virsh(*restore)
        assert world.open(), restore
    image.unlink()


def test_libvirtd_restarts(world: World, web: FastGuest) -> None:
    before = rules()
    with greeted(world.client, A, 2222) as stream:
        Libvirtd().restart()
        assert virsh("domstate", "web").stdout.strip() == "paused"
        assert carries(stream)
        # Not even a configuration that nobody can read kills a guest.
        saved = Path("/etc/libvirt-natns/config.toml").read_text()
        write_config("firewall = 3\n")
        try:
            Libvirtd().restart()
            assert virsh("domstate", "web").stdout.strip() == "paused"
        finally:
            write_config(saved)
        assert carries(stream)
    assert rules() == before


def test_reconnect_publishes_what_was_missed(world: World, web: FastGuest) -> None:
    """Rules that were lost meanwhile come back."""
    run("nft", "flush", "map", "inet", "natns", "ports", namespace="nat-a")
    assert not world.open()
    Libvirtd().restart()
    wait_for(world.open, what="the forwards")


def test_network_restarts(world: World, web: FastGuest) -> None:
    """Under the running guest: the forwards come back with the network."""
    virsh("net-destroy", "a")
    assert not world.open()
    virsh("net-start", "a")
    web.down()
    with serving("virbr10", "web"):
        assert world.open()
        assert asked("client", "udp", A, 2222) == CLIENT
        virsh("destroy", "web")
        assert not world.open()


def test_ends_while_its_network_is_down(world: World, web: FastGuest) -> None:
    virsh("net-destroy", "a")
    virsh("destroy", "web")
    virsh("net-start", "a")
    assert "2222" not in rules()


def test_metadata_edited_while_it_runs(world: World, web: FastGuest) -> None:
    """What it published goes with it, whatever its XML says by then."""
    edited = "<nat><portForward><range start='3333' to='22'/></portForward></nat>"
    virsh("metadata", "web", "urn:libvirt-natns:1", "--config", "--live", "--key", "natns",
          "--set", edited)  # fmt: skip
    assert world.open()
    virsh("destroy", "web")
    assert not world.open()
    start("web")
    assert world.open(3333)
    assert not world.open(2222)
    virsh("metadata", "web", "urn:libvirt-natns:1", "--config", "--live", "--remove")
    virsh("destroy", "web")
    assert not world.open(3333)


def test_renamed(world: World, web: FastGuest) -> None:
    virsh("destroy", "web")
    virsh("domrename", "web", "shop")
    try:
        start("shop")
        assert world.open()
        said = refusal(domain("rival", nic("a", SECOND), publishes=PUBLISHED))
        assert "is forwarded to guest shop already" in said
        virsh("destroy", "shop")
        assert not world.open()
    finally:
        virsh("undefine", "shop")


def hook(operation: str, xml: str, when: str = "begin") -> None:
    """An event as libvirt tells it: accepted, with not a word on stdout."""
    done = run(HOOK, "web", operation, when, "-", input=xml)
    assert (done.stdout, done.stderr) == ("", ""), operation


def test_xml_at_the_end_says_nothing(world: World, web: FastGuest) -> None:
    """Neither NICs nor metadata: what is recorded counts."""
    uuid = virsh("domuuid", "web").stdout.strip()
    bare = domain("web", uuid=uuid)
    hook("stopped", bare, "end")
    assert not world.open()
    hook("release", bare, "end")
    assert not (GUESTS / uuid).exists()


def test_operations_without_effect(world: World, web: FastGuest) -> None:
    before = rules()
    xml = virsh("dumpxml", "web").stdout
    for operation in ("started", "migrate", "restore", "reconnect", "attach", "unheard-of"):
        hook(operation, xml)
        assert rules() == before, operation


def test_hot_plug(world: World) -> None:
    """A NIC that goes takes its forwards along, and brings them back; on a booted guest."""
    published = ports("start='2222' to='80'", more="network='a'")
    published += ports("start='2250' to='22'", more="network='b'")
    second = nic("b", SECOND)
    with RealGuest("web", "a", MAC, metadata=nat(published), interfaces=[second]) as guest:
        assert "2250" in rules("b")
        guest.wait_ready()
        assert world.client.curl(f"http://{A}:2222/")
        unplug(MAC)
        assert "2222" not in rules()
        assert "2250" in rules("b")
        plug = ("attach-interface", "web", "network", "a", "--mac", MAC, "--live")
        virsh(*plug, "--model", "virtio")
        assert "10.0.0.100" in rules()
        assert natns("check").stdout == ""
        unplug(MAC)
        # Nor does anything else bring back what a NIC had that is gone.
        entry = "<host mac='52:54:00:00:00:77' ip='10.0.0.77'/>"
        virsh("net-update", "a", "add", "ip-dhcp-host", entry, "--live")
        assert "2222" not in rules()
        unplug(SECOND)
        assert "2250" not in rules("b")


def unplug(mac: str) -> None:
    """Take a NIC out, which the guest must agree to."""
    virsh("detach-interface", "web", "network", "--mac", mac, "--live")
    wait_for(lambda: mac not in virsh("domiflist", "web").stdout, timeout=20, what="its end")
    # libvirt tells the network last.
    wait_for(lambda: "port-deleted" in last_hook(), what="the hook")


def last_hook() -> str:
    lines = [line for line in Libvirtd().log().splitlines() if "Calling hook" in line]
    return lines[-1]
