# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever is broken here, what is not ours starts, and what was ours and runs goes on.

Each breakage meets each event of the hooks, of objects that are ours and that are
not, with the service and without it.  libvirt itself runs the main paths; the table's
rest is run as libvirt runs a hook.
"""

import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lab_interpreter
import pytest
from lab import (
    FastGuest,
    Libvirtd,
    Provider,
    Service,
    define_network,
    isolated,
    natns,
    remove_config,
    run,
    snapshot,
    virsh,
    wait_for,
    write_config,
)
from lab_base import CONFIG_FILE
from lab_domains import create, destroy, domain, nat, nic, ports, reason
from lab_service import SOCKET
from views import namespaces

from libvirt_natns import hook
from libvirt_natns.service import look

HOOKS = Path("/etc/libvirt/hooks")
STATE = Path("/var/lib/libvirt-natns")
MARKS = Path("/run/libvirt-natns/guests")
LIBRARIES = Path("/usr/lib/python3/dist-packages")
MAC = "52:54:00:00:00:05"
OTHER_MAC = "52:54:00:00:00:06"
UUID = "c0ffee00-0000-4000-8000-{:012}"
FORWARD = ports('start="8080" to="80"')
TYPO = "upstream = provider\n"


@pytest.fixture(scope="module")
def world(installed: None) -> Iterator[Provider]:
    """The provider network and the hooks, for all tests of this file."""
    forwarding = Path("/proc/sys/net/ipv4/ip_forward")
    with Provider() as provider:
        write_config(provider.config(more="probe = 0"))
        # libvirt switches it on for its first NAT network, and leaves it so.
        forwarding.write_text("1")
        yield provider
        forwarding.write_text("0")
        remove_config()


# -- what is broken ------------------------------------------------------------


@contextmanager
def configured(text: Callable[[str], str]) -> Iterator[None]:
    """A configuration that is made from the right one."""
    kept = CONFIG_FILE.read_text()
    CONFIG_FILE.write_text(text(kept))
    try:
        yield
    finally:
        CONFIG_FILE.write_text(kept)


@contextmanager
def damaged() -> Iterator[None]:
    """A state database that is none."""
    kept = {file: file.read_bytes() for file in STATE.glob("state.db*")}
    for file in kept:
        file.unlink()
    (STATE / "state.db").write_text("this is no database, as its first bytes show\n" * 100)
    try:
        yield
    finally:
        for file in STATE.glob("state.db*"):
            file.unlink()
        for file, content in kept.items():
            file.write_bytes(content)


@contextmanager
def of_a_later_version() -> Iterator[None]:
    """A state database that a later version has brought to its format."""

    def set_format(number: int) -> int:
        with sqlite3.connect(STATE / "state.db", timeout=10) as database:
            found = database.execute("PRAGMA user_version").fetchone()[0]
            database.execute(f"PRAGMA user_version = {number}")
        database.close()
        return int(found)

    earlier = set_format(99)
    try:
        yield
    finally:
        set_format(earlier)


@contextmanager
def full_disk() -> Iterator[None]:
    """No space is left where the state is; the records of what runs cannot be read."""
    run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", STATE)
    try:
        run("dd", "if=/dev/zero", f"of={STATE}/full", check=False)
        yield
    finally:
        run("umount", STATE)


@contextmanager
def without(library: str) -> Iterator[None]:
    """A Python library that is not there, and interpreters that have not loaded it before."""
    with lab_interpreter.starting(), covered(library):
        yield


@contextmanager
def covered(library: str) -> Iterator[None]:
    empty = Path("/run/tmp/empty")
    empty.mkdir(exist_ok=True)
    # An empty directory would be a package without a file, which is found.
    place = LIBRARIES / library
    run("mount", "--bind", empty, place)
    (empty / "__init__.py").write_text("raise ImportError(name=__name__)\n")
    try:
        yield
    finally:
        run("umount", place)
        shutil.rmtree(empty)


@contextmanager
def dead_service() -> Iterator[None]:
    """Sockets that nobody listens on any more."""
    resident = Service()
    resident.start()
    resident.kill()
    try:
        yield
    finally:
        for file in (SOCKET, look.path()):
            file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Breakage:
    """What is broken, and whether what is ours starts all the same.

    ``plain`` is a network of ours without ``<natns:nat>`` that was never handled:
    refused, or "passed over" to start without a router.  ``guest`` is a guest that
    publishes a port in a network that runs, if it is not as ``ours``.
    """

    broken: Callable[[], AbstractContextManager[None]]
    ours: Literal["starts", "refused"] = "refused"
    plain: Literal["starts", "refused", "passed over"] = "refused"
    guest: Literal["starts", "refused"] | None = None
    fact: str = ""


@contextmanager
def mounted_over(file: Path) -> Iterator[None]:
    """Something that is no file in a file's place."""
    kept = file.read_text()
    file.unlink()
    file.mkdir()
    try:
        yield
    finally:
        file.rmdir()
        file.write_text(kept)


BREAKAGES = {
    "configuration": Breakage(
        lambda: configured(lambda text: TYPO + text), plain="passed over", fact="not valid TOML"
    ),
    "configuration is a directory": Breakage(
        lambda: mounted_over(CONFIG_FILE), plain="passed over", fact="config.toml"
    ),
    "database": Breakage(damaged, fact="state database"),
    "database of a later version": Breakage(of_a_later_version, fact="state database"),
    "disk": Breakage(full_disk, fact="state database"),
    "lxml": Breakage(lambda: without("lxml"), fact="cannot load lxml"),
    # A port is published by rules alone, and pyroute2 is loaded with the first change of a link.
    "pyroute2": Breakage(lambda: without("pyroute2"), guest="starts", fact="cannot load pyroute2"),
    "service is dead": Breakage(dead_service, ours="starts", plain="starts"),
}


# -- objects -------------------------------------------------------------------


def network(number: int, inside: str, *, address: bool = True) -> bytes:
    """What libvirt hands to the hook network, in the form that libvirt writes."""
    ip = "<ip address='10.77.0.1' netmask='255.255.255.0'/>" if address else ""
    return spread(
        f"<hookData><network><name>n{number}</name><uuid>{UUID.format(number)}</uuid>{inside}"
        f"<mac address='52:54:00:77:00:01'/>{ip}</network></hookData>"
    )


def spread(document: str) -> bytes:
    return document.replace("><", ">\n  <").encode()


OFF = '<metadata><natns:nat xmlns:natns="urn:libvirt-natns:1" enabled="no"/>{}</metadata>'
BRIDGE = "<bridge name='virbr77'/>"
FOREIGN_NETWORKS = {
    "forward": network(1, f"<forward mode='nat'/>{BRIDGE}"),
    "bridge": network(2, "<forward mode='bridge'/><bridge name='br0'/>"),
    "enabled=no": network(3, OFF.format("") + BRIDGE),
    "enabled=no, odd names": network(
        4, OFF.format("") + "<domain name='my lab'/><bridge name='lab#1'/>"
    ),
    "enabled=no, unbound prefix": network(5, OFF.format("<foo:bar/>") + BRIDGE),
    "enabled=no, a name of XML 1.0's fifth edition": network(
        6, OFF.format("<pre\u021b/>") + BRIDGE
    ),
    "without address": network(7, "<domain name='my lab'/><bridge name='lab#1'/>", address=False),
    "enabled=no, of another encoding": b'<?xml version="1.0" encoding="foo"?>'
    + network(8, OFF.format("") + BRIDGE),
    "two uuids": network(9, f"<uuid>{UUID.format(10)}</uuid><forward/>{BRIDGE}"),
    "large": network(11, OFF.format(f"<x>{'x' * 9_000_000}</x>") + BRIDGE),
    "deep": network(12, OFF.format("<x>" * 20_000 + "</x>" * 20_000) + BRIDGE),
}
# These are ours in scope "isolated".
UNANNOTATED = {
    "plain": network(21, BRIDGE),
    "a domain with a blank": network(22, f"<domain name='my lab'/>{BRIDGE}"),
    "an odd bridge": network(23, "<bridge name='lab#1'/>"),
    "an unbound prefix": network(24, f"<metadata><foo:bar/></metadata>{BRIDGE}"),
    "of another encoding": b'<?xml version="1.0" encoding="foo"?>' + network(25, BRIDGE),
    "large": network(26, f"<metadata><x>{'x' * 9_000_000}</x></metadata>{BRIDGE}"),
}
FOREIGN_GUESTS = {
    "without metadata": spread(domain("g1", nic("run", MAC), uuid=UUID.format(41))),
    "in another network": spread(
        domain("g2", nic("stock", MAC), uuid=UUID.format(42), publishes=FORWARD)
    ),
    "on another bridge": spread(
        domain(
            "g3",
            "<interface type='bridge'><source bridge='br0'/></interface>",
            uuid=UUID.format(43),
            publishes="<bogus/>",
        )
    ),
    "of another encoding": b'<?xml version="1.0" encoding="foo"?>'
    + spread(domain("g4", nic("stock", MAC), uuid=UUID.format(44), publishes=FORWARD)),
    "an unbound prefix": spread(
        domain("g5", nic("stock", MAC), uuid=UUID.format(45), metadata=nat("") + "<foo:bar/>")
    ),
}


def run_hook(kind: str, operation: str, when: str, data: bytes) -> tuple[int, str]:
    """Run a hook as libvirt does; returns its status and its line, if any."""
    done = subprocess.run(
        [HOOKS / kind, "x", operation, when, "-"], input=data, capture_output=True, check=False
    )
    told = done.stderr.decode()
    assert done.stdout == b"", (kind, operation)
    assert told.count("\n") <= 1, told
    assert "Traceback" not in told, told
    assert "internal error" not in told, told
    return done.returncode, told


USUAL_NETWORKS = ("forward", "enabled=no", "without address")
USUAL_GUESTS = ("without metadata", "in another network")


def check_networks(breakage: str, *which: str) -> None:
    """Each event of a network that is not ours succeeds."""
    owner = f"<networkport><owner><uuid>{UUID.format(99)}</uuid></owner></networkport></hookData>"
    for name in which or FOREIGN_NETWORKS:
        data = FOREIGN_NETWORKS[name]
        with_port = data.replace(b"</hookData>", spread(owner))
        for operation, when in hook.NETWORK_EVENTS:
            whole = with_port if operation in hook.PORT_EVENTS else data
            status, _ = run_hook("network", operation, when, whole)
            assert status == 0, (breakage, name, operation)


def check_guests(breakage: str, *which: str) -> None:
    """Each event of a guest that is not ours succeeds."""
    for name in which or FOREIGN_GUESTS:
        for kind in ("qemu", "lxc") if name == USUAL_GUESTS[-1] else ("qemu",):
            for operation, when in (*hook.GUEST_EVENTS, ("migrate", "begin"), ("restore", "begin")):
                status, _ = run_hook(kind, operation, when, FOREIGN_GUESTS[name])
                assert status == 0, (breakage, name, kind, operation)


# -- what runs -----------------------------------------------------------------


class Running:
    """A network of ours and a guest in it that publishes a port; another network, too."""

    def __init__(self, world: Provider) -> None:
        self.world = world
        define_network(isolated("run", "virbr10"))
        virsh("net-start", "run")
        stock = isolated("stock", "virbr30", address="192.168.130.1").replace(
            "<bridge", "<forward mode='nat'/><bridge", 1
        )
        define_network(stock)
        virsh("net-start", "stock")
        create(domain("web", nic("run", OTHER_MAC), uuid=UUID.format(50), publishes=FORWARD))
        self.guest = FastGuest("virbr10", MAC)

    def talks(self) -> bool:
        return self.guest.ping(self.world.gateway)

    def hook_data(self, port: bool = False) -> bytes:
        inner = virsh("net-dumpxml", "run").stdout
        ports = (
            f"<networkport><owner><name>web</name><uuid>{UUID.format(50)}</uuid></owner>"
            f"<mac address='{OTHER_MAC}'/></networkport>"
        )
        return f"<hookData>\n{inner}{ports if port else ''}</hookData>\n".encode()

    def check_goes_on(self, breakage: str) -> None:
        """What has happened already is not stopped by a failure, nor what runs by an event."""
        for operation in hook.PORT_EVENTS:
            assert run_hook("network", operation, "begin", self.hook_data(port=True))[0] == 0
        assert run_hook("network", "updated", "begin", self.hook_data())[0] == 0
        web = virsh("dumpxml", "web").stdout.encode()
        for kind in ("qemu", "lxc"):
            for operation in ("reconnect", "attach"):
                status, _ = run_hook(kind, operation, "begin", web)
                assert status == 0, (breakage, kind, operation)
        assert self.talks(), breakage


@contextmanager
def running(world: Provider) -> Iterator[Running]:
    found = Running(world)
    with found.guest as guest:
        guest.dhcp()
        assert found.talks()
        yield found
    destroy("web")


def check_libvirts_own() -> None:
    """libvirt starts and stops what is not ours: a network, and guests in another one."""
    define_network(
        isolated("nat", "virbr31", address="192.168.131.1").replace(
            "<bridge", "<forward mode='nat'/><bridge", 1
        )
    )
    virsh("net-start", "nat")
    assert create(domain("other", nic("nat", MAC), publishes=FORWARD)).returncode == 0
    destroy("other")
    virsh("net-destroy", "nat")
    virsh("net-undefine", "nat")


def check_ours(breakage: Breakage, provider: Provider) -> None:
    """What is ours is refused in one line, or starts."""
    annotated = isolated("a", "virbr11", address="10.0.1.1", metadata=nat(""))
    for xml, expected in (
        (annotated, breakage.ours),
        (isolated("a", "virbr11", address="10.0.1.1"), breakage.plain),
    ):
        define_network(xml)
        done = virsh("net-start", "a", check=False)
        if expected == "refused":
            assert done.returncode != 0
            assert breakage.fact in reason(done)
            assert "virbr11" not in run("ip", "-br", "link").stdout
        else:
            assert done.returncode == 0, done.stderr
            assert ("nat-a" in namespaces()) == (expected == "starts")
            in_the_host = "10.0.1.1" in run("ip", "-br", "address").stdout
            assert in_the_host == (expected == "passed over")
            virsh("net-destroy", "a")
        virsh("net-undefine", "a")
    xml = domain("new", nic("run", "52:54:00:00:00:07"), publishes=ports('start="9090" to="80"'))
    done = create(xml, check=False)
    if (breakage.guest or breakage.ours) == "refused":
        assert done.returncode != 0
        assert breakage.fact in reason(done)
    else:
        assert done.returncode == 0, done.stderr
        rules = run("ip", "netns", "exec", "nat-run", "nft", "list", "ruleset").stdout
        assert "9090" in rules
        destroy("new")


@pytest.mark.parametrize("name", BREAKAGES)
def test_what_is_broken_without_the_service(name: str, world: Provider) -> None:
    breakage = BREAKAGES[name]
    with running(world) as found:
        with breakage.broken():
            check_networks(name, *USUAL_NETWORKS)
            check_guests(name, *USUAL_GUESTS)
            check_libvirts_own()
            check_ours(breakage, world)
            found.check_goes_on(name)
        assert natns("sync").returncode == 0
        assert natns("check").stdout == ""
        assert found.talks()
        assert {mark.name for mark in MARKS.glob("*")} == {UUID.format(50)}


def test_an_interpreter_that_is_killed(world: Provider, libvirtd: Libvirtd) -> None:
    """No event fails, ours or not, and libvirt spares a guest that it finds running."""
    with running(world) as found:
        with lab_interpreter.failing():
            check_networks("interpreter", *USUAL_NETWORKS)
            check_guests("interpreter", *USUAL_GUESTS)
            check_libvirts_own()
            found.check_goes_on("interpreter")
            libvirtd.restart()
            assert virsh("domstate", "web").stdout.strip() != "shut off"
            define_network(isolated("a", "virbr11", address="10.0.1.1"))
            virsh("net-start", "a")
            assert "nat-a" not in namespaces()
        assert natns("sync").returncode == 0
        assert natns("check").stdout == ""
        assert "nat-a" in namespaces()
        assert found.talks()
        virsh("net-destroy", "a")


# -- with the service ----------------------------------------------------------


@contextmanager
def stuck(service: Service) -> Iterator[None]:
    """A service that does not answer any more."""
    service.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        service.signal(signal.SIGCONT)


# What the service has loaded is not missing; it ends where it finds a later format.
SERVED = {
    "configuration": BREAKAGES["configuration"],
    "database": BREAKAGES["database"],
    "database of a later version": BREAKAGES["database of a later version"],
    "lxml": Breakage(BREAKAGES["lxml"].broken, ours="starts", plain="starts"),
}


@pytest.mark.parametrize("name", [*SERVED, "service is stuck"])
def test_what_is_broken_with_the_service(name: str, world: Provider) -> None:
    with Service() as service, running(world) as found:
        breakage = SERVED.get(name) or Breakage(
            lambda: stuck(service), ours="starts", plain="starts"
        )
        with breakage.broken():
            check_libvirts_own()
            check_ours(breakage, world)
            found.check_goes_on(name)
        if name == "database of a later version":
            # systemd would start the version that is installed by then.
            wait_for(lambda: not service.runs, timeout=10)
            service.start()
        assert natns("sync").returncode == 0
        assert natns("check").stdout == ""
        assert found.talks()


# -- scopes --------------------------------------------------------------------


@pytest.mark.parametrize("typo", ["", TYPO], ids=["well", "with a typo"])
def test_scope_annotated_leaves_others_alone(typo: str, world: Provider) -> None:
    """Whatever their XML says, and whatever the configuration says elsewhere."""
    with configured(lambda text: f'scope = "annotated"\n{typo}{text}'):
        for name, data in UNANNOTATED.items():
            for operation, when in hook.NETWORK_EVENTS:
                assert run_hook("network", operation, when, data) == (0, ""), (name, operation)
        for name, domain_name, bridge in (("a", "my lab", "virbr11"), ("b", "b", "lab#1")):
            define_network(isolated(name, bridge, address="10.0.1.1", domain=domain_name))
            virsh("net-start", name)
            assert namespaces() == set()
            virsh("net-destroy", name)


def test_a_network_that_was_handled_is_refused_with_a_typo(world: Provider) -> None:
    """Without its router it would not be what it was."""
    define_network(isolated("a", "virbr11", address="10.0.1.1"))
    virsh("net-start", "a")
    virsh("net-destroy", "a")
    with configured(lambda text: TYPO + text):
        done = virsh("net-start", "a", check=False)
        assert done.returncode != 0
        assert "not valid TOML" in reason(done)
    virsh("net-start", "a")
    assert namespaces() == {"nat-a"}


def test_what_started_without_a_router_gets_one_afterwards(world: Provider) -> None:
    define_network(isolated("a", "virbr11", address="10.0.1.1"))
    with configured(lambda text: TYPO + text):
        virsh("net-start", "a")
        assert namespaces() == set()
    assert natns("sync").stdout == "a: is active in libvirt, but has no router: made a router\n"
    assert namespaces() == {"nat-a"}


@pytest.mark.parametrize("typo", ["", TYPO], ids=["well", "with a typo"])
def test_no_document_that_is_not_ours_is_refused(typo: str, world: Provider) -> None:
    with running(world) as found, configured(lambda text: typo + text):
        check_networks(typo)
        check_guests(typo)
        found.check_goes_on(typo)


# -- documents -----------------------------------------------------------------


ODD = "<x:pre\u021b xmlns:x='urn:x'/>"


def test_names_that_expat_does_not_know(world: Provider) -> None:
    """libvirt takes them; nothing is left at the end, and guests publish."""
    before = snapshot()
    define_network(isolated("a", "virbr11", address="10.0.1.1", metadata=ODD + nat("")))
    virsh("net-start", "a")
    assert namespaces() == {"nat-a"}
    create(domain("web", nic("a", MAC), metadata=ODD + nat(FORWARD)))
    assert "8080" in natns("forward", "list").stdout
    destroy("web")
    assert "8080" not in natns("forward", "list").stdout
    virsh("net-destroy", "a")
    assert namespaces() == set()
    virsh("net-undefine", "a")
    wait_for(lambda: snapshot() == before)


def test_a_guest_that_is_refused_leaves_no_mark(world: Provider) -> None:
    define_network(isolated("a", "virbr11", address="10.0.1.1"))
    virsh("net-start", "a")
    for publishes in (
        "<bogus/>",
        FORWARD + FORWARD,
        ports('start="8080" to="80"', more='network="b"'),
    ):
        done = create(domain("web", nic("a", MAC), publishes=publishes), check=False)
        assert done.returncode != 0
        assert reason(done)
        assert not any(MARKS.glob("*")), publishes
    xml = spread(domain("web", nic("a", MAC), uuid=UUID.format(60), publishes="<bogus/>"))
    assert run_hook("qemu", "prepare", "begin", xml)[0] == 1
    assert not any(MARKS.glob("*"))
    xml = spread(domain("web", nic("a", MAC), uuid=UUID.format(60), publishes=FORWARD + FORWARD))
    assert run_hook("qemu", "prepare", "begin", xml)[0] == 1
    assert not any(MARKS.glob("*"))
    with damaged():
        assert run_hook("qemu", "prepare", "begin", xml)[0] == 1
    assert not any(MARKS.glob("*"))
