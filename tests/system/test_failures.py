# SPDX-License-Identifier: LGPL-2.1-or-later
"""What goes wrong is refused early, leaves nothing, and is over once it is mended.

Three parts: causes that `start` refuses, on the real libvirt; each step of the
set-up that fails; and a process that is killed ahead of each step.  The latter
two drive the engine itself, with a bridge like libvirt's made by the test.
"""

import os
import re
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
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
    remove_config,
    run,
    snapshot,
    start_network,
    virsh,
    wait_for,
    write_config,
)

from libvirt_natns import config, dnsmasq, document, neighbours, netns, plan, reconcile, store
from libvirt_natns.built import Built
from libvirt_natns.engine import Engine
from libvirt_natns.errors import DnsmasqError, KernelError, NatnsError
from libvirt_natns.firewall import nftables
from libvirt_natns.kernel import Kernel
from libvirt_natns.records import replace
from libvirt_natns.store import Store

MAC = "52:54:00:00:00:05"
STATE = Path("/var/lib/libvirt-natns/state.db")
NFTABLES = "/usr/sbin/nft"
DNSMASQ = "/usr/sbin/dnsmasq"


@pytest.fixture(scope="module")
def world(installed: None) -> Iterator[Provider]:
    """The provider network and the hooks, for all tests of this file."""
    with Provider() as provider:
        write_config(provider.config(more="probe = 0"))
        yield provider
        remove_config()


# -- refused in `start` ------------------------------------------------------


@contextmanager
def configured(provider: Provider, text: str) -> Iterator[None]:
    """Another configuration while the body runs."""
    write_config(text)
    try:
        yield
    finally:
        write_config(provider.config(more="probe = 0"))


@contextmanager
def covered(path: str, content: Path = Path("/dev/null")) -> Iterator[None]:
    """Another file in a program's place: no PATH leads around that."""
    real = os.path.realpath(path)
    run("mount", "--bind", content, real)
    try:
        yield
    finally:
        run("umount", real)


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


def nat(inside: str, attributes: str = "") -> str:
    return f'<natns:nat xmlns:natns="urn:libvirt-natns:1"{attributes}>{inside}</natns:nat>'


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
        "create it, or mend /etc/libvirt-natns/config.toml",
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
        r'fix that, or set dhcp = "background" in \[upstreams.x\] of .*',
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
from libvirt_natns import engine, hook, plan, sessions

def before(step):
    if isinstance(step, plan.{kind}):
        os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "started":
    sessions.Engine = functools.partial(engine.Engine, before=before)
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


# -- a world for the engine --------------------------------------------------


@dataclass
class Bench:
    """libvirt's part, played by the test: a bridge with its address, and dnsmasq's files.

    ``service``: the engine is a resident process's, which builds ahead of `started`.
    """

    xml: bytes
    service: bool = False
    address: str | None = "10.0.0.1/24"

    @property
    def uuid(self) -> str:
        return document.parse_network(self.xml).uuid

    @contextmanager
    def engine(self, before: Callable[[object], None] | None = None) -> Iterator[Engine]:
        opened = Store()
        threads: list[threading.Thread] = []

        def later(work: Callable[[], None]) -> None:
            threads.append(threading.Thread(target=quietly, args=[work]))
            threads[-1].start()

        more: dict[str, Any] = {"later": later, "built": Built()} if self.service else {}
        try:
            with spares(self.service) as kept, Kernel(kept) as kernel:
                yield Engine(config.load(), opened, kernel, before, **more)
        finally:
            opened.close()
            for thread in threads:
                thread.join()

    def make_bridge(self) -> None:
        """As libvirt does between `start` and `started`; fails where the bridge exists."""
        run("ip", "link", "add", "virbr10", "address", "52:54:00:aa:bb:cc", "type", "bridge")
        run("ip", "link", "set", "virbr10", "up")
        if self.address:
            run("ip", "address", "add", self.address, "broadcast", "10.0.0.255", "dev", "virbr10")
            run("ip", "route", "add", "10.9.0.0/16", "via", "10.0.0.9", "metric", "1")

    @staticmethod
    def delete_bridge() -> None:
        run("ip", "link", "delete", "virbr10", check=False)

    def start(self, before: Callable[[object], None] | None = None) -> None:
        """Like net-start, with both hooks."""
        network = document.parse_network(self.xml)
        with self.engine(before) as verbs:
            verbs.prepare(network, self.xml)
            if self.service:
                verbs.build(network, self.xml)
            self.make_bridge()
            verbs.up(network, self.xml)

    def stop(self, before: Callable[[object], None] | None = None) -> None:
        """Like net-destroy."""
        self.delete_bridge()
        with self.engine(before) as verbs:
            verbs.down(self.uuid)

    def differences(self) -> list[str]:
        """What check says of the network."""
        with self.engine() as verbs:
            record = verbs.store.network(self.uuid)
            assert record is not None
            assert record.state == "up"
            return reconcile.differences(verbs, record) + reconcile.host_differences(verbs)


def quietly(work: Callable[[], None]) -> None:
    """What is done later may find its network gone."""
    with suppress(NatnsError):
        work()


@contextmanager
def spares(wanted: bool) -> Iterator[netns.Spares | None]:
    """Namespaces made ahead of time, if they are wanted."""
    kept = netns.Spares() if wanted else None
    yield kept
    if kept is not None:
        kept.close()


@pytest.fixture(scope="module")
def libvirts_files(world: Provider) -> Iterator[bytes]:
    """A network's XML; libvirt's dnsmasq files of it stay, though libvirt does not run it."""
    more = '<route address="10.9.0.0" prefix="16" gateway="10.0.0.9"/>'
    xml = isolated("bench", "virbr10").replace("</network>", f"  {more}\n</network>")
    xml = xml.replace("<bridge", '<mac address="52:54:00:aa:bb:cc"/><bridge')
    start_network(xml)
    directory = dnsmasq.LIBVIRT_DIRECTORY
    kept = {file: file.read_bytes() for file in directory.glob("bench.*")}
    dumped = virsh("net-dumpxml", "bench").stdout.encode()
    virsh("net-destroy", "bench")
    virsh("net-undefine", "bench")
    for file, content in kept.items():
        file.write_bytes(content)
    yield dumped
    for file in kept:
        file.unlink()


@pytest.fixture(params=["host upstream", "iptables", "macvlan"])
def setting(request: pytest.FixtureRequest, world: Provider) -> Iterator[str]:
    """The built-in upstream with nftables, with nearly every kind of step, and the others."""
    name = str(request.param)
    text = 'firewall = "nftables"\n'
    if name == "macvlan":
        text = world.config(firewall="nftables", more='probe = 0\nattach = "macvlan"')
    elif name != "host upstream":
        text = world.config(firewall=name, more="probe = 0")
    with configured(world, text):
        yield name


@pytest.fixture
def bench(libvirts_files: bytes, setting: str) -> Bench:
    return Bench(libvirts_files)


IP = (
    '<natns:ip address="10.0.0.1" prefix="24"><natns:dhcp>'
    '<natns:range start="10.0.0.100" end="10.0.0.200"/></natns:dhcp></natns:ip>'
)


@pytest.fixture(params=["libvirt's address", "address in the metadata"])
def ahead(bench: Bench, request: pytest.FixtureRequest) -> Bench:
    """A bench of a resident process, for both kinds of networks."""
    if request.param == "libvirt's address":
        return Bench(bench.xml, service=True)
    uuid = "c0ffee00-0000-4000-8000-00000000000a"
    xml = isolated("bench", "virbr10", address=None, metadata=nat(IP), uuid=uuid)
    xml = xml.replace("<bridge", '<mac address="52:54:00:aa:bb:cc"/><bridge')
    return Bench(xml.encode(), service=True, address=None)


def interesting(steps: list[object], setting: str) -> list[int]:
    """The steps at which a failure tells something new.

    Of steps of one kind in a row the first; not those that find nothing to
    delete; of those that another setting has as well only the firewall, or the
    macvlan, and what follows it.
    """
    found = []
    for index, step in enumerate(steps):
        last = steps[index - 1] if index else None
        again = type(step) is type(last) and not isinstance(step, plan.Patch | str)
        idle = isinstance(step, str) and step.startswith(("delete", "end", "empty"))
        kind = {"iptables": plan.Firewall, "macvlan": plan.Macvlan}.get(setting, object)
        own = isinstance(step, kind) or isinstance(last, kind)
        if not again and not idle and own:
            found.append(index)
    return found


class InjectedError(KernelError):
    """The failure that a test asked for."""


class FailAt:
    """Fails ahead of one step, and notes all."""

    def __init__(self, index: int | None = None) -> None:
        self.index = index
        self.steps: list[object] = []

    def __call__(self, step: object) -> None:
        self.steps.append(step)
        if len(self.steps) - 1 == self.index:
            raise InjectedError("as the test wanted", "let it")


def settles_as(before: Any) -> None:  # noqa: ANN401
    """The kernel ends namespaces in its own time."""
    with suppress(Exception):
        wait_for(lambda: snapshot() == before, interval=0.05)
        return
    pytest.fail(before.diff(snapshot()))


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
    network = document.parse_network(bench.xml)
    bench.make_bridge()
    before = snapshot()
    rehearsal = FailAt()
    with bench.engine(rehearsal) as verbs:
        verbs.prepare(network, bench.xml)
        verbs.up(network, bench.xml)
        verbs.hand_back(network)
    settles_as(before)
    up = next(i for i, step in enumerate(rehearsal.steps) if isinstance(step, plan.Namespace))
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


OPERATIONS = {
    "create_namespace": (Kernel, 1),
    "set_sysctls": (Kernel, 1),
    "create_patch": (Kernel, 2),
    "attach": (Kernel, 2),
    "remove_address": (Kernel, 1),
    "add_address": (Kernel, 2),
    "set_up": (Kernel, 2),
    "set_route": (Kernel, 1),
    "announce": (neighbours, 1),
    "_start": (dnsmasq, 1),
    "put": (Store, 2),
    "set_state": (Store, 1),
}
"""What makes each thing, and how often it is called in a set-up at least."""


@pytest.mark.parametrize("setting", ["nftables"], indirect=True)
def test_an_operation_that_fails_halfway_is_taken_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thing was made, and then it turned out that it had failed."""
    network = document.parse_network(bench.xml)
    bench.make_bridge()
    before = snapshot()
    for name, (owner, calls) in {**OPERATIONS, "apply": (nftables, 1)}.items():
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
    network = document.parse_network(bench.xml)
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


# -- built ahead -------------------------------------------------------------


@pytest.mark.parametrize("setting", ["nftables", "host upstream"], indirect=True)
def test_started_joins_what_was_built(ahead: Bench) -> None:
    before = snapshot()
    network = document.parse_network(ahead.xml)
    noted = FailAt()
    with ahead.engine(noted) as verbs:
        verbs.prepare(network, ahead.xml)
        verbs.build(network, ahead.xml)
        assert any(isinstance(step, plan.LinkUp) for step in noted.steps)
        noted.steps.clear()
        ahead.make_bridge()
        verbs.up(network, ahead.xml)
        kinds = {type(step) for step in noted.steps} - {str}
        assert kinds <= {plan.Port, plan.Withdrawal, plan.Dnsmasq, plan.IdleDnsmasq}
        assert (plan.Dnsmasq in kinds) == network.taken_over
        # Twice is once.
        assert not verbs.build(network, ahead.xml)
        assert verbs.up(network, ahead.xml) == []
        assert ahead.differences() == []
    assert dnsmasq.running(ahead.uuid, "nat-bench")
    ahead.stop()
    settles_as(before)


@pytest.mark.parametrize("setting", ["nftables"], indirect=True)
def test_a_bridge_of_another_mtu_than_expected(ahead: Bench) -> None:
    network = document.parse_network(ahead.xml)
    with ahead.engine() as verbs:
        verbs.prepare(network, ahead.xml)
        verbs.build(network, ahead.xml)
        ahead.make_bridge()
        run("ip", "link", "set", "virbr10", "mtu", "9000")
        verbs.up(network, ahead.xml)
    for command in (["ip", "-n", "nat-bench"], ["ip"]):
        assert "mtu 9000" in run(*command, "link", "show", "type", "veth").stdout
    assert "option:mtu,1500" in dnsmasq._present(ahead.uuid).configuration
    assert ahead.differences() == []
    ahead.stop()


@pytest.mark.parametrize("setting", ["nftables", "host upstream"], indirect=True)
def test_a_start_that_libvirt_gave_up(ahead: Bench) -> None:
    """Nothing stays of what was built, unless something else has come of it."""
    before = snapshot()
    network = document.parse_network(ahead.xml)
    with ahead.engine() as verbs:
        verbs.prepare(network, ahead.xml)
        assert verbs.build(network, ahead.xml)
        first = verbs.store.network(ahead.uuid)
        # The next start finds what the first has left.
        verbs.prepare(network, ahead.xml)
        assert verbs.build(network, ahead.xml)
        second = verbs.store.network(ahead.uuid)
        assert first is not None
        assert second is not None
        assert not verbs.give_up(first)
        assert verbs.give_up(second)
        assert not verbs.give_up(second)
        settles_as(before)
        # A libvirt that is only slow gets its router all the same.
        ahead.make_bridge()
        verbs.up(network, ahead.xml)
        assert not verbs.give_up(second)
        assert ahead.differences() == []
    ahead.stop()
    settles_as(before)


@pytest.mark.parametrize("setting", ["nftables"], indirect=True)
def test_whatever_fails_while_building_is_made_when_started(ahead: Bench) -> None:
    network = document.parse_network(ahead.xml)
    before = snapshot()
    rehearsal = FailAt()
    with ahead.engine(rehearsal) as verbs:
        verbs.prepare(network, ahead.xml)
        first = len(rehearsal.steps)
        verbs.build(network, ahead.xml)
        built = len(rehearsal.steps)
        ahead.make_bridge()
        verbs.up(network, ahead.xml)
        last = len(rehearsal.steps)
    ahead.stop()
    settles_as(before)
    assert built - first > 10
    for index in range(first, last):
        failing = FailAt(index)
        with ahead.engine(failing) as verbs:
            verbs.prepare(network, ahead.xml)
            if index < built:
                with pytest.raises(InjectedError):
                    verbs.build(network, ahead.xml)
                assert "nat-bench" not in run("ip", "netns", "list").stdout
                links = run("ip", "-br", "link").stdout
                assert "natin-" not in links and "natup-" not in links
                ahead.make_bridge()
                verbs.up(network, ahead.xml)
                assert ahead.differences() == []
            else:
                verbs.build(network, ahead.xml)
                ahead.make_bridge()
                with pytest.raises(InjectedError):
                    verbs.up(network, ahead.xml)
        ahead.stop()
        settles_as(before)


@pytest.mark.parametrize("setting", ["nftables"], indirect=True)
@pytest.mark.parametrize("ahead", ["address in the metadata"], indirect=True)
def test_dnsmasq_that_gives_up_while_nobody_looks(ahead: Bench) -> None:
    """`started` tells of it.  Where libvirt's own has read the same, it would not be up."""
    network = document.parse_network(ahead.xml)
    before = snapshot()
    refusing = Path("/run/tmp/refusing")
    # Its configuration is right; it fails as it starts.
    refusing.write_text(
        '#!/bin/sh\ncase $1 in --test) exit 0 ;; esac\necho "out of luck" >&2\nexit 3\n'
    )
    refusing.chmod(0o755)
    told: list[str] = []
    with covered(DNSMASQ, refusing), ahead.engine() as verbs:

        def later(work: Callable[[], None]) -> None:
            try:
                work()
            except NatnsError as error:
                told.append(str(error))

        verbs = replace(verbs, later=later)
        verbs.prepare(network, ahead.xml)
        verbs.build(network, ahead.xml)
        assert told == ["dnsmasq refuses to start in nat-bench: out of luck"]
        ahead.make_bridge()
        with pytest.raises(DnsmasqError, match="refuses to start in nat-bench"):
            verbs.up(network, ahead.xml)
    refusing.unlink()
    ahead.stop()
    settles_as(before)


# -- killed ------------------------------------------------------------------


def dies(verb: Callable[[Callable[[object], None]], None], index: int) -> bool:
    """Run a verb in a child that is killed ahead of one step; whether it got there."""
    child = os.fork()
    if child == 0:
        steps = iter(range(1000))

        def before(step: object) -> None:
            if next(steps) == index:
                os.kill(os.getpid(), signal.SIGKILL)

        with suppress(BaseException):
            verb(before)
            os._exit(0)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def grow_old() -> None:
    """Let a start that came to no end be longer ago than any start takes."""
    with sqlite3.connect(STATE) as db:
        db.execute("UPDATE network SET since = since - ?", (store.STALLED + 1,))
    db.close()


def start_again(bench: Bench) -> None:
    bench.start()
    assert bench.differences() == []
    bench.stop()


def stop_again(bench: Bench) -> None:
    with bench.engine() as verbs:
        verbs.down(bench.uuid)
    # libvirt's, if it was a start that was killed: the next start removes it.
    bench.delete_bridge()


def sync(bench: Bench) -> None:
    """libvirt thinks the network inactive."""
    grow_old()
    synchronize(bench, {})


def sync_active(bench: Bench) -> None:
    """libvirt has the network active: the hook was killed, and libvirt as well."""
    grow_old()
    synchronize(bench, {bench.uuid: bench.xml})
    assert bench.differences() == []
    bench.stop()


def synchronize(bench: Bench, active: Mapping[str, bytes]) -> None:
    with bench.engine() as verbs:
        assert reconcile.sync(verbs, lambda: active).errors == []
        assert reconcile.missed(verbs, lambda: active) == []
        # Twice is once.
        assert reconcile.sync(verbs, lambda: active) == reconcile.Outcome([], [])


REMEDIES = [start_again, stop_again, sync]


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [*(("host upstream", remedy) for remedy in REMEDIES), ("iptables", start_again)],
    indirect=["setting"],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_killed_while_starting(remedy: Callable[[Bench], None], bench: Bench, setting: str) -> None:
    rehearsal = FailAt()
    before = snapshot()
    bench.start(rehearsal)
    bench.stop()
    settles_as(before)
    indexes = interesting(rehearsal.steps, setting)
    assert len(indexes) >= (2 if setting == "iptables" else 15)
    for index in indexes:
        assert dies(bench.start, index), rehearsal.steps[index]
        remedy(bench)
        settles_as(before)


@pytest.mark.parametrize("setting", ["nftables"], indirect=True)
@pytest.mark.parametrize("remedy", [start_again, sync], ids=lambda remedy: remedy.__name__)
def test_killed_while_building(remedy: Callable[[Bench], None], ahead: Bench) -> None:
    rehearsal = FailAt()
    before = snapshot()
    ahead.start(rehearsal)
    ahead.stop()
    settles_as(before)
    for index in interesting(rehearsal.steps, "nftables"):
        assert dies(ahead.start, index), rehearsal.steps[index]
        remedy(ahead)
        settles_as(before)


@pytest.mark.parametrize("setting", ["nftables"], indirect=True)
def test_killed_before_libvirt_knew(bench: Bench) -> None:
    """The network is active in libvirt, and its router is somewhere in between."""
    rehearsal = FailAt()
    before = snapshot()
    bench.start(rehearsal)
    bench.stop()
    kinds = (plan.Patch, plan.Withdrawal)
    indexes = [i for i, step in enumerate(rehearsal.steps) if isinstance(step, kinds)]
    for index in [*indexes, len(rehearsal.steps) - 1]:
        assert dies(bench.start, index), rehearsal.steps[index]
        sync_active(bench)
        settles_as(before)


@pytest.mark.parametrize("setting", ["host upstream"], indirect=True)
@pytest.mark.parametrize("remedy", REMEDIES, ids=lambda remedy: remedy.__name__)
def test_killed_while_stopping(remedy: Callable[[Bench], None], bench: Bench) -> None:
    before = snapshot()
    index = 0
    while True:
        bench.start()
        killed = dies(bench.stop, index)
        remedy(bench)
        settles_as(before)
        if not killed:
            break
        index += 1
    assert index > 5


@pytest.mark.parametrize("setting", ["nftables"], indirect=True)
def test_killed_while_repairing(bench: Bench) -> None:
    before = snapshot()
    bench.start()
    active = {bench.uuid: bench.xml}

    def repair(step: Callable[[object], None]) -> None:
        with bench.engine(step) as verbs:
            reconcile.sync(verbs, lambda: active)

    index, killed = 0, True
    while killed:
        run("ip", "netns", "delete", "nat-bench")
        killed = dies(repair, index)
        synchronize(bench, active)
        assert bench.differences() == []
        index += 8
    assert index > 16
    bench.stop()
    settles_as(before)
