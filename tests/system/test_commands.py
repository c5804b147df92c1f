# SPDX-License-Identifier: LGPL-2.1-or-later
"""check, sync, status, plan, exec, doctor and diagram on networks that run.

One world for most tests: networks a and b with the same subnet, a guest in
each, and a TCP connection through each that must live on whatever happens to
the other network, and through any repair that can spare it.
"""

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import (
    CHECKOUT,
    FastGuest,
    Host,
    isolated,
    natns,
    run,
    snapshot,
    start_network,
    virsh,
    wait_for,
)
from lab_sides import (
    HOOKS,
    MAC,
    Answer,
    Command,
    World,
    in_process,
    networks,
    two_networks,
    without_hooks,
)

REAL_INTERPRETER = True
WANTED = (
    '<natns:nat xmlns:natns="urn:libvirt-natns:1">'
    '<natns:upstream name="provider" address="192.168.0.150"/></natns:nat>'
)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``virt-natns`` in this very process, which is quicker."""
    return in_process(capsys)


# -- the world ---------------------------------------------------------------


@pytest.fixture(scope="module", params=["nftables", "iptables"])
def world(request: pytest.FixtureRequest, installed: None) -> Iterator[World]:
    with two_networks(str(request.param)) as made:
        yield made


# -- check and sync ----------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """What is broken behind our back, by shell; what check says; what cannot live on.

    ``{inner}`` and ``{outer}`` are the host ends of a's patches, ``{dir}`` its directory.
    """

    shell: str
    said: tuple[str, ...]
    cuts: bool = False


DAMAGES = {
    "namespace deleted": Damage(
        "ip netns delete nat-a", ("namespace nat-a is missing",), cuts=True
    ),
    "private patch deleted": Damage("ip link del {inner}", ("patch {inner} is missing",)),
    "upstream patch deleted": Damage(
        "ip link del {outer}", ("patch {outer} is missing",), cuts=True
    ),
    "off the private bridge": Damage(
        "ip link set {inner} nomaster", ("patch {inner} is not a port of bridge virbr10",)
    ),
    "off the upstream bridge": Damage(
        "ip link set {outer} nomaster", ("patch {outer} is not a port of bridge br0",)
    ),
    "on the wrong bridge": Damage(
        "ip link set {inner} master br0", ("patch {inner} is not a port of bridge virbr10",)
    ),
    "host end down": Damage("ip link set {inner} down", ("patch {inner} is down",)),
    "inner link down": Damage(
        "ip -n nat-a link set virbr10 down", ("link virbr10 is down in nat-a",)
    ),
    "upstream link down": Damage(
        "ip -n nat-a link set upstream down",
        ("link upstream is down in nat-a", "route default via 192.168.0.1"),
        cuts=True,
    ),
    "gateway address removed": Damage(
        "ip -n nat-a address del 10.0.0.1/24 dev virbr10",
        ("virbr10 in nat-a lacks the address 10.0.0.1/24",),
    ),
    "foreign address added": Damage(
        "ip -n nat-a address add 192.168.0.66/24 dev upstream",
        ("upstream in nat-a has the foreign address 192.168.0.66/24",),
    ),
    "upstream address replaced": Damage(
        "ip -n nat-a address flush dev upstream;"
        " ip -n nat-a address add 192.168.0.66/24 dev upstream",
        ("lacks the address 192.168.0.100/24", "has the foreign address 192.168.0.66/24"),
        cuts=True,
    ),
    "default route changed": Damage(
        "ip -n nat-a route replace default via 192.168.0.2",
        ("route default via 192.168.0.1 on upstream in nat-a is missing or not the only route",),
    ),
    "default route doubled": Damage(
        "ip -n nat-a route add default via 192.168.0.2 metric 50;"
        " ip -n nat-a route add blackhole default metric 60",
        ("route default via 192.168.0.1 on upstream in nat-a is missing or not the only route",),
    ),
    "forwarding off": Damage(
        "ip netns exec nat-a sysctl -qw net.ipv4.ip_forward=0",
        ("sysctl net/ipv4/ip_forward is 0 instead of 1 in nat-a",),
    ),
    "answers ARP for all": Damage(
        "ip netns exec nat-a sysctl -qw net.ipv4.conf.all.arp_ignore=0",
        ("sysctl net/ipv4/conf/all/arp_ignore is 0 instead of 1 in nat-a",),
    ),
    "address back in the host": Damage(
        "ip address add 10.0.0.1/24 dev virbr10",
        ("bridge virbr10 still has 10.0.0.1/24 in the host",),
    ),
    "dnsmasq killed": Damage(
        "kill -9 $(cat {dir}/dnsmasq.pid); while kill -0 $(cat {dir}/dnsmasq.pid) 2>/dev/null;"
        " do sleep 0.01; done",
        ("dnsmasq of nat-a is not running",),
    ),
    "MTU inside": Damage(
        "ip -n nat-a link set upstream mtu 1400",
        ("upstream in nat-a has MTU 1400 instead of 1500",),
    ),
}

FIREWALL_DAMAGES = {
    "nftables": [
        "nft flush ruleset",
        "nft add rule inet natns forward accept",
        "nft flush chain inet natns srcnat",
        'nft "add chain inet natns forward { policy accept; }"',
    ],
    "iptables": [
        "iptables-legacy -t nat -F; iptables-legacy -F; iptables-legacy -t mangle -F",
        "iptables-legacy -I FORWARD -j ACCEPT",
        "iptables-legacy -t nat -F POSTROUTING",
        "iptables-legacy -P FORWARD ACCEPT",
    ],
}


def repaired(world: World, command: Command, damage: Damage) -> None:
    """Damage a; check names that and nothing else, sync mends it and spares all the rest."""
    a, b = world.a, world.b
    values = {
        "inner": a.port("private"),
        "outer": a.port("upstream"),
        "dir": f"/run/libvirt-natns/networks/{a.uuid}",
    }
    untouched = (b.indexes(), b.dnsmasq(), a.dnsmasq())
    shell = damage.shell
    for name, value in values.items():
        shell = shell.replace(f"{{{name}}}", value)
    run("sh", "-ec", shell)
    found = command("check")
    assert found.status == 1
    for said in damage.said:
        assert said.format_map(values) in found.out
    assert all(line.startswith("a: ") for line in found.out.splitlines()), found.out
    foreseen = command("sync", "--dry-run")
    assert (foreseen.status, foreseen.err) == (0, "")
    assert set(foreseen.out.splitlines()) == set(found.out.splitlines())
    mended = command("sync")
    assert mended == Answer(0, mended.out, "")
    assert mended.out
    assert command("check") == Answer(0, "", "")
    assert b.talks()
    if damage.cuts:
        a.connect(world.provider)
    assert a.talks()
    assert untouched[:2] == (b.indexes(), b.dnsmasq())
    respawned = "dnsmasq" in damage.shell or "netns delete" in damage.shell
    assert (a.dnsmasq() != untouched[2]) == respawned


@pytest.mark.parametrize("world", ["nftables"], indirect=True)
@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_named_and_repaired(name: str, world: World, command: Command) -> None:
    repaired(world, command, DAMAGES[name])


@pytest.mark.parametrize("number", range(4))
def test_a_damaged_firewall_is_named_and_repaired(
    number: int, world: World, command: Command
) -> None:
    shell = FIREWALL_DAMAGES[world.firewall][number]
    said = ("firewall of nat-a is missing or was altered",)
    repaired(world, command, Damage(f"nsenter --net=/run/netns/nat-a sh -ec '{shell}'", said))


@pytest.mark.parametrize("world", ["nftables"], indirect=True)
def test_all_follow_the_bridge_whose_mtu_changes(world: World, command: Command) -> None:
    """A bridge takes its narrowest port's MTU: here that of a's, and b's path is as narrow."""
    outer = world.a.port("upstream")
    run("ip", "link", "set", outer, "mtu", "1400")
    found = command("check").out
    assert "a: upstream in nat-a has MTU 1500 instead of 1400\n" in found
    assert "b: upstream in nat-b has MTU 1500 instead of 1400\n" in found
    assert command("sync").status == 0
    assert command("check") == Answer(0, "", "")
    assert world.b.guest.dhcp(apply=False)["mtu"] == "1400"
    assert world.a.talks()
    assert world.b.talks()
    run("ip", "link", "set", "br0", "mtu", "1500")
    assert f"a: {outer} has MTU 1400 instead of 1500\n" in command("check").out
    assert command("sync").status == 0
    assert command("check") == Answer(0, "", "")
    assert "mtu" not in world.b.guest.dhcp(apply=False)


def test_what_is_well_is_left_alone(world: World, command: Command) -> None:
    before = [(side.indexes(), side.dnsmasq()) for side in (world.a, world.b)]
    state = snapshot()
    assert command("check") == Answer(0, "", "")
    for _ in range(2):
        assert command("sync") == Answer(0, "", "")
    assert not state.diff(snapshot())
    assert before == [(side.indexes(), side.dnsmasq()) for side in (world.a, world.b)]
    assert world.a.talks()
    assert world.b.talks()


@pytest.mark.parametrize("world", ["nftables"], indirect=True)
def test_sync_repairs_what_it_can_and_tells_the_rest(world: World, command: Command) -> None:
    run("ip", "netns", "add", "nat-c")
    with without_hooks():
        start_network(isolated("c", "virbr12"))
    run("ip", "-n", "nat-a", "route", "del", "default")
    done = command("sync")
    run("ip", "netns", "del", "nat-c")
    assert done.status == 1
    assert "a: route default" in done.out
    assert done.err.startswith("virt-natns: namespace nat-c belongs to another program: delete it")
    assert done.err.count("\n") == 1
    assert "inet 10.0.0.1/24" in run("ip", "-4", "address", "show", "virbr12").stdout
    assert world.a.talks()


# -- missed events -----------------------------------------------------------


@pytest.mark.parametrize("world", ["nftables"], indirect=True)
def test_missed_start_and_end(world: World, command: Command) -> None:
    before = snapshot()
    with without_hooks():
        start_network(isolated("c", "virbr12", hosts=[Host(MAC, "10.0.0.5")]))
        found = command("check")
        assert (found.status, found.out) == (
            1, "c: is active in libvirt, but has no router\n",
        )  # fmt: skip
        assert "c: is active" in command("status").out
        assert command("sync", "--dry-run") == Answer(0, found.out, "")
        assert command("sync").out == "c: is active in libvirt, but has no router: made a router\n"
        assert command("check").status == 0
        with FastGuest("virbr12", MAC, "guest-c") as guest:
            assert guest.dhcp()["router"] == "10.0.0.1"
            page = guest.curl(f"http://{world.provider.gateway}/")
            assert re.match(r"192\.168\.0\.1\d\d:", page)
        virsh("net-destroy", "c")
        found = command("check")
        assert found.status == 1
        assert "c: is not active in libvirt any more\n" in found.out
        assert "c: is not active in libvirt any more\n" in command("sync", "--dry-run").out
        assert command("sync").out == "c: is not active in libvirt any more: removed\n"
        assert command("check") == Answer(0, "", "")
    wait_for(lambda: not before.diff(snapshot()))
    assert world.a.talks()


@contextmanager
def libvirt_out_of_reach() -> Iterator[None]:
    """As if libvirtd did not run: nothing answers where it would."""
    listening = Path("/run/libvirt/libvirt-sock-ro")
    away = listening.rename(listening.with_name("away"))
    try:
        yield
    finally:
        away.rename(listening)


@pytest.mark.parametrize("world", ["nftables"], indirect=True)
def test_without_libvirt(world: World, command: Command) -> None:
    run("ip", "-n", "nat-a", "route", "del", "default")
    with libvirt_out_of_reach():
        done = command("check")
        assert done.status == 1
        assert "a: route default" in done.out
        done = command("sync")
        assert done.status == 0
        assert "a: route default" in done.out
        assert "libvirt does not answer" in done.err
        assert command("check").status == 0
        assert command("status").status == 0
        done = command("plan", "a")
        assert (done.status, done.out) == (1, "")
        assert done.err.startswith("virt-natns: libvirt does not answer: ")
        assert done.err.count("\n") == 1
        done = command("doctor")
        assert done.status == 1
        assert "broken  libvirt: libvirt does not answer" in done.out
    assert world.a.talks()
    assert world.b.talks()


# -- status ------------------------------------------------------------------


def test_status_of_what_is_well(world: World, command: Command) -> None:
    for side in (world.a, world.b):
        side.guest.dhcp(apply=False)
    assert command("status") == Answer(0, """\
NETWORK  NAMESPACE  SUBNET       UPSTREAM  ADDRESS        LEASES  HEALTH
a        nat-a      10.0.0.0/24  provider  192.168.0.100  1       ok
b        nat-b      10.0.0.0/24  provider  192.168.0.101  1       ok
service: not running: hooks do the work themselves
""", "")  # fmt: skip
    one = command("status", "b").out.splitlines()
    assert [line.split()[0] for line in one] == ["NETWORK", "b", "service:"]
    assert command("status", world.b.uuid).out.splitlines() == one
    described = json.loads(command("status", "--json").out)
    assert described.keys() == {
        "networks", "host", "missed", "guests", "service", "waiting", "stops", "notes",
        "version", "domains", "forwards", "upstreams", "libvirt_networks",
    }  # fmt: skip
    assert described["service"]["state"] == "absent"
    leases = described["networks"][0].pop("dhcp_leases")
    assert [lease["address"] for lease in leases] == ["10.0.0.5"]
    assert described["networks"][0] == {
        "network": "a",
        "uuid": world.a.uuid,
        "state": "up",
        "namespace": "nat-a",
        "bridge": "virbr10",
        "subnets": ["10.0.0.0/24"],
        "upstream": "provider",
        "address": "192.168.0.100",
        "leases": 1,
        "health": "ok",
        "differences": [],
        "forwards": [],
        "lease_seconds": None,
        "address6": None,
        "prefix": None,
        "obstacles": [],
    }
    assert (described["host"], described["missed"], described["guests"]) == ([], [], [])


@pytest.mark.parametrize("world", ["nftables"], indirect=True)
def test_status_of_what_is_not_well(world: World, command: Command) -> None:
    for side in (world.a, world.b):
        side.guest.dhcp(apply=False)
    start_network(isolated("c", "virbr12", metadata=WANTED))
    virsh("net-destroy", "c")
    run("ip", "-n", "nat-b", "route", "del", "default")
    shown = command("status").out
    assert command("sync").status == 0
    assert (
        shown
        == """\
NETWORK  NAMESPACE  SUBNET       UPSTREAM  ADDRESS        LEASES  HEALTH
a        nat-a      10.0.0.0/24  provider  192.168.0.100  1       ok
b        nat-b      10.0.0.0/24  provider  192.168.0.101  1       damaged (1)
  ! route default via 192.168.0.1 on upstream in nat-b is missing or not the only route
c        -          10.0.0.0/24  provider  192.168.0.150  -       down
"virt-natns sync" repairs the differences marked with "!".
service: not running: hooks do the work themselves
"""
    )
    virsh("net-undefine", "c")
    # Of a network that is no more there is a lease, but nobody wants to see it.
    assert "c  " not in command("status").out
    assert "down" in command("status", "c").out


# -- plan, exec, doctor, diagram -----------------------------------------------


@pytest.mark.parametrize("world", ["nftables"], indirect=True)
def test_plan_changes_nothing(world: World, command: Command) -> None:
    before = snapshot()
    files = sorted((CHECKOUT / "xml").glob("*.xml"))
    assert len(files) > 5
    shown = {}
    for file in files:
        done = command("plan", os.fspath(file))
        if file.name.startswith("domain"):
            assert done.status == 1
            assert os.fspath(file) in done.err
        elif file.stem == "natns-ip-dual":
            # It asks for an address in IPv6, of which this upstream has none.
            assert "is refused, as the upstream has no IPv6 subnet" in done.err
        else:
            assert (done.status, done.err) == (0, "")
        shown[file.stem] = done.out
    assert shown["disabled"] == (
        "network disabled is not touched: its metadata says enabled='no'\n"
    )
    assert "namespace nat-twin-a\n" in shown["twin-a"]
    # The next free one, in both: nothing was leased.
    addresses = [re.search(r"address (\S+) on upstream", shown[f"twin-{x}"]) for x in "ab"]
    assert addresses[0]
    assert addresses[1]
    assert addresses[0][1] == addresses[1][1] not in ("192.168.0.100/24", "192.168.0.101/24")
    assert "address 192.168.0.150/24 on upstream in nat-annotated\n" in shown["annotated"]
    assert "route 10.1.0.0/16 via 10.0.0.9 on " in shown["annotated"]
    assert "no address 10.0.0.1/24 on virbr12 in the host\n" in shown["natns-ip"]
    running = command("plan", "a").out
    assert "address 192.168.0.100/24 on upstream in nat-a\n" in running
    assert not before.diff(snapshot())
    assert {side["network"] for side in networks(command)} == {"a", "b"}


@pytest.mark.parametrize("world", ["nftables"], indirect=True)
def test_exec_runs_inside(world: World) -> None:
    said = natns("exec", "b", "--", "ip", "-4", "-br", "address", "show", "upstream").stdout
    assert said.split()[2] == "192.168.0.101/24"
    # Options are the command's, also without the dashes.
    assert natns("exec", "b", "ip", "-V").stdout.startswith("ip utility")
    assert natns("exec", "b", "--", "sh", "-c", "exit 7", check=False).returncode == 7
    # As with any shell, a command ends where nothing reads its output any more.
    ignored = natns("exec", "b", "--", "grep", "SigIgn", "/proc/self/status").stdout.split()[1]
    assert not int(ignored, 16) & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)
    for arguments, status, line in [
        (("zzz", "--", "true"), 1, "there is no network zzz: see virsh net-list --all"),
        (("a", "--", "no-such"), 1, "cannot run no-such: No such file or directory"),
        (("a",), 2, "exec: a command is missing"),
    ]:
        done = natns("exec", *arguments, check=False)
        assert (done.returncode, done.stdout) == (status, "")
        assert done.stderr == f"virt-natns: {line}\n"


@pytest.mark.parametrize("world", ["nftables"], indirect=True)
def test_errors_are_one_line(world: World, command: Command) -> None:
    for arguments, line in [
        (("status", "zzz"), "there is no network zzz: see virsh net-list --all"),
        (("check", "zzz"), "there is no network zzz: see virsh net-list --all"),
        (("plan", "zzz"), "there is no file and no network zzz: see virsh net-list --all"),
    ]:  # fmt: skip
        assert command(*arguments) == Answer(1, "", f"virt-natns: {line}\n")
    for wrong in (("no-such-command",), (), ("status", "--no-such-option"), ("sync", "a")):
        done = natns(*wrong, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        fault, more = done.stderr.splitlines()
        assert more == f"see {fault.partition(':')[0]} --help"


def test_diagram(world: World, command: Command) -> None:
    for side in (world.a, world.b):
        side.guest.dhcp(apply=False)
    assert command("diagram") == Answer(0, """\
  52:54:00:00:00:05 10.0.0.5      52:54:00:00:00:05 10.0.0.5
              |                               |
              a                               b
           virbr10                         virbr11
              |                               |
+-------------+--------------+  +-------------+--------------+
| nat-a: ok                  |  | nat-b: ok                  |
| 10.0.0.1/24                |  | 10.0.0.1/24                |
| 192.168.0.100              |  | 192.168.0.101              |
+-------------+--------------+  +-------------+--------------+
              |                               |
--------------+-------------------------------+--------------- br0
   (upstream provider, 192.168.0.0/24, gateway 192.168.0.1)
""", "")  # fmt: skip


def test_doctor_finds_all_well(world: World, command: Command) -> None:
    before = snapshot()
    done = command("doctor")
    assert done.status == 0, done.out
    assert done.err == ""
    # The size of the neighbour tables is the machine's.
    lines = [line for line in done.out.splitlines() if "neighbour tables" not in line]
    assert {line.split()[0] for line in lines} == {"ok"}
    assert f"firewall: {world.firewall}, " in done.out
    assert not before.diff(snapshot())


@pytest.mark.parametrize("world", ["nftables"], indirect=True)
def test_doctor_names_what_is_broken(world: World, command: Command) -> None:
    def broken() -> list[str]:
        done = command("doctor")
        assert done.status == 1
        lines = [line for line in done.out.splitlines() if not line.startswith("ok ")]
        return [line.removeprefix("broken  ") for line in lines]

    hook = HOOKS / "network"
    text = hook.read_text()
    times = hook.stat()
    hook.write_text(text + "# an older one\n")
    os.utime(hook, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert broken() == [f"hooks: not this version's: {hook}: run virt-natns install"]
    hook.write_text(text)
    os.utime(hook, ns=(times.st_atime_ns, times.st_mtime_ns))

    with without_hooks():
        assert broken() == [
            "hooks: not installed: network, qemu, lxc: run virt-natns install",
            "hooks in libvirt: no hook is installed: run virt-natns install",
        ]
        start_network(isolated("c", "virbr12"))
    assert broken() == ["networks: c is active in libvirt, but has no router: run virt-natns sync"]
    virsh("net-destroy", "c")

    config = Path("/etc/libvirt-natns/config.toml")
    kept = config.read_text()
    config.write_text(kept.replace("probe", "porbe"))
    assert broken()[0].startswith(f"configuration: {config}: upstreams.provider.porbe: unknown key")
    config.write_text(kept.replace('"br0"', '"br7"'))
    lines = broken()
    assert (
        "upstream: bridge br7 of upstream provider does not exist:"
        f" create it, or fix {config}" in lines
    )
    config.write_text(kept)
    run("mount", "--bind", "/dev/null", os.path.realpath("/usr/sbin/dnsmasq"))
    lines = broken()
    run("umount", os.path.realpath("/usr/sbin/dnsmasq"))
    assert "program dnsmasq: dnsmasq is not installed: install the package dnsmasq-base" in lines
