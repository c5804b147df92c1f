# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watch and healer inside a test, networks to damage, and how long healing takes."""

import io
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest
from lab import (
    ECHO_PORT,
    FastGuest,
    LabError,
    isolated,
    run,
    start_network,
    virsh,
    wait_for,
)
from lab_base import Closing

from libvirt_natns import names
from libvirt_natns.daemons import dnsmasq
from libvirt_natns.engine.observer import HOST, Nobody
from libvirt_natns.engine.reconcile import comparison
from libvirt_natns.kernel import netns
from libvirt_natns.service.engine_pool import EnginePool
from libvirt_natns.service.healer import Healer
from libvirt_natns.service.kernel_watch import KernelWatch
from libvirt_natns.service.log import Log
from libvirt_natns.service.watched import Watched

PROMISE = 2.0
"""Seconds within which damage heals."""

TRIES = 3
"""A machine that is busy with something else may be late once or twice."""

SHARE = 8
"""Where one look at a network takes more than this part of the promise, nobody can keep it."""

PATIENCE = 20.0


class Parts(Nobody, Closing):
    """Watch and healer, as the service puts them together."""

    def __init__(self) -> None:
        self.log = io.StringIO()
        self.sessions = EnginePool(self)
        self.healer = Healer(self.sessions, Log(self.log))
        self.watch = KernelWatch(self._describe, self.healer.suspect, self._on_namespace)
        self.finds_new_networks = True
        # What the verbs tell while they change something.
        self.changing = self.watch.changing  # type: ignore[method-assign]

    def _on_namespace(self, namespace: str) -> None:
        if self.finds_new_networks:
            self.healer.appeared(namespace)

    def _describe(self, uuid: str) -> Watched | None:
        with self.sessions.engine() as engine:
            record = engine.store.networks.get(uuid)
        return Watched.of(record) if record and record.state == "up" else None

    def __enter__(self) -> Self:
        self.watch.start()
        self.healer.start()
        return self

    def down(self) -> None:
        self.watch.stop()
        self.healer.stop()
        self.sessions.close()

    def follow(self, *networks: "Net") -> None:
        self.watch.follow(network.uuid for network in networks)
        assert self.watch.settled(PATIENCE)

    def said(self, what: str, network: str = "") -> list[str]:
        """Lines of the log about an event, and of one network."""
        about = re.compile(rf'event="?{what}"? network="?{network}' + ("\\b" if network else ""))
        return [line for line in self.log.getvalue().splitlines() if about.search(line)]

    def wrong(self, uuid: str = HOST) -> list[str]:
        """What is wrong with a network, or with the host."""
        with self.sessions.engine() as engine:
            if uuid == HOST:
                return comparison.host_differences(engine)
            record = engine.store.networks.get(uuid)
            assert record is not None
            return comparison.network_differences(engine, record)

    def idle(self) -> bool:
        """Whether nothing is due, repairs that failed and what was given up apart."""
        return self.healer.is_idle(100)


class Net:
    """A network of libvirt's that is up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.namespace = f"nat-{name}"
        self.uuid = virsh("net-uuid", name).stdout.strip()

    @property
    def dnsmasq(self) -> int | None:
        return dnsmasq.running(self.uuid, self.namespace)

    @property
    def table(self) -> str:
        """The handle of the rules' table: another one as soon as they are loaded anew."""
        listed = run("nft", "-a", "list", "tables", namespace=self.namespace).stdout
        return listed.partition("inet natns")[2]

    @property
    def identity(self) -> tuple[object, ...]:
        """What is another one after it was made anew."""
        links = run("ip", "-n", self.namespace, "-o", "link").stdout
        indexes = tuple(re.findall(r"^\d+: \S+", links, re.MULTILINE))
        return netns.inode(self.namespace), self.dnsmasq, self.table, indexes


class Stream:
    """A TCP connection that says something all the time, and is answered."""

    def __init__(self, guest: FastGuest, server: str) -> None:
        self._socket = guest.connect(server, ECHO_PORT)
        self._socket.settimeout(PATIENCE)
        self._socket.recv(100)
        self._rounds = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._talk, daemon=True)
        self._thread.start()

    def _talk(self) -> None:
        while not self._end.wait(0.02):
            try:
                self._socket.sendall(b"x")
                if not self._socket.recv(1):
                    return
            except OSError:
                return
            self._rounds += 1

    def flows(self) -> bool:
        """Whether answers come from now on."""
        before = self._rounds
        try:
            wait_for(lambda: self._rounds > before + 3, timeout=PATIENCE)
        except LabError:
            return False
        return True

    def close(self) -> None:
        self._end.set()
        self._socket.close()
        self._thread.join(PATIENCE)


@contextmanager
def network(name: str, bridge: str, metadata: str = "") -> Iterator[Net]:
    start_network(isolated(name, bridge, metadata=metadata))
    try:
        yield Net(name)
    finally:
        virsh("net-destroy", name, check=False)
        virsh("net-undefine", name)


def open_files() -> int:
    """How many descriptors this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def damage(command: str, net: Net) -> None:
    """Run a shell command that breaks something of a network."""
    words = {
        "ns": net.namespace,
        "private": names.private_patch(net.uuid),
        "upstream": names.upstream_patch(net.uuid),
        "dnsmasq": net.dnsmasq,
    }
    run("sh", "-ec", command.format(**words))


def heals(parts: Parts, command: str, net: Net, concerned: str | None = None) -> None:
    """Damage heals within the time that was promised; by the log, and by the kernel.

    ``concerned``: whom the log names, where it is not the network.
    """
    taken = []
    about, uuid = (net.name, net.uuid) if concerned is None else (concerned, HOST)
    for _ in range(TRIES):
        earlier = len(parts.said("healed", about))
        start = time.monotonic()
        assert not parts.wrong(net.uuid)
        promise = max(PROMISE, SHARE * (time.monotonic() - start))
        start = time.monotonic()
        damage(command, net)
        wait_for(
            lambda: len(parts.said("healed", about)) > earlier and not parts.wrong(uuid),  # noqa: B023
            timeout=PATIENCE,
            what=f"healing of: {command}; log: {parts.log.getvalue()}",
        )
        taken.append(time.monotonic() - start)
        if taken[-1] <= promise:
            return
        wait_for(parts.idle, timeout=PATIENCE)
    pytest.fail(f"healed only after {taken} s")
