# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration of the host's DNS relay, and its complaints."""

import socket
import subprocess
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from libvirt_natns import names
from libvirt_natns.daemons import dns_probe, dns_relay, dnsmasq_process
from libvirt_natns.daemons.dns_relay import Relay

RELAY = Relay("natns-host", (IPv4Address("198.19.252.1"), IPv6Address("fd00::1")), 305)
LOOPBACK = IPv4Address("127.0.0.1")


@pytest.fixture
def resolv_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of /etc/resolv.conf; nothing is there yet."""
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path / "run")
    monkeypatch.setattr(dns_relay, "RESOLV_CONF", tmp_path / "resolv.conf")
    return tmp_path / "resolv.conf"


def test_configuration(resolv_conf: Path) -> None:
    made = dns_relay.configuration(RELAY).splitlines()
    assert [line for line in made if "address=" in line] == [
        "listen-address=198.19.252.1",
        "listen-address=fd00::1",
        "address=/relay.libvirt-natns.invalid/198.19.252.1",
    ]
    assert f"resolv-file={resolv_conf}" in made and "strict-order" in made and "port=305" in made


def test_a_link_that_leads_elsewhere_is_another_configuration(resolv_conf: Path) -> None:
    made = []
    for target in ("a", "b", "missing/b"):
        resolv_conf.unlink(missing_ok=True)
        resolv_conf.symlink_to(resolv_conf.parent / target)
        made.append(dns_relay.configuration(RELAY))
    assert len(set(made)) == 3
    # dnsmasq does not start without the directory of its file.
    assert ["no-resolv" in text for text in made] == [False, False, True]


def test_dnsmasq_accepts_the_configuration(resolv_conf: Path, tmp_path: Path) -> None:
    file = tmp_path / "dnsmasq.conf"
    file.write_text(dns_relay.configuration(RELAY))
    command = [dnsmasq_process.program(), "--test", dnsmasq_process.option(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "dnsmasq: syntax check OK.")


def test_a_relay_with_a_complaint_is_no_difference(resolv_conf: Path) -> None:
    assert dns_relay.differences(RELAY) == ["the DNS relay on natns-host is not running"]
    assert dns_relay.present() == []
    complaint = dns_relay.paths("natns-host").complaint
    complaint.parent.mkdir(parents=True)
    complaint.write_text("Address already in use\n")
    assert dns_relay.present() == ["natns-host"]
    assert dns_relay.complaint("natns-host") == "Address already in use"
    assert dns_relay.differences(RELAY) == []
    dns_relay.stop("natns-host")
    assert dns_relay.present() == []


def test_a_relay_that_is_not_heard_names_the_lines_that_help() -> None:
    told = dns_relay.unheard(RELAY)
    for line in (
        'nft: iifname "natns-host" th dport 305 accept',
        " iptables: -I INPUT -i natns-host -p udp --dport 305 -j ACCEPT",
        "ufw: allow in on natns-host to any port 305",
        "firewalld: --add-port=305/udp --add-port=305/tcp in its zone",
    ):
        assert line in told
    six = dns_relay.unheard(Relay(RELAY.bridge, RELAY.addresses[1:], RELAY.port))
    assert " ip6tables: -I INPUT" in six


def test_a_question_is_answered_refused_or_not_heard() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((str(LOOPBACK), 0))
        port = server.getsockname()[1]
        assert dns_probe.ask(LOOPBACK, port, "a.test", 0.05) == "silent"
        question = server.recv(512)
        assert question[12:] == b"\1a\4test\0\0\1\0\1"
    assert dns_probe.ask(LOOPBACK, port, "", 0.5) == "refuses"
