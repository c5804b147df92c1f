# SPDX-License-Identifier: LGPL-2.1-or-later
"""What goes wrong is refused early, leaves nothing, and is over once it is mended.

Causes that `start` refuses, on the real libvirt; and each step of the set-up that
fails, in the engine itself, with a bridge like libvirt's made by the test.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lab import (
    CHECKOUT,
    CommandError,
    FastGuest,
    Host,
    Provider,
    define_network,
    isolated,
    natns,
    run,
    snapshot,
    start_network,
    virsh,
)
from lab_bench import (
    DNSMASQ,
    STATE,
    Bench,
    FailAt,
    InjectedError,
    configured,
    covered,
    grow_old,
    interesting,
    nat,
    settles_as,
)

from libvirt_natns.daemons import dnsmasq
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.firewall import nftables
from libvirt_natns.kernel import address_probe
from libvirt_natns.kernel.bridges import Bridges
from libvirt_natns.kernel.link_addresses import LinkAddresses
from libvirt_natns.kernel.links import Links
from libvirt_natns.kernel.routes import Routes
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.kernel.sysctl import Sysctls
from libvirt_natns.kernel.veth import VethPairs
from libvirt_natns.operations.namespaces import Namespace
from libvirt_natns.state.networks import NetworkTable

pytest_plugins = ("lab_bench",)

MAC = "52:54:00:00:00:05"
NFTABLES = "/usr/sbin/nft"


# -- refused in `start` ------------------------------------------------------


@contextmanager
def command(make: str, undo: str) -> Iterator[None]:
    """Something that a command breaks and another one mends."""
    run("sh", "-ec", make)
    try:
        yield
    finally:
        run("sh", "-ec", undo)


@contextmanager
def corrupt_database() -> Iterator[None]:
    """A state database that is none."""
    kept = {file: file.read_bytes() for file in STATE.parent.glob("state.db*")}
    for file in kept:
        file.unlink()
    STATE.write_text("this is no database, as its first bytes show\n" * 100)
    try:
        yield
    finally:
        STATE.unlink()
        for file, content in kept.items():
            file.write_bytes(content)


@contextmanager
def read_only_database() -> Iterator[None]:
    """A state directory that nobody can write to, not even root."""
    run("mount", "--bind", STATE.parent, STATE.parent)
    run("mount", "-o", "remount,bind,ro", STATE.parent)
    try:
        yield
    finally:
        run("umount", STATE.parent)


@contextmanager
def _both(
    first: AbstractContextManager[None], second: AbstractContextManager[None]
) -> Iterator[None]:
    with first, second:
        yield


@dataclass(frozen=True)
class Cause:
    """Why a network cannot start, and the line that tells: its fact and its remedy.

    ``concerns_all``: it might stand in the way of any network on this machine.
    """

    broken: Callable[[Provider], AbstractContextManager[None]]
    fact: str
    remedy: str
    metadata: str = ""
    concerns_all: bool = True


NOBODY = 'kind = "bridge"\nbridge = "br0"\npool = "dhcp"\ndhcp_timeout = 0.1'


def with_upstream(provider: Provider, table: str) -> str:
    return f'upstream = "x"\n[upstreams.x]\n{table}\n'


CAUSES = {
    "unknown upstream": Cause(
        lambda p: configured(p, p.config(more="probe = 0\n[upstreams.other]\nkind = 'host'")),
        "network a: there is no upstream dsl",
        r"add \[upstreams.dsl\] to /etc/libvirt-natns/config.toml, or name one of host, .*",
        nat('<natns:upstream name="dsl"/>'),
        concerns_all=False,
    ),
    "missing bridge": Cause(
        lambda p: configured(p, p.config().replace('"br0"', '"br7"')),
        "network a: bridge br7 of upstream provider does not exist",
        "create it, or fix /etc/libvirt-natns/config.toml",
    ),
    "bridge is down": Cause(
        lambda p: command(
            "ip link set br0 down", "ip link set br0 up; ip route add default via 192.168.0.1"
        ),
        "network a: bridge br0 of upstream provider is down",
        r"set it up \(ip link set br0 up\)",
    ),
    "not a bridge": Cause(
        lambda p: configured(p, p.config().replace('"br0"', '"lo"')),
        "network a: bridge lo of upstream provider is not a bridge",
        "name a bridge in /etc/libvirt-natns/config.toml",
    ),
    "foreign namespace": Cause(
        lambda p: command("ip netns add nat-a", "ip netns delete nat-a"),
        "network a: namespace nat-a exists and is not ours",
        r"rename the network, or delete it \(ip netns delete nat-a\)",
        concerns_all=False,
    ),
    "broken configuration": Cause(
        lambda p: configured(p, p.config().replace("192.168.0.0/24", "192.168.0.0/240")),
        "/etc/libvirt-natns/config.toml: upstreams.provider.subnet: is '192.168.0.0/240'",
        "expected an IPv4 subnet such as 192.168.0.0/24",
        # Without it, a network that was never handled starts without a router.
        nat(""),
    ),
    "corrupt state": Cause(
        lambda p: corrupt_database(),
        rf"state database {STATE}: is damaged \(file is not a database\)",
        "run virt-natns sync, which keeps the damaged file and rebuilds the database",
    ),
    "unwritable state": Cause(
        lambda p: read_only_database(),
        rf"cannot (open|change) the state database {STATE}",
        r".*(readonly|unable to open|read-only).*",
    ),
    "no dnsmasq": Cause(
        lambda p: covered(DNSMASQ),
        "dnsmasq is not installed",
        "install the package dnsmasq-base",
    ),
    "no nft": Cause(
        lambda p: _both(
            configured(p, p.config(firewall="nftables", more="probe = 0")), covered(NFTABLES)
        ),
        "the program nft is missing",
        'install nftables, or set firewall = "iptables"',
    ),
    "no router": Cause(
        lambda p: configured(p, with_upstream(p, 'kind = "router"\nnic = "ens3"')),
        "upstream x: its router is not up",
        "virt-natns router up x",
    ),
    "no DHCP server": Cause(
        lambda p: configured(p, with_upstream(p, NOBODY)),
        "network a: no DHCP server on bridge br0 of upstream x has leased an address within 0.1 s",
        "fix the DHCP server, or stop the stations that have the addresses which it offers,"
        r' or set dhcp = "background" in \[upstreams.x\] of .*',
    ),
}


def refusal(network: str) -> str:
    """Our one line in virsh's error about a network that does not start."""
    with pytest.raises(CommandError) as caught:
        virsh("net-start", network)
    stderr = caught.value.result.stderr
    before, mark, line = stderr.partition("libvirt-natns: ")
    assert mark, stderr
    assert "unexpected exit status 1: " in before
    assert "libvirt-natns: " not in line
    assert line.endswith("\n")
    assert "\n" not in line.rstrip("\n"), line
    return line.rstrip("\n")


@contextmanager
def transient(xml: str) -> Iterator[None]:
    """A network that is started without being defined, and destroyed."""
    file = Path("/run/tmp/transient.xml")
    file.write_text(xml)
    virsh("net-create", os.fspath(file))
    try:
        yield
    finally:
        name = xml.partition("<name>")[2].partition("<")[0]
        virsh("net-destroy", name)
        file.unlink()


def others_start() -> None:
    """Networks that are none of ours start, whatever is broken."""
    kept = isolated(
        "kept", "virbr20", address="10.7.0.1", dhcp=None, more='<dns enable="no"/>',
        metadata=nat("<bogus/>", ' enabled="no"'),
    )  # fmt: skip
    bridged = f"<network><name>bridged</name>{nat('<bogus/>')}<forward mode='bridge'/>"
    for xml in (kept, f"{bridged}<bridge name='br0'/></network>"):
        with transient(xml):
            assert "nat-kept" not in run("ip", "netns", "list").stdout


@pytest.mark.parametrize("name", CAUSES)
def test_start_refuses(name: str, world: Provider) -> None:
    cause = CAUSES[name]
    define_network(isolated("a", "virbr10", metadata=cause.metadata))
    before = snapshot()
    with cause.broken(world):
        line = refusal("a")
        assert re.fullmatch(f"{cause.fact}: {cause.remedy}", line), line
        if cause.concerns_all:
            others_start()
    settles_as(before)
    if cause.metadata:
        virsh("net-undefine", "a")
        define_network(isolated("a", "virbr10"))
    virsh("net-start", "a")
    assert "inet 10.0.0.1/24" in run("ip", "-n", "nat-a", "address").stdout


@pytest.mark.parametrize(
    ("inside", "told"),
    [
        ('<natns:upstream name="provider" adress="192.168.0.150"/>', "adress"),
        ('<natns:upstream name="provider" address="192.168.0.300"/>', "192.168.0.300"),
    ],
)
def test_start_refuses_invalid_metadata(inside: str, told: str, world: Provider) -> None:
    define_network(isolated("a", "virbr10", metadata=nat(inside)))
    before = snapshot()
    line = refusal("a")
    assert told in line
    assert ": " in line
    assert not before.diff(snapshot())
    virsh("net-undefine", "a")
    start_network(isolated("a", "virbr10", metadata=nat('<natns:upstream name="provider"/>')))


def test_a_failing_started_leaves_nothing_of_libvirts_either(world: Provider) -> None:
    """A fault that `start` cannot see: dnsmasq is there, but refuses to run for us."""
    define_network(isolated("a", "virbr10", hosts=[Host(MAC, "10.0.0.5")]))
    before = snapshot()
    refusing = Path("/run/tmp/refusing")
    refusing.write_text(
        '#!/bin/sh\ncase "$*" in *libvirt-natns*) echo "out of luck" >&2; exit 3;; esac\n'
        'exec /run/tmp/real "$@"\n'
    )
    refusing.chmod(0o755)
    real = Path("/run/tmp/real")
    real.write_bytes(Path(DNSMASQ).read_bytes())
    real.chmod(0o755)
    with covered(DNSMASQ, refusing):
        line = refusal("a")
    assert line == "dnsmasq refuses to start in nat-a: out of luck"
    for file in (real, refusing):
        file.unlink()
    settles_as(before)
    virsh("net-start", "a")
    with FastGuest("virbr10", MAC) as guest:
        assert guest.dhcp()["ip"] == "10.0.0.5"


KILLED_HOOK = """\
#!/usr/bin/python3 -I
import functools, os, signal, sys
sys.path.append({checkout!r})
from libvirt_natns import hook
from libvirt_natns.engine import engine, factory, observer

class Killer(observer.Nobody):
    def step(self, what):
        if type(what).__name__ == {kind!r}:
            os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "started":
    factory.Engine = functools.partial(engine.Engine, observer=Killer())
sys.exit(hook.main("network", sys.argv[1:]))
"""


@contextmanager
def hook_that_is_killed(kind: str) -> Iterator[None]:
    """A `started` hook that ends ahead of the first step of a kind, without a word."""
    hook = Path("/etc/libvirt/hooks/network")
    kept = hook.read_text()
    hook.write_text(KILLED_HOOK.format(checkout=os.fspath(CHECKOUT), kind=kind))
    try:
        yield
    finally:
        hook.write_text(kept)


@pytest.mark.parametrize(
    ("kind", "synced"),
    [("Namespace", True), ("Withdrawal", False), ("Withdrawal", True), ("Dnsmasq", False)],
)
def test_a_hook_that_is_killed(kind: str, synced: bool, world: Provider) -> None:
    """libvirt leaves its bridge; the next start, or sync, removes that as well."""
    define_network(isolated("a", "virbr10", hosts=[Host(MAC, "10.0.0.5")]))
    before = snapshot()
    with hook_that_is_killed(kind):
        failed = virsh("net-start", "a", check=False)
    assert failed.returncode == 1
    assert "signal 9" in failed.stderr
    assert "virbr10" in run("ip", "-br", "link").stdout
    if synced:
        grow_old()
        assert natns("sync").returncode == 0
        settles_as(before)
    virsh("net-start", "a")
    with FastGuest("virbr10", MAC) as guest:
        assert guest.dhcp()["router"] == "10.0.0.1"
        assert guest.curl(f"http://{world.gateway}/").startswith("192.168.0.1")
    virsh("net-destroy", "a")
    settles_as(before)


# -- each step fails ---------------------------------------------------------


@pytest.mark.parametrize("setting", ["nftables", "iptables", "host upstream"], indirect=True)
def test_up_and_down_leave_no_trace(bench: Bench) -> None:
    before = snapshot()
    bench.start()
    assert bench.differences() == []
    assert snapshot() != before
    bench.stop()
    settles_as(before)


def test_whichever_step_fails_nothing_stays(bench: Bench, setting: str) -> None:
    network = libvirt_xml.parse_network(bench.xml)
    bench.make_bridge()
    before = snapshot()
    rehearsal = FailAt()
    with bench.engine(rehearsal) as verbs:
        verbs.prepare(network, bench.xml)
        verbs.up(network, bench.xml)
        verbs.hand_back(network)
    settles_as(before)
    up = next(i for i, step in enumerate(rehearsal.steps) if isinstance(step, Namespace))
    end = next(i for i, step in enumerate(rehearsal.steps) if step == "note that it is up")
    assert end - up > 15
    for index in [i for i in interesting(rehearsal.steps, setting) if i <= end]:
        failing = FailAt(index)
        with bench.engine(failing) as verbs, pytest.raises(InjectedError):
            verbs.prepare(network, bench.xml)
            verbs.up(network, bench.xml)
        assert len(failing.steps) > index
        settles_as(before)
    with bench.engine() as verbs:
        verbs.prepare(network, bench.xml)
        verbs.up(network, bench.xml)
        assert bench.differences() == []
    bench.stop()


OPERATIONS: tuple[tuple[object, str, int], ...] = (
    (Kernel, "create_namespace", 1),
    (Sysctls, "set_all", 1),
    (VethPairs, "create", 2),
    (Bridges, "attach", 2),
    (LinkAddresses, "remove", 1),
    (LinkAddresses, "add", 2),
    (Links, "set_up", 2),
    (Routes, "replace", 1),
    (address_probe, "announce", 1),
    (dnsmasq, "start_process", 1),
    (NetworkTable, "put", 2),
    (NetworkTable, "set_state", 1),
    (nftables, "apply", 1),
)
"""What makes each thing, and how often it is called in a set-up at least."""


@pytest.mark.parametrize("setting", ["nftables"], indirect=True)
def test_an_operation_that_fails_halfway_is_taken_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thing was made, and then it turned out that it had failed."""
    network = libvirt_xml.parse_network(bench.xml)
    bench.make_bridge()
    before = snapshot()
    for owner, name, calls in OPERATIONS:
        for number in range(1, calls + 1):
            with monkeypatch.context() as patch, bench.engine() as verbs:
                patch.setattr(owner, name, failing_after(getattr(owner, name), number))
                with pytest.raises(InjectedError):
                    verbs.prepare(network, bench.xml)
                    verbs.up(network, bench.xml)
            settles_as(before)
    bench.delete_bridge()


def failing_after(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The same function, but its call of that number fails when all is done."""
    calls = iter(range(1, 1000))

    def wrapped(*arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401
        result = function(*arguments, **keywords)
        if next(calls) == number:
            raise InjectedError("as the test wanted", "let it")
        return result

    return wrapped


@pytest.mark.parametrize("setting", ["nftables"], indirect=True)
def test_a_repair_that_fails_can_be_repeated(bench: Bench) -> None:
    """A network that is up stays recorded as up, and what was well stays."""
    before = snapshot()
    bench.start()
    network = libvirt_xml.parse_network(bench.xml)
    pid = dnsmasq.running(bench.uuid, "nat-bench")
    run("ip", "-n", "nat-bench", "route", "del", "default")
    run("ip", "address", "add", "10.0.0.1/24", "dev", "virbr10")
    with bench.engine(FailAt(1)) as verbs, pytest.raises(InjectedError):
        verbs.up(network, bench.xml)
    assert bench.differences()
    with bench.engine() as verbs:
        assert verbs.up(network, bench.xml)
    assert bench.differences() == []
    assert dnsmasq.running(bench.uuid, "nat-bench") == pid
    bench.stop()
    settles_as(before)
