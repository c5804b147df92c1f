# SPDX-License-Identifier: LGPL-2.1-or-later
"""What guests claim: addresses that stay theirs, ports that nobody else has, no bad metadata."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lab import (
    FastGuest,
    Host,
    Provider,
    isolated,
    natns,
    run,
    virsh,
    wait_for,
    write_config,
)
from lab_domains import (
    asked,
    create,
    define,
    destroy,
    dnsmasq_pid,
    domain,
    file_of,
    networks,
    nic,
    nic_on,
    ports,
    provider_world,
    reason,
    refusal,
    start,
    upstream,
    uuid_of,
)

A = "192.168.0.150"
HOST = "192.168.0.2"

pytestmark = pytest.mark.usefixtures("installed")


# -- target addresses --------------------------------------------------------------

UUID = "11111111-2222-4333-8444-555555555555"
OTHER, FIXED, KNOWN = "52:54:00:00:00:21", "52:54:00:00:00:22", "52:54:00:00:00:23"


@pytest.fixture
def plain(nothing_left: None) -> Iterator[Provider]:
    """The provider with whatever backend; no addresses or ports from before."""
    with provider_world() as provider:
        yield provider


def hosts_of(network: str) -> dict[str, str]:
    """The addresses that dnsmasq is to give, by MAC."""
    file = Path("/run/libvirt-natns/networks", uuid_of(network), "dnsmasq.hosts")
    rows = (line.split(",") for line in file.read_text().splitlines() if line)
    return {row[0]: row[1] for row in rows}


def test_reservation_is_kept_for_good(plain: Provider) -> None:
    one = isolated("a", "virbr10", dhcp=("10.0.0.100", "10.0.0.110"),
                   hosts=[Host(FIXED, "10.0.0.101")])  # fmt: skip
    published = ports("start='2222' to='22'")
    with networks(one):
        pid = dnsmasq_pid("a")
        with FastGuest("virbr10", OTHER, "other") as other:
            # What the first guest would have had is taken when it starts.
            leased = other.dhcp(apply=False)["ip"]
            create(domain("fixed", nic("a", FIXED), publishes=ports("start='2223' to='22'")))
            xml = domain("kept", nic("a", KNOWN), publishes=published, uuid=UUID)
            define(xml)
            start("kept")
            kept = hosts_of("a")[KNOWN]
            assert kept not in (leased, "10.0.0.101")
            assert FIXED not in hosts_of("a") or hosts_of("a")[FIXED] == "10.0.0.101"
            assert dnsmasq_pid("a") == pid
            with FastGuest("virbr10", KNOWN, "kept") as guest:
                assert guest.dhcp()["ip"] == kept
                # dnsmasq answers first, and then has the lease written down.
                wait_for(lambda: kept in virsh("domifaddr", "kept").stdout)
                guest.serve("tcp", 22)
                address = lease_of("a")
                assert asked(None, "tcp", address, 2222) == HOST
            with FastGuest("virbr10", FIXED, "fixed") as guest:
                guest.dhcp()
                guest.serve("tcp", 22)
                assert guest.addresses() == ["10.0.0.101/24"]
                assert asked(None, "tcp", address, 2223) == HOST
        virsh("destroy", "kept")
        virsh("undefine", "kept")
        define(xml)
        virsh("net-destroy", "a")
        virsh("destroy", "fixed")
        virsh("net-start", "a")
        assert hosts_of("a")[KNOWN] == kept  # before its guest starts
        start("kept")
        with FastGuest("virbr10", KNOWN, "again") as guest:
            assert guest.dhcp()["ip"] == kept
        destroy("kept")


def test_reservations_of_guests_that_are_gone_leave_room(plain: Provider) -> None:
    """For one more guest that publishes something, and for one that does not."""
    with networks(isolated("a", "virbr10", dhcp=("10.0.0.100", "10.0.0.102"))):
        for number in range(4):
            name, mac = f"job{number}", f"52:54:00:00:01:{number:02x}"
            create(domain(name, nic("a", mac), publishes=ports(f"start='222{number}' to='22'")))
            assert hosts_of("a")[mac]
            destroy(name)
        assert list(hosts_of("a")) == [mac]
        assert natns("check", check=False).returncode == 0
        with FastGuest("virbr10", OTHER, "other") as other:
            assert other.dhcp(apply=False)["ip"]


def lease_of(network: str) -> str:
    """The network's upstream address."""
    words = run("ip", "-o", "-4", "-n", f"nat-{network}", "address", "show", "upstream").stdout
    return words.split()[3].partition("/")[0]


def test_host_of_the_xml_comes_before_a_reservation(plain: Provider) -> None:
    """Also where it is written while the guest runs, and with somebody's reserved address."""
    with networks(isolated("a", "virbr10")):
        create(domain("web", nic("a", KNOWN), publishes=ports("start='2222' to='22'")))
        create(domain("mail", nic("a", OTHER), publishes=ports("start='2525' to='25'")))
        assert hosts_of("a") == {KNOWN: "10.0.0.100", OTHER: "10.0.0.101"}
        entry = f"<host mac='{KNOWN}' ip='10.0.0.101'/>"
        virsh("net-update", "a", "add", "ip-dhcp-host", entry, "--live")
        with FastGuest("virbr10", KNOWN, "web") as web, FastGuest("virbr10", OTHER, "mail") as mail:
            for guest, port in ((web, 22), (mail, 25)):
                guest.dhcp()
                guest.serve("tcp", port)
            assert web.addresses() == ["10.0.0.101/24"]
            assert mail.addresses() == ["10.0.0.100/24"] or "10.0.0.102/24" in mail.addresses()
            assert asked(None, "tcp", lease_of("a"), 2222) == HOST
            assert asked(None, "tcp", lease_of("a"), 2525) == HOST
        destroy("web", "mail")


# -- conflicts and refusals ----------------------------------------------------------


def one(name: str, mac: str, *ranges: str, more: str = "") -> str:
    return domain(name, nic("a", mac), publishes=ports(*ranges, more=more))


def test_conflicts_are_found_before_anything_starts(plain: Provider) -> None:
    own = ports("start='7000' end='7010'", more="guestAddress='10.0.0.50'")
    with networks(isolated("a", "virbr10", metadata=upstream(A, own))):
        create(one("first", KNOWN, "start='2222' to='22'", "start='9000' end='9010'"))
        for wanted, port in (
            ("start='2222' to='80'", "2222"),
            ("start='2000' end='3000'", "2222"),
            ("start='9005' end='9020'", "9005-9010"),
            ("start='9010' to='22'", "9010"),
        ):
            said = refusal(one("second", OTHER, wanted))
            assert said.startswith(
                f"guest second: tcp port {port} of {A} is forwarded to guest first already"
            )
        said = refusal(one("second", OTHER, "start='7005' to='22'"))
        assert said.startswith(f"guest second: tcp port 7005 of {A} is forwarded to network a")
        # Nothing of the refused ones is left: neither a claim nor a reservation.
        assert hosts_of("a") == {KNOWN: "10.0.0.100"}
        assert not list(Path("/run/libvirt-natns/guests").glob("*/*"))
        assert len(list(Path("/run/libvirt-natns/guests").iterdir())) == 1
        # The other protocol's number is free, and what is beside a range.
        create(one("second", OTHER, "start='2222' to='22'", more="proto='udp'"))
        destroy("first")
        create(one("third", FIXED, "start='2222' to='22'"))
        destroy("second", "third")


def test_of_two_that_start_at_once_one_wins(plain: Provider) -> None:
    with networks(isolated("a", "virbr10")), ThreadPoolExecutor() as threads:
        files = [
            file_of(one(name, mac, "start='2222' to='22'", "start='auto' to='80'"))
            for name, mac in (("one", KNOWN), ("two", OTHER))
        ]
        done = list(threads.map(lambda file: virsh("create", "--paused", file, check=False), files))
        assert sorted(each.returncode for each in done) == [0, 1]
        loser = next(each for each in done if each.returncode)
        assert "tcp port 2222" in reason(loser)
        destroy("one", "two")


def test_two_automatic_ports_at_once(plain: Provider) -> None:
    """Neither is refused, and each keeps its own over restarts."""
    with networks(isolated("a", "virbr10")), ThreadPoolExecutor() as threads:
        xmls = {name: one(name, mac, "start='auto' to='22'")
                for name, mac in (("one", KNOWN), ("two", OTHER))}  # fmt: skip
        for xml in xmls.values():
            define(xml)
        list(threads.map(start, xmls))
        chosen = ports_in_force("a")
        assert set(chosen) == {20000, 20001}
        destroy("one", "two")
        start("two")
        start("one")
        assert ports_in_force("a") == chosen
        destroy("one", "two")
        # Whose port somebody else has taken meanwhile gets another, and keeps that.
        create(one("rude", FIXED, "start='20000' end='20001' to='22'"))
        list(threads.map(start, xmls))
        assert set(ports_in_force("a")) == {20000, 20001, 20002, 20003}
        others = {port: to for port, to in ports_in_force("a").items() if port > 20001}
        destroy("one", "two", "rude")
        list(threads.map(start, xmls))
        assert ports_in_force("a") == others
        destroy("one", "two")


def test_automatic_ports_of_a_network_for_several_guests(plain: Provider) -> None:
    own = "".join(
        ports("start='auto' to='22'", more=f"guestAddress='10.0.0.{number}'") for number in (50, 51)
    )
    with networks(isolated("a", "virbr10", metadata=upstream(A, own))):
        assert ports_in_force("a") == {20000: "10.0.0.50 . 22", 20001: "10.0.0.51 . 22"}


def ports_in_force(network: str) -> dict[int, str]:
    """The ports that a namespace forwards, with their targets."""
    told = run("nft", "list", "map", "inet", "natns", "ports", namespace=f"nat-{network}").stdout
    pairs = [word.split(" : ") for word in told.partition("elements = {")[2].split(",")]
    return {
        int(key.split(" . ")[2]): to.partition(" }")[0].strip()
        for key, to in (pair for pair in pairs if len(pair) == 2)
    }


BAD = {
    "zero": (ports("start='0' to='22'"), "start='0'"),
    "too high": (ports("start='65536' to='22'"), "65536"),
    "word": (ports("start='abc' to='22'"), "abc"),
    "reversed": (ports("start='30' end='20'"), "end='20'"),
    "mismatched": (ports("start='20' end='30' to='1' toEnd='5'"), "toEnd"),
    "bad address": (ports("start='1' to='22'", more="address='1.2.3'"), "1.2.3"),
    "foreign address": (ports("start='1' to='22'", more="address='192.168.0.99'"), "192.168.0.99"),
    "protocol": (ports("start='1' to='22'", more="proto='icmp'"), "icmp"),
    "attribute": (ports("start='1' to='22'", more="colour='red'"), "colour"),
    "mac": (ports("start='1' to='22'", more="mac='52:54:00:99:99:99'"), "52:54:00:99:99:99"),
    "network": (ports("start='1' to='22'", more="network='b'"), "network='b'"),
    "guest": (ports("start='1' to='22'", more="guestAddress='10.9.9.9'"), "10.9.9.9"),
}


def test_bad_metadata(plain: Provider) -> None:
    """Refused with one line; but not where it is none of our business."""
    with networks(isolated("a", "virbr10")):
        for what, (published, mentioned) in BAD.items():
            said = refusal(domain("bad", nic("a", KNOWN), publishes=published))
            assert mentioned in said, what
        assert hosts_of("a") == {}
        assert not Path("/run/libvirt-natns/guests").exists()
        everything = "".join(published for published, _ in BAD.values())
        create(domain("none", publishes=everything))
        # Not even by a configuration that nobody can read.
        write_config("firewall = 3\n")
        run("ip", "link", "add", "virbr77", "type", "bridge")
        try:
            create(domain("foreign", nic_on("virbr77", KNOWN), publishes=everything))
            destroy("none", "foreign")
        finally:
            run("ip", "link", "del", "virbr77")
            write_config(plain.config(more="probe = 0"))
