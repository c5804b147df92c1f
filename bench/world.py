# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shared by the parts: the clock, libvirt's hooks, the service, networks of each kind."""

import contextlib
import importlib
import importlib.util
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lab

from libvirt_natns.cli.hook_files import HOOKS, HOOKS_DIRECTORY
from libvirt_natns.documents import config
from libvirt_natns.engine.engine import Engine
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.state.store import Store

SOCKET = Path("/run/libvirt-natns/service.sock")
LOG = Path("/run/tmp/service.log")
STATE = Path("/var/lib/libvirt-natns")
SETTLING = 0.1
"""Seconds between two rounds.  The kernel ends a namespace after the command that deletes it, and
new namespaces wait for that.  The wait is no part of a set-up."""

LEAST = 3
"""Rounds that a part takes even on a slow machine."""

NO_SERVICE = "this version has no `virt-natns serve`"


@dataclass(frozen=True)
class Options:
    """The amount of measuring; without a number of rounds, a part has its own."""

    rounds: int | None
    networks: int
    forwards: int
    seconds: int

    def turns(self, usual: int, budget: float, least: int = LEAST) -> Iterator[int]:
        """Yield the numbers of the rounds, from 0.

        The number is the option's, or ``usual``.  If the rounds take longer than ``budget``
        seconds, there are fewer, but at least ``least``.
        """
        end = time.monotonic() + budget
        for number in range(self.rounds or usual):
            if not self.rounds and number >= least and time.monotonic() > end:
                break
            yield number


# -- time ------------------------------------------------------------------------


def timed(call: Callable[[], object]) -> float:
    """Return the milliseconds that a call takes."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


def settle(seconds: float = SETTLING) -> None:
    """Let the kernel finish what it was told to remove."""
    time.sleep(seconds)


def process_time(command: list[str], standard_input: bytes = b"") -> float:
    """Return the milliseconds from a program's start, as libvirt starts a hook, to its end.

    Raises LabError where it fails.
    """
    with open(os.memfd_create("stdin"), "w+b") as stream:  # noqa: PTH123 - no path
        stream.write(standard_input)
        stream.seek(0)
        start = time.perf_counter()
        process = subprocess.Popen(command, stdin=stream, stdout=subprocess.DEVNULL)
        status = process.wait()
        taken = (time.perf_counter() - start) * 1000
    if status:
        raise lab.LabError(f"{' '.join(command)}: exit status {status}")
    return taken


# -- our side --------------------------------------------------------------------

Mode = Literal["none", "empty", "ours"]


class Hooks:
    """libvirt's hooks, exchanged in place.

    libvirt looks for hooks once, when it starts or is reloaded.  From then on it runs the present
    file, if any, at each event.
    """

    def __init__(self) -> None:
        lab.install_natns()
        files = [HOOKS_DIRECTORY / hook for hook in HOOKS]
        self._ours = {file: file.read_text() for file in files}
        self.use("none")

    def use(self, mode: Mode) -> None:
        for file, text in self._ours.items():
            if mode == "none":
                file.unlink(missing_ok=True)
                continue
            fresh = file.with_suffix(".new")
            fresh.write_text(text if mode == "ours" else "#!/bin/sh\nexit 0\n")
            fresh.chmod(0o755)
            fresh.rename(file)

    @contextmanager
    def ours(self) -> Iterator[None]:
        self.use("ours")
        try:
            yield
        finally:
            self.use("none")


def has_service() -> bool:
    """True if this version has the resident service."""
    return lab.natns("serve", "--help", check=False).returncode == 0


class Service:
    """``virt-natns serve``, as a process of ours."""

    def __init__(self) -> None:
        with LOG.open("ab") as log:
            self._process = subprocess.Popen(
                [lab.PYTHON, "-m", "libvirt_natns", "serve"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.fspath(lab.CHECKOUT)},
            )
        lab.wait_for(self._answers, timeout=20, what=f"the service (see {LOG})")

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise lab.LabError(f"the service has ended:\n{LOG.read_text()[-2000:]}")
        return SOCKET.exists()

    @property
    def memory(self) -> float:
        """Its resident memory in kB."""
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        return float(text.partition("VmRSS:")[2].split()[0])

    @property
    def cpu(self) -> float:
        """Seconds that it has run on a CPU, all its threads together."""
        tasks = Path(f"/proc/{self._process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def service() -> Iterator[Service]:
    """Run the service while the body runs."""
    running = Service()
    try:
        yield running
    finally:
        running.close()


def client() -> Any:  # noqa: ANN401 - a version without the service has none
    """Return the hooks' client of the service; None in a version without the service."""
    name = "libvirt_natns.service.client"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


@contextmanager
def engine() -> Iterator[Engine]:
    """Yield the verbs in this process, with the sandbox's configuration."""
    store = Store()
    try:
        with Kernel() as kernel:
            yield Engine(config.load(), store, kernel)
    finally:
        store.close()


@contextmanager
def provider(more: str = "", **options: Any) -> Iterator[lab.Provider]:  # noqa: ANN401
    """Yield the provider network as the configured upstream, with a new state database.

    ``more`` is added to the upstream's table.
    """
    for file in STATE.glob("state.db*"):
        file.unlink()
    with lab.Provider(**options) as world:
        lab.write_config(world.config(more=more))
        yield world


# -- networks --------------------------------------------------------------------

GUEST = "10.0.0.5"
DHCP = '<natns:dhcp><natns:range start="10.0.0.100" end="10.0.0.200"/></natns:dhcp>'


def nat(inside: str) -> str:
    return f'<natns:nat xmlns:natns="urn:libvirt-natns:1">{inside}</natns:nat>'


def forwards(count: int) -> str:
    """Return ``<natns:portForward>`` with ``count`` forwards, of which no two make a range."""
    ranges = "".join(
        f'<natns:range start="{8000 + 2 * n}" to="{80 + n % 2}"/>' for n in range(count)
    )
    return f'<natns:portForward guestAddress="{GUEST}">{ranges}</natns:portForward>'


def wide_forwards(count: int) -> str:
    """Return the same in ranges of four that do not meet: metadata has at most 256 kB."""
    ranges = "".join(
        f'<natns:range start="{start}" end="{start + 3}" to="80"/>'
        for start in range(8000, 8000 + 5 * (count // 4), 5)
    )
    return f'<natns:portForward guestAddress="{GUEST}">{ranges}</natns:portForward>'


def stock(name: str, bridge: str, count: int = 0) -> str:
    """Return an isolated network as virt-manager makes it, with ``count`` forwards."""
    return lab.isolated(name, bridge, metadata=nat(forwards(count)) if count else "")


def own(name: str, bridge: str, count: int = 0, uuid: str | None = None, more: str = "") -> str:
    """Return a network with its address in our metadata; ``more`` is added there."""
    inside = f'<natns:ip address="10.0.0.1" prefix="24">{DHCP}</natns:ip>{more}'
    inside += forwards(count) if count else ""
    return lab.isolated(name, bridge, address=None, metadata=nat(inside), uuid=uuid)


def native(name: str, bridge: str, address: str = "192.168.77.1") -> str:
    """Return libvirt's own network with NAT."""
    return lab.isolated(name, bridge, address=address, more='  <forward mode="nat"/>')


def hook_data(name: str) -> bytes:
    """Return the XML that libvirt gives a hook for an active network."""
    return f"<hookData>{lab.virsh('net-dumpxml', name).stdout}</hookData>".encode()


@contextmanager
def defined(*documents: str) -> Iterator[None]:
    """Define networks in libvirt while the body runs."""
    names = [xml.partition("<name>")[2].partition("</name>")[0] for xml in documents]
    with contextlib.ExitStack() as cleanup:
        for name, xml in zip(names, documents, strict=True):
            lab.define_network(xml)
            cleanup.callback(lab.virsh, "net-undefine", name, check=False)
            cleanup.callback(lab.virsh, "net-destroy", name, check=False)
        yield
