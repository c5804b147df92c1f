# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files are judged as the start of a network or guest judges them, without root and libvirt."""

import os
import shutil
from pathlib import Path

import pytest

from libvirt_natns import names
from libvirt_natns.cli import commands
from libvirt_natns.daemons import libvirt
from libvirt_natns.errors import LibvirtError

XML = names.resource("xml")
HEAD = '<natns:nat xmlns:natns="urn:libvirt-natns:1"'
IP = "<ip address='10.0.0.1' prefix='24'/>"
CONFIG = """
upstream = "provider"
[upstreams.provider]
kind = "bridge"
bridge = "br0"
subnet = "192.168.0.0/24"
gateway = "192.168.0.1"
pool = ["192.168.0.100-192.168.0.199"]
dns = ["192.168.0.1"]
[upstreams.wan]
kind = "router"
nic = "ens3"
[upstreams.leased]
kind = "bridge"
bridge = "br1"
pool = "dhcp"
"""


@pytest.fixture(autouse=True)
def anybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without rights, on a machine without libvirt and without a configuration."""

    def unreachable(**_: object) -> None:
        raise LibvirtError("libvirt is asked")

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(libvirt, "connected", unreachable)
    monkeypatch.setattr(names, "CONFIG_FILE", tmp_path / "none.toml")
    monkeypatch.setattr(names, "STATE_DIRECTORY", tmp_path / "none")
    monkeypatch.chdir(tmp_path)


def network(inside: str, name: str = "lab") -> str:
    return f"<network><name>{name}</name><bridge name='virbr10'/>{inside}</network>"


def nat(attributes: str, inside: str = "") -> str:
    return f"<metadata>{HEAD} {attributes}>{inside}</natns:nat></metadata>"


def domain(forwards: str) -> str:
    return f"<domain><name>web</name>{nat('', forwards)}</domain>"


def upstream(name: str) -> str:
    return nat("", f"<natns:upstream name='{name}'/>")


def validate(capsys: pytest.CaptureFixture[str], *files: str | Path) -> tuple[int, list[str]]:
    status = commands.main(["validate", *map(str, files)])
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    # A line for each file, in their order.
    assert [line.partition(":")[0] for line in lines] == list(map(str, files))
    return status, [line.partition(": ")[2] for line in lines]


def judged(
    capsys: pytest.CaptureFixture[str], content: str | bytes, settings: str | None = CONFIG
) -> str:
    """Return the line about a file with this content; it is wrong if the status says so."""
    octets = content.encode() if isinstance(content, str) else content
    Path("file").write_bytes(octets)
    if settings is not None:
        names.CONFIG_FILE.write_text(settings)
    status, (line,) = validate(capsys, "file")
    assert status == (": valid, " not in line)
    return line


def test_all_examples_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    examples = sorted(each for each in XML.iterdir() if each.suffix in (".xml", ".toml"))
    status, lines = validate(capsys, *examples)
    assert status == 0
    kinds = {example.suffix: set[str]() for example in examples}
    for example, line in zip(examples, lines, strict=True):
        assert ": valid, " in line
        kinds[example.suffix].add(line.split()[0].rstrip(":"))
    assert kinds == {".xml": {"network", "domain"}, ".toml": {"configuration"}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (network(IP), "network lab: valid, and gets a router to upstream provider"),
        (f"\ufeff\n<?xml version='1.0'?>\n{network(IP)}".replace("\n<?", "<?"),
         "network lab: valid, and gets a router to upstream provider"),
        (network(IP + upstream("host")), "network lab: valid, and gets a router to upstream host"),
        (network(IP + upstream("wan")), "network lab: valid, and gets a router to upstream wan"),
        (network(IP + upstream("leased")),
         "network lab: valid, and gets a router to upstream leased"),
        # libvirt chooses the bridge and the uuid when it defines the network.
        (network(IP).replace("<bridge name='virbr10'/>", ""),
         "network lab: valid, and gets a router to upstream provider"),
        (network(f"<forward/>{IP}"),
         "network lab: valid, and is not touched: has <forward mode='nat'>"),
        (network(IP + nat("enabled='no'")),
         "network lab: valid, and is not touched: its metadata says enabled='no'"),
        ("<domain type='kvm'><name>web</name></domain>",
         "domain web: valid, without <natns:nat>"),
        (domain("<natns:portForward><natns:range start='80'/></natns:portForward>"),
         "domain web: valid, with 1 <natns:portForward>"),
        ("", "configuration: valid, with scope isolated and upstream host"),
        (CONFIG, "configuration: valid, with scope isolated and upstream provider"),
    ],
)  # fmt: skip
def test_valid(content: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert judged(capsys, content) == said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (network(IP + nat("enabled='maybe'")), "wrong network: network 'lab', line 1: <natns:nat>"
         " has enabled='maybe': expected yes or no"),
        (network(nat("")), "wrong network: network lab has neither <ip> nor <natns:ip>: add <ip>"),
        (network("<ip address='192.168.0.1' prefix='25'/>"),
         "wrong network: network lab: its subnet 192.168.0.0/25 overlaps 192.168.0.0/24 of"
         " upstream provider: give one of them another subnet"),
        (network(IP + upstream("nowhere")),
         "wrong network: network lab: there is no upstream nowhere: add [upstreams.nowhere] to"),
        (network(IP.replace("/>", ">") + "<dhcp>"), "wrong document: the document is not well-"),
        ("<domain><metadata><natns:nat/></metadata></domain>", "wrong document: the document is"),
        (domain("<natns:portForward/>"),
         "wrong domain: domain 'web', line 1: <natns:portForward>"),
        ("<pool/>", "wrong document: the document begins with 'pool': expected <network> or"),
        ("scoop = 1", "wrong configuration: scoop: unknown key: expected scope (did you mean"),
        ("scope = isolated", "wrong configuration: not valid TOML: Invalid value (at line 1,"
         " column 9): 'scope = isolated': a text needs quotes: scope = \"isolated\""),
        (b"\xff", "wrong configuration: not UTF-8 at byte 0: save it as UTF-8"),
        (b"<network>\xff", "wrong document: the document is not UTF-8 at byte 9: save it as"),
    ],
)  # fmt: skip
def test_wrong(content: str | bytes, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert judged(capsys, content).startswith(said)


@pytest.mark.skipif(not shutil.which("dnsmasq", path="/usr/sbin"), reason="no dnsmasq")
def test_dnsmasq_reads_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    own = nat("", "<natns:ip address='10.0.0.1' prefix='24'/>")
    option = "<dnsmasq:options><dnsmasq:option value='{}'/></dnsmasq:options>"
    root = "<network xmlns:dnsmasq='http://libvirt.org/schemas/network/dnsmasq/1.0'>"
    whole = network(own + option).replace("<network>", root)
    assert judged(capsys, whole.format("no-such-option=1")).startswith(
        "wrong network: network lab: dnsmasq refuses 'no-such-option=1': bad option"
    )
    assert "valid, " in judged(capsys, whole.format("cache-size=500"))


def test_a_configuration_among_the_files_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """The machine's own may be of another site, wrong, or unreadable."""
    Path("lab.xml").write_text(network(IP))
    Path("site.toml").write_text(CONFIG)
    names.CONFIG_FILE.write_text("scoop = 1")
    assert validate(capsys, "lab.xml") == (
        0,
        ["network lab: valid, without a look at its upstream: the configuration cannot be used"],
    )
    status, lines = validate(capsys, "lab.xml", "site.toml")
    assert status == 0
    assert lines[0] == "network lab: valid, and gets a router to upstream provider"
    Path("site.toml").write_text("scope = 1")
    names.CONFIG_FILE.unlink()
    status, lines = validate(capsys, "lab.xml", "site.toml")
    assert status == 1
    assert "without a look" in lines[0]
    assert lines[1].startswith("wrong configuration: scope: is 1: expected ")


def test_a_file_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    Path("lab.xml").write_text(network(IP))
    Path("folder").mkdir()
    assert validate(capsys, "no.xml", "folder", "lab.xml") == (
        1,
        [
            "cannot be read: No such file or directory",
            "cannot be read: Is a directory",
            "network lab: valid, and gets a router to upstream host",
        ],
    )
