# SPDX-License-Identifier: LGPL-2.1-or-later
"""virt-natns forward on a real libvirt: metadata, packets, and what must not change.

Two networks with the same subnet.  The guests are domains that never run a single
instruction; a namespace with the same MAC beside each sends and answers.
"""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lab import (
    FastGuest,
    Libvirtd,
    Node,
    Provider,
    install_natns,
    isolated,
    remove_config,
    start_network,
    uninstall_natns,
    virsh,
    write_config,
)
from lab_sides import STATE, Answer, Command, in_process, without_hooks

from libvirt_natns.cli import commands
from libvirt_natns.engine.guests.guest_engine import Guests
from libvirt_natns.errors import FirewallError

URI = "urn:libvirt-natns:1"
WEB, DB = "52:54:00:00:00:05", "52:54:00:00:00:06"
FOREIGN = '<lab:owner xmlns:lab="urn:lab">somebody</lab:owner>'
OWN = '<natns:portForward><natns:range start="9999" to="99"/></natns:portForward>'
NETWORKS_OWN = (
    '<natns:portForward guestAddress="10.0.0.100"><natns:range start="7777" to="22"/>'
    "</natns:portForward>"
)
A, B = "192.168.0.100", "192.168.0.101"
CUT = 1.0
"""Seconds after which what was removed must not answer any more."""


def natns_element(content: str) -> str:
    return f'<natns:nat xmlns:natns="{URI}">{content}</natns:nat>'


def domain(name: str, network: str, mac: str, metadata: str) -> Path:
    file = Path(f"/run/tmp/{name}.xml")
    file.write_text(
        f"<domain type='qemu'><name>{name}</name><metadata>{metadata}</metadata>"
        "<memory unit='MiB'>16</memory><os><type arch='x86_64' machine='pc'>hvm</type></os>"
        f"<devices><interface type='network'><mac address='{mac}'/>"
        f"<source network='{network}'/></interface></devices></domain>"
    )
    return file


@dataclass
class World:
    """Guests web (persistent, network a) and db (transient, b), and a client outside."""

    web: FastGuest
    db: FastGuest
    client: Node
    other: Node


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return in_process(capsys)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Both backends where packets are what it is about."""
    if "world" in metafunc.fixturenames:
        backends = ["nftables", "iptables"] if metafunc.function in PACKETS else ["nftables"]
        metafunc.parametrize("world", backends, indirect=True, scope="module")


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest, installed: None) -> Iterator[World]:
    with ExitStack() as stack:
        provider = stack.enter_context(Provider())
        write_config(provider.config(firewall=request.param, more="probe = 0"))
        stack.callback(remove_config)
        for file in STATE.glob("state.db*"):
            file.unlink()
        guests = []
        for name, bridge, mac, address in (("a", "virbr10", WEB, A), ("b", "virbr11", DB, B)):
            own = f'<natns:upstream name="provider" address="{address}"/>'
            own += NETWORKS_OWN if name == "b" else ""
            start_network(isolated(name, bridge, metadata=natns_element(own)))
            stack.callback(virsh, "net-undefine", name, check=False)
            stack.callback(virsh, "net-destroy", name, check=False)
            guests.append(stack.enter_context(FastGuest(bridge, mac, f"guest-{name}")))
        # A reload orders libvirt's rules anew: let it do so before any test compares them.
        Libvirtd().reload()
        virsh("define", str(domain("web", "a", WEB, FOREIGN + natns_element(OWN))))
        stack.callback(virsh, "undefine", "web", check=False)
        virsh("start", "--paused", "web")
        stack.callback(virsh, "destroy", "web", check=False)
        virsh("create", "--paused", str(domain("db", "b", DB, FOREIGN)))
        stack.callback(virsh, "destroy", "db", check=False)
        for guest in guests:
            guest.static("10.0.0.100/24", "10.0.0.1")
            for port in (22, 80, 81, 7000, 7001):
                guest.serve("tcp", port)
            guest.serve("udp", 53)
        neighbours = [
            provider.neighbour(f"client-{last}", f"192.168.0.{last}/24") for last in (77, 78)
        ]
        yield World(*guests, *neighbours)


@pytest.fixture
def restored(world: World) -> Iterator[None]:
    """For a test that leaves the guests' metadata other than it was."""
    yield
    for where in ("--live", "--config"):
        virsh("metadata", "web", where, "--uri", URI, "--key", "natns", "--set", bare(OWN))
    virsh("metadata", "db", "--live", "--uri", URI, "--remove", check=False)
    assert commands.main(["sync"]) == 0


def bare(content: str) -> str:
    return f"<nat>{content.replace('natns:', '')}</nat>"


# -- looking ---------------------------------------------------------------------


def answers(node: Node, address: str, port: int) -> str | None:
    """The address that a service saw the client under; None where none answers."""
    try:
        with node.connect(address, port, timeout=0.7) as stream:
            return stream.recv(100).decode().partition(":")[0]
    except OSError:
        return None


def asked(opened: socket.socket, address: str, port: int) -> str | None:
    """The same for a datagram."""
    opened.sendto(b"?", (address, port))
    try:
        return opened.recv(100).decode().partition(":")[0]
    except OSError:
        return None


def talks(stream: socket.socket) -> bool:
    try:
        stream.sendall(b"still there?")
        return stream.recv(100) == b"still there?"
    except OSError:
        return False


def opened_stream(node: Node, address: str, port: int) -> socket.socket:
    stream = node.connect(address, port, timeout=CUT)
    assert stream.recv(100)
    return stream


def xml(name: str, *options: str) -> str:
    return virsh("dumpxml", name, *options).stdout


def definitions() -> tuple[str, str, str]:
    return xml("web"), xml("web", "--inactive"), xml("db")


def listed(command: Command, *guest: str) -> list[dict[str, Any]]:
    """What guests publish, the network's own forward left out."""
    answer = json.loads(command("forward", "list", *guest, "--json").out)
    return [row for row in answer["forwards"] if row["guest"]]


def done(answer: Answer) -> str:
    assert (answer.status, answer.err) == (0, ""), answer
    return answer.out


def refused(answer: Answer) -> str:
    """The one line of a command that could not."""
    assert answer.status == 1, answer
    assert not answer.out
    assert re.fullmatch(r"virt-natns: .+\n", answer.err), answer.err
    return answer.err


# -- adding and removing ---------------------------------------------------------------


def test_add_and_remove(world: World, command: Command) -> None:
    assert answers(world.client, A, 2222) is None
    before = definitions()
    out = done(command("forward", "add", "web", "2222:22"))
    assert out == f"web: tcp {A}:2222 -> 10.0.0.100:22\n"
    assert answers(world.client, A, 2222) == "192.168.0.77"
    assert answers(world.db, A, 2222) == B
    assert answers(world.client, B, 2222) is None
    for text in (xml("web"), xml("web", "--inactive")):
        assert re.search(r"<natns:range start=.2222. to=.22./>", text)
        assert re.search(r"<natns:range start=.9999. to=.99./>", text)
        assert text.count("<natns:nat ") == 1
        assert ">somebody</lab:owner>" in text
    done(command("forward", "remove", "web", f"{A}:2222/tcp"))
    assert answers(world.client, A, 2222) is None
    assert [re.sub(r"\s", "", each) for each in definitions()] == [
        re.sub(r"\s", "", each) for each in before
    ]
    assert "has no forward tcp 2222" in refused(command("forward", "remove", "web", "2222"))


def test_transient_guest_has_the_live_one_only(world: World, command: Command) -> None:
    uuid = virsh("domuuid", "db").stdout.strip()
    done(command("forward", "add", uuid, "2222:22"))
    assert answers(world.client, B, 2222) == "192.168.0.77"
    assert ">somebody</lab:owner>" in xml("db")
    done(command("forward", "remove", uuid, "2222"))
    assert "natns:nat" not in xml("db")
    assert answers(world.client, B, 2222) is None


def test_shut_off_guest_has_the_persistent_one_only(world: World, command: Command) -> None:
    virsh("define", str(domain("off", "a", "52:54:00:00:00:07", FOREIGN)))
    try:
        assert "when it starts" in done(command("forward", "add", "off", "2300:22/udp"))
        assert re.search(
            r"proto=.udp.><natns:range start=.2300.", re.sub(r">\s+<", "><", xml("off"))
        )
        (row,) = listed(command, "off")
        assert (row["proto"], row["first"], row["target_first"]) == ("udp", 2300, 22)
        assert (row["state"], row["reason"]) == ("off", "the guest is off: its start publishes it")
        said = command("forward", "add", "off", "9999:22")
        assert said.status == 0
        assert "would not start" in said.err
        assert "guest web" in said.err
        done(command("forward", "remove", "off", "2300/udp"))
        done(command("forward", "remove", "off", "9999"))
        assert "natns:nat" not in xml("off")
        assert ">somebody</lab:owner>" in xml("off")
    finally:
        virsh("undefine", "off")


def test_ranges_sources_and_chosen_ports(world: World, command: Command) -> None:
    done(command("forward", "add", "web", "80-81"))
    done(command("forward", "add", "web", "8000-8001:7000-7001", "--source", "192.168.0.78/32"))
    done(command("forward", "add", "web", "8100-8110:80", "--network", "a"))
    done(command("forward", "add", "web", "5353:53/udp", "--mac", WEB))
    chosen = done(command("forward", "add", "web", "auto:22", "--guest-address", "10.0.0.100"))
    port = int(re.fullmatch(rf"web: tcp {A}:(\d+) -> 10.0.0.100:22\n", chosen)[1])  # type: ignore[index]
    for number in (80, 81, 8100, 8110, port):
        assert answers(world.client, A, number) == "192.168.0.77", number
    assert [answers(world.client, A, number) for number in (8000, 8001)] == [None, None]
    assert [answers(world.other, A, number) for number in (8000, 8001)] == ["192.168.0.78"] * 2
    with world.client.open_socket("udp", timeout=CUT) as asking:
        assert asked(asking, A, 5353) == "192.168.0.77"
    rows = {(row["proto"], row["first"], row["last"]): row for row in listed(command, "web")}
    assert rows["tcp", 8100, 8110]["target_last"] == 80
    assert rows["tcp", 8000, 8001]["sources"] == ["192.168.0.78/32"]
    assert {row["state"] for row in rows.values()} == {"published"}
    assert {row["network"] for row in rows.values()} == {"a"}
    assert set(rows) == {
        ("tcp", 80, 81), ("tcp", 8000, 8001), ("tcp", 8100, 8110),
        ("udp", 5353, 5353), ("tcp", port, port), ("tcp", 9999, 9999),
    }  # fmt: skip
    for removed in ("80-81", "8000-8001", "8100-8110", "5353/udp", str(port)):
        assert f":{removed.partition('/')[0]} " in command("forward", "list").out
        done(command("forward", "remove", "web", f"{A}:{removed}"))
    assert [row["first"] for row in listed(command)] == [9999]
    assert answers(world.client, A, port) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("add", "db", "2222:22", "--network", "a"),
         "guest db has no NIC in network a that libvirt-natns handles: see virt-natns plan a"),
        (("add", "web", "9999:22"), "tcp 9999 is forwarded already, as a part of tcp 9999:"),
        (("add", "web", "9999:99"), "already"),
        (("add", "web", "192.168.0.55:2222:22"), "is not an address of its network"),
        (("add", "web", "2222:22", "--source", "192.168.0.1/24"),
         "virt-natns: forward tcp 2222 has source='192.168.0.1/24': expected whole subnets: "),
        (("add", "web", "2222:22", "--mac", DB),
         f"forward tcp 2222 has mac='{DB}': expected the MAC address of a NIC of the guest"),
        (("add", "nobody", "2222:22"), "there is no guest nobody: see virsh list --all"),
        (("add", "wbe", "2222:22"), "there is no guest wbe (did you mean web?): see virsh list"),
        (("remove", "web", "2222/udp"), "no forward"),
        (("list", "nobody"), "there is no guest nobody"),
    ],
)  # fmt: skip
def test_refusals_change_nothing(
    world: World, command: Command, arguments: tuple[str, ...], said: str
) -> None:
    before = definitions(), listed(command)
    assert said in refused(command("forward", *arguments))
    assert (definitions(), listed(command)) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("add", "web", "0:22"),
        ("add", "web", "2222:65536"),
        ("add", "web", "20-10"),
        ("add", "web", "1-3:1-2"),
        ("add", "web", "auto"),
        ("add", "web", "2222:22/icmp"),
        ("add", "web", "300.0.0.1:2222:22"),
        ("remove", "web", "2222:22"),
        ("add", "web"),
        (),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], command: Command) -> None:
    with pytest.raises(SystemExit) as left:
        command("forward", *arguments)
    assert left.value.code == 2


def test_conflict_with_another_guest(world: World, command: Command) -> None:
    virsh("create", "--paused", str(domain("rival", "a", "52:54:00:00:00:07", "")))
    try:
        before = definitions(), xml("rival"), listed(command)
        line = refused(command("forward", "add", "rival", "9990-10000"))
        assert f"tcp port 9999 of {A} is forwarded to guest web already" in line
        assert (definitions(), xml("rival"), listed(command)) == before
        done(command("forward", "add", "rival", "9999:22/udp"))
    finally:
        virsh("destroy", "rival")
    assert {row["guest"] for row in listed(command)} == {"web"}


def test_what_cannot_be_applied_is_not_written(
    world: World, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise FirewallError("no rules today")

    before = definitions(), listed(command)
    with monkeypatch.context() as patch:
        patch.setattr(Guests, "publish", fails)
        assert "no rules today" in refused(command("forward", "add", "web", "2222:22"))
    assert (definitions(), listed(command)) == before


# -- flows -----------------------------------------------------------------------------


def test_removing_cuts_its_own_flows_only(world: World, command: Command, restored: None) -> None:
    for spec in ("2222:22", "2223:22", "5353:53/udp", "5354:53/udp"):
        done(command("forward", "add", "web", spec))
    with ExitStack() as stack:
        cut, kept = (
            stack.enter_context(opened_stream(world.client, A, port)) for port in (2222, 2223)
        )
        unlike, alike = (
            stack.enter_context(world.client.open_socket("udp", timeout=CUT)) for _ in range(2)
        )
        assert asked(unlike, A, 5353) == "192.168.0.77"
        assert asked(alike, A, 5354) == "192.168.0.77"
        done(command("forward", "remove", "web", "2222"))
        done(command("forward", "remove", "web", "5353/udp"))
        assert not talks(cut)
        assert asked(unlike, A, 5353) is None
        assert talks(kept)
        assert asked(alike, A, 5354) == "192.168.0.77"


# -- sync, check and status --------------------------------------------------------------


def test_edited_metadata_is_applied_by_sync(world: World, command: Command, restored: None) -> None:
    edited = bare('<portForward><range start="2400" to="22"/></portForward>')
    virsh("metadata", "web", "--live", "--uri", URI, "--key", "natns", "--set", edited)
    said = command("check")
    assert said.status == 1
    assert f"web: is not published: tcp {A}:2400 -> 10.0.0.100:22\n" in said.out
    assert f"web: is published still: tcp {A}:9999 -> 10.0.0.100:99\n" in said.out
    differing = json.loads(command("status", "--json").out)["guests"]
    assert {each["guest"] for each in differing} == {"web"}
    assert len(differing) == 2
    assert answers(world.client, A, 2400) is None
    out = done(command("sync"))
    assert f"web: tcp {A}:2400 -> 10.0.0.100:22: published\n" in out
    assert answers(world.client, A, 2400) == "192.168.0.77"
    assert command("check").status == 0
    assert done(command("sync")) == ""


def test_sync_names_bad_metadata_and_repairs_the_rest(
    world: World, command: Command, restored: None
) -> None:
    bad = bare('<portForward><range start="70000"/></portForward>')
    virsh("metadata", "db", "--live", "--uri", URI, "--key", "natns", "--set", bad)
    edited = bare('<portForward><range start="2400" to="22"/></portForward>')
    virsh("metadata", "web", "--live", "--uri", URI, "--key", "natns", "--set", edited)
    said = command("sync")
    assert said.status == 1
    assert "70000" in said.err
    assert answers(world.client, A, 2400) == "192.168.0.77"


def test_status_shows_what_is_published(world: World, command: Command) -> None:
    told = f"  > web: tcp {A}:9999 -> 10.0.0.100:99\n"
    assert told in command("status").out
    networks = {
        each["network"]: each for each in json.loads(command("status", "--json").out)["networks"]
    }
    assert [each["guest"] for each in networks["b"]["forwards"]] == [None]
    (row,) = networks["a"]["forwards"]
    assert row == {
        "guest": "web", "guest_uuid": virsh("domuuid", "web").stdout.strip(), "network": "a",
        "proto": "tcp", "address": A, "first": 9999, "last": 9999, "target": "10.0.0.100",
        "target_first": 99, "target_last": 99, "sources": [], "allowed": [], "state": "published",
        "reason": None,
    }  # fmt: skip
    assert "9999 -> web" in command("diagram").out


def test_sync_removes_a_guest_whose_end_was_missed(world: World, command: Command) -> None:
    published = '<natns:portForward><natns:range start="2500" to="22"/></natns:portForward>'
    file = domain("brief", "a", "52:54:00:00:00:08", natns_element(published))
    virsh("create", "--paused", str(file))
    try:
        assert [row["first"] for row in listed(command, "brief")] == [2500]
        with without_hooks():
            virsh("destroy", "brief")
        assert "brief: is not active in libvirt any more" in command("check").out
        assert "brief: is not active in libvirt any more: removed" in done(command("sync"))
        assert 2500 not in [row["first"] for row in listed(command)]
    finally:
        virsh("destroy", "brief", check=False)


def test_uninstall_and_install_with_running_guests(
    world: World, command: Command, restored: None
) -> None:
    done(command("forward", "add", "web", "2222:22"))
    uninstall_natns()
    try:
        assert not Path("/run/libvirt-natns").exists()
    finally:
        install_natns()
    assert [row["first"] for row in listed(command, "web")] == [2222, 9999]
    assert answers(world.client, A, 2222) == "192.168.0.77"


def test_networks_own_forwards_and_own_addresses_are_listed(
    world: World, command: Command, restored: None
) -> None:
    own = bare('<address address="192.168.0.110"><allow start="22"/></address>')
    virsh("metadata", "db", "--live", "--uri", URI, "--key", "natns", "--set", own)
    assert "db: address 192.168.0.110 -> 10.0.0.100 (tcp 22): published" in done(command("sync"))
    assert answers(world.client, "192.168.0.110", 22) == "192.168.0.77"
    assert answers(world.client, B, 7777) == "192.168.0.77"
    table = [re.split(r"  +", line) for line in done(command("forward", "list")).splitlines()]
    assert table[0] == ["GUEST", "NETWORK", "PROTO", "LISTEN", "TARGET", "SOURCES", "STATE"]
    assert table[1] == ["-", "b", "tcp", f"{B}:7777", "10.0.0.100:22", "any", "published"]
    assert table[2] == [
        "db", "b", "address", "192.168.0.110 (tcp 22)", "10.0.0.100", "any", "published"
    ]  # fmt: skip


PACKETS = {
    test_add_and_remove,
    test_ranges_sources_and_chosen_ports,
    test_removing_cuts_its_own_flows_only,
}
