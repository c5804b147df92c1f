# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fork server that ``iptables_server`` starts: what it does with a request.

python-iptables keeps every table that it has opened, with the namespace it was opened in.
libxtables loads extensions for one family, and does not find them for the other.  So the server
loads python-iptables, opens nothing, and forks for each request.

A request is JSON: ``verb``, ``family``, ``path`` (more directories of modules), ``limit``
(seconds), and what the verb takes.  Its length brings a descriptor of the namespace.  The answer
is JSON, too: what the verb has ``said``, and its ``complaint`` in one line, "" for none.  Of the
package around, the server imports ``iptc_library``, ``iptc_tables`` and ``iptc_compare`` alone,
so that it starts quickly.
"""

import ctypes
import fcntl
import importlib.util
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from libvirt_natns.firewall.iptc_compare import PROGRAMS, TableRequest, differences, rebuild
from libvirt_natns.firewall.iptc_library import iptc
from libvirt_natns.firewall.iptc_tables import append, dump, open_table

LOCK = "/run/xtables.lock"
"""The lock under which iptables itself changes tables, on Debian and Fedora alike."""

FRAME = struct.Struct("!Q")
CLONE_NEWNET = 0x40000000

TABLE_NAMES = {
    4: Path("/proc/thread-self/net/ip_tables_names"),
    6: Path("/proc/thread-self/net/ip6_tables_names"),
}


def serve() -> None:
    """Do requests from the socket that is standard input, until that is closed."""
    link = socket.socket(fileno=0)
    while True:
        start, descriptors, _, _ = socket.recv_fds(link, FRAME.size, 1)
        if not start:
            return
        start += _received(link, FRAME.size - len(start))
        request: TableRequest = json.loads(_received(link, *FRAME.unpack(start)))
        sys.path += [entry for entry in request["path"] if entry not in sys.path]
        with suppress(Exception):
            # A fork that needs it will say why it is missing.
            iptc()
        answer = _in_fork(request, descriptors[0])
        os.close(descriptors[0])
        link.sendall(FRAME.pack(len(answer)) + answer)


def _received(link: socket.socket, length: int) -> bytes:
    some = b""
    while len(some) < length:
        more = link.recv(length - len(some))
        if not more:
            os._exit(0)
        some += more
    return some


def _in_fork(request: TableRequest, namespace: int) -> bytes:
    """Do a request in a process of its own, inside of a namespace; return the answer."""
    reader, writer = os.pipe()
    errors = os.memfd_create("stderr")
    process = os.fork()
    if not process:
        # libxtables says why, and ends the process.
        os.dup2(errors, 2)
        # A fork that hangs, or waits for a lock, must not stay.
        signal.alarm(request["limit"])
        _enter(namespace)
        with os.fdopen(writer, "wb") as told:
            told.write(json.dumps(_do(request)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        answer = said.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with os.fdopen(errors, "rb") as file:
        file.seek(0)
        lines = file.read().decode(errors="replace").strip().splitlines()
    if status == -signal.SIGALRM:
        reason = f"it takes longer than {request['limit']} s: fuser -v {_lock_file()}"
        return json.dumps({"said": "", "complaint": reason}).encode()
    if status:
        reason = (lines or [f"python-iptables has ended with status {status}"])[-1]
        return json.dumps({"said": "", "complaint": reason}).encode()
    return answer


def _enter(namespace: int) -> None:
    if hasattr(os, "setns"):
        os.setns(namespace, CLONE_NEWNET)
    elif ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
        # Python before 3.12 has no os.setns.
        os._exit(1)


def _do(request: TableRequest) -> dict[str, str]:
    try:
        return {"said": VERBS[request["verb"]](request), "complaint": ""}
    except Exception as error:
        # python-iptables quotes the kernel's reason as bytes.
        reason = " ".join(str(error).replace(": b'", ": '").split()) or type(error).__name__
        return {"said": "", "complaint": reason}


def find(_request: TableRequest) -> str:
    """Say whether python-iptables is there, without loading it."""
    return "found" if importlib.util.find_spec("iptc") else ""


def replace(request: TableRequest) -> str:
    """Replace whole tables, in the given order, each in one transaction."""
    for wanted in _wanted(request):
        table = open_table(request["family"], wanted["name"])
        table.flush()
        for chain, policy in wanted["policies"].items():
            table.set_policy(chain, policy)
        for chain, entries in wanted["chains"].items():
            append(table, chain, entries)
        table.commit()
    return ""


def clear(request: TableRequest) -> str:
    """Empty all tables that exist; the filter last, which stops forwarding until then."""
    for name in sorted(_existing(request), key=lambda name: name == "filter"):
        table = open_table(request["family"], name)
        table.flush()
        for chain in table.chains:
            if chain.is_builtin():
                chain.set_policy("ACCEPT")
        table.commit()
    return ""


def listing(request: TableRequest) -> str:
    """Return all tables that exist and hold something."""
    note = " # IPv6" if request["family"] == 6 else ""
    return "".join(
        dump(open_table(request["family"], name), note) for name in sorted(_existing(request))
    )


def own(request: TableRequest) -> str:
    """Bring our chains and the jumps to them to the wanted state, a transaction a table."""
    with _locked():
        for wanted in _concerned(request):
            table = open_table(request["family"], wanted["name"])
            if any(differences(table, wanted, request)):
                rebuild(table, wanted, request["prefix"])
                table.commit()
    return ""


def compare(request: TableRequest) -> str:
    """Return what ``own`` would change, one line each."""
    existing = _existing(request)
    lines: list[str] = []
    for wanted in _concerned(request):
        if wanted["name"] in existing:
            lines += differences(open_table(request["family"], wanted["name"]), wanted, request)
        else:
            lines.append(f"{PROGRAMS[request['family']]}: table {wanted['name']} is missing")
    return "".join(f"{line}\n" for line in lines)


def _concerned(request: TableRequest) -> list[TableRequest]:
    """Return the wanted tables, then existing tables that may hold something left over."""
    wanted = _wanted(request)
    names = [table["name"] for table in wanted]
    rest = [name for name in sorted(_existing(request)) if name not in names]
    return [*wanted, *({"name": name, "chains": {}, "jumps": []} for name in rest)]


def _wanted(request: TableRequest) -> list[TableRequest]:
    return [table for table in request["tables"] if table["family"] == request["family"]]


VERBS = {
    "find": find,
    "replace": replace,
    "clear": clear,
    "list": listing,
    "own": own,
    "compare": compare,
}


def _existing(request: TableRequest) -> list[str]:
    names = TABLE_NAMES[request["family"]]
    return names.read_text().split() if names.exists() else []


def _lock_file() -> str:
    return os.environ.get("XTABLES_LOCKFILE", LOCK)


@contextmanager
def _locked() -> Iterator[None]:
    # libiptc reads a table, changes it and writes it back: two processes that do so at once
    # lose one change, or fail.
    # The file is for root alone, as iptables has it: a user who opens it can keep others waiting.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(_lock_file(), flags, 0o600)
    with os.fdopen(descriptor, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
