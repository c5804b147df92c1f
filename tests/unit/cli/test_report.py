# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bug report: its masks, its excerpts, and its bounds."""

import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from libvirt_natns.cli import commands
from libvirt_natns.cli.report import bounded_output, report_file, report_parts, rules_text
from libvirt_natns.cli.report.masks import HIDDEN, Masks
from libvirt_natns.documents import xml_excerpt
from libvirt_natns.errors import DocumentError, StoreError

# -- masks -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("password = 'a b' # x", f"password = {HIDDEN} # x"),
        ("api_key: abc def", f"api_key: {HIDDEN}"),
        ('{"auth-token": "abc", "port": 1}', f'{{"auth-token": {HIDDEN}, "port": 1}}'),
        ("Authorization: Bearer abc", f"Authorization: {HIDDEN}"),
        ("curl --token abc https://x", f"curl --token {HIDDEN}"),
        ("<graphics passwd='geheim' port='1'/>", f"<graphics passwd={HIDDEN} port='1'/>"),
        ("DB_PASSWORD=abc", f"DB_PASSWORD={HIDDEN}"),
        ("https://me:abc@example.org/x", f"https://{HIDDEN}@example.org/x"),
        ("a\n-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\nb",
         f"a\n{HIDDEN}\nb"),
        ("-----BEGIN PRIVATE KEY-----\nabc", HIDDEN),
        ("the tokens of a bucket are gone", "the tokens of a bucket are gone"),
    ],
)  # fmt: skip
def test_secrets(text: str, masked: str) -> None:
    assert Masks().masked(text) == masked


PRIVATE = (
    "10.0.0.1/24 192.168.0.1 172.16.0.1 127.0.0.1 169.254.1.1 198.51.100.7 100.64.0.1 0.0.0.0",
    "fd00:10::1/64 fe80::5054:ff:fe00:5 ::1 :: 2001:db8:77::1 ff02::1",
    "52:54:00:00:00:05 fe:54:00:00:00:05 0a:93:35:9e:63:4d 00:00:00:00:00:00 ff:ff:ff:ff:ff:ff",
    "12:34:56 version 5.36.0 inet6 table::x 1.2.3.4.5 300.1.1.1 a::b::c",
)


@pytest.mark.parametrize("text", PRIVATE)
def test_all_else_stays(text: str) -> None:
    assert Masks().masked(text) == text


def test_public_addresses_keep_the_part_that_tells_a_fault() -> None:
    masks = Masks()
    assert masks.masked("8.8.8.8/24 via 8.8.8.1 dev eth0, 8.8.4.4:53.") == (
        "public1.8/24 via public1.1 dev eth0, public2.4:53."
    )
    assert masks.masked("8.8.8.9-8.8.8.12 [2a01:4f8:1:2::5]:80 2a01:4f8:1::/48") == (
        "public1.9-public1.12 [public6-1:2::5]:80 public6-1::/48"
    )
    assert masks.masked("2a01:4f8:2::1 2A01:04F8:0001:2::5") == "public6-2::1 public6-1:2::5"
    # An IPv4 address within an IPv6 address.
    assert masks.masked("64:ff9b::808:808 2002:808:808::1") == "translated1 translated2"


def test_hardware_addresses_keep_their_vendor() -> None:
    masks = Masks()
    assert masks.masked("3c:ec:ef:12:34:56 3C:EC:EF:12:34:57 00:16:3e:01:02:03") == (
        "3c:ec:ef:nic1 3c:ec:ef:nic2 00:16:3e:01:02:03"
    )
    # As a bridge's id, without zeros ahead; and in an address that the kernel made of it.
    assert masks.masked("bridge_id 8000.0:15:17:1:2:3 fe80::215:17ff:fe01:203/64") == (
        "bridge_id 8000.00:15:17:nic3 fe80::(00:15:17:nic3)/64"
    )
    assert masks.masked("2a01:4f8:1:2:215:17ff:fe01:203") == "public6-1:2:(00:15:17:nic3)"


# -- excerpts ----------------------------------------------------------------

NETWORK = b"""<network xmlns:dnsmasq='http://libvirt.org/schemas/network/dnsmasq/1.0'>
  <name>a&amp;b</name><title>PLANTED</title><description>PLANTED</description>
  <metadata>
    <x:x xmlns:x='urn:x'>PLANTED</x:x>
    <natns:nat xmlns:natns='urn:libvirt-natns:1'><natns:upstream name='wan'/></natns:nat>
  </metadata>
  <ip address='10.0.0.1' prefix='24'/>
  <dnsmasq:options><dnsmasq:option value='log-dhcp'/></dnsmasq:options>
  <x:y xmlns:x='urn:x' z='PLANTED'/>
</network>"""

DOMAIN = b"""<domain type='kvm'>
  <name>web</name><uuid>u</uuid><description>PLANTED</description>
  <metadata>
    <x:x xmlns:x='urn:x'>PLANTED</x:x>
    <natns:nat xmlns:natns='urn:libvirt-natns:1'><natns:address address='auto'/></natns:nat>
  </metadata>
  <devices>
    <disk><source file='/PLANTED'/></disk>
    <interface type='network'>
      <mac address='52:54:00:00:00:05'/><source network='a'/>
      <filterref filter='PLANTED'><parameter name='IP' value='PLANTED'/></filterref>
    </interface>
    <graphics type='vnc' passwd='PLANTED'/>
  </devices>
</domain>"""


def test_excerpts() -> None:
    assert (
        xml_excerpt.of_network(NETWORK)
        == """\
<network>
  <name>a&amp;b</name>
  <metadata>
    <natns:nat>
      <natns:upstream name="wan"/>
    </natns:nat>
  </metadata>
  <ip address="10.0.0.1" prefix="24"/>
  <dnsmasq:options>
    <dnsmasq:option value="log-dhcp"/>
  </dnsmasq:options>
</network>"""
    )
    assert (
        xml_excerpt.of_domain(DOMAIN)
        == """\
<domain type="kvm">
  <name>web</name>
  <uuid>u</uuid>
  <natns:nat>
    <natns:address address="auto"/>
  </natns:nat>
  <interface type="network">
    <mac address="52:54:00:00:00:05"/>
    <source network="a"/>
  </interface>
</domain>"""
    )
    assert xml_excerpt.of_domain(b"<domain><name>x</name><uuid>u</uuid></domain>") == ""
    with pytest.raises(DocumentError):
        xml_excerpt.of_network(b"<domain/>")


NFT = """\
table inet natns {
\tset known {
\t\ttype ipv4_addr
\t}

\tchain forward {
\t\ttype filter hook forward priority filter; policy drop;
\t\taccept comment "DHCP"
\t}
}
table ip filter {
\tset PLANTED {
\t\ttype ipv4_addr
\t}

\tchain INPUT {
\t\ttype filter hook input priority filter; policy accept;
\t\tcounter jump PLANTED
\t}

\tchain FORWARD {
\t\ttype filter hook forward priority filter; policy drop;
\t\tjump NATNS-FORWARD comment "libvirt-natns"
\t\tcounter jump DOCKER comment "PLANTED"
\t}

\tchain DOCKER {
\t\tmeta l4proto tcp goto DEEPER
\t}

\tchain DEEPER {
\t\tip daddr 10.0.0.1 drop
\t}

\tchain NATNS-FORWARD {
\t\taccept
\t}

\tchain PLANTED {
\t\taccept
\t}
}
table ip other {
\tchain PLANTED {
\t\ttype filter hook input priority filter; policy accept;
\t}
}
"""
SAVED = """\
# Generated
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:PLANTED - [0:0]
-A INPUT -j PLANTED
-A FORWARD -m comment --comment "PLANTED \\"x" -j DOCKER
-A FORWARD -m comment --comment libvirt-natns -j NATNS-FORWARD
-A DOCKER -j DROP
COMMIT
"""


def test_rules_of_others_are_those_that_forwarded_packets_meet() -> None:
    shown = rules_text.of_nft(NFT)
    assert "PLANTED" not in shown
    assert "table ip other" not in shown
    for part in (
        "\tset known {", 'comment "DHCP"', "jump NATNS-FORWARD", "chain NATNS-FORWARD {",
        "counter jump DOCKER comment (left out)", "chain DOCKER {", "ip daddr 10.0.0.1 drop",
    ):  # fmt: skip
        assert part in shown
    assert rules_text.of_iptables(SAVED).splitlines() == [
        "*filter",
        ":FORWARD DROP [0:0]",
        "-A FORWARD -m comment --comment (left out) -j DOCKER",
        "-A FORWARD -m comment --comment libvirt-natns -j NATNS-FORWARD",
        ":DOCKER - [0:0]",
        "-A DOCKER -j DROP",
    ]


def test_a_listing_that_was_cut_or_refused_says_so() -> None:
    cut = NFT[: NFT.index("chain PLANTED")].rstrip("\t\n") + "\n(cut after 192 KiB)"
    assert rules_text.of_nft(cut).startswith("(cut after 192 KiB)\ntable inet natns {")
    assert "ip daddr 10.0.0.1 drop" in rules_text.of_nft(cut)
    refused = "Error: Could not process rule: Operation not permitted\n(exit status 1)"
    assert rules_text.of_nft(refused) == refused
    assert rules_text.of_nft("(nft is not installed)") == "(nft is not installed)"
    cut = SAVED.replace("COMMIT", "(cut after 192 KiB)")
    assert rules_text.of_iptables(cut).splitlines()[:2] == ["(cut after 192 KiB)", "*filter"]


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("# PLANTED", ""),
        ('bridge = "br#0" # PLANTED', 'bridge = "br#0"'),
        ("bridge = 'br#0'# PLANTED", "bridge = 'br#0'"),
        (r'bridge = "a\"#b" # PLANTED', r'bridge = "a\"#b"'),
        ('bridge = "br0', 'bridge = "br0'),
        ("[upstreams.wan]", "[upstreams.wan]"),
    ],
)
def test_comments_of_the_configuration_are_left_out(line: str, kept: str) -> None:
    assert report_parts.without_comment(line) == kept


# -- bounds ------------------------------------------------------------------


def python(program: str, limit: float = 20) -> str:
    return bounded_output.of(sys.executable, "-c", program, limit=limit)


def test_a_program_is_bounded(tmp_path: Path) -> None:
    assert python("print('a'); raise SystemExit(3)") == "a\n(exit status 3)"
    assert python("import sys; sys.stderr.write('b')") == "b"
    endless = python("while True: print('x' * 1000)")
    assert len(endless) < bounded_output.SIZE_LIMIT + 100
    assert endless.endswith("(cut after 192 KiB)")
    mark = tmp_path / "pid"
    # A program that hangs, ignores SIGTERM, and has a child with its output.
    hangs = python(
        "import os, signal, time, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"print('begun', flush=True)\nif os.fork(): open({os.fspath(mark)!r}, 'w').write('x')\n"
        "time.sleep(600)",
        limit=2,
    )
    assert hangs == "begun\n(ended: it took too long)"
    # Its streams are closed, and it runs on.
    silent = python("import os, time; os.close(1); os.close(2); time.sleep(600)", limit=2)
    assert silent == "(ended: it took too long)"
    assert bounded_output.of("no-such-program") == "(no-such-program is not installed)"


def test_a_text_loses_whole_lines_of_its_middle() -> None:
    text = "".join(f"line {number}\n" for number in range(1000))
    short = report_file.cut(text, 500)
    assert len(short) < 560
    assert short.startswith("line 0\n")
    assert short.endswith("line 999\n")
    assert all(line.startswith(("line ", "(... ")) for line in short.splitlines())
    assert report_file.cut("a\n", 500) == "a\n"


def written(
    parts: list[tuple[str, Callable[[], str]]], monkeypatch: pytest.MonkeyPatch, file: Path
) -> str:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(report_parts, "parts", lambda _: iter(parts))
    assert commands.main(["report", os.fspath(file)]) == 0
    return file.read_text()


def broken() -> str:
    raise StoreError("the database is damaged", "run virt-natns sync")


def odd() -> str:
    raise ValueError("token=PLANTED")


def test_each_part_may_fail_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.txt"
    parts = [("one", broken), ("two", odd), ("three", lambda: "\x1b[2Jok"), ("four", lambda: "")]
    text = written(parts, monkeypatch, file)
    assert "== one\n(failed: the database is damaged: run virt-natns sync)\n" in text
    assert "== two\n(failed: internal error (ValueError: token=(masked)" in text
    assert "== three\n\\x1b[2Jok\n" in text
    assert "== four\n(nothing)\n" in text
    assert "PLANTED" not in text
    assert capsys.readouterr().out == f"{file}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_report_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = ("large", lambda: "x" * 99 + "\n" + "y" * 1_000_000)
    text = written([large] * 40, monkeypatch, tmp_path / "large")
    assert len(text) < report_file.SIZE_LIMIT + 10_000
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    text = written([("a", lambda: "fine")] * 4, monkeypatch, tmp_path / "slow")
    assert text.count("fine") == 2
    assert text.count("(left out: the report has taken 120 s)") == 2


def test_a_file_that_is_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    precious, link = tmp_path / "precious", tmp_path / "link"
    link.symlink_to(precious)
    assert commands.main(["report", os.fspath(link)]) == 1
    assert not precious.exists()
    precious.write_text("kept")
    assert commands.main(["report", os.fspath(precious)]) == 1
    assert precious.read_text() == "kept"
    assert commands.main(["report", os.fspath(tmp_path / "no" / "dir")]) == 1
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.endswith(f"{link} exists already: remove the file, or name another")
    assert second.endswith(f"{precious} exists already: remove the file, or name another")
    assert third.endswith("(No such file or directory): name another file")
