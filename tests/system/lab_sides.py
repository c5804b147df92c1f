# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two networks that run side by side, each with a guest that talks to the provider.

And what is done to them: commands, hooks that are away, another boot.
"""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from lab import (
    ECHO_PORT,
    FastGuest,
    Host,
    Provider,
    isolated,
    remove_config,
    run,
    start_network,
    virsh,
    write_config,
)

from libvirt_natns.cli import commands
from libvirt_natns.kernel.boot_clock import boot_id

MAC = "52:54:00:00:00:05"
HOOKS = Path("/etc/libvirt/hooks")
STATE = Path("/var/lib/libvirt-natns")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


# -- commands ----------------------------------------------------------------


@dataclass
class Answer:
    """What a command said."""

    status: int
    out: str
    err: str


Command = Callable[..., Answer]


def in_process(capsys: pytest.CaptureFixture[str]) -> Command:
    """``virt-natns`` in this very process, which is quicker."""

    def run_command(*arguments: str) -> Answer:
        capsys.readouterr()
        status = commands.main(list(arguments))
        said = capsys.readouterr()
        return Answer(status, said.out, said.err)

    return run_command


def networks(command: Command) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads(command("status", "--json").out)["networks"]
    return listed


# -- networks ----------------------------------------------------------------


@dataclass
class Side:
    """A network with a guest; ``stream`` is the guest's connection to the provider."""

    name: str
    bridge: str
    guest: FastGuest
    uuid: str = ""
    stream: socket.socket = field(default_factory=socket.socket)

    @property
    def namespace(self) -> str:
        return f"nat-{self.name}"

    def connect(self, provider: Provider) -> None:
        self.stream.close()
        self.stream = self.guest.connect(provider.gateway, ECHO_PORT)
        assert self.stream.recv(100).startswith(b"192.168.0.1")

    def disconnect(self) -> None:
        self.stream.close()

    def talks(self) -> bool:
        """Whether the connection still carries something there and back."""
        try:
            self.stream.sendall(b"still there?")
            return self.stream.recv(100) == b"still there?"
        except OSError:
            return False

    def port(self, patch: str) -> str:
        """The host end of the patch that an altname names."""
        listed = run("ip", "-j", "link", "show", f"natns-{patch}-{self.name}").stdout
        return str(json.loads(listed)[0]["ifname"])

    def indexes(self) -> list[int]:
        """The interface indexes in the namespace, and of its ends in the host."""
        links = json.loads(run("ip", "-j", "-n", self.namespace, "link").stdout)
        return [number for link in links for number in (link["ifindex"], link.get("link_index", 0))]

    def dnsmasq(self) -> str:
        return Path(f"/run/libvirt-natns/networks/{self.uuid}/dnsmasq.pid").read_text().strip()


@dataclass
class World:
    provider: Provider
    firewall: str
    a: Side
    b: Side


@contextmanager
def two_networks(firewall: str) -> Iterator[World]:
    with ExitStack() as cleanup:
        provider = cleanup.enter_context(Provider())
        write_config(provider.config(firewall=firewall, more="probe = 0"))
        cleanup.callback(remove_config)
        for file in STATE.glob("state.db*"):
            # Addresses that are leased already would not be the pool's first.
            file.unlink()
        sides = []
        for name, bridge in (("a", "virbr10"), ("b", "virbr11")):
            start_network(isolated(name, bridge, hosts=[Host(MAC, "10.0.0.5")]))
            cleanup.callback(virsh, "net-undefine", name, check=False)
            cleanup.callback(virsh, "net-destroy", name, check=False)
            guest = cleanup.enter_context(FastGuest(bridge, MAC, f"guest-{name}"))
            guest.static("10.0.0.5/24", "10.0.0.1")
            side = Side(name, bridge, guest, virsh("net-uuid", name).stdout.strip())
            cleanup.callback(side.disconnect)
            side.connect(provider)
            sides.append(side)
        yield World(provider, firewall, *sides)


# -- what happens to libvirt ---------------------------------------------------


@contextmanager
def without_hooks() -> Iterator[None]:
    """libvirt without our hooks, as if they were installed later.

    A stranger's hook that does nothing stands in for each, so that libvirt need
    not look again: that rearranges its own firewall rules.
    """
    away = HOOKS.with_name("hooks.away")
    HOOKS.rename(away)
    HOOKS.mkdir()
    for name in ("network", "qemu"):
        (HOOKS / name).write_text("#!/bin/sh\nexec cat >/dev/null\n")
        (HOOKS / name).chmod(0o755)
    try:
        yield
    finally:
        for file in HOOKS.iterdir():
            file.unlink()
        HOOKS.rmdir()
        away.rename(HOOKS)


@contextmanager
def another_boot(number: int) -> Iterator[None]:
    """The kernel's boot id of another boot."""
    file = Path("/run/tmp/boot_id")
    file.write_text(f"00000000-0000-4000-8000-{number:012}\n")
    run("mount", "--bind", file, BOOT_ID)
    # No process has ever seen two.
    boot_id.cache_clear()
    try:
        yield
    finally:
        run("umount", BOOT_ID)
        file.unlink()
        boot_id.cache_clear()
