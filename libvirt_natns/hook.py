# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program of libvirt's hooks, with few imports until the event is known to be ours.

A guest's start runs four hooks and waits for each, so whether an event
concerns us is decided here, ahead of any costly import.

Standard output stays empty in any case: for some events libvirt would take it for the guest's XML.
The line of a refusal goes to standard error, and libvirt shows it to the user.
"""

# Not os: without site nothing has loaded it yet, and it takes as long as all of this.
import posix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from libvirt_natns.documents.xml_sniff import Glance
    from libvirt_natns.service.client import Answer

    MayRefuse = Callable[[], bool]
    """Tells whether a failure may stop libvirt."""

RUN_DIRECTORY = "/run/libvirt-natns"
SOCKET = f"{RUN_DIRECTORY}/service.sock"
HOST_FILE = f"{RUN_DIRECTORY}/host.json"

LIMIT = 60.0
"""Seconds that an event may take: waiting for the service and then for locks, together."""

# As in the module stat.
S_IFMT, S_IFDIR, S_IFREG, S_IFSOCK = 0o170000, 0o040000, 0o100000, 0o140000

# Whether a failure may stop libvirt, if the network or guest is ours (``ownership``).  A failure
# must not stop what has already happened.
NETWORK_EVENTS = {
    ("start", "begin"): True,
    ("started", "begin"): True,
    ("updated", "begin"): False,
    ("stopped", "end"): False,
    # A NIC that comes or goes; "plugged" and "unplugged" before libvirt 5.5.
    ("port-created", "begin"): False,
    ("port-deleted", "begin"): False,
    ("plugged", "begin"): False,
    ("unplugged", "begin"): False,
}
GUEST_EVENTS = {
    ("prepare", "begin"): True,
    ("start", "begin"): True,
    ("stopped", "end"): False,
    ("release", "end"): False,
    # A failure would kill a guest that runs.
    ("reconnect", "begin"): False,
    ("attach", "begin"): False,
}
FORWARD_EVENTS = (("started", "begin"), ("stopped", "end"))
"""Events of a network with ``<forward>`` that may alter what the host forwards."""

PORT_EVENTS = ("port-created", "port-deleted", "plugged", "unplugged")


def main(kind: str, arguments: list[str]) -> int:
    """Answer one event; return the exit status.

    ``kind`` is the hook's name, ``arguments`` are libvirt's: the object's name,
    the operation, the sub-operation and something extra.  The object's XML
    comes on standard input.
    """
    silence(1)
    data = _read_input()
    if len(arguments) < 3:
        return 0
    event = (arguments[1], arguments[2])
    look = network_event if kind == "network" else guest_event
    try:
        return look(event, data)
    except Exception as error:
        # The first look itself has failed, so the event is not known to be ours.
        _report(error, refuses=False)
        return 0


def on_lease(uuid: str) -> int:
    """Handle a changed lease; a network's DHCP client calls this from inside the namespace."""
    from libvirt_natns.kernel import netns

    silence(1)
    netns.go_to_host()
    return handle("lease", ("changed", "-"), uuid.encode(), never)


def never() -> bool:
    """Refuse nothing."""
    return False


def guest_event(event: tuple[str, str], data: bytes) -> int:
    """Answer an event of the hooks qemu and lxc; returns the exit status."""
    if event not in GUEST_EVENTS:
        return 0
    # A guest may outlive its network: it can be known even if no network is left.
    if not any(_is_directory(f"{RUN_DIRECTORY}/{each}") for each in ("networks", "guests")):
        return 0
    from libvirt_natns.documents import xml_sniff

    seen = xml_sniff.at_domain(data)
    known = bool(seen.uuid) and _is_directory(f"{RUN_DIRECTORY}/guests/{seen.uuid}")
    if event[0] in ("stopped", "release"):
        return handle("guest", event, data, never) if known else 0

    def is_ours() -> bool:
        from libvirt_natns.documents import ownership

        return ownership.of_guest(seen)

    if seen.annotated:
        return handle("guest", event, data, is_ours if GUEST_EVENTS[event] else never)
    # `prepare` has seen to a guest without metadata.
    if event[0] == "start" or not (known or (seen.nics > 1 and is_ours())):
        return 0
    return handle("guest", event, data, never)


def network_event(event: tuple[str, str], data: bytes) -> int:
    """Answer an event of the hook network; returns the exit status."""
    if event not in NETWORK_EVENTS:
        return 0
    from libvirt_natns.documents import xml_sniff

    seen = xml_sniff.at_network(data)
    if event[0] in PORT_EVENTS:
        known = bool(seen.owner) and _is_directory(f"{RUN_DIRECTORY}/guests/{seen.owner}")
        return handle("network", event, data, never) if known else 0
    if not _concerns_us(event[0], seen):
        if event in FORWARD_EVENTS:
            _of_others(event, data, seen)
        return 0

    def is_ours() -> bool:
        from libvirt_natns.documents import ownership

        return ownership.of_network(seen)

    return handle("network", event, data, is_ours if NETWORK_EVENTS[event] else never)


def _of_others(event: tuple[str, str], data: bytes, seen: "Glance") -> None:
    """Handle an event of a network that is not ours, and that alters the host's forwarding."""
    try:
        if opens_forwarding(seen):
            _beside(event, data)
    except Exception:  # the network must start even if this fails
        return


def opens_forwarding(seen: "Glance") -> bool:
    """True if a network of others makes the host forward what our rules still drop."""
    if not seen.forwards or not is_a(S_IFREG, HOST_FILE):
        return False
    from libvirt_natns.engine import host_forwarding

    return host_forwarding.is_altered(seen)


def _beside(event: tuple[str, str], data: bytes) -> None:
    """Set the host's rules for a network of others, in a process of its own.

    libvirt waits for neither its end nor its output: the network starts at once.  Raises OSError
    if no process can be started.
    """
    silence(2)
    if posix.fork():
        return
    try:
        posix.setsid()
        handle("host", ("forwarding", event[0]), data, never)
    finally:
        posix._exit(0)


def silence(descriptor: int) -> None:
    """Lead a descriptor to /dev/null."""
    null = posix.open("/dev/null", posix.O_RDWR)
    posix.dup2(null, descriptor)
    if null > 2:
        posix.close(null)


def is_a(kind: int, path: str) -> bool:
    """True if a file is there and of that kind."""
    try:
        return posix.stat(path).st_mode & S_IFMT == kind
    except OSError:
        return False


def _is_directory(path: str) -> bool:
    return is_a(S_IFDIR, path)


def _read_input() -> bytes:
    """Return all that libvirt sends; libvirt must not find the pipe closed."""
    try:
        with open(0, "rb", closefd=False) as stream:
            return stream.read()
    except OSError:
        return b""


def _concerns_us(operation: str, seen: "Glance") -> bool:
    """Return whether a network's event could be ours, ahead of any judgement on its XML.

    A network that was handled when it last ran has a directory.  It is made at
    `start`; a `started` without one can still be ours, when the hooks were
    installed in between.
    """
    if seen.uuid and _is_directory(f"{RUN_DIRECTORY}/networks/{seen.uuid}"):
        return True
    if operation not in ("start", "started") or seen.untouched:
        return False
    if seen.annotated:
        return True
    from libvirt_natns.documents import ownership

    return seen.ours(ownership.scope())


def handle(kind: str, event: tuple[str, str], data: bytes, may_refuse: "MayRefuse") -> int:
    """Have the service answer an event of ours, or do it here where there is none."""
    import time

    start = time.monotonic()
    if is_a(S_IFSOCK, SOCKET):
        from libvirt_natns.service import client

        answer = client.ask(kind, event, data)
        if answer is not None:
            return _relay(answer, may_refuse)
    return _do(kind, event, data, may_refuse, LIMIT - (time.monotonic() - start))


def _relay(answer: "Answer", may_refuse: "MayRefuse") -> int:
    """Pass the service's answer on; the service has logged it already."""
    if answer.done:
        return 0
    _tell(answer.text)
    return 1 if may_refuse() else 0


def _do(
    kind: str, event: tuple[str, str], data: bytes, may_refuse: "MayRefuse", seconds: float
) -> int:
    import gc

    # The process ends soon: looking for garbage takes longer than it brings.
    gc.disable()
    try:
        import site

        # The interpreter was started without it, for speed; now other packages count.
        site.main()
        from libvirt_natns.engine import events
        from libvirt_natns.kernel import locks

        locks.end_waiting_in(seconds)
        events.answer(kind, event, data)
    except Exception as error:  # a fault of ours must stop nothing that may go on
        refuses = may_refuse()
        _report(error, refuses)
        return 1 if refuses else 0
    return 0


def _tell(line: str) -> None:
    """Show a line to libvirt's user, where standard error can be written."""
    try:
        posix.write(2, f"libvirt-natns: {line}\n".encode(errors="replace"))
    except OSError:
        return


def _report(error: Exception, refuses: bool) -> None:
    """Report an error to libvirt's user, or to the log if that user does not see it."""
    from libvirt_natns.errors import describe, log

    line, more = describe(error)
    _tell(line)
    log(more if more or refuses else [line])
