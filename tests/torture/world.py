# SPDX-License-Identifier: LGPL-2.1-or-later
"""The world that is tortured: a provider, libvirt, the service, streams, and others' things."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import lab_base
import lab_interpreter
import libvirt
from lab import (
    ECHO_PORT,
    FastGuest,
    LabError,
    Libvirtd,
    Provider,
    Service,
    forward_at_once,
    install_natns,
    remove_config,
    run,
    uninstall_natns,
    wait_for,
    write_config,
)
from model import Model, Net

LIMIT = 90.0
"""Seconds within which all must be well after a fault, on a machine that is busy."""

STREAM_LIMIT = 40.0
"""Seconds within which a stream answers: TCP may have to send again."""

STOCK = """<network><name>stock</name><uuid>c0ffee00-0000-4000-a000-000000000001</uuid>
<forward mode='nat'/><bridge name='virbr-stock' stp='on' delay='0'/>
<ip address='192.168.122.1' netmask='255.255.255.0'>
<dhcp><range start='192.168.122.2' end='192.168.122.254'/></dhcp></ip></network>"""

ADMIN = "table inet admin {\nchain forward {\ntype filter hook forward priority 5; counter\n}\n}\n"


def _runs(pid: int) -> bool:
    """True if a process has not ended; a zombie has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


class RefusedError(Exception):
    """libvirt refuses an operation; the text is its message."""


class Stream:
    """A TCP connection of a guest to the provider's echo server."""

    def __init__(self, guest: FastGuest, server: str) -> None:
        self._guest, self._server = guest, server
        self._open()

    def _open(self) -> None:
        self._socket: socket.socket = self._guest.connect(self._server, ECHO_PORT)
        self._socket.settimeout(STREAM_LIMIT)
        self._socket.recv(100)

    def carries(self) -> bool:
        """True if the connection still answers."""
        try:
            self._socket.sendall(b"x")
            return self._socket.recv(1) == b"x"
        except OSError:
            return False

    def close(self) -> None:
        self._socket.close()


class World:
    """Everything, from set-up to the end of the campaign.

    ``excused`` are pillars whose own network was damaged in this step.
    """

    def __init__(self, backend: str, resident: bool) -> None:
        self.backend = backend
        self.resident = resident
        self.model = Model()
        self.libvirtd = Libvirtd()
        self.service: Service | None = None
        self.streams: dict[str, Stream] = {}
        self.excused: set[str] = set()
        self.host_damage: list[float] = []
        self._stack = ExitStack()
        self._connection: Any = None

    # -- set-up ------------------------------------------------------------

    def __enter__(self) -> "World":
        with ExitStack() as undo:
            undo.push(self.__exit__)
            self._set_up()
            undo.pop_all()
        return self

    def _set_up(self) -> None:
        libvirt.registerErrorHandler(lambda *_: None, None)
        self.libvirtd.start()
        self.libvirtd.prime()
        # Hooks, commands and services are forks of it: an operation is not its imports.
        server = lab_base.start_command_server()
        self._stack.callback(lab_base.end_command_server)
        self._stack.enter_context(lab_interpreter.loaded(server))
        install_natns()
        self._stack.callback(uninstall_natns)
        self._stack.callback(remove_config)
        self.provider = self._stack.enter_context(Provider())
        write_config(self.provider.config(firewall=self.backend, more="probe = 0"))
        run("nft", "-f", "-", input=ADMIN)
        self._stack.callback(run, "nft", "delete", "table", "inet", "admin", check=False)
        if self.resident:
            self.service = Service()
            self.service.start()
        self.create_network(STOCK)
        self._stack.callback(run, "virsh", "net-destroy", "stock", check=False)
        forward_at_once("virbr-stock")
        self._add_stream("stock", "virbr-stock", "192.168.122.50/24", "192.168.122.1")
        for net in self.model.nets:
            if net.is_pillar:
                self.define(net)
                self.start(net)
                self.join(net)

    def join(self, net: Net) -> None:
        """Give a pillar its guest and stream."""
        self._add_stream(net.name, net.bridge, "10.0.0.50/24", "10.0.0.1")

    def _add_stream(self, name: str, bridge: str, address: str, gateway: str) -> None:
        guest = FastGuest(bridge, name=f"g-{name}")
        self._stack.callback(guest.down)
        guest.static(address, gateway)
        wait_for(lambda: guest.ping(self.provider.gateway), timeout=LIMIT, what=f"{name}'s way out")
        self.streams[name] = Stream(guest, self.provider.gateway)

    def reopen(self, name: str) -> None:
        """Open a stream anew that may have been broken."""
        self.streams[name].close()
        self.streams[name]._open()

    def __exit__(self, *_: object) -> None:
        for stream in self.streams.values():
            stream.close()
        with suppress(LabError):
            if self.service is not None:
                self.service.stop()
        self._stack.close()

    def end_all(self) -> None:
        """Destroy all guests, then destroy and undefine all networks."""
        for name in self.active_guests():
            self.domain(name).destroy()
        for net in self.model.nets:
            if self.is_active(net):
                self.destroy(net)
            if self.is_defined(net):
                self.undefine(net)
        for stream in self.streams.values():
            stream.close()
        self.streams.clear()

    # -- libvirt -----------------------------------------------------------

    @property
    def connection(self) -> Any:  # noqa: ANN401
        if self._connection is None:
            self._connection = libvirt.open("qemu:///system")
        return self._connection

    def reconnect(self) -> None:
        """Start libvirtd if it does not run, and forget a connection that may be broken."""
        self.libvirtd.start()
        if self._connection is not None:
            with suppress(libvirt.libvirtError):
                self._connection.close()
        self._connection = None

    def ask(self, question: Callable[[Any], Any]) -> Any:  # noqa: ANN401
        """Have libvirt do something.  Raises RefusedError."""
        try:
            return question(self.connection)
        except libvirt.libvirtError as error:
            raise RefusedError(str(error)) from error

    def create_network(self, xml: str) -> None:
        self.ask(lambda c: c.networkCreateXML(xml))

    def define(self, net: Net, **how: Any) -> None:  # noqa: ANN401
        self.ask(lambda c: c.networkDefineXML(net.xml(**how)))

    def start(self, net: Net) -> None:
        self.ask(lambda c: c.networkLookupByUUIDString(net.uuid).create())

    def destroy(self, net: Net) -> None:
        self.ask(lambda c: c.networkLookupByUUIDString(net.uuid).destroy())

    def undefine(self, net: Net) -> None:
        self.ask(lambda c: c.networkLookupByUUIDString(net.uuid).undefine())

    def is_defined(self, net: Net) -> bool:
        with suppress(RefusedError):
            self.ask(lambda c: c.networkLookupByUUIDString(net.uuid))
            return True
        return False

    def active(self) -> list[Net]:
        """The networks of ours that libvirt has active."""
        flags = libvirt.VIR_CONNECT_LIST_NETWORKS_ACTIVE
        found = self.ask(lambda c: [each.UUIDString() for each in c.listAllNetworks(flags)])
        nets = (self.model.net_of(uuid) for uuid in found)
        return sorted((net for net in nets if net), key=lambda net: net.slot)

    def is_active(self, net: Net) -> bool:
        return net in self.active()

    def active_guests(self) -> dict[str, str]:
        """The domains that run: their XML by name."""
        flags = libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE
        found: dict[str, str] = {}
        for each in self.ask(lambda c: c.listAllDomains(flags)):
            with suppress(libvirt.libvirtError):
                found[each.name()] = each.XMLDesc(0)
        return found

    def domain(self, name: str) -> Any:  # noqa: ANN401
        return self.ask(lambda c: c.lookupByName(name))

    # -- processes ---------------------------------------------------------

    def kill(self, pid: int) -> None:
        """End a process of this sandbox by SIGKILL, and wait for its end.

        On a busy machine a killed process is seen running for a while.
        """
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not _runs(pid), timeout=LIMIT, what=f"the end of process {pid}")

    def processes(self, *words: str) -> list[int]:
        """Processes whose command line contains all of these words."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if all(word in line for word in words) and int(directory.name) != os.getpid():
                    found.append(int(directory.name))
        return found

    def restart_service(self) -> None:
        if self.service is not None and not self.service.runs:
            self.service.start()

    def may_damage_host(self) -> bool:
        """True unless the healer would take one more damage in the host for a fight."""
        now = time.monotonic()
        self.host_damage = [each for each in self.host_damage if now - each < 70]
        if len(self.host_damage) >= 3:
            return False
        self.host_damage.append(now)
        return True


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
