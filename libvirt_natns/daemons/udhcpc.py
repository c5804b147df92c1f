# SPDX-License-Identifier: LGPL-2.1-or-later
"""A DHCP client (busybox's udhcpc) on one link of one namespace, and its lease.

The client only asks, renews and rebinds.  It changes nothing in the kernel: its
script writes down what the server says, and runs the command ``on_change`` where
that is something new, or has come to its end.  Whoever started the client need not
live on; the lease is in files:

    script   what the client runs at each event, whose name is a link to it
    command  what that runs when the lease has changed: ``on_change``
    awaited  is there while somebody waits for the lease, who need not be told of it
    pid      the client's process id
    lease    what the server said, NAME=VALUE a line, as long as it is valid
    times    the client that got it, when (seconds since boot), for how many seconds

A client that starts says so as if it had lost a lease.  It is told from one that
has by ``times``: the lease of a client that was killed is kept, for the next one asks
for the same address.  Should nobody answer that one, the lease ends in time all
the same: the script looks at each round of questions that came to nothing.

udhcpc runs a program with the event as its argument.  That program is the shell, and
the event a file in the client's working directory: on Debian, nothing below /run can
be run itself (noexec).

Known limits: udhcpc renews at half of the lease's time, whatever T1 and T2 the
server names; it knows no forced renewal by the server.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from ipaddress import AddressValueError, IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from signal import Signals

from libvirt_natns.errors import DhcpError, NatnsError
from libvirt_natns.kernel import netns, processes
from libvirt_natns.kernel.locks import make_directory
from libvirt_natns.model.subnet import StaticRoute
from libvirt_natns.records import dataclass

START_LIMIT = 5.0
"""Seconds for a process to start."""

STOP_LIMIT = 2.0
"""Seconds that a client gets to give its lease back and to end."""

NEIGHBOUR_LIMIT = 0.3
"""Seconds in which the server's MAC address must be known for a release to reach it."""

POLL = 0.01
"""Seconds between two looks at whether there is a lease."""

ABSENT_LOOKS = 10
"""How often in a row a client is not found that has ended."""

MAX_PROBE = 2.0
"""Longest time, in seconds, for which a client asks whether an address is in use."""

MTU = re.compile(r"[0-9]{1,5}")
LEAST_MTU = 576
"""What every IPv4 host can take, in octets: a server that names less is not believed."""

MANNER = ("-f", "-R", "-S", "-B", "-s", "/bin/sh")
"""In the foreground, released at its end, known to the system log, answered by broadcast:
a host that filters what its bridges carry cannot know which address will be offered."""

PATIENCE = ("-t", "5", "-T", "2", "-A", "10")
"""Five questions, one each 2 s, then a pause of 10 s: again and again."""

NO_ADDRESS = IPv4Address(0)
DISCARD = 9

EVENTS = ("deconfig", "bound", "renew", "leasefail", "nak")

SCRIPT = """\
#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# libvirt-natns: udhcpc runs this in its own directory at each event, with what the
# server said in the environment, and waits for it.  The event is the script's name.
# A renewal that brings nothing new costs one mv.

changed() {
    # Told to the listener, which has what the client and this have not: all capabilities.
    [ -e awaited ] || echo >&9
}

# The lease's client, when it got it, and for how long; 0 without a lease.
holder=0 obtained=0 seconds=0
[ ! -e times ] || read -r holder obtained seconds <times
read -r now _ </proc/uptime
now=${now%.*}

lost() {
    [ -e lease ] || exit 0
    rm -f lease times
    changed
}

case ${0##*/} in
bound | renew)
    new="ip=$ip
mask=$mask
router=$router
dns=$dns
mtu=$mtu
routes=$staticroutes
server=$serverid
"
    old=
    if [ -e lease ]; then
        while IFS= read -r line; do
            old="$old$line
"
        done <lease
    fi
    echo "$PPID $now ${lease:-0}" >times.new && mv -f times.new times
    [ "$new" != "$old" ] || exit 0
    printf %s "$new" >lease.new && mv -f lease.new lease
    changed
    ;;
deconfig)
    # Each client begins with that; only the lease's own has lost it.
    [ "$PPID" != "$holder" ] || lost
    ;;
leasefail)
    # Nobody answers, also where a lease is left of a client that was killed.
    [ "$seconds" -eq 0 ] || [ "$now" -lt $((obtained + seconds)) ] || lost
    ;;
esac
"""


CAPABILITIES = ("net_raw", "net_bind_service")
"""What udhcpc needs: packet sockets on one link, and the client's port."""

DETACH = """\
rm -f told
mkfifo told || exit
sh -c 'while read -r _; do sh ./command </dev/null; done' <told >/dev/null 2>&1 &
exec 9>told
rm -f told
"$@" </dev/null >/dev/null 2>&1 &
echo $! >"$0"
"""
"""Starts a client beside a listener, which runs the command where the client's script says so.

The client reads what comes from the network, so it lacks the capabilities that the command
needs.  The listener reads lines of a pipe alone, and ends with the client, its writer; udhcpc
has descriptors 3 and 4 for itself.  The shell is the parent of both for a moment only;
whatever ends us, the process is noted.
"""


@dataclass(frozen=True, slots=True)
class Client:
    """A client that runs: where, as whom, and what it runs when its lease has changed.

    ``client_id`` is DHCP's option 61 in hexadecimal digits; ``directory`` is
    the client's alone.  ``probe``: seconds for which an address is asked for by
    ARP before it is taken, MAX_PROBE at most; 0 for not at all.
    """

    namespace: str
    link: str
    client_id: str
    directory: Path
    on_change: tuple[str, ...]
    probe: float = 0.0


@dataclass(frozen=True, slots=True)
class Lease:
    """What a server said.

    ``until`` is when it ends, in seconds since boot, suspended time included;
    None for never.  ``mtu`` is in octets.  ``on_link`` are destinations that the server
    says need no gateway.  See ``lease_check`` for which values make sense.
    """

    address: IPv4Interface
    server: IPv4Address | None = None
    gateway: IPv4Address | None = None
    dns: tuple[IPv4Address, ...] = ()
    mtu: int | None = None
    routes: tuple[StaticRoute, ...] = ()
    until: float | None = None
    on_link: tuple[IPv4Network, ...] = ()


# -- the lease ---------------------------------------------------------------


def lease(directory: Path) -> Lease | None:
    """The lease that a client holds; None without one, or where it makes no sense."""
    try:
        text = (directory / "lease").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return parse(text, _until(directory))


def parse(text: str, until: float | None = None) -> Lease | None:
    """The lease that a client's script has written down; None where it makes no sense.

    Values that the server got wrong are left out, but for the address.
    """
    values = dict(line.partition("=")[::2] for line in text.splitlines())
    mask = values.get("mask") or "32"
    try:
        address = IPv4Interface(f"{values.get('ip', '')}/{_prefix(mask)}")
    except ValueError:
        return None
    routes = _routes(values.get("routes", "").split())
    first = next(iter(_addresses(values.get("router", ""))), None)
    # A server that names routes means those alone (RFC 3442).
    default = next((gate for to, gate in routes if to.prefixlen == 0), None)
    return Lease(
        address=address,
        server=next(iter(_addresses(values.get("server", ""))), None),
        gateway=default if routes else first,
        dns=tuple(each for each in _addresses(values.get("dns", "")) if not each.is_loopback),
        mtu=_mtu(values.get("mtu", "")),
        # What is on the link itself is found through its gateways.
        routes=tuple(
            StaticRoute(to, gate) for to, gate in routes if to.prefixlen and gate != NO_ADDRESS
        ),
        until=until,
        on_link=tuple(to for to, gate in routes if to.prefixlen and gate == NO_ADDRESS),
    )


def _prefix(mask: str) -> str:
    """A mask as its prefix length; ValueError where it is none.

    ``ipaddress`` would take a wildcard mask, 0.0.0.255, for a /24 as well.
    """
    if mask.isdecimal():
        return mask
    bits = int(IPv4Address(mask)) ^ 0xFFFFFFFF
    if bits & (bits + 1):
        raise ValueError(f"{mask} is no subnet mask")
    return str(32 - bits.bit_length())


def _addresses(text: str) -> Iterable[IPv4Address]:
    for word in text.split():
        with suppress(AddressValueError):
            address = IPv4Address(word)
            if not (address.is_unspecified or address.is_multicast):
                yield address


def _routes(words: list[str]) -> list[tuple[IPv4Network, IPv4Address]]:
    """Destinations and their gateways, in turn."""
    found = []
    for destination, gateway in zip(words[::2], words[1::2], strict=False):
        with suppress(ValueError):
            found.append((IPv4Network(destination, strict=False), IPv4Address(gateway)))
    return found


def _mtu(text: str) -> int | None:
    return int(text) if MTU.fullmatch(text) and LEAST_MTU <= int(text) <= 65535 else None


def _until(directory: Path) -> float | None:
    try:
        _, obtained, seconds = map(int, (directory / "times").read_text().split())
    except (OSError, ValueError):
        return None
    # All ones is for ever (RFC 2131), and so is a server that says nothing.
    return obtained + seconds if 0 < seconds < 2**32 - 1 else None


@contextmanager
def awaiting(directory: Path) -> Iterator[None]:
    """Have no ``on_change`` run as long as the body does, which looks at the lease itself.

    Around the client's start, too, or a quick server's answer would be told.
    """
    awaited = directory / "awaited"
    make_directory(directory)
    awaited.touch()
    try:
        yield
    finally:
        awaited.unlink(missing_ok=True)
        with suppress(OSError):
            # It is empty where no client was started.
            directory.rmdir()


def await_lease(client: Client, seconds: float) -> Lease | None:
    """The client's lease, as soon as there is one; None where there is none in time.

    Raises DhcpError where the client ends instead.
    """
    deadline = time.monotonic() + seconds
    absent = 0
    while (found := lease(client.directory)) is None:
        # As it starts it writes its process id anew, and is not found for a moment.
        absent = absent + 1 if running(client) is None else 0
        if absent > ABSENT_LOOKS:
            raise DhcpError(
                f"the DHCP client of {client.namespace} has ended", "see the system log"
            )
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL)
    return found


# -- the process -------------------------------------------------------------


def program() -> list[str]:
    """The command that is udhcpc.  Raises DhcpError where it is not installed."""
    if found := processes.program("udhcpc"):
        return [found]
    # Other distributions have the one program alone.
    if found := processes.program("busybox"):
        return [found, "udhcpc"]
    raise DhcpError("udhcpc is not installed", "install the package udhcpc (busybox)")


def running(client: Client) -> int | None:
    """The process id of a client, if it runs in its namespace."""
    return process(client.directory, client.namespace)


def process(directory: Path, namespace: str) -> int | None:
    """The same of whatever client has that directory."""
    pid = _pid(directory)
    return pid if pid is not None and processes.lives_in(pid, namespace) else None


def _pid(directory: Path) -> int | None:
    pid = processes.read_pid(directory / "pid")
    known = pid is not None and _mark(directory) in processes.command(pid)
    return pid if known else None


def _mark(directory: Path) -> str:
    """What no other process has in its command line: it names its own pid file."""
    return os.fspath(directory / "pid")


def differences(client: Client) -> list[str]:
    """What is wrong with a client, in words; nothing where all is well."""
    pid = running(client)
    if pid is None:
        return [f"DHCP client of {client.namespace} is not running"]
    present = processes.command(pid)
    same = all(word in present for word in (client.link, f"61:{client.client_id}"))
    if not same or _read(client.directory / "script") != SCRIPT:
        return [f"DHCP client of {client.namespace} runs with other settings"]
    if _read(client.directory / "command") != _command(client):
        return [f"DHCP client of {client.namespace} runs the command of another version"]
    return []


def _command(client: Client) -> str:
    return f"exec {shlex.join(client.on_change)}\n"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def ensure(client: Client, request: IPv4Address | None = None) -> None:
    """Have a client run; one that is well is left alone.

    ``request`` is the address to ask for first.  Raises DhcpError.
    """
    if not differences(client):
        return
    command = client.directory / "command"
    if _read(command) != _command(client):
        # The client's script reads it at each event, so that no lease is given up for it.
        command.with_suffix(".new").write_text(_command(client))
        command.with_suffix(".new").replace(command)
        if not differences(client):
            return
    # Without a chance to give back a lease that the next one goes on with.
    _end(client.directory, processes.AT_ONCE)
    write_files(client)
    _start(client, request)


def write_files(client: Client) -> None:
    """Write what a client and its script need."""
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
    """End a client, which gives its lease back, and remove its files; missing is success.

    With its ``namespace``, the server is sure to hear of it.  Raises DhcpError
    for a client that does not end.
    """
    if not directory.is_dir():
        return
    held = lease(directory)
    # Without it the end of this lease is nobody's business.
    (directory / "times").unlink(missing_ok=True)
    if held and held.server and namespace and _pid(directory) is not None:
        _meet(namespace, held.server)
    _end(directory)
    shutil.rmtree(directory, ignore_errors=True)


def _end(directory: Path, signals: tuple[Signals, ...] = processes.POLITELY) -> None:
    pid = _pid(directory)
    descriptor = processes.opened(pid, _mark(directory)) if pid else None
    if descriptor is None:
        return
    try:
        if not processes.end(descriptor, STOP_LIMIT, signals):
            raise DhcpError(f"the DHCP client {pid} does not end", "end it by hand")
    finally:
        os.close(descriptor)


def _meet(namespace: str, server: IPv4Address) -> None:
    """Have the kernel find out a server's MAC address, or its router's.

    A release is sent to it, not asked for again, and the link goes a moment later.
    """
    deadline = time.monotonic() + NEIGHBOUR_LIMIT
    with suppress(OSError, NatnsError), netns.entered(namespace):
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as link:
            link.sendto(b"", (str(server), DISCARD))
        while _is_asked_for() and time.monotonic() < deadline:
            time.sleep(POLL)


def _is_asked_for() -> bool:
    """Whether an answer to any ARP request is still to come, in the thread's namespace."""
    lines = Path("/proc/thread-self/net/arp").read_text().splitlines()[1:]
    return any(line.split()[2:3] == ["0x0"] for line in lines)


__all__ = [
    "Client",
    "Lease",
    "await_lease",
    "awaiting",
    "differences",
    "ensure",
    "lease",
    "parse",
    "process",
    "program",
    "running",
    "stop",
    "write_files",
]
