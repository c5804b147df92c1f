# SPDX-License-Identifier: LGPL-2.1-or-later
"""A DHCP client (busybox's udhcpc) on one link of one namespace.

The client only asks, renews and rebinds.  It changes nothing in the kernel: its script
writes the lease to a file.  The script runs the command ``on_change`` when the lease is
new, has changed or has ended.  The client outlives the process that started it.  Its
directory has the files of ``dhcp_lease``, and these:

    script   the script for all events; each event's name is a link to it
    command  the script's command for a changed lease: ``on_change``
    awaited  exists while a process waits for the lease and needs no ``on_change``
    pid      the client's process id

Known limits: udhcpc renews at half of the lease's time, and ignores the server's T1 and T2.  It
knows no forced renewal by the server.
"""

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from signal import Signals

from libvirt_natns.daemons import dhcp_lease
from libvirt_natns.daemons.dhcp_lease import DhcpLease
from libvirt_natns.daemons.text_files import text_if_any
from libvirt_natns.daemons.udhcpc_script import DETACH, EVENTS, SCRIPT
from libvirt_natns.errors import DhcpError
from libvirt_natns.kernel import neighbour_lookup, netns, processes
from libvirt_natns.kernel.locks import make_directory

START_LIMIT = 5.0
"""Seconds for a process to start."""

STOP_LIMIT = 2.0
"""Seconds that a client gets to release its lease and to end."""

POLL = 0.01
"""Seconds between two looks at the lease."""

ABSENT_LOOKS = 10
"""Looks in a row that do not find the client, after which it counts as ended."""

MAX_PROBE = 2.0
"""Longest time, in seconds, for which a client asks whether an address is in use."""

MANNER = ("-f", "-R", "-S", "-B", "-s", "/bin/sh")
"""In the foreground, with a release at its end, with the system log, asking for broadcast answers.

A host that filters bridged packets cannot know which address a server will offer.
"""

PATIENCE = ("-t", "4", "-T", "2", "-A", "2")
"""Four questions, each 2 s apart, then a pause of 2 s, without end.

The client pauses as well after it has declined an address that another station has.  The
start of a network waits for the next offer (``dhcp_timeout``).
"""

CAPABILITIES = ("net_raw", "net_bind_service")
"""The needs of udhcpc: packet sockets on one link, and the port of DHCP clients."""


@dataclass(frozen=True, slots=True)
class Client:
    """A client: its link, its identity, and its command for a changed lease.

    ``client_id`` is DHCP's option 61 in hexadecimal digits.  ``directory`` belongs to the
    client alone.  ``probe`` are the seconds of ARP questions for an address before the client
    takes it, MAX_PROBE at most; 0 for no probe.
    """

    namespace: str
    link: str
    client_id: str
    directory: Path
    on_change: tuple[str, ...]
    probe: float = 0.0


# -- waiting for the lease ---------------------------------------------------


@contextmanager
def awaiting(directory: Path) -> Iterator[None]:
    """Suppress ``on_change`` during the body, which looks at the lease itself.

    The body includes the client's start, or a quick answer of the server would run ``on_change``.
    """
    awaited = directory / "awaited"
    make_directory(directory)
    awaited.touch()
    try:
        yield
    finally:
        awaited.unlink(missing_ok=True)
        with suppress(OSError):
            # The directory is empty where no client was started.
            directory.rmdir()


def await_lease(client: Client, seconds: float) -> DhcpLease | None:
    """Return the client's lease as soon as there is one; None without a lease in time.

    Raises DhcpError where the client ends instead.
    """
    deadline = time.monotonic() + seconds
    absent = 0
    while (lease := dhcp_lease.read(client.directory)) is None:
        # A client that starts writes its pid file anew, and is not found for a moment.
        absent = absent + 1 if running(client) is None else 0
        if absent > ABSENT_LOOKS:
            raise DhcpError(
                f"the DHCP client of {client.namespace} has ended", "see the system log"
            )
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL)
    return lease


# -- the process -------------------------------------------------------------


def program() -> list[str]:
    """Return the words that run udhcpc.  Raises DhcpError where it is not installed."""
    if path := processes.program("udhcpc"):
        return [path]
    # Other distributions have busybox only.
    if path := processes.program("busybox"):
        return [path, "udhcpc"]
    raise DhcpError("udhcpc is not installed", "install the package udhcpc (busybox)")


def running(client: Client) -> int | None:
    """Return the process id of a client, if it runs in its namespace."""
    return process(client.directory, client.namespace)


def process(directory: Path, namespace: str) -> int | None:
    """Return the process id of the client with that directory, if it runs in that namespace."""
    pid = _pid(directory)
    return pid if pid is not None and processes.lives_in(pid, namespace) else None


def _pid(directory: Path) -> int | None:
    return processes.from_pid_file(directory / "pid", _mark(directory))


def clients(directory: Path) -> list[int]:
    """Return the processes of the client with that directory, in any namespace.

    All processes are searched where the pid file names no client: on a full disk it is empty.
    """
    pid = _pid(directory)
    if pid is not None:
        return [pid]
    return processes.with_word(_mark(directory)) if (directory / "script").exists() else []


def _mark(directory: Path) -> str:
    """Return the word of a command line that only this client has: the path of its pid file."""
    return os.fspath(directory / "pid")


def differences(client: Client) -> list[str]:
    """Return, in words, each difference of a client; none where all is well."""
    pid = running(client)
    if pid is None:
        return [f"DHCP client of {client.namespace} is not running"]
    present = processes.command(pid)
    same = all(word in present for word in (client.link, f"61:{client.client_id}"))
    if not same or text_if_any(client.directory / "script") != SCRIPT:
        return [f"DHCP client of {client.namespace} runs with other settings"]
    if text_if_any(client.directory / "command") != _command(client):
        return [f"DHCP client of {client.namespace} runs the command of another version"]
    return []


def _command(client: Client) -> str:
    return f"exec {shlex.join(client.on_change)}\n"


def ensure(client: Client, request: IPv4Address | None = None) -> None:
    """Have a client run as it should; a client without differences is left alone.

    ``request`` is the address to ask for first.  Raises DhcpError.
    """
    if not differences(client):
        return
    command = client.directory / "command"
    if running(client) is not None and text_if_any(command) != _command(client):
        # The script reads the command at each event, so the client need not be restarted.
        command.with_suffix(".new").write_text(_command(client))
        command.with_suffix(".new").replace(command)
        if not differences(client):
            return
    # The next client goes on with the lease, so this client must not release it.
    _end(client.directory, processes.AT_ONCE)
    write_files(client)
    _start(client, request)


def write_files(client: Client) -> None:
    """Write the files that a client and its script need."""
    make_directory(client.directory)
    (client.directory / "command").write_text(_command(client))
    (client.directory / "script").write_text(SCRIPT)
    for event in EVENTS:
        with suppress(FileExistsError):
            (client.directory / event).symlink_to("script")


def _start(client: Client, request: IPv4Address | None) -> None:
    command = [
        *processes.confined(*CAPABILITIES),
        *program(),
        *MANNER,
        *("-i", client.link, "-p", _mark(client.directory)),
        *("-x", f"61:{client.client_id}", "-O", "mtu", "-O", "staticroutes", *PATIENCE),
        *((f"-a{int(client.probe * 1000)}",) if client.probe else ()),
        *(("-r", str(request)) if request else ()),
    ]
    try:
        with netns.entered(client.namespace):
            subprocess.run(
                ["/bin/sh", "-c", DETACH, _mark(client.directory), *command],
                env={"PATH": processes.PATH},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=client.directory,
                start_new_session=True,
                check=True,
                timeout=START_LIMIT,
            )
    except (OSError, subprocess.SubprocessError) as error:
        raise DhcpError(f"cannot start udhcpc in {client.namespace}", str(error)) from error


def stop(directory: Path, namespace: str | None = None) -> None:
    """End a client, which releases its lease, and remove its files; missing is success.

    With its ``namespace``, the release surely reaches the server.  Raises DhcpError for a
    client that does not end.
    """
    if not directory.is_dir():
        return
    held = dhcp_lease.read(directory)
    # Without the file, the script runs no command for the end of this lease.
    (directory / "times").unlink(missing_ok=True)
    if held and held.server and namespace and clients(directory):
        # udhcpc sends a single release, and the link is removed a moment later.
        neighbour_lookup.resolve(namespace, held.server)
    _end(directory)
    shutil.rmtree(directory, ignore_errors=True)


def _end(directory: Path, signals: tuple[Signals, ...] = processes.POLITELY) -> None:
    pids = clients(directory)
    if not processes.end(pids, _mark(directory), STOP_LIMIT, signals):
        listed = ", ".join(map(str, pids))
        raise DhcpError(f"the DHCP client {listed} does not end", "end it by hand")
