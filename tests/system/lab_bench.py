# SPDX-License-Identifier: LGPL-2.1-or-later
"""A world for the engine: libvirt's part is played by the test, step by step.

A test module takes its fixtures by ``pytest_plugins = ("lab_bench",)``.
"""

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lab import (
    Provider,
    Snapshot,
    isolated,
    remaining,
    remove_config,
    run,
    start_network,
    virsh,
    write_config,
)
from lab_base import ip

from libvirt_natns.daemons import libvirt_dnsmasq
from libvirt_natns.documents import config, libvirt_xml
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.observer import NOBODY, Nobody
from libvirt_natns.engine.prebuilt import Built
from libvirt_natns.engine.reconcile import comparison
from libvirt_natns.errors import KernelError, NatnsError
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations.firewall_operations import Firewall
from libvirt_natns.operations.link_operations import Macvlan, Patch
from libvirt_natns.state import networks
from libvirt_natns.state.store import Store

STATE = Path("/var/lib/libvirt-natns/state.db")
DNSMASQ = "/usr/sbin/dnsmasq"


@pytest.fixture(scope="module")
def world(installed: None) -> Iterator[Provider]:
    """The provider network and the hooks, for all tests of this file."""
    with Provider() as provider:
        write_config(provider.config(more="probe = 0"))
        yield provider
        remove_config()


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


def nat(inside: str, attributes: str = "") -> str:
    return f'<natns:nat xmlns:natns="urn:libvirt-natns:1"{attributes}>{inside}</natns:nat>'


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
        return libvirt_xml.parse_network(self.xml).uuid

    @contextmanager
    def engine(self, before: Callable[[object], None] | None = None) -> Iterator[Engine]:
        opened = Store()
        threads: list[threading.Thread] = []

        def later(work: Callable[[], None]) -> None:
            threads.append(threading.Thread(target=quietly, args=[work]))
            threads[-1].start()

        more: dict[str, Any] = {"later": later, "built": Built()} if self.service else {}
        try:
            with Kernel() as kernel:
                observer = StepObserver(before) if before else NOBODY
                yield Engine(config.load(), opened, kernel, observer, **more)
        finally:
            opened.close()
            for thread in threads:
                thread.join()

    def make_bridge(self) -> None:
        """As libvirt does between `start` and `started`; fails where the bridge exists."""
        ip("link add virbr10 up address 52:54:00:aa:bb:cc type bridge")
        if self.address:
            ip(
                f"address add {self.address} broadcast 10.0.0.255 dev virbr10",
                "route add 10.9.0.0/16 via 10.0.0.9 metric 1",
            )

    @staticmethod
    def delete_bridge() -> None:
        run("ip", "link", "delete", "virbr10", check=False)

    def start(self, before: Callable[[object], None] | None = None) -> None:
        """Like net-start, with both hooks."""
        network = libvirt_xml.parse_network(self.xml)
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
            record = verbs.store.networks.get(self.uuid)
            assert record is not None
            assert record.state == "up"
            return comparison.network_differences(verbs, record) + comparison.host_differences(
                verbs
            )


def quietly(work: Callable[[], None]) -> None:
    """What is done later may find its network gone."""
    with suppress(NatnsError):
        work()


@pytest.fixture(scope="module")
def libvirts_files(world: Provider) -> Iterator[bytes]:
    """A network's XML; libvirt's dnsmasq files of it stay, though libvirt does not run it."""
    more = '<route address="10.9.0.0" prefix="16" gateway="10.0.0.9"/>'
    xml = isolated("bench", "virbr10").replace("</network>", f"  {more}\n</network>")
    xml = xml.replace("<bridge", '<mac address="52:54:00:aa:bb:cc"/><bridge')
    start_network(xml)
    directory = libvirt_dnsmasq.LIBVIRT_DIRECTORY
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


AHEAD = ("libvirt's address", "address in the metadata")
"""Kinds of networks that a resident process builds ahead."""


def of_kind(kind: str, xml: bytes) -> Bench:
    """Return a bench of a resident process; ``xml`` has libvirt's address."""
    if kind == AHEAD[0]:
        return Bench(xml, service=True)
    uuid = "c0ffee00-0000-4000-8000-00000000000a"
    own = isolated("bench", "virbr10", address=None, metadata=nat(IP), uuid=uuid)
    own = own.replace("<bridge", '<mac address="52:54:00:aa:bb:cc"/><bridge')
    return Bench(own.encode(), service=True, address=None)


@pytest.fixture(params=AHEAD)
def ahead(bench: Bench, request: pytest.FixtureRequest) -> Bench:
    """A bench of a resident process, for both kinds of networks."""
    return of_kind(request.param, bench.xml)


def interesting(steps: list[object], setting: str) -> list[int]:
    """The steps at which a failure tells something new.

    Of steps of one kind in a row the first; not those that find nothing to
    delete; of those that another setting has as well only the firewall, or the
    macvlan, and what follows it.
    """
    found = []
    for index, step in enumerate(steps):
        last = steps[index - 1] if index else None
        again = type(step) is type(last) and not isinstance(step, Patch | str)
        idle = isinstance(step, str) and step.startswith(("delete", "end", "empty"))
        kind = {"iptables": Firewall, "macvlan": Macvlan}.get(setting, object)
        own = isinstance(step, kind) or isinstance(last, kind)
        if not again and not idle and own:
            found.append(index)
    return found


class StepObserver(Nobody):
    """Calls a function ahead of each change."""

    def __init__(self, before: Callable[[object], None]) -> None:
        self.before = before

    def step(self, what: object) -> None:
        self.before(what)


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


def settles_as(before: Snapshot) -> None:
    left = remaining(before)
    if left:
        pytest.fail(left)


def grow_old() -> None:
    """Let a start that came to no end be longer ago than any start takes."""
    with sqlite3.connect(STATE) as db:
        db.execute("UPDATE network SET since = since - ?", (networks.STALLED + 1,))
    db.close()
