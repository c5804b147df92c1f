# SPDX-License-Identifier: LGPL-2.1-or-later
"""DHCP and DNS of a network that is routed: what its XML says, guests get."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest
from lab import (
    ECHO_PORT,
    INTERNET,
    FastGuest,
    Host,
    LabError,
    Node,
    Provider,
    define_network,
    end_process,
    isolated,
    natns,
    run,
    spawn,
    start_network,
    virsh,
    wait_for,
    write_config,
)

GATEWAY = "10.0.0.1"
WEB = Host("52:54:00:00:00:05", "10.0.0.5", "web")
STRANGER = "52:54:00:00:00:99"
DNSMASQ = "xmlns:dnsmasq='http://libvirt.org/schemas/network/dnsmasq/1.0'"

pytestmark = pytest.mark.usefixtures("installed")


@pytest.fixture
def world(provider: Provider) -> Provider:
    """The provider as upstream; the firewall's backends are told apart elsewhere."""
    write_config(provider.config(firewall="nftables"))
    return provider


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def options(*lines: str) -> str:
    """libvirt's <dnsmasq:options>."""
    each = "".join(f"<dnsmasq:option value='{line}'/>" for line in lines)
    return f"<dnsmasq:options {DNSMASQ}>{each}</dnsmasq:options>"


def natns_ip(dhcp: str) -> str:
    """The metadata of a network that libvirt gives no address."""
    return (
        "<natns:nat xmlns:natns='urn:libvirt-natns:1'><natns:ip address='10.0.0.1' prefix='24'>"
        f"<natns:dhcp>{dhcp}</natns:dhcp></natns:ip></natns:nat>"
    )


def leases(network: str) -> list[list[str]]:
    """The MAC, address and name columns of virsh net-dhcp-leases.

    The prefix is that of the network's <ip>, so "/0" where libvirt knows none.
    """
    rows = [line.split() for line in virsh("net-dhcp-leases", network).stdout.splitlines()]
    return sorted([row[2], row[4], row[5]] for row in rows if len(row) > 5)


def upstream_address(name: str) -> str:
    shown = run("ip", "-n", f"nat-{name}", "-4", "-o", "address", "show", "upstream").stdout
    return shown.split()[3].partition("/")[0]


@contextmanager
def resolver(world: Provider, name: str, address: str, answer: str) -> Iterator[Node]:
    """A DNS server on the provider's bridge that answers everything with one address."""
    node = world.neighbour(name, f"{address}/24")
    process = spawn(
        "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--user=root",
        "--no-resolv", "--no-hosts", f"--address=/#/{answer}", namespace=name,
    )  # fmt: skip
    try:
        wait_for(lambda: node.dig("up.test", server=address) == [answer], what=f"server {name}")
        yield node
    finally:
        end_process(process)


@contextmanager
def conversation(guest: FastGuest, world: Provider) -> Iterator[socket.socket]:
    """A connection to the provider that must survive."""
    with guest.connect(world.gateway, ECHO_PORT) as stream:
        assert stream.recv(100).startswith(b"192.168.0.")
        yield stream


def echoes(stream: socket.socket) -> bool:
    stream.sendall(b"still there?")
    return stream.recv(100) == b"still there?"


# -- what guests get -------------------------------------------------------------

RECORDS = """<dns>
  <host ip='10.0.0.7'><hostname>db</hostname></host>
  <txt name='note' value='some text'/>
  <srv service='ldap' protocol='tcp' domain='lab' target='db.lab' port='389' priority='1'
       weight='5'/>
</dns>"""


TEXTS = {
    "sender": "v=spf1 include:x # ~all",
    "quote": 'a "b',
    "dkim": "k=rsa; t=s,y; p=MIGf/0G+=",
    "slash": "a\\b \\n \\",
    "blanks": " a  b ",
}
"""What has a meaning in dnsmasq's configuration."""


def test_guests_get_a_router_a_resolver_and_names(world: Provider) -> None:
    start_network(isolated("a", "virbr10", domain="lab", hosts=[WEB], more=RECORDS))
    with FastGuest("virbr10", WEB.mac) as web, FastGuest("virbr10", name="client") as client:
        offer = web.dhcp()
        assert (offer["ip"], offer["mask"], offer["hostname"]) == (WEB.ip, "24", "web")
        assert offer["router"] == offer["dns"] == offer["serverid"] == GATEWAY
        assert (offer["domain"], offer["lease"]) == ("lab", "3600")
        assert "mtu" not in offer
        own = client.dhcp(hostname="client")["ip"]
        for name in ("web", "web.lab"):
            assert client.dig(name) == ["10.0.0.5"]
        for name in ("client", "client.lab"):
            assert web.dig(name) == [own]
        assert client.dig("5.0.0.10.in-addr.arpa", "PTR") == ["web.lab."]
        assert client.dig("db.lab") == client.dig("db") == ["10.0.0.7"]
        assert client.dig("note", "TXT") == ['"some text"']
        assert client.dig("_ldap._tcp.lab", "SRV") == ["1 5 389 db.lab."]
        assert client.dig("www.example.test", "+tcp") == [INTERNET]
        assert ("www.example.test", upstream_address("a")) in world.queries()
        assert client.curl(f"http://{INTERNET}/").startswith(upstream_address("a"))
        assert leases("a") == sorted(
            [[WEB.mac, "10.0.0.5/24", "web"], [client.mac, f"{own}/24", "client"]]
        )


def domain_xml(name: str, network: str) -> str:
    """A domain that is only there for its NIC."""
    return f"""<domain type='qemu'><name>{name}</name><memory unit='MiB'>16</memory>
      <os><type arch='x86_64' machine='pc'>hvm</type></os>
      <devices><interface type='network'><mac address='{WEB.mac}'/>
      <source network='{network}'/></interface></devices></domain>"""


def domain_address(name: str) -> list[str]:
    return [line.split()[-1] for line in virsh("domifaddr", name).stdout.splitlines()]


def test_leases_of_twins_are_told_apart(world: Provider, stack: ExitStack, tmp_path: Path) -> None:
    for name, bridge, ip in (("a", "virbr10", "10.0.0.5"), ("b", "virbr11", "10.0.0.6")):
        start_network(isolated(name, bridge, hosts=[Host(WEB.mac, ip, f"web-{name}")]))
        file = tmp_path / name
        file.write_text(domain_xml(f"guest-{name}", name))
        virsh("create", "--paused", os.fspath(file))
        guest = stack.enter_context(FastGuest(bridge, WEB.mac, f"g-{name}"))
        assert guest.dhcp()["ip"] == ip
    assert leases("a") == [[WEB.mac, "10.0.0.5/24", "web-a"]]
    assert leases("b") == [[WEB.mac, "10.0.0.6/24", "web-b"]]
    assert domain_address("guest-a") == ["10.0.0.5/24"]
    assert domain_address("guest-b") == ["10.0.0.6/24"]


def listing(bridge: str) -> Path:
    """libvirt's file of the leases that its helper was told of."""
    return Path(f"/var/lib/libvirt/dnsmasq/{bridge}.status")


def listed(bridge: str) -> list[dict[str, Any]]:
    """The leases in libvirt's file; an empty file has none."""
    file = listing(bridge)
    return json.loads(file.read_text() or "[]") if file.exists() else []


def test_lease_that_was_renewed_stays_listed(world: Provider) -> None:
    """libvirt's own dnsmasq has read it when it started, and knows of no renewal."""
    define_network(isolated("a", "virbr10", hosts=[WEB]))
    virsh("net-start", "a")
    with FastGuest("virbr10", WEB.mac) as guest:
        guest.dhcp()
        # dnsmasq answers, and then runs its lease script.
        (entry,) = wait_for(lambda: listed("virbr10"), what="the lease in libvirt's file")
    virsh("net-destroy", "a")
    end = int(time.time()) + 6
    listing("virbr10").write_text(json.dumps([entry | {"expiry-time": end}]))
    virsh("net-start", "a")
    with FastGuest("virbr10", WEB.mac) as guest:
        guest.dhcp()
        wait_for(lambda: listed("virbr10")[0]["expiry-time"] > end + 60, what="the renewal")
        wait_for(lambda: time.time() > end + 2, timeout=20)
    assert leases("a") == [[WEB.mac, "10.0.0.5/24", "web"]]


def test_lease_is_renewed_by_unicast(world: Provider, tmp_path: Path) -> None:
    start_network(isolated("a", "virbr10", hosts=[WEB]))
    events = tmp_path / "events"
    script = tmp_path / "script"
    script.write_text(
        f'#!/bin/sh\necho "$1 $ip" >>{events}\n'
        '[ "$1" != bound ] || ip address add "$ip/$mask" dev eth0\n'
    )
    script.chmod(0o755)
    with FastGuest("virbr10", WEB.mac) as guest:
        client = spawn("busybox", "udhcpc", "-f", "-i", "eth0", "-s", script, namespace=guest.name)
        try:
            wait_for(guest.addresses, timeout=15, what="a lease")
            with guest.sniff("udp and port 67") as capture:
                client.send_signal(signal.SIGUSR1)
                wait_for(lambda: f"renew {WEB.ip}" in events.read_text(), what="the renewal")
                asked, answered = wait_for(lambda: capture.lines()[1:] and capture.lines()[:2])
            assert f"{WEB.ip}.68 > {GATEWAY}.67" in asked
            assert f"{GATEWAY}.67 > {WEB.ip}.68" in answered
        finally:
            end_process(client)


# -- whom the namespace asks -------------------------------------------------------


def test_forwarders_and_users_options(world: Provider, stack: ExitStack) -> None:
    stack.enter_context(resolver(world, "all", "192.168.0.53", "1.1.1.1"))
    stack.enter_context(resolver(world, "corp", "192.168.0.54", "2.2.2.2"))
    forwarder = "<forwarder domain='corp.test' addr='192.168.0.54'/>"
    everything = f"<dns><forwarder addr='192.168.0.53'/>{forwarder}</dns>"
    start_network(isolated("a", "virbr10", hosts=[WEB], more=everything))
    some = f"<dns forwardPlainNames='no'>{forwarder}</dns>"
    users = options(
        "server=/users.test/192.168.0.54", "address=/fixed.test/3.3.3.3",
        "dhcp-option=3,10.0.0.9", "dhcp-option=42,10.0.0.8", "dhcp-option=26,1280",
    )  # fmt: skip
    start_network(isolated("b", "virbr11", hosts=[WEB], more=some + users))

    guest = stack.enter_context(FastGuest("virbr10", WEB.mac, "g-a"))
    guest.dhcp()
    assert guest.dig("www.example.test") == guest.dig("any.test") == ["1.1.1.1"]
    assert guest.dig("www.corp.test") == ["2.2.2.2"]
    assert world.queries() == []

    guest = stack.enter_context(FastGuest("virbr11", WEB.mac, "g-b"))
    offer = guest.dhcp(apply=False)
    assert (offer["router"], offer["ntpsrv"], offer["mtu"]) == ("10.0.0.9", "10.0.0.8", "1280")
    guest.static("10.0.0.50/24", GATEWAY)
    guest.resolve_with(GATEWAY)
    assert guest.dig("www.example.test") == [INTERNET]
    assert guest.dig("www.corp.test") == guest.dig("users.test") == ["2.2.2.2"]
    assert guest.dig("fixed.test") == ["3.3.3.3"]
    assert guest.dig("plain") == []
    assert {name for name, _ in world.queries()} == {"www.example.test"}


@pytest.fixture
def systemd_resolved() -> Iterator[Path]:
    """The host as systemd-resolved leaves it; yields the file with the real servers."""
    directory = Path("/run/systemd/resolve")
    directory.mkdir(parents=True)
    real = directory / "resolv.conf"
    yield real
    real.unlink(missing_ok=True)
    directory.rmdir()
    directory.parent.rmdir()


def test_hosts_resolvers_are_followed(provider: Provider, systemd_resolved: Path) -> None:
    named = f'dns = ["{provider.gateway}"]'
    write_config(provider.config(firewall="nftables").replace(named, ""))
    Path("/etc/resolv.conf").write_text("nameserver 127.0.0.53\noptions edns0 trust-ad\n")
    systemd_resolved.write_text(f"nameserver 2001:db8::53\nnameserver {provider.gateway}\n")
    start_network(isolated("a", "virbr10", hosts=[WEB]))
    with FastGuest("virbr10", WEB.mac) as guest:
        assert guest.dhcp()["dns"] == GATEWAY
        assert guest.dig("www.example.test") == [INTERNET]
        with resolver(provider, "other", "192.168.0.53", "1.1.1.1"):
            fresh = systemd_resolved.with_suffix(".new")
            fresh.write_text("nameserver 192.168.0.53\n")
            fresh.rename(systemd_resolved)
            wait_for(lambda: guest.dig("other.test") == ["1.1.1.1"], what="the new server")
        assert natns("check").returncode == 0


# -- live changes --------------------------------------------------------------------


def update(command: str, section: str, xml: str) -> None:
    virsh("net-update", "a", command, section, xml, "--live", "--config")


def test_updates_take_effect_and_cut_no_connection(world: Provider, stack: ExitStack) -> None:
    start_network(isolated("a", "virbr10", domain="lab", hosts=[WEB]))
    talker = stack.enter_context(FastGuest("virbr10", WEB.mac, "talker"))
    talker.dhcp()
    stream = stack.enter_context(conversation(talker, world))
    guest = stack.enter_context(FastGuest("virbr10", STRANGER))

    def leased() -> str:
        return guest.dhcp()["ip"]

    update("add", "ip-dhcp-host", f"<host mac='{STRANGER}' name='new' ip='10.0.0.50'/>")
    wait_for(lambda: leased() == "10.0.0.50", what="the reserved address")
    assert talker.dig("new.lab") == ["10.0.0.50"]
    update("modify", "ip-dhcp-host", f"<host mac='{STRANGER}' name='new' ip='10.0.0.51'/>")
    wait_for(lambda: leased() == "10.0.0.51", what="the other reserved address")
    assert echoes(stream)

    update("add", "dns-host", "<host ip='10.0.0.7'><hostname>db</hostname></host>")
    wait_for(lambda: talker.dig("db.lab") == ["10.0.0.7"], what="the name")
    update("delete", "dns-host", "<host ip='10.0.0.7'><hostname>db</hostname></host>")
    wait_for(lambda: talker.dig("db.lab") == [], what="the name's end")
    update("add", "dns-txt", "<txt name='note' value='hello'/>")
    wait_for(lambda: talker.dig("note", "TXT") == ['"hello"'], what="the text")
    assert echoes(stream)

    update("delete", "ip-dhcp-host", f"<host mac='{STRANGER}' name='new' ip='10.0.0.51'/>")
    update("add", "ip-dhcp-range", "<range start='10.0.0.220' end='10.0.0.221'/>")
    update("delete", "ip-dhcp-range", "<range start='10.0.0.100' end='10.0.0.200'/>")
    assert leased() in ("10.0.0.220", "10.0.0.221")
    assert echoes(stream)
    assert natns("check").returncode == 0


def dnsmasq_pid(network: str) -> int:
    """The dnsmasq of a namespace; 0 where there is none."""
    listed = run("ip", "netns", "pids", f"nat-{network}").stdout.split()
    uuid = virsh("net-uuid", network).stdout.strip()
    file = Path(f"/run/libvirt-natns/networks/{uuid}/dnsmasq.pid")
    pid = file.read_text().strip() if file.exists() else ""
    return int(pid) if pid in listed else 0


def test_dnsmasq_that_dies_is_noticed_and_brought_back(world: Provider, stack: ExitStack) -> None:
    start_network(isolated("a", "virbr11", hosts=[Host(WEB.mac, WEB.ip)]))
    guest = stack.enter_context(FastGuest("virbr11", WEB.mac))
    guest.dhcp(hostname="client")
    stream = stack.enter_context(conversation(guest, world))
    pid = dnsmasq_pid("a")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not dnsmasq_pid("a"))
    assert guest.dig("client") == []
    check = natns("check", check=False)
    assert (check.returncode, "dnsmasq of nat-a is not running" in check.stdout) == (1, True)
    natns("sync")
    assert dnsmasq_pid("a") not in (0, pid)
    assert natns("check").returncode == 0
    assert echoes(stream)
    # It knows the leases that it gave before.
    assert guest.dig("client") == [WEB.ip]
    assert leases("a") == [[WEB.mac, "10.0.0.5/24", "client"]]
    assert guest.dhcp()["ip"] == WEB.ip

    # An update that no hook told of: the hosts are read again, by the same process.
    pid = dnsmasq_pid("a")
    hosts = Path("/var/lib/libvirt/dnsmasq/a.hostsfile")
    hosts.write_text(f"{STRANGER},10.0.0.66,other\n{WEB.mac},{WEB.ip}\n")
    check = natns("check", check=False)
    assert (check.returncode, "outdated hosts" in check.stdout) == (1, True)
    natns("sync")
    assert natns("check").returncode == 0
    other = stack.enter_context(FastGuest("virbr11", STRANGER, "other"))
    wait_for(lambda: other.dhcp()["ip"] == "10.0.0.66", what="the other host's address")
    assert dnsmasq_pid("a") == pid


# -- other kinds of networks -----------------------------------------------------------


def test_networks_that_libvirt_gives_no_address(world: Provider, stack: ExitStack) -> None:
    dhcp = f"<natns:host mac='{WEB.mac}' name='web' ip='10.0.0.5'/>"
    served = "<natns:range start='10.0.0.100' end='10.0.0.200'/>" + dhcp
    users = options("address=/fixed.test/3.3.3.3", "dhcp-option=42,10.0.0.8")
    texts = "".join(f"<txt name='{name}' value={quoteattr(TEXTS[name])}/>" for name in TEXTS)
    records = RECORDS.replace("</dns>", f"{texts}</dns>")
    start_network(
        isolated("a", "virbr10", address=None, domain=None, metadata=natns_ip(served),
                 more="<domain name='lab' localOnly='yes'/>" + records + users)
    )  # fmt: skip
    start_network(isolated("b", "virbr11", address=None, metadata=natns_ip(dhcp), domain=None))
    guest = stack.enter_context(FastGuest("virbr10", name="g-a"))
    offer = guest.dhcp(hostname="client")
    assert 100 <= int(offer["ip"].rpartition(".")[2]) <= 200
    assert (offer["router"], offer["dns"], offer["domain"]) == (GATEWAY, GATEWAY, "lab")
    assert offer["ntpsrv"] == "10.0.0.8"
    assert guest.dig("client.lab") == [offer["ip"]]
    assert guest.dig("db.lab") == ["10.0.0.7"]
    assert guest.dig("note", "TXT") == ['"some text"']
    for name, value in TEXTS.items():
        shown = value.replace("\\", "\\\\").replace('"', '\\"')
        assert guest.dig(name, "TXT") == [f'"{shown}"']
    assert guest.dig("_ldap._tcp.lab", "SRV") == ["1 5 389 db.lab."]
    assert guest.dig("fixed.test") == ["3.3.3.3"]
    assert guest.dig("missing.lab") == []
    assert guest.dig("www.example.test") == [INTERNET]
    assert {name for name, _ in world.queries()} == {"www.example.test"}

    for bridge, name in (("virbr10", "w-a"), ("virbr11", "w-b")):
        web = stack.enter_context(FastGuest(bridge, WEB.mac, name))
        assert web.dhcp()["ip"] == WEB.ip
        assert web.dig("web") == [WEB.ip]
        assert web.curl(f"http://{INTERNET}/").startswith(upstream_address(name[-1]))
    assert leases("a") == sorted(
        [[guest.mac, f"{offer['ip']}/0", "client"], [WEB.mac, "10.0.0.5/0", "web"]]
    )
    # Reservations only: a stranger gets nothing.
    assert leases("b") == [[WEB.mac, "10.0.0.5/0", "web"]]
    stranger = stack.enter_context(FastGuest("virbr11", STRANGER, "stranger"))
    with pytest.raises(LabError, match="no DHCP lease"):
        stranger.dhcp(timeout=2)


def test_networks_without_dns_or_without_dhcp(world: Provider, stack: ExitStack) -> None:
    start_network(isolated("a", "virbr10", hosts=[WEB], more="<dns enable='no'/>"))
    guest = stack.enter_context(FastGuest("virbr10", WEB.mac, "g-a"))
    offer = guest.dhcp()
    assert (offer["router"], "dns" in offer) == (GATEWAY, False)
    assert guest.dig("www.example.test", server=GATEWAY) == []
    assert guest.curl(f"http://{INTERNET}/").startswith(upstream_address("a"))

    start_network(isolated("b", "virbr11", dhcp=None, more=RECORDS))
    guest = stack.enter_context(FastGuest("virbr11", name="g-b"))
    guest.static("10.0.0.50/24", GATEWAY)
    assert guest.dig("www.example.test", server=GATEWAY) == [INTERNET]
    assert guest.dig("db", server=GATEWAY) == ["10.0.0.7"]

    start_network(isolated("c", "virbr12", dhcp=None, more="<dns enable='no'/>"))
    guest = stack.enter_context(FastGuest("virbr12", name="g-c"))
    guest.static("10.0.0.50/24", GATEWAY)
    assert guest.curl(f"http://{INTERNET}/").startswith(upstream_address("c"))
    assert run("ip", "netns", "pids", "nat-c").stdout == ""
    assert natns("check").returncode == 0


@pytest.fixture
def tftp_root() -> Iterator[Path]:
    root = Path("/var/lib/libvirt/tftp")
    root.mkdir(mode=0o755)
    yield root
    for file in root.iterdir():
        file.unlink()
    root.rmdir()


def test_network_boot(backend: str, provider: Provider, tftp_root: Path, tmp_path: Path) -> None:
    """All services of the namespace, past either backend's rules."""
    content = "boot me\n" * 1000
    (tftp_root / "pxelinux.0").write_text(content)
    served = f"""<ip address='{GATEWAY}' netmask='255.255.255.0'><tftp root='{tftp_root}'/><dhcp>
      {WEB.xml()}<bootp file='pxelinux.0'/></dhcp></ip>"""
    start_network(isolated("a", "virbr10", address=None, more=served))
    with FastGuest("virbr10", WEB.mac) as guest:
        offer = guest.dhcp()
        assert guest.dig("www.example.test") == guest.dig("www.example.test", "+tcp") == [INTERNET]
        assert (offer["boot_file"], offer["siaddr"]) == ("pxelinux.0", GATEWAY)
        got = tmp_path / "got"
        guest.run("busybox", "tftp", "-g", "-r", offer["boot_file"], "-l", got, offer["siaddr"])
        assert got.read_text() == content
