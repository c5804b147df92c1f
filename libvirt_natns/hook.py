# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libvirt's hooks run: the standard library's barest part until it is our event.

A guest's start runs four hooks and waits for each, so whether an event
concerns us is decided here, ahead of any costly import.

Standard output stays empty whatever happens (for some events libvirt would
take it for the guest's XML); the one line of a refusal goes to standard error,
which libvirt shows to the user.
"""

import os
import sys

RUN_DIRECTORY = "/run/libvirt-natns"
NAMESPACE = "urn:libvirt-natns:1"

# Whether failing may stop libvirt: it never may once the thing has happened.
NETWORK_EVENTS = {
    ("start", "begin"): True,
    ("started", "begin"): True,
    ("updated", "begin"): False,
    ("stopped", "end"): False,
}


def main(kind: str, arguments: list[str]) -> int:
    """Answer one event; returns the exit status.

    ``kind`` is the hook's name, ``arguments`` are libvirt's: the object's name,
    the operation, the sub-operation and something extra.  The object's XML
    comes on standard input.
    """
    _silence_stdout()
    data = sys.stdin.buffer.read()
    if kind != "network" or len(arguments) < 3:
        return 0
    event = (arguments[1], arguments[2])
    if event not in NETWORK_EVENTS or not _concerns_us(event[0], data):
        return 0
    return _handle(event, data, NETWORK_EVENTS[event])


def _silence_stdout() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.close(null)


def _concerns_us(operation: str, data: bytes) -> bool:
    """Whether a network's event could be ours, from its XML alone."""
    uuid, untouched = _look(data)
    if operation == "start":
        return not untouched
    # The directory is made at `start`; a `started` without one can still be ours,
    # when the hooks were installed in between.
    known = bool(uuid) and os.path.isdir(f"{RUN_DIRECTORY}/networks/{uuid}")
    return known or (operation == "started" and not untouched)


def _look(data: bytes) -> tuple[str, bool]:
    """A network's uuid, and whether it has a <forward> or is set to enabled="no".

    Far from a validation: what passes here is parsed and validated in full.
    """
    from xml.parsers import expat

    path: list[str] = []
    uuid: list[str] = []
    untouched: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        path.append(name)
        inside = path[path.index("network") + 1 :] if "network" in path else []
        off = name == f"{NAMESPACE} nat" and attributes.get("enabled") == "no"
        if inside == ["forward"] or (off and len(inside) == 2):
            untouched.append(name)

    def end(name: str) -> None:
        path.pop()

    def text(characters: str) -> None:
        if path[-2:] == ["network", "uuid"]:
            uuid.append(characters)

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    try:
        parser.Parse(data, True)
    except expat.ExpatError:
        return "", False
    plain = "".join(uuid).strip()
    return (plain if set(plain) <= set("0123456789abcdef-") else ""), bool(untouched)


def _handle(event: tuple[str, str], data: bytes, refuses: bool) -> int:
    import site

    # The interpreter was started without it, for speed; now other packages count.
    site.main()
    from libvirt_natns import dispatch
    from libvirt_natns.errors import NatnsError

    try:
        dispatch.network_event(event, data)
    except NatnsError as error:
        sys.stderr.write(f"libvirt-natns: {error}\n")
    except Exception as error:  # the only broad one: a hook must answer
        _log_trace()
        sys.stderr.write(
            f"libvirt-natns: internal error ({type(error).__name__}: {error}):"
            " see the system log and please report it\n"
        )
    else:
        return 0
    return 1 if refuses else 0


def _log_trace() -> None:
    import syslog
    import traceback

    syslog.openlog("libvirt-natns", syslog.LOG_PID, syslog.LOG_DAEMON)
    for line in traceback.format_exc().splitlines():
        syslog.syslog(syslog.LOG_ERR, line)
