# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the dnsmasq of a namespace is told, and which processes are taken for it.

dnsmasq/*.txt are networks with all that libvirt 9.0 wrote for them (11.3 writes
the same), and what we make of it.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path
from types import SimpleNamespace

import pytest

from libvirt_natns import names
from libvirt_natns.addresses import Address
from libvirt_natns.daemons import (
    dnsmasq,
    dnsmasq_files,
    dnsmasq_process,
    dnsmasq_trial,
    libvirt_dnsmasq,
)
from libvirt_natns.daemons.dnsmasq import Daemon
from libvirt_natns.daemons.dnsmasq_config import Advertised, make
from libvirt_natns.daemons.dnsmasq_files import Files, paths
from libvirt_natns.daemons.dnsmasq_from_xml import text_record
from libvirt_natns.daemons.dnsmasq_routes import RoutedNics
from libvirt_natns.daemons.resolv_conf import Resolvers
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.errors import DnsmasqError, DocumentError
from libvirt_natns.kernel import netns
from libvirt_natns.model.dns import TextRecord
from libvirt_natns.model.network import Network
from libvirt_natns.model.subnet import Subnet

GOLDEN = sorted((Path(__file__).parent / "dnsmasq").glob("*.txt"))
ASKED = Resolvers((IPv4Address("192.168.0.1"),))
PREFIX = IPv6Network("fd00:1::/64")
UUID = "00000000-0000-4000-8000-000000000001"

# What <natns:ip> cannot say.
LIBVIRT_ONLY = {"hosts", "ipv6-several", "several-subnets", "tftp"}


def parts_of(golden: Path) -> dict[str, str]:
    parts = {}
    for part in golden.read_text().split("--- ")[1:]:
        title, _, text = part.partition("\n")
        parts[title] = text
    return parts


def libvirts(golden: Path) -> Files:
    parts = parts_of(golden)
    found = (parts.get(f"libvirt's {name}", "") for name in ("configuration", "hosts", "records"))
    return Files(*found)


def golden_network(golden: Path) -> Network:
    return libvirt_xml.parse_network(parts_of(golden)["network"].encode())


def golden(name: str) -> Path:
    return next(path for path in GOLDEN if path.stem == name)


def configuration(
    name: str = "plain",
    *options: str,
    asked: Resolvers = ASKED,
    mtu: int | None = None,
    proxied: tuple[IPv6Network, ...] = (),
    router6: bool = True,
) -> list[str]:
    """Our lines for a golden network, with ``<dnsmasq:options>`` added to it."""
    xml = parts_of(golden(name))["network"].replace(
        "</network>",
        "<d:options xmlns:d='http://libvirt.org/schemas/network/dnsmasq/1.0'>"
        + "".join(f"<d:option value='{option}'/>" for option in options)
        + "</d:options></network>",
    )
    written = libvirts(golden(name)).configuration + "".join(f"{line}\n" for line in options)
    network = libvirt_xml.parse_network(xml.encode())
    files = make(network, Files(written), asked, mtu, advertised=Advertised(proxied, router6))
    return files.configuration.splitlines()


def about(lines: list[str], *keys: str) -> list[str]:
    return [line for line in lines if re.split("[ =]", line)[0] in keys]


# -- derived from libvirt's ----------------------------------------------------


def test_there_are_golden_texts() -> None:
    assert len(GOLDEN) >= 22


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_derived_configuration(path: Path) -> None:
    files = make(golden_network(path), libvirts(path), ASKED, None)
    assert files.configuration == parts_of(path)["our configuration"]
    assert (files.hosts, files.records) == (libvirts(path).hosts, libvirts(path).records)


def test_resolvers_that_dnsmasq_polls() -> None:
    lines = configuration(asked=Resolvers(file=Path("/run/systemd/resolve/resolv.conf")))
    assert "resolv-file=/run/systemd/resolve/resolv.conf" in lines
    assert "no-resolv" not in lines


def test_without_resolvers_nobody_is_asked() -> None:
    lines = configuration(asked=Resolvers())
    assert about(lines, "no-resolv", "server", "resolv-file") == ["no-resolv"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["server=/corp/192.168.0.9"], ["no-resolv", "server=192.168.0.1"]),
        (["server=192.168.0.9"], ["no-resolv"]),
        (["server = 192.168.0.9"], ["no-resolv"]),
        (["resolv-file=/etc/corp"], []),
        (["resolv-file=/etc/corp", "server=192.168.0.9"], []),
        (["no-resolv"], []),
        (["no-resolv", "server=192.168.0.9"], []),
    ],
)
def test_whom_the_users_options_name_is_asked(options: list[str], expected: list[str]) -> None:
    lines = configuration("plain", *options)
    assert about(lines, "no-resolv", "server", "resolv-file") == [*expected, *options]


def test_users_options_stay_and_come_last() -> None:
    options = ["dhcp-option=3,10.0.0.9", "dhcp-option=3", "log-queries", "pid-file=/run/x"]
    assert configuration("plain", *options)[-3:] == options[:3]


def test_users_options_about_ipv6_stay_as_they_are() -> None:
    options = ["ra-param=*,0,0", "dhcp-range=fd00:1::1, ra-stateless", "enable-ra"]
    lines = configuration("ipv6-advertised", *options, mtu=1400, proxied=(PREFIX,), router6=False)
    assert lines[-3:] == options
    assert about(lines, "ra-param") == options[:1]


def test_text_that_is_not_of_this_network() -> None:
    """An option that libvirt has not written yet is no reason to lose lines."""
    network = golden_network(golden("options"))
    files = make(network, libvirts(golden("plain")), ASKED, None)
    assert "domain=plain" in files.configuration.splitlines()


# -- MTU -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "mtu", "expected"),
    [
        ("plain", [], None, []),
        ("plain", [], 1400, ["dhcp-option=option:mtu,1400"]),
        ("mtu", [], None, ["dhcp-option=option:mtu,1400"]),
        ("mtu", [], 1300, ["dhcp-option=option:mtu,1300"]),
        ("plain", ["dhcp-option=26,1280"], 1400, ["dhcp-option=26,1280"]),
        ("plain", ["dhcp-option-force=26,1280"], 1400, ["dhcp-option-force=26,1280"]),
        ("plain", ["dhcp-option = option:mtu, 1280"], 1400, ["dhcp-option = option:mtu, 1280"]),
        ("plain", ["dhcp-option=6,10.0.0.9"], 1400,
         ["dhcp-option=option:mtu,1400", "dhcp-option=6,10.0.0.9"]),
    ],
)  # fmt: skip
def test_mtu(name: str, options: list[str], mtu: int | None, expected: list[str]) -> None:
    lines = about(configuration(name, *options, mtu=mtu), "dhcp-option", "dhcp-option-force")
    assert [line for line in lines if "tag:" not in line] == expected


# -- default routes --------------------------------------------------------------

MAC, OTHER = "52:54:00:00:00:05", "52:54:00:00:00:06"


def routed(files: Files | None, routed: RoutedNics, *options: str, hosts: str = "") -> Files:
    """Our files for a network of 10.0.0.0/24, from libvirt's or from ``<natns:ip>``."""
    content = "".join(f"<d:option value='{option}'/>" for option in options)
    content = (
        f"<d:options xmlns:d='http://libvirt.org/schemas/network/dnsmasq/1.0'>{content}</d:options>"
    )
    dhcp = f"<natns:range start='10.0.0.100' end='10.0.0.200'/>{hosts}"
    network = natns_network(content, dhcp)
    kept: list[tuple[str, Address]] = [
        (OTHER, IPv4Address("10.0.0.6")),
        (MAC, IPv6Address("fd00::5")),
    ]
    return make(network, files, ASKED, None, kept, Advertised(routed=routed))


TEXT = Files("dhcp-range=10.0.0.100,10.0.0.200,255.255.255.0\n", f"{MAC.upper()},10.0.0.5,web\n")


@pytest.mark.parametrize("libvirts", [None, TEXT], ids=["natns:ip", "libvirt's"])
def test_nics_with_another_way_out_get_no_router(libvirts: Files | None) -> None:
    """An entry of another network tags a NIC, unless it has an entry in IPv4."""
    files = routed(libvirts, RoutedNics(exceptions=(MAC, OTHER)))
    own = [MAC] if libvirts else []
    assert about(files.configuration.splitlines(), "dhcp-option", "dhcp-mac") == [
        "dhcp-option=tag:natns-no-router,3",
        "dhcp-option=tag:known-othernet,3",
        "dhcp-option=tag:natns-no-router,6",
        "dhcp-option=tag:known-othernet,6",
        *(f"dhcp-mac=set:natns-no-router,{mac}" for mac in (*own, OTHER)),
    ]
    assert files.hosts.splitlines() == [
        *([f"{MAC.upper()},10.0.0.5,web"] if libvirts else [f"{MAC},127.0.0.1"]),
        f"{OTHER},10.0.0.6",
        f"{MAC},[fd00::5]",
    ]
    assert [mac for mac, _ in dnsmasq_files.reserved(files.hosts)] == [OTHER, MAC]


def test_only_some_nics_get_a_router() -> None:
    files = routed(None, RoutedNics(others=False, exceptions=(MAC,)))
    assert about(files.configuration.splitlines(), "dhcp-option", "dhcp-mac") == [
        "dhcp-option=tag:!natns-router,tag:!known-othernet,3",
        "dhcp-option=tag:!natns-router,tag:!known-othernet,6",
    ]
    assert files.hosts.splitlines()[0] == f"{MAC},127.0.0.1"


def test_many_nics_share_entries() -> None:
    macs = tuple(f"52:54:00:00:01:{number:02x}" for number in range(70))
    lines = routed(None, RoutedNics(exceptions=macs)).hosts.splitlines()[:3]
    assert [line.rpartition(",")[2] for line in lines] == ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    assert ",".join(line.rpartition(",")[0] for line in lines) == ",".join(macs)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("dhcp-option=3", ["6"]),
        ("dhcp-option-force=option:router,10.0.0.9", ["6"]),
        ("dhcp-option = 6,10.0.0.9", ["3"]),
        ("dhcp-option=option:dns-server,10.0.0.9", ["3"]),
        # For some clients only.
        ("dhcp-option=tag:x,3", ["3", "6"]),
        ("dhcp-option=33,10.0.0.9,10.0.0.8", ["3", "6"]),
    ],
)
def test_the_users_own_routers_and_servers_stay(option: str, expected: list[str]) -> None:
    lines = routed(None, RoutedNics(exceptions=(MAC,)), option).configuration.splitlines()
    ours = [line for line in about(lines, "dhcp-option") if "natns-no-router" in line]
    assert ours == [f"dhcp-option=tag:natns-no-router,{number}" for number in expected]


@pytest.mark.parametrize(
    ("options", "hosts"),
    [
        ([f"dhcp-host={MAC},10.0.0.9"], ""),
        (["dhcp-hostsfile=/etc/more"], ""),
        (["dhcp-ignore=tag:!known"], ""),
        # dnsmasq 2.90 would hang.
        ([], "<natns:host name='web' ip='10.0.0.7'/>"),
    ],
)
def test_an_entry_of_another_network_meets_no_other_entry(options: list[str], hosts: str) -> None:
    files = routed(None, RoutedNics(exceptions=(MAC,)), *options, hosts=hosts)
    assert f"dhcp-mac=set:natns-no-router,{MAC}" in files.configuration.splitlines()
    assert "known-othernet" not in files.configuration
    assert "127.0.0.1" not in files.hosts


# -- IPv6 ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mtu", "router6", "expected"),
    [
        ("ipv6-advertised", None, True, []),
        ("ipv6-advertised", 1400, True, ["ra-param=*,mtu:1400,0"]),
        ("ipv6-advertised", 1200, True, ["ra-param=*,mtu:1280,0"]),
        ("ipv6-advertised", None, False, ["ra-param=*,0,0"]),
        ("ipv6-advertised", 1400, False, ["ra-param=*,mtu:1400,0,0"]),
        ("plain", 1400, False, []),
    ],
)
def test_router_and_mtu(name: str, mtu: int | None, router6: bool, expected: list[str]) -> None:
    assert about(configuration(name, mtu=mtu, router6=router6), "ra-param") == expected


@pytest.mark.parametrize(
    ("name", "proxied", "expected"),
    [
        ("ipv6-advertised", "fd00:1::/64", ["dhcp-range=fd00:1::1,off-link,ra-only"]),
        ("ipv6-advertised", "fd00::/16", ["dhcp-range=fd00:1::1,off-link,ra-only"]),
        ("ipv6-advertised", "fd00:2::/64", ["dhcp-range=fd00:1::1,ra-only"]),
        ("ipv6-static", "fd00:1::/64", ["dhcp-range=fd00:1::1,off-link,static,64"]),
        (
            "ipv6-several",
            "fd00:1::/64",
            [
                "dhcp-range=fd00:1::100,fd00:1::1ff,off-link,64",
                "dhcp-range=fd00:2::1,ra-only,64,1h",
                "dhcp-range=fd00:3::1,ra-only,64,1h",
            ],
        ),
        (
            "ipv6-several",
            "fd00:3::/64",
            [
                "dhcp-range=fd00:1::100,fd00:1::1ff,64",
                "dhcp-range=fd00:2::1,ra-only,64,1h",
                "dhcp-range=fd00:3::1,off-link,ra-only,64,1h",
            ],
        ),
    ],
)
def test_proxied_subnets_are_not_on_the_link(name: str, proxied: str, expected: list[str]) -> None:
    lines = about(configuration(name, proxied=(IPv6Network(proxied),)), "dhcp-range")
    assert [line for line in lines if "fd00:" in line] == expected


LEASED = Subnet(IPv6Interface("2001:db8:0:7::1/64"))


@pytest.mark.parametrize("name", ["plain", "ipv6", "ipv6-advertised"])
def test_a_leased_subnet_is_advertised(name: str) -> None:
    network = golden_network(golden(name))
    network = replace(network, subnets=(*network.subnets, LEASED))
    lines = make(network, libvirts(golden(name)), ASKED, None).configuration.splitlines()
    assert about(lines, "dhcp-range")[-1] == "dhcp-range=2001:db8:0:7::1,ra-only,64,1h"
    added = [line for line in lines if line not in configuration(name)]
    assert added == ["dhcp-range=2001:db8:0:7::1,ra-only,64,1h"]


@pytest.mark.parametrize(
    "option", ["dhcp-range=::,constructor:virbr10,ra-stateless", "dhcp-range=2001:db8:0:7::,slaac"]
)
def test_a_subnet_that_the_user_advertises_is_not_advertised_twice(option: str) -> None:
    network = golden_network(golden("plain"))
    network = replace(network, subnets=(*network.subnets, LEASED), dnsmasq_options=(option,))
    files = Files(libvirts(golden("plain")).configuration + f"{option}\n")
    lines = make(network, files, ASKED, None).configuration.splitlines()
    assert about(lines, "dhcp-range")[1:] == [option]


def test_router_of_a_network_without_names_and_without_dhcp() -> None:
    """libvirt has no dnsmasq there."""
    network = libvirt_xml.parse_network(
        f"<network><name>a</name><uuid>{UUID}</uuid><bridge name='virbr10'/><dns enable='no'/>"
        "<ip family='ipv6' address='fd00:1::1' prefix='64'/></network>".encode()
    )
    assert (network.has_dnsmasq, network.needs_dnsmasq) == (False, True)
    lines = make(network, None, Resolvers(), None).configuration.splitlines()
    assert {"port=0", "dhcp-range=fd00:1::1,ra-only"} < set(lines)


def test_reservations_of_both_families() -> None:
    mac = "52:54:00:00:00:05"
    kept: list[tuple[str, Address]] = [
        (mac, IPv4Address("10.0.0.5")),
        (mac, IPv6Address("fd00:1::5")),
    ]
    files = make(golden_network(golden("ipv6")), libvirts(golden("ipv6")), ASKED, None, kept)
    assert files.hosts.splitlines()[1:] == [f"{mac},10.0.0.5", f"{mac},[fd00:1::5]"]


# -- written as libvirt would ----------------------------------------------------


def natns_ip(xml: str) -> bytes:
    """The same network, addressed by <natns:ip> instead of <ip>."""
    found = re.search(r"  <ip .*?(/>|</ip>)\n(?=  <dnsmasq|</network>)", xml, re.DOTALL)
    assert found
    element = re.sub(r"<(/?)(?=[a-z])", r"<\1natns:", found[0])
    nat = f"<metadata><natns:nat xmlns:natns='urn:libvirt-natns:1'>{element}</natns:nat></metadata>"
    return xml.replace(found[0], nat).encode()


@pytest.mark.parametrize(
    "path", [path for path in GOLDEN if path.stem not in LIBVIRT_ONLY], ids=lambda path: path.stem
)
def test_written_as_libvirt_does(path: Path) -> None:
    network = libvirt_xml.parse_network(natns_ip(parts_of(path)["network"]))
    assert not network.taken_over
    files = make(network, None, ASKED, None)
    # But for what dnsmasq would not give out as it stands.
    quoted = r'txt-record=t2,"a, b \"c\""'
    expected = parts_of(path)["our configuration"].replace('txt-record=t2,a, b "c"', quoted)
    assert files.configuration == expected
    assert files.hosts == libvirts(path).hosts
    assert files.records.split() == libvirts(path).records.split()


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("some text", "some text"),
        ("it's k=v; 100% ünïcode", "it's k=v; 100% ünïcode"),
        ("v=spf1 include:x # ~all", '"v=spf1 include:x # ~all"'),
        ('a "b', r'"a \"b"'),
        ("a,b", '"a,b"'),
        ("back\\slash", r'"back\\slash"'),
        (" first", '" first"'),
        ("last ", '"last "'),
    ],
)
def test_texts(value: str, written: str) -> None:
    assert text_record(TextRecord("n.example", value)) == f"txt-record=n.example,{written}"


def natns_network(content: str = "", dhcp: str = "") -> Network:
    return libvirt_xml.parse_network(
        f"""<network><name>a</name><uuid>{UUID}</uuid><bridge name='virbr10'/>
        <metadata><natns:nat xmlns:natns='urn:libvirt-natns:1'>
        <natns:ip address='10.0.0.1' prefix='24'><natns:dhcp>{dhcp}</natns:dhcp></natns:ip>
        </natns:nat></metadata>{content}</network>""".encode()
    )


def test_hosts_by_mac_and_by_name() -> None:
    dhcp = """<natns:host mac='52:54:00:00:00:05' name='web' ip='10.0.0.5'/>
      <natns:host name='db' ip='10.0.0.6'/><natns:host mac='52:54:00:00:00:07' ip='10.0.0.7'/>"""
    files = make(natns_network(dhcp=dhcp), None, ASKED, None)
    assert (
        files.hosts == "52:54:00:00:00:05,10.0.0.5,web\ndb,10.0.0.6\n52:54:00:00:00:07,10.0.0.7\n"
    )


def test_hosts_of_dhcpv6() -> None:
    dhcp = """<natns:host mac='52:54:00:00:00:05' name='web' ip='fd00::5'/>
      <natns:host id='00:03:00:01:02:03' name='db' ip='fd00::6'/>
      <natns:host name='mail' ip='fd00::7'/><natns:host id='0:1:2' ip='fd00::8'/>"""
    xml = f"""<network><name>a</name><uuid>{UUID}</uuid><bridge name='virbr10'/>
        <metadata><natns:nat xmlns:natns='urn:libvirt-natns:1'>
        <natns:ip family='ipv6' address='fd00::1' prefix='64'><natns:dhcp>{dhcp}</natns:dhcp>
        </natns:ip></natns:nat></metadata></network>"""
    files = make(libvirt_xml.parse_network(xml.encode()), None, ASKED, None)
    assert files.hosts.splitlines() == [
        "52:54:00:00:00:05,web,[fd00::5]",
        "id:00:03:00:01:02:03,db,[fd00::6]",
        "mail,[fd00::7]",
        "id:0:1:2,[fd00::8]",
    ]


def test_no_dnsmasq_where_libvirt_runs_none() -> None:
    assert natns_network().has_dnsmasq
    assert not natns_network("<dns enable='no'/>").has_dnsmasq
    hosts = "<natns:host mac='52:54:00:00:00:05' ip='10.0.0.5'/>"
    assert natns_network("<dns enable='no'/>", hosts).has_dnsmasq


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("<dns><txt name='a,b' value='x'/></dns>", "<txt> has name='a,b'"),
        ("<dns><txt name='a' value='x&#10;y'/></dns>", "<txt> has value="),
        ("<dns><txt value='x'/></dns>", "<txt> has no name"),
        (f"<dns><txt name='a' value='{'x' * 988}'/></dns>", "expected a value shorter by 1 octets"),
        (f"<dns><txt name='a' value='{',&quot;' * 400}'/></dns>", "shorter by 215 octets"),
        ("<dns><srv service='a,b' protocol='tcp'/></dns>", "<srv> has service='a,b'"),
        ("<dns><srv service='a' protocol='t p'/></dns>", "<srv> has protocol='t p'"),
        ("<dns><srv service='a' protocol='tcp' target='b,1'/></dns>", "<srv> has target='b,1'"),
        ("<dns><srv service='a' protocol='tcp' domain='b/'/></dns>", "<srv> has domain='b/'"),
        ("<dns><srv service='a' protocol='tcp' port='65536'/></dns>", "<srv> has port='65536'"),
        ("<dns><srv service='a' protocol='tcp' weight='-1'/></dns>", "<srv> has weight='-1'"),
        ("<dns><forwarder domain='a/b' addr='192.168.0.1'/></dns>", "has domain='a/b'"),
        ("<dns><forwarder addr='192.168.0.1#53'/></dns>", "has addr='192.168.0.1#53'"),
        ("<dns><forwarder addr='fe80::1%a b'/></dns>", "has addr='fe80::1%a b'"),
        ("<dns><forwarder/></dns>", "<forwarder> has neither domain nor addr"),
        ("<dns><host ip='x'><hostname>a</hostname></host></dns>", "<host> has ip='x'"),
        ("<dns><host ip='10.0.0.5'/></dns>", "<host> has no <hostname>"),
        ("<dns><host ip='10.0.0.5'><hostname>a b</hostname></host></dns>", "<hostname> 'a b'"),
        ("<dns><host ip='10.0.0.5'><hostname/></host></dns>", "<hostname> ''"),
        ("<domain name='a,b'/>", "<domain> has name='a,b'"),
        (
            "<d:options xmlns:d='http://libvirt.org/schemas/network/dnsmasq/1.0'>"
            "<d:option value='a&#10;b'/></d:options>",
            "<option> has value='a\\nb'",
        ),
    ],
)
def test_values_that_would_say_something_else_to_dnsmasq(content: str, complaint: str) -> None:
    with pytest.raises(DocumentError) as caught:
        natns_network(content)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_libvirts_own_networks_are_not_judged() -> None:
    xml = b"<network><name>a</name><dns><txt name='a,b' value='c'/></dns></network>"
    assert libvirt_xml.parse_any_network(xml).dns is not None


# -- files and processes ---------------------------------------------------------


@pytest.fixture(autouse=True)
def run_directory(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Golden texts name the real run-time directory; processes get their own."""
    with pytest.MonkeyPatch.context() as patch:
        if "process" in request.node.name:
            patch.setattr(names, "RUN_DIRECTORY", tmp_path)
            paths(UUID).pid.parent.mkdir(parents=True)
        yield tmp_path


def pretender(option: str) -> subprocess.Popen[bytes]:
    """A process with such an argument that says when it runs."""
    words = ["sh", "-c", "echo ready; read line", "sh", option]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def finish(process: subprocess.Popen[bytes]) -> int:
    """Let a pretender end by itself; its exit status tells whether it was ended before."""
    process.communicate(b"\n", timeout=5)
    return process.returncode


def test_process_that_took_over_a_pid_is_spared() -> None:
    stranger = pretender("--conf-file=/etc/dnsmasq.conf")
    paths(UUID).pid.write_text(f"{stranger.pid}\n")
    dnsmasq.stop(UUID)
    assert finish(stranger) == 0
    assert not paths(UUID).pid.exists()


def test_process_without_a_pid_file_is_ended() -> None:
    stray = pretender(f"--conf-file={paths(UUID).configuration}")
    other = pretender(f"--conf-file={paths(UUID.replace('1', '2')).configuration}")
    dnsmasq.stop(UUID)
    assert stray.wait(timeout=5) < 0
    assert finish(other) == 0
    dnsmasq.stop(UUID)


def test_process_that_ignores_the_first_signal_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnsmasq_process, "STOP_LIMIT", 0.2)
    option = f"--conf-file={paths(UUID).configuration}"
    words = ["sh", "-c", "trap '' TERM; echo ready; read line", "sh", option]
    stubborn = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert stubborn.stdout is not None
    stubborn.stdout.readline()
    dnsmasq.stop(UUID)
    assert stubborn.wait(timeout=5) == -9


def test_process_that_does_not_run_is_missed() -> None:
    daemon = Daemon(UUID, "nat-no-such-namespace", "virbr10", Files("x\n"))
    assert dnsmasq.differences(daemon) == ["dnsmasq of nat-no-such-namespace is not running"]
    assert dnsmasq.differences(Daemon(UUID, "nat-no-such-namespace", "virbr10", None)) == []


def test_libvirts_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libvirt_dnsmasq, "LIBVIRT_DIRECTORY", tmp_path)
    with pytest.raises(DnsmasqError, match=r"a\.conf: No such file or directory"):
        libvirt_dnsmasq.read("a")
    (tmp_path / "a.conf").write_text("strict-order\n")
    assert libvirt_dnsmasq.read("a") == Files("strict-order\n")
    (tmp_path / "a.hostsfile").write_text("52:54:00:00:00:05,10.0.0.5\n")
    (tmp_path / "a.addnhosts").write_text("10.0.0.7\tdb\n")
    found = libvirt_dnsmasq.read("a")
    assert (found.hosts, found.records) == ("52:54:00:00:00:05,10.0.0.5\n", "10.0.0.7\tdb\n")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What becomes of a dnsmasq that runs as soon as it is started, in words."""
    events: list[str] = []
    monkeypatch.setattr(dnsmasq, "start_process", lambda *_: events.append("started"))
    monkeypatch.setattr(dnsmasq, "reload_hosts", lambda pid: events.append("reloaded"))
    monkeypatch.setattr(dnsmasq, "running", lambda *_: 7 if events else None)
    return events


def test_process_is_started_reloaded_restarted_or_left_alone(told: list[str]) -> None:
    for files in (Files("x\n"), Files("x\n"), Files("x\n", "y\n"), Files("z\n", "y\n")):
        daemon = Daemon(UUID, "nat-a", "virbr10", files)
        dnsmasq.ensure(daemon)
        assert dnsmasq.differences(daemon) == []
    assert told == ["started", "reloaded", "started"]
    assert dnsmasq.differences(Daemon(UUID, "nat-a", "virbr10", None))


def test_process_that_was_not_told_shows(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    dnsmasq.ensure(Daemon(UUID, "nat-a", "virbr10", Files("x\n")))

    def killed(pid: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dnsmasq, "reload_hosts", killed)
    daemon = Daemon(UUID, "nat-a", "virbr10", Files("x\n", "y\n"))
    with pytest.raises(KeyboardInterrupt):
        dnsmasq.ensure(daemon)
    assert dnsmasq.differences(daemon)


def test_process_files_can_be_read_by_the_user_that_dnsmasq_becomes(told: list[str]) -> None:
    before = os.umask(0o077)
    try:
        dnsmasq.ensure(Daemon(UUID, "nat-a", "virbr10", Files("x\n", "y\n", "z\n")))
    finally:
        os.umask(before)
    written = paths(UUID)
    for file in (written.hosts, written.records):
        assert file.stat().st_mode & 0o777 == 0o644
    for directory in (names.network_directory(UUID), *names.network_directory(UUID).parents[:2]):
        assert directory.stat().st_mode & 0o777 == 0o711


def test_process_that_starts_counts_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = Daemon(UUID, "nat-a", "virbr10", Files("x\n"))
    starting = pretender(f"--conf-file={paths(UUID).configuration}")
    monkeypatch.setattr(netns, "inode", lambda _: Path(f"/proc/{os.getpid()}/ns/net").stat().st_ino)
    dnsmasq.start_note(UUID).write_text(f"{starting.pid}\n")
    paths(UUID).configuration.write_text("x\n")
    assert dnsmasq.running(UUID, "nat-a") == starting.pid
    assert dnsmasq.differences(daemon) == []
    timer = threading.Timer(0.2, finish, [starting])
    timer.start()
    dnsmasq.stop(UUID)
    timer.join()
    # It was not ended, but has ended.
    assert starting.returncode == 0
    assert dnsmasq.running(UUID, "nat-a") is None
    assert not dnsmasq.start_note(UUID).exists()


def test_process_of_which_nothing_is_left_is_not_searched_for() -> None:
    stray = pretender(f"--conf-file={paths(UUID).configuration}")
    dnsmasq.stop(UUID, search=False)
    assert stray.poll() is None
    paths(UUID).configuration.write_text("x\n")
    dnsmasq.stop(UUID, search=False)
    assert stray.wait(timeout=5) < 0


@pytest.mark.parametrize(
    ("script", "complaint"), [("exit 0", ""), ("echo no luck >&2; exit 3", "no luck")]
)
def test_process_is_waited_for_later(
    script: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "dnsmasq"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o711)
    monkeypatch.setattr(dnsmasq_process, "program", lambda: str(program))
    monkeypatch.setattr(dnsmasq_process, "lease_options", list)
    monkeypatch.setattr(netns, "entered", lambda _: nullcontext())
    kept: list[Callable[[], None]] = []
    daemon = Daemon(UUID, "nat-a", "virbr10", Files("x\n"))
    dnsmasq.ensure(daemon, kept.append)
    (work,) = kept
    if complaint:
        with pytest.raises(DnsmasqError, match=f"refuses to start in nat-a: {complaint}"):
            work()
    else:
        work()


# -- what ends a line ----------------------------------------------------------------


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\r"])
def test_only_a_line_feed_ends_a_line(character: str) -> None:
    """As for libvirt and dnsmasq."""
    line = f"txt-record=a,b{character}enable-tftp"
    theirs = Files(f"strict-order\n{line}\nno-resolv\n")
    network = replace(golden_network(golden("plain")), dnsmasq_options=())
    assert line in make(network, theirs, ASKED, None).configuration.split("\n")
    options = replace(network, dnsmasq_options=(line,))
    assert line in make(options, None, ASKED, None).configuration.split("\n")


def test_libvirts_text_is_read_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(libvirt_dnsmasq, "LIBVIRT_DIRECTORY", tmp_path)
    text = "srv-host=_a._tcp.x,y\rz,1\r\nlocal=/\u2028/\n"
    (tmp_path / "a.conf").write_bytes(text.encode())
    assert libvirt_dnsmasq.read("a").configuration == text


# -- what dnsmasq refuses ------------------------------------------------------------

REAL = pytest.mark.skipif(not shutil.which("dnsmasq"), reason="needs dnsmasq")


def own_network(inside: str = "") -> Network:
    """A network of <natns:ip>, whose configuration is ours alone."""
    return libvirt_xml.parse_network(
        f"""<network xmlns:dnsmasq='http://libvirt.org/schemas/network/dnsmasq/1.0'>
        <name>a</name><uuid>{UUID}</uuid><metadata>
        <natns:nat xmlns:natns='urn:libvirt-natns:1'><natns:ip address='10.0.0.1' prefix='24'/>
        </natns:nat></metadata><bridge name='virbr10'/>{inside}</network>""".encode()
    )


@REAL
@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        (
            "<dnsmasq:options><dnsmasq:option value='bogus=1'/></dnsmasq:options>",
            "network a: dnsmasq refuses 'bogus=1': bad option; change",
        ),
        (f"<domain name='{'a' * 64}.x'/>", "dnsmasq refuses 'domain=aaaa"),
        ("<dns><txt name='\u00e9' value='a'/></dns>", "bad TXT record"),
        (
            "<dnsmasq:options><dnsmasq:option value='no-daemon'/></dnsmasq:options>",
            "dnsmasq does not become a daemon with 'no-daemon'",
        ),
    ],
)
def test_what_dnsmasq_refuses_is_found_out_ahead(inside: str, expected: str) -> None:
    with pytest.raises(DnsmasqError) as raised:
        dnsmasq_trial.check(own_network(inside))
    assert expected in str(raised.value)


@REAL
def test_what_dnsmasq_takes_is_taken() -> None:
    dnsmasq_trial.check(own_network("<dns><txt name='x' value='a, \"b\"'/></dns>"))


LISTENING = """
import socket, sys
sock = socket.create_server((sys.argv[1], 0)) if sys.argv[1] else None
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("address", "limited"), [("", True), ("127.0.0.1", False)])
def test_an_idle_dnsmasq_that_serves_clients_elsewhere_is_left_alone(
    address: str, limited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would answer them no more, and would call poll(2) for ever."""
    monkeypatch.setattr(libvirt_dnsmasq, "LIBVIRT_DIRECTORY", tmp_path)
    monkeypatch.setattr(libvirt_dnsmasq, "LIBVIRT_RUN_DIRECTORY", tmp_path)
    word = dnsmasq_process.option(libvirt_dnsmasq.path("a", "conf"))
    command = [sys.executable, "-c", LISTENING, address, word]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        (tmp_path / "a.pid").write_text(f"{process.pid}\n")
        run: list[list[str]] = []

        def limit(words: list[str], **_: object) -> SimpleNamespace:
            run.append(words)
            return SimpleNamespace(returncode=0, stderr=b"")

        monkeypatch.setattr(subprocess, "run", limit)
        assert bool(libvirt_dnsmasq.bound_differences("a")) == limited
        libvirt_dnsmasq.bind("a", ())
        assert len(run) == limited
        # A limit that is not ours stays.
        libvirt_dnsmasq.unbind("a")
        assert len(run) == limited
