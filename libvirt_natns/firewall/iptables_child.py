# SPDX-License-Identifier: LGPL-2.1-or-later
"""What runs inside a namespace on behalf of ``iptables``: the importer of iptc.

Started as a program of its own, because python-iptables keeps every table it
has opened, with the namespace it was opened in.  Reads one request as JSON,
does one verb, writes its result to stdout and its error as one line to stderr.
It uses nothing of the package around it, so that it starts quickly.

Each family has a process of its own: what libxtables loads for one, it does not
find for the other.

python-iptables asks every table that the kernel knows whether a target is a
chain of it, and asking creates the table.  The subclasses here let a rule ask
its own table only.
"""

import ctypes
import ctypes.util
import fcntl
import importlib.util
import json
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from typing import Any

LOCK = "/run/xtables.lock"
"""The lock under which iptables itself changes tables, on Debian and Fedora alike."""

TABLE_NAMES = {
    4: Path("/proc/thread-self/net/ip_tables_names"),
    6: Path("/proc/thread-self/net/ip6_tables_names"),
}
PROGRAMS = {4: "iptables", 6: "ip6tables"}
"""What changes a family's tables by hand."""

REFUSALS = ("DROP", "REJECT")
HARMLESS = (b"ACCEPT", b"LOG", b"")
"""Targets that refuse nothing."""

SONAMES = {
    "c": "libc.so.6",
    "xtables": "libxtables.so.12",
    "ip4tc": "libip4tc.so.2",
    "ip6tc": "libip6tc.so.2",
}
"""Where the libraries that python-iptables looks for usually are."""

Search = Callable[[str], str | None]
Request = dict[str, Any]

# python-iptables carries no types; these say which of its classes is meant.
Iptc = Any
Library = Any
Table = Any
Chain = Any
Rule = Any
Module = Any


def main(request: Request) -> int:
    """Do what ``request`` asks for, a family after the other: the exit code of the process."""
    sys.path += [entry for entry in request["path"] if entry not in sys.path]
    *others, last = request.get("families") or [4]
    for family in others:
        code = _apart(request | {"family": family})
        if code:
            return code
    return _do(request | {"family": last})


def _apart(request: Request) -> int:
    """The same in a process that ends with it; what is slow to load has been loaded before."""
    with suppress(Exception):
        _iptc()
    process = os.fork()
    if not process:
        code = _do(request)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _do(request: Request) -> int:
    try:
        sys.stdout.write(VERBS[request["verb"]](request))
    except Exception as error:
        # python-iptables quotes the kernel's reason as bytes.
        message = " ".join(str(error).replace(": b'", ": '").split()) or type(error).__name__
        sys.stderr.write(f"{message}\n")
        return 1
    return 0


def find(_request: Request) -> str:
    """Say whether python-iptables is there, without loading it."""
    return "found" if importlib.util.find_spec("iptc") else ""


def replace(request: Request) -> str:
    """Replace whole tables, in the given order, each in one transaction."""
    for wanted in _wanted(request):
        table = _table(request, wanted["name"])
        table.flush()
        for chain, policy in wanted["policies"].items():
            table.set_policy(chain, policy)
        for chain, entries in wanted["chains"].items():
            _append(table, chain, entries)
        table.commit()
    return ""


def clear(request: Request) -> str:
    """Empty all tables that exist; the filter last, which stops forwarding meanwhile."""
    for name in sorted(_existing(request), key=lambda name: name == "filter"):
        table = _table(request, name)
        table.flush()
        for chain in table.chains:
            if chain.is_builtin():
                chain.set_policy("ACCEPT")
        table.commit()
    return ""


def listing(request: Request) -> str:
    """All tables that exist and hold something."""
    note = " # IPv6" if request["family"] == 6 else ""
    return "".join(_dump(_table(request, name), note) for name in sorted(_existing(request)))


def own(request: Request) -> str:
    """Bring our chains and the jumps to them to what is wanted, a transaction a table."""
    with _locked():
        for wanted in _concerned(request):
            table = _table(request, wanted["name"])
            if any(_differences(table, wanted, request)):
                _rebuild(table, wanted, request["prefix"])
                table.commit()
    return ""


def compare(request: Request) -> str:
    """What ``own`` would change, one line each."""
    existing = _existing(request)
    lines: list[str] = []
    for wanted in _concerned(request):
        if wanted["name"] in existing:
            lines += _differences(_table(request, wanted["name"]), wanted, request)
        else:
            lines.append(f"{PROGRAMS[request['family']]}: table {wanted['name']} is missing")
    return "".join(f"{line}\n" for line in lines)


def _concerned(request: Request) -> list[Request]:
    """The wanted tables, then those that exist and may hold something left over."""
    wanted = _wanted(request)
    names = [table["name"] for table in wanted]
    rest = [name for name in sorted(_existing(request)) if name not in names]
    return [*wanted, *({"name": name, "chains": {}, "jumps": {}, "last": []} for name in rest)]


def _wanted(request: Request) -> list[Request]:
    return [table for table in request["tables"] if table["family"] == request["family"]]


def _ours(table: Table, prefix: str) -> list[str]:
    return [chain.name for chain in table.chains if chain.name.startswith(prefix)]


def _rebuild(table: Table, wanted: Request, prefix: str) -> None:
    found = _ours(table, prefix)
    for name in found:
        _unjump(table, name)
        table.flush_entries(name)
    for name in set(found) - set(wanted["chains"]):
        table.delete_chain(name)
    for name, entries in wanted["chains"].items():
        if name not in found:
            table.create_chain(name)
        _append(table, name, entries)
    for builtin, jump in wanted["jumps"].items():
        chain = _chain(table, builtin)
        last = builtin in wanted["last"]
        chain.insert_rule(_rule(jump, chain), _end(table, builtin) if last else 0)


def _differences(table: Table, wanted: Request, request: Request) -> Iterator[str]:
    found = _ours(table, request["prefix"])
    program = PROGRAMS[request["family"]]
    for name in found:
        if name not in wanted["chains"]:
            yield f"{program}: chain {name} in table {table.name} is left over"
    for name, entries in wanted["chains"].items():
        place = f"{program}: chain {name} in table {table.name}"
        if name not in found:
            yield f"{place} is missing"
        elif not _holds(_chain(table, name), entries):
            yield f"{place} was altered"
    for builtin, jump in wanted["jumps"].items():
        own = jump["target"][0].encode()
        targets = [table.get_target(entry) for entry in _raw(table, builtin)]
        last = builtin in wanted["last"]
        place = "at its end" if last else "at its beginning"
        if targets.count(own) != 1 or not (
            _is_behind(table, builtin, targets.index(own)) if last else targets[0] == own
        ):
            yield f"{program}: {builtin} in table {table.name} has not our jump {place}"


def _end(table: Table, builtin: str) -> int:
    """The number of rules ahead of the first that refuses everything."""
    entries = list(_raw(table, builtin))
    refusing = (i for i, entry in enumerate(entries) if _refuses_all(table, builtin, entry))
    return next(refusing, len(entries))


def _is_behind(table: Table, builtin: str, place: int) -> bool:
    """Return whether no rule that may refuse something stands between a place and the end."""
    end = _end(table, builtin)
    entries = list(_raw(table, builtin))[place + 1 : end]
    return place <= end and all(table.get_target(entry) in HARMLESS for entry in entries)


def _refuses_all(table: Table, chain: str, entry: Any) -> bool:  # noqa: ANN401
    """Return whether a rule refuses each packet, by itself or by a chain of such rules."""
    rule = _known_rule(entry, _chain(table, chain))
    target = table.get_target(entry).decode()
    matches = [match for match in rule.matches if match.name != "comment"]
    if matches or not _text(rule).startswith(("-j ", "-m comment")):
        return False
    if target in REFUSALS:
        return True
    inside = list(_raw(table, target)) if target in {each.name for each in table.chains} else []
    telling = [each for each in inside if table.get_target(each) != b"LOG"]
    return bool(telling) and _refuses_all(table, target, telling[0])


def _holds(chain: Chain, entries: list[Request]) -> bool:
    # Both sides in the words of the same library.
    held = [_text(_known_rule(entry, chain)) for entry in _raw(chain.table, chain.name)]
    return held == [_text(_rule(entry, chain)) for entry in entries]


VERBS = {
    "find": find,
    "replace": replace,
    "clear": clear,
    "list": listing,
    "own": own,
    "compare": compare,
}


def _existing(request: Request) -> list[str]:
    names = TABLE_NAMES[request["family"]]
    return names.read_text().split() if names.exists() else []


@contextmanager
def _locked() -> Iterator[None]:
    # libiptc reads a table, changes it and writes it back: two that do so at once
    # lose one change, or fail.
    # For root alone, as iptables has it: who can open it can keep others waiting.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(os.environ.get("XTABLES_LOCKFILE", LOCK), flags, 0o600)
    with os.fdopen(descriptor, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _iptc() -> Iptc:
    if "iptc" not in sys.modules:
        # Gone in Python 3.12, slow to load before, and asked for one path only.
        stub = types.ModuleType("distutils.sysconfig")
        stub.get_python_lib = lambda: sysconfig.get_path("purelib")  # type: ignore[attr-defined]
        sys.modules |= {"distutils": types.ModuleType("distutils"), stub.__name__: stub}
        ctypes.util.find_library = _find_library
        for directory in filter(Path.is_dir, _extensions()):
            os.environ.setdefault("XTABLES_LIBDIR", os.fspath(directory))
        import iptc  # noqa: F401 - returned from there
    return sys.modules["iptc"]


def _extensions() -> Iterator[Path]:
    """Where iptables' extensions usually are; else python-iptables scans all libraries."""
    yield Path("/usr/lib") / str(sysconfig.get_config_var("MULTIARCH")) / "xtables"
    yield Path("/usr/lib64/xtables")
    yield Path("/usr/lib/xtables")


def _find_library(name: str, otherwise: Search = ctypes.util.find_library) -> str | None:
    """The file name of a shared library, without the compiler runs that Python resorts to."""
    with suppress(OSError):
        if name in SONAMES:
            ctypes.CDLL(SONAMES[name])
            return SONAMES[name]
    # python-iptables' own, which lies beside it: it looks there next.
    return None if "xtwrapper" in name else otherwise(name)


@cache
def _adapt(family: int) -> None:
    """Let python-iptables 1.0.1 read the option tables of libxtables 1.8.11.

    Their entries have become longer by one field, so that it finds the first
    option of an extension and no other.
    """
    library: Library = sys.modules["iptc.xtables"]
    short = library.xt_option_entry

    class LongEntry(ctypes.Structure):
        _fields_ = [("entry", short), ("base", ctypes.c_size_t)]

    def lookup(_self: object, entries: Any, name: bytes) -> Any:  # noqa: ANN401
        table = ctypes.cast(entries, ctypes.POINTER(LongEntry))
        held = takewhile(lambda entry: entry.name, (table[i].entry for i in count()))
        return next((entry for entry in held if entry.name == name), None)

    # TCPMSS has two options, and the first has nothing in the new field: what follows a
    # short entry is the next one's name, or that nothing.
    protocol = library.NFPROTO_IPV4 if family == 4 else library.NFPROTO_IPV6
    options = library.xtables(protocol).find_target("TCPMSS")[0].x6_options
    words = ctypes.cast(options, ctypes.POINTER(ctypes.c_void_p))
    if not words[ctypes.sizeof(short) // ctypes.sizeof(ctypes.c_void_p)]:
        library.xtables._option_lookup = lookup


def _rule_class(table: Table) -> type[Rule]:
    base = _iptc().Rule6 if isinstance(table, _iptc().Table6) else _iptc().Rule

    class OwnTableRule(base):  # type: ignore[misc, valid-type]
        @property
        def tables(self) -> list[Table]:
            return [self.chain.table]

    return OwnTableRule


def _known_rule(entry: Any, chain: Chain) -> Rule:  # noqa: ANN401
    return _rule_class(chain.table)(entry, chain)


def _table(request: Request, name: str) -> Table:
    kind = _iptc().Table if request["family"] == 4 else _iptc().Table6
    _adapt(request["family"])
    # Otherwise each step would be a transaction of its own.
    return kind(name, autocommit=False)


def _chain(table: Table, name: str) -> Chain:
    return _iptc().Chain(table, name)


def _append(table: Table, name: str, entries: list[Request]) -> None:
    chain = _chain(table, name)
    for entry in entries:
        chain.append_rule(_rule(entry, chain))


def _rule(entry: Request, chain: Chain) -> Rule:
    rule = _rule_class(chain.table)(chain=chain)
    fields = {
        "src": entry["source"],
        "dst": entry["destination"],
        "in_interface": entry["iif"],
        "out_interface": entry["oif"],
        "protocol": entry["protocol"],
    }
    for field, value in fields.items():
        if value:
            setattr(rule, field, value)
    for module, parameters in entry["matches"]:
        _set(rule.create_match(module), parameters)
    name, parameters = entry["target"]
    _set(rule.create_target(name), parameters)
    _compare_whole_names(rule)
    return rule


def _compare_whole_names(rule: Rule) -> None:
    """Have the kernel compare all bits of interfaces' names.

    For IPv6, python-iptables 1.0.1 asks for the lowest bit of each letter: "lo" would be
    "virbr10", too.
    """
    for field in ("iniface_mask", "outiface_mask"):
        mask = getattr(rule.get_ip(), field)
        setattr(rule.get_ip(), field, b"\xff" * len(mask))


def _set(module: Module, parameters: dict[str, str | list[str]]) -> None:
    for key, value in parameters.items():
        module.set_parameter(key, value)


def _raw(table: Table, chain: str) -> Iterator[Any]:
    entry = table.first_rule(chain)
    while entry:
        yield entry
        entry = table.next_rule(entry)


def _unjump(table: Table, target: str) -> None:
    """Delete every jump to ``target``, leaving all others exactly as they are."""
    for chain in table.chains:
        entries = list(_raw(table, chain.name))
        for index in range(len(entries) - 1, -1, -1):
            if table.get_target(entries[index]) == target.encode():
                _delete(table, chain.name, index)


def _delete(table: Table, chain: str, index: int) -> None:
    # By number: python-iptables deletes by likeness only, and a rule that was
    # taken apart and put together again may be like another one.
    if not table._iptc.iptc_delete_num_entry(chain.encode(), index, table._handle):
        raise OSError(f"cannot delete rule {index + 1} of {chain}: {table.strerror()}")


def _dump(table: Table, note: str) -> str:
    chains = table.chains
    lines = []
    for chain in chains:
        policy = chain.get_policy().name if chain.is_builtin() else "-"
        rules = [_text(_known_rule(rule, chain)) for rule in _raw(table, chain.name)]
        if rules or policy != "ACCEPT":
            lines += [f":{chain.name} {policy}", *(f"-A {chain.name} {rule}" for rule in rules)]
    return "".join(f"{line}\n" for line in [f"*{table.name}{note}", *lines] if lines)


def _text(rule: Rule) -> str:
    options = {
        "-s": _unless_all(rule.src),
        "-d": _unless_all(rule.dst),
        "-i": rule.in_interface or "",
        "-o": rule.out_interface or "",
        "-p": "" if rule.protocol == "ip" else rule.protocol,
    }
    parts = [f"{option} {value}" for option, value in options.items() if value]
    parts += [_module_text("-m", match) for match in rule.matches]
    return " ".join([*parts, _module_text("-j", rule.target)])


def _unless_all(network: str) -> str:
    return "" if network in ("0.0.0.0/0.0.0.0", "::/0") else network


def _module_text(option: str, module: Module) -> str:
    parameters = module.get_all_parameters().items()
    texts = [f"--{key} {' '.join(value)}".rstrip() for key, value in parameters]
    return " ".join([option, module.name, *texts])


if __name__ == "__main__":
    sys.exit(main(json.load(sys.stdin)))
