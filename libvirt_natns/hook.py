# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libvirt's hooks run: the standard library's barest part until it is our event.

A guest's start runs four hooks and waits for each, so whether an event
concerns us is decided here, ahead of any costly import.

Standard output stays empty whatever happens (for some events libvirt would
take it for the guest's XML); the one line of a refusal goes to standard error,
which libvirt shows to the user.
"""

# Not os: without site nothing has loaded it yet, and it takes as long as all of this.
import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from libvirt_natns.client import Answer

RUN_DIRECTORY = "/run/libvirt-natns"
SOCKET = f"{RUN_DIRECTORY}/service.sock"

NO_ROOM = (28, 30, 122)
"""ENOSPC, EROFS and EDQUOT: a file system's trouble, and no fault of ours."""

# As in the module stat.
S_IFMT, S_IFDIR, S_IFSOCK = 0o170000, 0o040000, 0o140000

# Whether failing may stop libvirt: it never may once the thing has happened.
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
    # Failing would kill a guest that runs.
    ("reconnect", "begin"): False,
    ("attach", "begin"): False,
}
PORT_EVENTS = ("port-created", "port-deleted", "plugged", "unplugged")


def main(kind: str, arguments: list[str]) -> int:
    """Answer one event; returns the exit status.

    ``kind`` is the hook's name, ``arguments`` are libvirt's: the object's name,
    the operation, the sub-operation and something extra.  The object's XML
    comes on standard input.
    """
    _silence_stdout()
    data = _read_input()
    if len(arguments) < 3:
        return 0
    event = (arguments[1], arguments[2])
    if kind != "network":
        return _guest(event, data) if event in GUEST_EVENTS else 0
    return _network(event, data) if event in NETWORK_EVENTS else 0


def on_lease(uuid: str) -> int:
    """A network's DHCP client says, from inside the namespace, that its lease has changed."""
    from libvirt_natns import netns

    _silence_stdout()
    netns.go_to_host()
    return _handle("lease", ("changed", "-"), uuid.encode(), False)


def _guest(event: tuple[str, str], data: bytes) -> int:
    """An event of the hooks qemu and lxc."""
    from libvirt_natns import glance

    # A guest may outlive its network: it can be known where no network is left.
    if not any(_is_directory(f"{RUN_DIRECTORY}/{each}") for each in ("networks", "guests")):
        return 0
    seen = glance.at_domain(data)
    known = bool(seen.uuid) and _is_directory(f"{RUN_DIRECTORY}/guests/{seen.uuid}")
    ends = event[0] in ("stopped", "release")
    if not known and (ends or not seen.annotated):
        return 0
    return _handle("guest", event, data, GUEST_EVENTS[event])


def _network(event: tuple[str, str], data: bytes) -> int:
    from libvirt_natns import glance

    seen = glance.at_network(data)
    if event[0] in PORT_EVENTS:
        known = bool(seen.owner) and _is_directory(f"{RUN_DIRECTORY}/guests/{seen.owner}")
        return _handle("network", event, data, False) if known else 0
    if not _concerns_us(event[0], seen.uuid, seen.untouched):
        return 0
    # What is not ours starts whatever is broken here.
    return _handle("network", event, data, NETWORK_EVENTS[event] and not seen.untouched)


def _silence_stdout() -> None:
    null = posix.open("/dev/null", posix.O_RDWR)
    posix.dup2(null, 1)
    if null > 2:
        posix.close(null)


def _is_a(kind: int, path: str) -> bool:
    """Whether a file is there and of that kind."""
    try:
        return posix.stat(path).st_mode & S_IFMT == kind
    except OSError:
        return False


def _is_directory(path: str) -> bool:
    return _is_a(S_IFDIR, path)


def _read_input() -> bytes:
    """All that libvirt sends; it must not find the pipe closed."""
    try:
        with open(0, "rb", closefd=False) as stream:
            return stream.read()
    except OSError:
        return b""


def _concerns_us(operation: str, uuid: str, untouched: bool) -> bool:
    """Whether a network's event could be ours, from its XML alone.

    A network that was handled when it last ran has a directory.  It is made at
    `start`; a `started` without one can still be ours, when the hooks were
    installed in between.
    """
    if operation in ("start", "started") and not untouched:
        return True
    return bool(uuid) and _is_directory(f"{RUN_DIRECTORY}/networks/{uuid}")


def _handle(kind: str, event: tuple[str, str], data: bytes, refuses: bool) -> int:
    """Have the service answer an event of ours, or do it here where there is none."""
    if _is_a(S_IFSOCK, SOCKET):
        from libvirt_natns import client

        answer = client.ask(kind, event, data)
        if answer is not None:
            return _relay(answer, refuses)
    return _do(kind, event, data, refuses)


def _relay(answer: "Answer", refuses: bool) -> int:
    """The service has logged it already."""
    if answer.done:
        return 0
    _tell(answer.text)
    return 1 if refuses else 0


def _do(kind: str, event: tuple[str, str], data: bytes, refuses: bool) -> int:
    import gc

    # The process ends soon: looking for garbage takes longer than it brings.
    gc.disable()
    try:
        import site

        # The interpreter was started without it, for speed; now other packages count.
        site.main()
        from libvirt_natns import dispatch

        dispatch.answer(kind, event, data)
    except Exception as error:  # the only broad one: a hook must answer
        _report(error, refuses)
        return 1 if refuses else 0
    return 0


def _report(error: Exception, refuses: bool) -> None:
    """One line for libvirt's user; for the log what that user does not see."""
    line, more = said(error)
    _tell(line)
    _log(more if more or refuses else [line])


def _tell(line: str) -> None:
    """Tell libvirt's user, if anybody reads: the exit status must not depend on it."""
    try:
        sys.stderr.write(f"libvirt-natns: {line}\n")
    except (OSError, ValueError, AttributeError):
        # A full disk, a libvirtd that has ended; None where there is no such stream.
        return


def said(error: Exception) -> tuple[str, list[str]]:
    """An error in one line, and what else the log should have of it."""
    from libvirt_natns.errors import NatnsError

    line = str(error)
    if isinstance(error, NatnsError):
        return line, []
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        where = error.filename or "a file"
        return f"cannot write {where} ({error.strerror}): free some space", []
    if isinstance(error, ImportError):
        told = f"cannot load {error.name or 'a module'}: install it for {sys.executable}"
        return told, [f"{told} ({error})"]
    import traceback

    told = f"{type(error).__name__}: {' '.join(line.split())}"
    lines = "".join(traceback.format_exception(error)).splitlines()
    return f"internal error ({told}): see the system log and report it", lines


def _log(lines: list[str]) -> None:
    import syslog

    syslog.openlog("libvirt-natns", syslog.LOG_PID, syslog.LOG_DAEMON)
    for line in lines:
        syslog.syslog(syslog.LOG_ERR, line)
