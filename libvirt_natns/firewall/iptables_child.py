# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program that ``iptables`` runs inside a namespace, since python-iptables caches tables.

python-iptables keeps every table that it has opened, with the namespace it was opened in.
So this is a process of its own.  It reads one request as JSON,
does one verb, writes its result to stdout and its error as one line to stderr.
Of the package around, it imports ``iptc_library``, ``iptc_tables`` and ``iptc_compare`` alone,
so that it starts quickly.

Each family has a process of its own: libxtables loads extensions for one family, and does not
find them for the other.
"""

import fcntl
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from libvirt_natns.firewall.iptc_compare import PROGRAMS, TableRequest, differences, rebuild
from libvirt_natns.firewall.iptc_library import iptc
from libvirt_natns.firewall.iptc_tables import append, dump, open_table

LOCK = "/run/xtables.lock"
"""The lock under which iptables itself changes tables, on Debian and Fedora alike."""

TABLE_NAMES = {
    4: Path("/proc/thread-self/net/ip_tables_names"),
    6: Path("/proc/thread-self/net/ip6_tables_names"),
}


def main() -> int:
    """Do the verb of the request on standard input, a family after the other: the exit code."""
    request: TableRequest = json.load(sys.stdin)
    sys.path += [entry for entry in request["path"] if entry not in sys.path]
    *others, last = request.get("families") or [4]
    for family in others:
        code = _apart(request | {"family": family})
        if code:
            return code
    return _do(request | {"family": last})


def _apart(request: TableRequest) -> int:
    """Do a verb in a process of its own; python-iptables is slow to load and is loaded before."""
    with suppress(Exception):
        iptc()
    process = os.fork()
    if not process:
        code = _do(request)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _do(request: TableRequest) -> int:
    try:
        sys.stdout.write(VERBS[request["verb"]](request))
    except Exception as error:
        # python-iptables quotes the kernel's reason as bytes.
        message = " ".join(str(error).replace(": b'", ": '").split()) or type(error).__name__
        sys.stderr.write(f"{message}\n")
        return 1
    return 0


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
    return [*wanted, *({"name": name, "chains": {}, "jumps": {}, "last": []} for name in rest)]


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


@contextmanager
def _locked() -> Iterator[None]:
    # libiptc reads a table, changes it and writes it back: two processes that do so at once
    # lose one change, or fail.
    # The file is for root alone, as iptables has it: a user who opens it can keep others waiting.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(os.environ.get("XTABLES_LOCKFILE", LOCK), flags, 0o600)
    with os.fdopen(descriptor, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
