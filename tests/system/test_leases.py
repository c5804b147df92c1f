# SPDX-License-Identifier: LGPL-2.1-or-later
"""Upstream addresses on a real segment: who gets which, for how long, and who learns of it."""

import json
import os
import shutil
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from lab import (
    Libvirtd,
    Node,
    Provider,
    define_network,
    forward_at_once,
    isolated,
    natns,
    remove_config,
    run,
    snapshot,
    start_network,
    virsh,
    wait_for,
    write_config,
)
from views import (
    links,
    namespaces,
    redefine,
    refusal,
    settled,
    status,
    upstream_address,
)

UUID = "6f2b9c1e-0000-4000-8000-00000000000a"
BOOT_ID = "/proc/sys/kernel/random/boot_id"
WANTED = '<natns:nat xmlns:natns="urn:libvirt-natns:1"><natns:upstream address="{}"/></natns:nat>'

pytestmark = pytest.mark.usefixtures("no_config_left")


@pytest.fixture
def no_config_left(installed: None) -> Iterator[None]:
    yield
    remove_config()


def wanting(name: str, bridge: str, address: str) -> str:
    return isolated(name, bridge, metadata=WANTED.format(address))


# -- sticky --------------------------------------------------------------------


def test_a_lease_is_for_good(provider: Provider, libvirtd: Libvirtd) -> None:
    write_config(provider.config())
    start_network(isolated("a", "virbr10", uuid=UUID))
    start_network(isolated("b", "virbr11"))
    first, other = upstream_address("a"), upstream_address("b")
    virsh("net-destroy", "a")
    start_network(isolated("c", "virbr12"))
    assert upstream_address("c") not in (first, other), "the pool is large enough for another"
    virsh("net-undefine", "a")
    start_network(isolated("a", "virbr13", uuid=UUID))
    assert upstream_address("a") == first
    with reboot(libvirtd):
        assert namespaces() == set()
        # In another order than before.
        for name in ("c", "b", "a"):
            virsh("net-start", name)
        assert (upstream_address("a"), upstream_address("b")) == (first, other)
        assert natns("check").stdout == ""
        virsh("net-destroy", "b")
        assert status("b")["address"] == other


@contextmanager
def reboot(libvirtd: Libvirtd) -> Iterator[None]:
    """What is left of libvirt and of us when the machine comes up again.

    The kernel's id of the boot is another one while the body runs.
    """
    libvirtd.stop()
    for process in processes("dnsmasq"):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    for link in [link for link in links() if link.startswith(("virbr", "natin-", "natup-"))]:
        run("ip", "link", "del", link, check=False)
    for name in namespaces():
        run("ip", "netns", "del", name)
    for program in ("iptables", "ip6tables"):
        delete_libvirts_rules(program)
    for directory in ("/run/libvirt-natns", "/run/libvirt/network"):
        shutil.rmtree(directory)
    another = Path("/run/tmp/boot_id")
    another.write_text(f"{uuid.uuid4()}\n")
    run("mount", "--bind", another, BOOT_ID)
    try:
        libvirtd.start()
        yield
        for name in virsh("net-list", "--name").stdout.split():
            virsh("net-destroy", name)
    finally:
        run("umount", BOOT_ID)
        another.unlink()


def delete_libvirts_rules(program: str) -> None:
    table = ""
    for line in run(f"{program}-save").stdout.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith("-A LIBVIRT") and " virbr" in line:
            run(program, "-t", table, *line.replace("-A", "-D", 1).split())


def processes(name: str) -> list[int]:
    """Processes of a name that serve networks, the provider's own apart."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (directory / "cmdline").read_bytes()
            if command.startswith(f"/usr/sbin/{name}".encode()) and b"provider-" not in command:
                found.append(int(directory.name))
    return found


# -- wanted --------------------------------------------------------------------


def test_wanted_address(provider: Provider) -> None:
    """Honoured also outside the pool; else refused with its reason, and nothing changed."""
    write_config(provider.config())
    provider.neighbour("other", "192.168.0.77/24")
    start_network(wanting("holder", "virbr10", "192.168.0.55"))
    assert upstream_address("holder") == "192.168.0.55"
    forward_at_once("virbr10")
    wait_for(lambda: links()["virbr10"]["operstate"] == "UP", what="a bridge that is done")
    define_network(isolated("a", "virbr11"))
    before = settled()
    for address, reason in (
        ("192.168.7.5", "is not in its subnet 192.168.0.0/24"),
        ("192.168.0.0", "is its network address"),
        ("192.168.0.255", "is its broadcast address"),
        ("192.168.0.1", "is its gateway"),
        ("192.168.0.2", "is an address of the host"),
        ("192.168.0.55", "is leased to network holder"),
        ("192.168.0.77", "is in use by another machine"),
    ):
        redefine(wanting("a", "virbr11", address))
        said = refusal("a")
        assert address in said
        assert reason in said
        assert before.diff(snapshot()) == ""
    redefine(wanting("a", "virbr11", "192.168.0.150"))
    virsh("net-start", "a")
    assert upstream_address("a") == "192.168.0.150"


# -- small pools ---------------------------------------------------------------


@contextmanager
def probing(node: Node, address: str) -> Iterator[None]:
    """A machine that is about to take an address: it asks for it, again and again."""
    mac = bytes.fromhex(node.mac.replace(":", ""))
    frame = b"\xff" * 6 + mac + bytes.fromhex("0806 0001 0800 06 04 0001")
    frame += mac + bytes(4) + bytes(6) + socket.inet_aton(address)
    done = threading.Event()

    def ask(packets: socket.socket) -> None:
        while not done.wait(0.02):
            packets.send(frame)

    with node.packet_socket() as packets:
        thread = threading.Thread(target=ask, args=(packets,))
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def test_pool_with_few_free_addresses(installed: None) -> None:
    """Of eight addresses two are free; the third network has to wait for one."""
    with Provider(
        subnet="192.168.5.0/29", gateway="192.168.5.1", host_address="192.168.5.2/29"
    ) as provider:
        write_config(provider.config(pool="192.168.5.0/29"))
        provider.neighbour("squatter", "192.168.5.3/29")
        prober = provider.neighbour("prober", None)
        for number, name in enumerate("abc"):
            define_network(isolated(name, f"virbr1{number}"))
        with probing(prober, "192.168.5.4"):
            virsh("net-start", "a")
            virsh("net-start", "b")
            assert {upstream_address("a"), upstream_address("b")} == {"192.168.5.5", "192.168.5.6"}
            said = refusal("c")
            assert "no address of upstream provider is free" in said
            assert "2 of them by other machines" in said
            freed = upstream_address("a")
            virsh("net-destroy", "a")
            virsh("net-start", "c")
            assert upstream_address("c") == freed
            assert "no address of upstream provider is free" in refusal("a")
        virsh("net-start", "a")
        assert upstream_address("a") == "192.168.5.4"
        assert natns("check").stdout == ""


def test_kept_address_that_somebody_took(provider: Provider) -> None:
    write_config(provider.config())
    start_network(isolated("a", "virbr10"))
    kept = upstream_address("a")
    virsh("net-destroy", "a")
    provider.neighbour("squatter", f"{kept}/24")
    virsh("net-start", "a")
    assert upstream_address("a") != kept
    assert IPv4Address(upstream_address("a")) in pool()


def pool() -> list[IPv4Address]:
    first = int(IPv4Address("192.168.0.100"))
    return [IPv4Address(number) for number in range(first, first + 100)]


# -- neighbours ----------------------------------------------------------------


def neighbours_mac(node: Node, address: str) -> str | None:
    """The MAC address that a node has in its table for an address."""
    entries = json.loads(node.run("ip", "-j", "neighbour", "show", address).stdout or "[]")
    return entries[0].get("lladdr") if entries else None


def test_neighbours_learn_of_a_reused_address(provider: Provider) -> None:
    """They are told, and need not ask: this one sends nothing at all meanwhile."""
    address = "192.168.0.100"
    write_config(provider.config(pool=address))
    near = provider.neighbour("near", "192.168.0.77/24")
    start_network(isolated("a", "virbr10"))
    assert upstream_address("a") == address
    assert near.ping(address)
    first = links("nat-a")["upstream"]["address"]
    assert neighbours_mac(near, address) == first
    virsh("net-destroy", "a")
    with near.sniff(f"arp and ether src {near.mac}") as own:
        start_network(isolated("b", "virbr11"))
        second = links("nat-b")["upstream"]["address"]
        assert second != first
        wait_for(lambda: neighbours_mac(near, address) == second, what="the new address")
        asked = [line for line in own.lines() if "Request who-has 192.168.0.100" in line]
    assert not asked, "the neighbour had to ask"
    assert near.ping(address)
