# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab itself works, with libvirt's own isolated networks and no natns."""

import os

import pytest
from lab import (
    INTERNET,
    CommandError,
    FastGuest,
    Host,
    LabError,
    Libvirtd,
    Provider,
    RealGuest,
    Server,
    isolated,
    objects,
    run,
    snapshot,
    start_network,
    virsh,
    wait_for,
    write_config,
)

MAC = "52:54:00:00:00:05"


def test_commands_report_their_output() -> None:
    with pytest.raises(CommandError, match="exit status 3\nnope"):
        run("sh", "-c", "echo nope >&2; exit 3")
    assert run("false", check=False).returncode == 1
    with pytest.raises(LabError, match="not done after"):
        run("sleep", "10", timeout=0.1)


def test_waiting_ends() -> None:
    with pytest.raises(LabError, match=r"0\.1 s in vain for a miracle"):
        wait_for(lambda: False, timeout=0.1, what="a miracle")


def test_native_network_leases_an_address() -> None:
    start_network(isolated("a", "virbr10", hosts=[Host(MAC, "10.0.0.5", "web")]))
    with FastGuest("virbr10", MAC) as guest:
        offer = guest.dhcp()
        assert offer["ip"] == "10.0.0.5"
        assert offer["hostname"] == "web"
        assert offer["serverid"] == "10.0.0.1"
        assert "router" not in offer
        assert guest.addresses() == ["10.0.0.5/24"]
        assert guest.mac == MAC
        assert guest.dig("web.a") == ["10.0.0.5"]
        assert guest.ping("10.0.0.1")
        wait_for(lambda: "10.0.0.5" in virsh("net-dhcp-leases", "a").stdout)


def test_spanning_tree_delays_a_port_until_told_not_to() -> None:
    start_network(isolated("a", "virbr10"))
    with FastGuest("virbr10", name="slow", stp=True) as slow:
        slow.static("10.0.0.6/24")
        assert not slow.ping("10.0.0.1")
        with FastGuest("virbr10", name="fast") as fast:
            fast.static("10.0.0.7/24")
            assert fast.ping("10.0.0.1")
            # It asks for the address a second after it has last done so; that would
            # not be enough for the port to forward by itself.
            assert slow.ping("10.0.0.1", timeout=2)


def test_guest_without_a_server_gets_no_lease() -> None:
    start_network(isolated("a", "virbr10", dhcp=None))
    with FastGuest("virbr10") as guest, pytest.raises(LabError, match="no DHCP lease"):
        guest.dhcp(timeout=2)


def test_provider_answers_with_the_address_it_saw(provider: Provider) -> None:
    neighbour = provider.neighbour("near", "192.168.0.77/24")
    for target in (provider.gateway, INTERNET):
        assert neighbour.curl(f"http://{target}/").startswith("192.168.0.77:")
    assert provider.web.addresses() == {"192.168.0.77"}
    assert run("curl", "-sS", f"http://{INTERNET}/").stdout.startswith("192.168.0.2:")
    assert neighbour.dig("www.example.test", server=provider.gateway) == [INTERNET]
    assert ("www.example.test", "192.168.0.77") in provider.queries()


def test_provider_echoes_from_a_chosen_port(provider: Provider) -> None:
    neighbour = provider.neighbour("near", "192.168.0.77/24")
    with neighbour.connect(provider.gateway, 7, source_port=5555) as stream:
        assert stream.recv(100) == b"192.168.0.77:5555\n"
        stream.sendall(b"ping")
        assert stream.recv(100) == b"ping"
    with neighbour.open_socket("udp", 5556) as datagrams:
        datagrams.sendto(b"ping", (provider.gateway, 7))
        assert datagrams.recv(100) == b"192.168.0.77:5556\nping"
    assert [contact.payload for contact in provider.tcp.contacts] == ["", "ping"]
    assert provider.udp.contacts[0].port == 5556


def test_provider_streams(provider: Provider) -> None:
    neighbour = provider.neighbour("near", "192.168.0.77/24")
    assert neighbour.curl(f"http://{INTERNET}/stream?count=3&interval=0.01") == "0\n1\n2"
    assert len(neighbour.curl(f"http://{INTERNET}/bytes/100000")) == 100000


def test_neighbours_squat_and_sniff(provider: Provider) -> None:
    first = provider.neighbour("first", "192.168.0.77/24")
    second = provider.neighbour("second", "192.168.0.78/24")
    with second.sniff("icmp") as capture:
        assert first.ping("192.168.0.78")
        wait_for(lambda: len(capture.lines()) >= 2, what="two packets")
        assert "ICMP echo request" in capture.lines()[0]
    first.add_address("192.168.0.150/24")
    assert second.ping("192.168.0.150")
    with second.packet_socket() as frames:
        frames.send(bytes.fromhex("ff" * 6 + "0a0000000001" + "88b5") + b"x" * 46)


def test_upstream_without_an_address_on_the_host() -> None:
    with Provider(host_address=None) as provider:
        assert provider.address is None
        assert not run("ip", "-4", "-o", "address", "show", "br0").stdout


def test_second_network_with_the_same_subnet_is_refused_by_libvirt() -> None:
    start_network(isolated("a", "virbr10"))
    with pytest.raises(CommandError, match="already in use by interface virbr10"):
        start_network(isolated("b", "virbr11"))


def test_snapshot_tells_what_changed(provider: Provider) -> None:
    before = snapshot()
    start_network(isolated("a", "virbr10"))
    difference = before.diff(snapshot())
    for expected in ("links:", "+ virbr10 ", "+ virbr10 10.0.0.1/24", "processes:", "dnsmasq"):
        assert expected in difference
    virsh("net-destroy", "a")
    wait_for(lambda: snapshot() == before)


def test_libvirtd_restarts_and_reloads(libvirtd: Libvirtd) -> None:
    start_network(isolated("a", "virbr10"))
    old = libvirtd.pid
    libvirtd.restart()
    assert libvirtd.pid != old
    libvirtd.reload()
    assert objects().networks == {"a"}
    assert os.path.exists("/sys/class/net/virbr10")  # noqa: PTH110


def test_config_is_the_sandboxs_own(provider: Provider) -> None:
    write_config(provider.config(firewall="nftables", more='[upstreams.x]\nkind = "host"'))
    assert (
        'pool = ["192.168.0.100-192.168.0.199"]'
        in run("cat", "/etc/libvirt-natns/config.toml").stdout
    )


def test_real_guest_boots_leases_and_talks() -> None:
    start_network(isolated("a", "virbr10", hosts=[Host(MAC, "10.0.0.5")]))
    server = Server(None, "http", 8000)
    try:
        with RealGuest("web", "a", MAC, url="http://10.0.0.1:8000/") as guest:
            guest.wait_ready()
            assert guest.address == "10.0.0.5"
            assert guest.fetched.startswith("10.0.0.5:")
            assert guest.fetch("http://10.0.0.1:8000/bytes/3") == "xxx"
            assert run("curl", "-sS", "http://10.0.0.5/").stdout == "this is web\n"
            assert guest.run("hostname") == "web\n"
            with pytest.raises(LabError, match="exit status 7"):
                guest.run("echo no; exit 7")
            assert "10.0.0.5" in virsh("domifaddr", "web").stdout
    finally:
        server.close()
