# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever is broken here, what is not ours starts, and what was ours and runs goes on.

Each breakage meets each event of the hooks, of objects that are ours and that are
not, with the service and without it.  libvirt itself runs the main paths; the table's
rest is run as libvirt runs a hook.
"""

import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from lab import (
    FastGuest,
    Provider,
    Service,
    define_network,
    isolated,
    natns,
    remove_config,
    run,
    virsh,
    write_config,
)
from lab_base import CONFIG_FILE
from lab_domains import create, destroy, domain, nat, nic, ports, reason
from lab_service import SOCKET
from views import namespaces

from libvirt_natns import hook

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
    with Provider() as provider:
        write_config(provider.config(more="probe = 0"))
        yield provider
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
    """A Python library that is not there."""
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
    """A socket that nobody listens on any more."""
    resident = Service()
    resident.start()
    resident.kill()
    try:
        yield
    finally:
        SOCKET.unlink(missing_ok=True)


@dataclass(frozen=True)
class Breakage:
    """What is broken, and whether what is ours starts all the same.

    ``plain`` is a network of ours without ``<natns:nat>`` that was never handled:
    refused, or "passed over" to start without a router.
    """

    broken: Callable[[], AbstractContextManager[None]]
    ours: Literal["starts", "refused"] = "refused"
    plain: Literal["starts", "refused", "passed over"] = "refused"
    fact: str = ""


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
    "pyroute2": Breakage(lambda: without("pyroute2"), fact="cannot load pyroute2"),
    "service is dead": Breakage(dead_service, ours="starts", plain="starts"),
}


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


def check_foreign(breakage: str) -> None:
    """Each event of all that is not ours succeeds."""
    for name, data in FOREIGN_NETWORKS.items():
        port = (
            f"<networkport><owner><uuid>{UUID.format(99)}</uuid></owner></networkport></hookData>"
        )
        for operation, when in hook.NETWORK_EVENTS:
            whole = data.replace(b"</hookData>", port.encode()) if "p" in operation else data
            status, _ = run_hook("network", operation, when, whole)
            assert status == 0, (breakage, name, operation)
    for name, data in FOREIGN_GUESTS.items():
        for kind in ("qemu", "lxc"):
            for operation, when in (*hook.GUEST_EVENTS, ("migrate", "begin"), ("restore", "begin")):
                status, _ = run_hook(kind, operation, when, data)
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
    if breakage.ours == "refused":
        assert done.returncode != 0
        assert breakage.fact in reason(done)
    else:
        assert done.returncode == 0, done.stderr
        destroy("new")


@pytest.mark.parametrize("name", BREAKAGES)
def test_what_is_broken_without_the_service(name: str, world: Provider) -> None:
    breakage = BREAKAGES[name]
    with running(world) as found:
        with breakage.broken():
            check_foreign(name)
            check_libvirts_own()
            check_ours(breakage, world)
            found.check_goes_on(name)
        assert natns("sync").returncode == 0
        assert natns("check").stdout == ""
        assert found.talks()
        assert {mark.name for mark in MARKS.glob("*")} == {UUID.format(50)}
