# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pure parts of router namespaces: times, what is kept of a NIC, rules, resolvers."""

import argparse
import errno
import json
import os
import struct
import subprocess
import time
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from pathlib import Path
from socket import AF_INET, AF_INET6

import pytest

from libvirt_natns import names
from libvirt_natns.cli.router import duration
from libvirt_natns.errors import ConflictError, KernelError, RouterFileError, StoreError
from libvirt_natns.firewall import iptables, nftables
from libvirt_natns.firewall.host_policy import Followed, HostForward
from libvirt_natns.kernel import boot_clock, netlink, processes
from libvirt_natns.kernel.netlink import Attrs
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.upstream import RouterUpstream
from libvirt_natns.upstream.router import (
    confirm_timer,
    confirmation,
    downstream,
    helper_command,
    host_resolv_conf,
    ipv6_choice,
    journal,
    nat_rules,
    nic_addresses,
    nic_inside,
    nic_neighbours,
    nic_routes,
    nic_snapshot,
    preflight,
    restore_script,
    router_files,
)
from libvirt_natns.upstream.router.downstream import RouterNeeds
from libvirt_natns.upstream.router.host_resolv_conf import Resolver
from libvirt_natns.upstream.router.nic_rules import NicRule
from libvirt_natns.upstream.router.nic_snapshot import Capture
from libvirt_natns.upstream.router.target import Target

TARGET = Target(
    name="wan",
    nic="ens3",
    backend="nftables",
    host_subnet="192.168.158.0/24",
    ports=(("tcp", 22, 22), ("udp", 60000, 61000)),
    addresses6=("2001:db8::2",),
    transit="10.213.252.0/22",
)
PUBLISHED = HostForward("tcp", None, 8080, 8080, IPv4Address("10.213.252.2"), "transit")


@pytest.mark.parametrize(
    ("text", "seconds"), [("60", 60.0), ("60s", 60.0), ("1.5s", 1.5), ("2m", 120.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "60x", "2h", "9999999"])
def test_no_durations(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not a time of up to an hour"):
        duration(text)


def test_addresses_of_a_target() -> None:
    assert (str(TARGET.host), str(TARGET.gateway)) == ("192.168.158.2/24", "192.168.158.1/24")
    assert str(TARGET.transit_gateway) == "10.213.252.1"
    assert (TARGET.namespace, TARGET.link) == ("natns-router-wan", "natns-wan")


def test_ports_of_the_host_that_a_network_publishes() -> None:
    needs = RouterNeeds(forwards=(PUBLISHED,))
    preflight.check_published(TARGET, needs)
    preflight.check_published(replace(TARGET, ports=(("udp", 8080, 8080),)), needs)
    with pytest.raises(ConflictError, match="publishes tcp port 8080"):
        preflight.check_published(replace(TARGET, ports=(("tcp", 8000, 9000),)), needs)


# -- what is kept of a NIC -----------------------------------------------------


def address(valid: int, link: int = 7) -> bytes:
    """An address of 192.0.2.1/24 as the kernel lists it."""
    return struct.pack("=BBBBI", 2, 24, 0x80, 0, link) + netlink.pack(
        [
            (netlink.IFA_ADDRESS, bytes([192, 0, 2, 1])),
            (netlink.IFA_LOCAL, bytes([192, 0, 2, 1])),
            (netlink.IFA_FLAGS, struct.pack("=I", 0x280)),
            (netlink.IFA_CACHEINFO, struct.pack("=IIII", valid, valid, 1, 2)),
        ]
    )


def test_an_address_is_itself_on_any_link_at_any_time() -> None:
    one, other = nic_addresses.parse(address(600)), nic_addresses.parse(address(300, link=9))
    assert one.body == other.body
    assert (one.ip, one.prefix, one.leased) == ("192.0.2.1", 24, True)


@pytest.mark.parametrize(("elapsed", "left"), [(0, 600), (100, 500), (1000, nic_addresses.SOON)])
def test_a_lifetime_goes_on_while_an_address_is_away(elapsed: int, left: int) -> None:
    request = nic_addresses.parse(address(600)).request(4, elapsed)
    assert struct.unpack_from("=I", request, 4) == (4,)
    times = Attrs.parse(request, 8).get(netlink.IFA_CACHEINFO)
    assert times is not None
    assert struct.unpack_from("=II", times) == (left, left)
    forever = nic_addresses.parse(address(nic_addresses.FOREVER)).request(4, elapsed)
    times = Attrs.parse(forever, 8).get(netlink.IFA_CACHEINFO)
    assert times is not None
    assert struct.unpack_from("=I", times) == (nic_addresses.FOREVER,)


def test_a_route_leads_over_the_link_that_it_is_given() -> None:
    hops = struct.pack("=HBBi", 8, 1, 0, 7) + struct.pack("=HBBi", 8, 0, 3, 5)
    listed = struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 3, 0, 1, 0x10) + netlink.pack(
        [(netlink.RTA_OIF, struct.pack("=i", 7)), (netlink.RTA_MULTIPATH, hops)]
    )
    assert nic_routes.links_of(listed) == {5, 7}
    found = nic_routes.parse(listed, 7)
    assert (found.destination, found.is_default, found.gateway) == ("0.0.0.0/0", True, None)
    assert nic_routes.links_of(found.request(12)) == {5, 12}


def test_a_capture_survives_its_file() -> None:
    capture = Capture(
        name="ens3",
        index=2,
        mac="52:54:00:00:00:01",
        mtu=1500,
        flags=1,
        queue=1000,
        group=0,
        alias="",
        altnames=("enp0s3",),
        settings=(("ipv4/conf/rp_filter", "2"),),
        addresses=(nic_addresses.parse(address(600)),),
        neighbours=(nic_neighbours.proxy("2001:db8::2"),),
        links=((7, "other"),),
    )
    written = json.dumps(nic_snapshot.as_object(capture))
    assert nic_snapshot.from_object(json.loads(written)) == capture
    earlier = json.loads(written)
    del earlier["links"]
    assert nic_snapshot.from_object(earlier) == replace(capture, links=())
    inside = nic_inside.without_host(
        capture, ["192.0.2.1"], {"ipv4/conf/rp_filter": "1", "unknown": "1"}
    )
    assert inside.addresses == ()
    assert [each.ip for each in inside.neighbours] == ["2001:db8::2", "192.0.2.1"]
    assert inside.settings == (("ipv4/conf/rp_filter", "1"),)


# -- rules ---------------------------------------------------------------------


def test_rules_in_nftables() -> None:
    text = nftables.render(nat_rules.rules(TARGET, RouterNeeds((PUBLISHED,))), "router")
    assert "elements = { tcp . 22 : 192.168.158.2 . 22, tcp . 8080 : 10.213.252.2 . 8080 }" in text
    assert "elements = { udp . 60000-61000 : 192.168.158.2 }" in text
    chain = text.partition("chain forward {")[2].partition("}")[0]
    *_, neighbours, rest = [line.strip() for line in chain.splitlines() if line.strip()]
    assert neighbours == 'iifname "ens3" oifname "ens3" drop'
    assert rest == "meta nfproto ipv4 drop", "IPv6 for the host passes"
    assert "hook input" not in text


def test_helpers_follow_flows_of_single_networks() -> None:
    followed = Followed("transit", IPv4Address("10.213.252.2"), ("tftp",))
    rules = nat_rules.rules(TARGET, RouterNeeds(followed=(followed,)))
    line = 'iifname "transit" ip saddr 10.213.252.2 udp dport 69 ct helper set "tftp"'
    assert line in nftables.render(rules, "router")
    assert "helper" not in nftables.render(nat_rules.rules(TARGET), "router")


def test_rules_in_iptables() -> None:
    made = iptables.tables(nat_rules.rules(TARGET, RouterNeeds((PUBLISHED,))), iptables.ROUTER)
    assert [table.name for table in made] == ["nat", "mangle", "raw", "filter"]
    texts = {table.name: [str(e) for c in table.chains.values() for e in c] for table in made}
    assert texts["filter"][-1].endswith("-j DROP")
    assert any("--to-destination 10.213.252.2" in text for text in texts["nat"])


# -- resolvers -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nameserver 192.0.2.53\n", None),
        ("nameserver 127.0.0.53\nnameserver 192.0.2.53\n", None),
        ("nameserver fe80::1%ens3\nnameserver 127.0.0.1\n", []),
    ],
)
def test_what_an_own_file_must_name(text: str, expected: list[str] | None, tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text(text)
    found = host_resolv_conf.servers(host_resolv_conf.look(file), file=file)
    assert (found is None) == (expected is None)


def test_a_link_is_replaced_and_comes_back(tmp_path: Path) -> None:
    stub, file = tmp_path / "stub", tmp_path / "resolv.conf"
    stub.write_text("nameserver 127.0.0.53\nnameserver 192.0.2.53\nsearch example.test\n")
    file.symlink_to(stub)
    before = host_resolv_conf.look(file)
    assert before == Resolver(link=str(stub))
    assert host_resolv_conf.servers(before, file=file) == ["192.0.2.53"]
    wanted = host_resolv_conf.wanted(("192.0.2.53",), before, file)
    host_resolv_conf.restore(wanted, file)
    assert not file.is_symlink()
    assert "nameserver 192.0.2.53\nsearch example.test\n" in file.read_text()
    host_resolv_conf.restore(before, file)
    assert file.readlink() == stub
    host_resolv_conf.restore(Resolver(), file)
    assert not file.is_symlink()


# -- the timer -----------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which systemd runs, and what waits writes down how it was started."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(confirm_timer, "SYSTEMD", tmp_path)
    monkeypatch.setattr(processes, "PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    script = f'echo "waiting $(cut -d" " -f6 /proc/self/stat) $*" >>{tmp_path / "said"}'
    monkeypatch.setattr(helper_command, "line", lambda *words: ("sh", "-c", script, *words))
    return tmp_path


def systemd_run(machine: Path, does: str) -> None:
    program = machine / "bin" / "systemd-run"
    program.write_text(f'#!/bin/sh\necho "unit $*" >>{machine / "said"}\n{does}\n')
    program.chmod(0o755)


def said(machine: Path) -> list[str]:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        lines = (machine / "said").read_text().splitlines() if (machine / "said").exists() else []
        if lines:
            return lines
        time.sleep(0.01)
    raise AssertionError("nothing was started")


def test_the_timer_is_a_unit_where_systemd_runs(machine: Path) -> None:
    systemd_run(machine, "exit 0")
    confirm_timer.arm("wan", 12.5)
    (line,) = said(machine)
    assert line.startswith("unit --quiet --collect --unit=natns-router-wan-")
    assert line.endswith("wan 12.5")


def test_the_timer_has_a_session_of_its_own_elsewhere(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confirm_timer, "SYSTEMD", machine / "missing")
    confirm_timer.arm("wan", 12.5)
    (line,) = said(machine)
    _, session, *words = line.split()
    assert int(session) != os.getsid(0)
    assert words == ["wan", "12.5"]


@pytest.mark.parametrize(
    "error", [KernelError("not now"), OSError(errno.ENOSPC, "full"), RuntimeError("a bug")]
)
def test_the_timer_tries_again(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as it takes, and for as long as the journal does not tell that it may stop."""
    monkeypatch.setattr(confirm_timer, "PAUSES", (0.0, 0.0))
    problems = [error] * 50

    def take_back() -> None:
        if problems:
            raise problems.pop()

    def pending() -> bool:
        raise StoreError("the journal cannot be read")

    confirm_timer.wait(0.0, pending, take_back)
    assert not problems


def test_the_timer_ends_with_a_confirmation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confirm_timer, "PAUSES", (0.0,))
    answers = [True, True, False]

    def take_back() -> None:
        raise KernelError("not now")

    confirm_timer.wait(0.0, lambda: answers.pop(0), take_back)
    assert not answers
    confirm_timer.wait(boot_clock.now() + 60.0, lambda: False, take_back)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"target": 1}', "\0\1", "1" * 5000])
def test_a_damaged_file_of_a_router(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "STATE_DIRECTORY", tmp_path)
    (tmp_path / "routers").mkdir()
    for kind in ("json", "kept"):
        names.router_file("wan", kind).write_text(content)
    with pytest.raises(RouterFileError, match=r"wan\.json is damaged"):
        journal.load("wan")
    with pytest.raises(RouterFileError, match=r"wan\.kept is damaged"):
        confirmation.load("wan")
    assert journal.load_all() == []
    assert set(journal.damaged()) == {"wan"}
    asides = [router_files.put_aside(names.router_file("wan", "kept")).name]
    for _ in range(router_files.MOST_ASIDE + 2):
        names.router_file("wan", "kept").write_text("another")
        asides.append(router_files.put_aside(names.router_file("wan", "kept")).name)
    assert asides[:2] == ["wan.kept.damaged", "wan.kept.damaged-2"]
    assert len(set(asides)) == router_files.MOST_ASIDE


def test_a_nic_by_another_name() -> None:
    header = struct.pack("=BBBBI", AF_INET, 24, 0x80, 0, 7)
    labels = {b"ens3": b"enp1s0", b"ens3:1": b"enp1s0:1", b"ens33": b"ens33"}
    for label, expected in labels.items():
        said = [(netlink.IFA_LOCAL, bytes(4)), (netlink.IFA_LABEL, label + b"\0")]
        made = nic_addresses.parse(header + netlink.pack(said)).relabelled("ens3", "enp1s0")
        found = Attrs.parse(bytes.fromhex(made.body), 8).get(netlink.IFA_LABEL)
        assert found == expected + b"\0"
    rule = NicRule(
        (bytes(12) + netlink.pack([(netlink.FRA_IIFNAME, b"ens3\0"), (6, b"\1\0\0\0")])).hex()
    )
    assert rule.names("ens3")
    assert rule.renamed("ens3", "enp1s0").names("enp1s0")
    assert not rule.renamed("ens3", "enp1s0").names("ens3")


def test_the_script_is_plain_shell(tmp_path: Path) -> None:
    """Whatever a link is called, nothing of it is run."""
    for name in ("ens3", "a b;id", "$(id)", "'"):
        before = replace(capture6(("2001:db8::2", 64)), name=name, altnames=("x y", "`id`"))
        file = tmp_path / "restore"
        file.write_text(restore_script.script("natns-router-wan", "natns-wan", before))
        subprocess.run(["/bin/sh", "-n", file], check=True)
        assert "python" not in file.read_text().lower().replace("without python", "")
        assert "@" not in file.read_text().replace("%%@*", "").replace("%@*", "").replace("$@", "")


# -- IPv6 of networks ------------------------------------------------------------


def capture6(*bodies: tuple[str, int]) -> Capture:
    made = []
    for ip, prefix in bodies:
        header = struct.pack("=BBBBI", AF_INET6, prefix, 0x80, 0, 7)
        body = header + netlink.pack([(netlink.IFA_ADDRESS, IPv6Address(ip).packed)])
        made.append(nic_addresses.parse(body))
    return Capture("absent", 2, "52:54:00:00:00:01", 1500, 1, 1000, 0, "", addresses=tuple(made))


@pytest.mark.parametrize(
    ("addresses", "hosts", "subnet6", "subnet", "own"),
    [
        ([], [], None, "", False),
        ([("2001:db8::2", 64)], ["2001:db8::2"], None, "2001:db8::/64", True),
        ([("2001:db8::2", 64)], ["2001:db8::3"], None, "2001:db8::/64", False),
        ([("fd00::2", 64), ("2001:db8::2", 64)], ["2001:db8::2", "fd00::2"], None,
         "2001:db8::/64", True),
        ([("2001:db8::2", 128)], ["2001:db8::2"], None, "", False),
        ([("2001:db8::2", 128)], ["2001:db8::2"], "2001:db8::/64", "2001:db8::/64", True),
        ([("2001:db8::2", 124)], ["2001:db8::2"], None, "", False),
    ],
)  # fmt: skip
def test_what_networks_get(
    addresses: list[tuple[str, int]], hosts: list[str], subnet6: str | None, subnet: str, own: bool
) -> None:
    wanted = RouterUpstream(
        name="wan", nic="ens3", subnet6=IPv6Network(subnet6) if subnet6 else None
    )
    chosen = [
        ipv6_choice.choose(Config(firewall="nftables"), wanted, capture6(*addresses), hosts)
        for _ in range(2)
    ]
    assert chosen[0] == chosen[1], "the same each time"
    assert (chosen[0].subnet, bool(chosen[0].own)) == (subnet, own)
    if own:
        assert IPv6Address(chosen[0].own) in IPv6Network(subnet)
    none = not subnet
    assert bool(chosen[0].transit) != none
    assert none or IPv6Network(chosen[0].transit).subnet_of(IPv6Network("fd00::/8"))


def test_rules_for_networks_in_ipv6() -> None:
    target = replace(TARGET, transit6="fd00:1:2::/64", subnet6="2001:db8::/64")
    to = HostForward("tcp", None, 8080, 8080, IPv6Address("fd00:1:2::2"), "transit")
    needs = RouterNeeds((to,), (("2001:db8:0:0:a::/80", "fd00:1:2::2"),))
    text = nftables.render(nat_rules.rules(target, needs), "router")
    chain = text.partition("chain forward {")[2].partition("}")[0]
    lines = [line.strip() for line in chain.splitlines()]
    drop = lines.index('meta nfproto ipv6 iifname "transit" drop')
    assert lines.index('iifname "transit" ip6 saddr fd00:1:2::/64 accept') < drop
    assert any("ip6 saddr 2001:db8:0:0:a::/80 accept" in line for line in lines[:drop])
    assert "tcp . 8080 : fd00:1:2::2 . 8080" in text
    moved = replace(needs, prefixes=((needs.prefixes[0][0], "fd00:1:2::3"),))
    assert nftables.render(nat_rules.rules(target, moved), "router") != text, "routes are looked at"


def test_all_of_a_subnet_gets_ahead_of_the_nics_route() -> None:
    target = replace(TARGET, transit6="fd00:1:2::/64", subnet6="2001:db8::/64")
    whole = (IPv6Network("2001:db8::/64"), IPv6Network("fd00::/64"))
    found = downstream.prefixes(target, whole, IPv6Network("2001:db8:9::/64"), "fd00:1:2::2")
    assert [prefix for prefix, _ in found] == [
        "2001:db8:9::/64",
        "2001:db8::/65",
        "2001:db8:0:0:8000::/65",
    ]
