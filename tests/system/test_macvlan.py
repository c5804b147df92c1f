# SPDX-License-Identifier: LGPL-2.1-or-later
"""Namespaces with a macvlan on a NIC or bridge, in place of a bridge's port."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from lab import (
    CommandError,
    FastGuest,
    Host,
    Provider,
    Service,
    define_network,
    isolated,
    run,
    start_network,
    virsh,
    wait_for,
    write_config,
)
from lab_sides import Command, in_process, networks

from libvirt_natns import names

MAC = "52:54:00:00:00:05"
WEB = Host(MAC, "10.0.0.5", "web")
NIC = "nic0"
FORWARD = """<natns:nat xmlns:natns="urn:libvirt-natns:1">
  <natns:portForward guestAddress="10.0.0.5">
    <natns:range start="8080" to="80"/>
  </natns:portForward>
  <natns:portForward proto="udp" guestAddress="10.0.0.5">
    <natns:range start="7"/>
  </natns:portForward>
</natns:nat>"""
FULL = 1023
LARGE, SMALL = 1500, 1400
BRIDGE_NF = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")

pytestmark = pytest.mark.usefixtures("installed")


@pytest.fixture
def nic(provider: Provider) -> Iterator[str]:
    """A link of the host that leads to the provider's network, as a NIC does."""
    run("ip", "link", "add", NIC, "type", "veth", "peer", "name", "switch0")
    run("ip", "link", "set", "switch0", "master", provider.bridge, "up")
    run("ip", "link", "set", NIC, "up")
    yield NIC
    run("ip", "link", "del", NIC, check=False)


def config(provider: Provider, parent: str, firewall: str = "nftables", attach: str = "") -> str:
    """The provider's network as an upstream by macvlan on ``parent``."""
    text = provider.config(firewall=firewall, more=f'attach = "{attach or "macvlan"}"')
    return text.replace(f'bridge = "{provider.bridge}"', f'bridge = "{parent}"')


def link(name: str, namespace: str | None = None) -> dict[str, object]:
    shown = run("ip", "-j", "-d", "link", "show", name, namespace=namespace).stdout
    found: dict[str, object] = json.loads(shown)[0]
    return found


def is_macvlan(parent: str, namespace: str = "nat-a") -> bool:
    """Whether the namespace's link to the upstream is one, in the mode "bridge", and up."""
    found = link("upstream", namespace)
    kind = found["linkinfo"]
    assert isinstance(kind, dict)
    if kind["info_kind"] != "macvlan":
        return False
    on_parent = found["link_index"] == link(parent)["ifindex"]
    return on_parent and kind["info_data"]["mode"] == "bridge" and "UP" in str(found["flags"])


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """``virt-natns`` in this process."""
    return in_process(capsys)


def address_of(command: Command, name: str) -> str:
    """The address of a network on the upstream."""
    listed = networks(command)
    return next(str(each["address"]) for each in listed if each["network"] == name)


@contextmanager
def strict_host() -> Iterator[None]:
    """A host whose firewall sees bridged frames and forwards none, as Docker has it."""
    before = BRIDGE_NF.read_text()
    BRIDGE_NF.write_text("1")
    run("iptables", "-P", "FORWARD", "DROP")
    try:
        yield
    finally:
        run("iptables", "-P", "FORWARD", "ACCEPT")
        BRIDGE_NF.write_text(before)


@contextmanager
def guest_of(bridge: str, name: str) -> Iterator[FastGuest]:
    """The guest 10.0.0.5 with a web and an echo server."""
    with FastGuest(bridge, MAC, name) as guest:
        guest.static("10.0.0.5/24", "10.0.0.1")
        guest.serve("http", 80)
        guest.serve("udp", 7)
        yield guest


def answers(interface: str, address: str) -> bool:
    """Whether somebody answers for an address when the host asks on an interface."""
    asked = ("busybox", "arping", "-f", "-c", "1", "-w", "1", "-I", interface, address)
    return run(*asked, check=False).returncode == 0


def echoed(asker: FastGuest, address: str) -> str:
    """The address that an echo server saw of who asked it."""
    with asker.open_socket("udp") as datagrams:
        datagrams.sendto(b"ping", (address, 7))
        return datagrams.recv(100).decode().partition(":")[0]


@pytest.mark.parametrize(("parent", "firewall"), [(NIC, "nftables"), ("br0", "iptables")])
def test_guests_talk_over_it(
    provider: Provider, nic: str, command: Command, parent: str, firewall: str
) -> None:
    # The pool's first address is another machine's, as a probe by the parent finds out.
    neighbour = provider.neighbour("near", "192.168.0.100/24")
    write_config(config(provider, parent, firewall))
    ports = run("bridge", "link").stdout
    with ExitStack() as cleanup:
        if parent != NIC and BRIDGE_NF.exists():
            cleanup.enter_context(strict_host())
        guests, addresses = {}, {}
        for number, name in enumerate(("a", "b")):
            bridge = f"virbr1{number}"
            start_network(isolated(name, bridge, hosts=[WEB], metadata=FORWARD))
            guests[name] = cleanup.enter_context(guest_of(bridge, f"guest-{name}"))
            addresses[name] = address_of(command, name)
            assert addresses[name] != "192.168.0.100"
            assert is_macvlan(parent, f"nat-{name}")
        assert "natup-" not in run("bridge", "link").stdout
        assert parent not in ports or parent in run("bridge", "link").stdout
        for name, guest in guests.items():
            own = addresses[name]
            assert guest.curl(f"http://{provider.gateway}/").startswith(f"{own}:")
            assert guest.curl("http://203.0.113.80/").startswith(f"{own}:")
            assert guest.dig("www.example.test", server="10.0.0.1") == ["203.0.113.80"]
            # Forwards, from outside and from a guest of the other network.
            assert neighbour.curl(f"http://{own}:8080/").startswith("192.168.0.100:")
            other = "b" if name == "a" else "a"
            seen = guest.curl(f"http://{addresses[other]}:8080/")
            assert seen.startswith(f"{own}:")
            assert echoed(guest, addresses[other]) == own
            assert echoed(guest, own) == "10.0.0.1"
            uuid = virsh("net-uuid", name).stdout.strip()
            assert names.mac(uuid, "upstream") in neighbour.run("ip", "neighbour").stdout
        # The host itself gets no answer: what it sends goes to the wire only.
        assert answers(parent, "192.168.0.100")
        assert not answers(parent, addresses["a"])
    assert command("check").status == 0
    assert f"upstream provider, by macvlan, {provider.subnet}" in command("diagram").out
    plan = command("plan", "a").out
    assert f"macvlan upstream on {parent} in nat-a, MTU {LARGE}" in plan
    assert "natup-" not in plan
    doctor = command("doctor").out
    assert f"upstream: provider, by macvlan on interface {parent}\n" in doctor
    assert "this kernel has network namespaces, bridges, veth and macvlan\n" in doctor
    virsh("net-destroy", "a")
    virsh("net-destroy", "b")
    assert "promiscuity 0" in run("ip", "-d", "link", "show", parent).stdout


def test_refusals(provider: Provider, nic: str, command: Command) -> None:
    define_network(isolated("a", "virbr10"))

    def refused(*words: str) -> None:
        with pytest.raises(CommandError) as error:
            virsh("net-start", "a")
        for word in ("of upstream provider", *words):
            assert word in str(error.value)
        assert "nat-" not in run("ip", "netns", "list").stdout

    write_config(config(provider, "nic9"))
    refused("interface nic9", "does not exist")
    write_config(config(provider, "switch0"))
    refused("interface switch0", "belongs to bridge br0", "name br0 in")
    write_config(config(provider, "lo"))
    refused("interface lo", "is the loopback interface")
    write_config(config(provider, nic))
    run("ip", "link", "set", nic, "down")
    refused(f"interface {nic}", "is down", f"ip link set {nic} up")
    run("ip", "link", "set", nic, "up")
    run("ip", "tuntap", "add", "tun0", "mode", "tun")
    write_config(config(provider, "tun0"))
    refused("interface tun0", "does not accept a macvlan (Invalid argument)", "name another NIC in")
    run("ip", "link", "del", "tun0")
    write_config(config(provider, nic, attach="bridge"))
    refused(f"bridge {nic}", "is not a bridge", 'attach = "macvlan"')
    doctor = command("doctor").out
    assert f"broken  upstream: bridge {nic} of upstream provider is not a bridge" in doctor
    assert "this kernel has network namespaces, bridges and veth\n" in doctor
    write_config(
        config(provider, nic).replace('gateway = "192.168.0.1"', 'gateway = "192.168.0.2"')
    )
    refused("cannot lead to the gateway 192.168.0.2, an address of this host")


@contextmanager
def filled(bridge: str) -> Iterator[None]:
    """A bridge with as many ports as it takes."""
    taken = len(json.loads(run("ip", "-j", "link", "show", "master", bridge).stdout))
    commands = ""
    for number in range(FULL - taken):
        # A group of their own: the kernel then deletes them all at once.
        commands += f"tuntap add fill{number} mode tap\n"
        commands += f"link set fill{number} master {bridge} group 77\n"
    run("sh", "-c", f"ip -batch - <<'END'\n{commands}END")
    try:
        yield
    finally:
        run("ip", "link", "del", "group", "77")


def test_a_full_bridge(provider: Provider, command: Command) -> None:
    with filled(provider.bridge):
        write_config(provider.config())
        with pytest.raises(CommandError) as error:
            start_network(isolated("a", "virbr10"))
        assert "bridge br0 of upstream provider is full with 1023 ports" in str(error.value)
        assert 'use another bridge, or attach = "macvlan"' in str(error.value)
        write_config(config(provider, provider.bridge))
        virsh("net-start", "a")
        with FastGuest("virbr10") as guest:
            guest.static("10.0.0.5/24", "10.0.0.1")
            assert guest.curl(f"http://{provider.gateway}/").startswith(
                f"{address_of(command, 'a')}:"
            )
        virsh("net-destroy", "a")


def test_sync_moves_a_running_network(provider: Provider, nic: str, command: Command) -> None:
    write_config(provider.config())
    start_network(isolated("a", "virbr10", hosts=[WEB], metadata=FORWARD))
    own = address_of(command, "a")
    with guest_of("virbr10", "guest-a") as guest:
        for attach, parent in (("macvlan", nic), ("macvlan", "br0"), ("bridge", "br0")):
            write_config(config(provider, parent, attach=attach))
            assert command("check").status == 1
            assert command("sync").status == 0
            assert command("check").status == 0
            assert is_macvlan(parent) == (attach == "macvlan")
            assert ("natup-" in run("bridge", "link").stdout) == (attach == "bridge")
            assert guest.curl(f"http://{provider.gateway}/").startswith(f"{own}:")
            answer = provider.router.curl(f"http://{own}:8080/")
            assert answer.startswith("192.168.0.1:")


def test_service_heals(service: Service, provider: Provider, nic: str, command: Command) -> None:
    write_config(config(provider, nic))
    start_network(isolated("a", "virbr10", hosts=[WEB]))

    def works() -> bool:
        return command("check").status == 0

    with guest_of("virbr10", "guest-a") as guest:
        stream = guest.connect(provider.gateway, 7)
        stream.recv(100)
        run("ip", "-n", "nat-a", "link", "del", "upstream")
        wait_for(lambda: run("ip", "-n", "nat-a", "link", "show", "upstream", check=False).stdout)
        wait_for(works, what="the macvlan")
        assert is_macvlan(nic)
        stream.sendall(b"still there?")
        assert stream.recv(100) == b"still there?"
        stream.close()
        for mtu in (SMALL, LARGE):
            # The kernel itself follows to a smaller one only.
            run("ip", "link", "set", nic, "mtu", str(mtu))
            wait_for(lambda: link("upstream", "nat-a")["mtu"] == mtu, what="the MTU")  # noqa: B023
            wait_for(works, what="all of it")
            told = guest.dhcp(apply=False).get("mtu")
            assert told == (str(SMALL) if mtu == SMALL else None)
        # With its parent the macvlan goes, and with another of that name it comes.
        run("ip", "link", "del", nic)
        assert not works()
        run("ip", "link", "add", NIC, "type", "veth", "peer", "name", "switch0")
        run("ip", "link", "set", "switch0", "master", provider.bridge, "up")
        run("ip", "link", "set", NIC, "up")
        wait_for(works, timeout=30, what="the macvlan on a new NIC")
        assert guest.curl(f"http://{provider.gateway}/").startswith(f"{address_of(command, 'a')}:")
