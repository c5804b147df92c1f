# SPDX-License-Identifier: LGPL-2.1-or-later
"""The importer of python-iptables (iptc), with repairs of its version 1.0.1.

python-iptables asks every table that the kernel knows whether a target is a
chain of it, and asking creates the table.  The subclasses here let a rule ask
its own table only.

Only ``iptables_child`` and the modules that it imports use this module.
"""

import ctypes
import ctypes.util
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from typing import Any

SONAMES = {
    "c": "libc.so.6",
    "xtables": "libxtables.so.12",
    "ip4tc": "libip4tc.so.2",
    "ip6tc": "libip6tc.so.2",
}
"""Where the libraries that python-iptables looks for usually are."""

Search = Callable[[str], str | None]

# python-iptables carries no types; these say which of its classes is meant.
Iptc = Any
Library = Any
IptcTable = Any
IptcChain = Any
IptcRule = Any
IptcModule = Any


def iptc() -> Iptc:
    """Load python-iptables and return its package."""
    if "iptc" not in sys.modules:
        # distutils: gone in Python 3.12, slow to load before, and asked for one path only.
        stub = types.ModuleType("distutils.sysconfig")
        stub.get_python_lib = lambda: sysconfig.get_path("purelib")  # type: ignore[attr-defined]
        sys.modules |= {"distutils": types.ModuleType("distutils"), stub.__name__: stub}
        ctypes.util.find_library = _find_library
        for directory in filter(Path.is_dir, _extensions()):
            os.environ.setdefault("XTABLES_LIBDIR", os.fspath(directory))
        import iptc  # noqa: F401 - returned from there
    return sys.modules["iptc"]


def _extensions() -> Iterator[Path]:
    """Yield the usual places of iptables' extensions; else python-iptables scans all libraries."""
    yield Path("/usr/lib") / str(sysconfig.get_config_var("MULTIARCH")) / "xtables"
    yield Path("/usr/lib64/xtables")
    yield Path("/usr/lib/xtables")


def _find_library(name: str, otherwise: Search = ctypes.util.find_library) -> str | None:
    """Return the file name of a shared library, without the compiler runs of Python's search."""
    with suppress(OSError):
        if name in SONAMES:
            ctypes.CDLL(SONAMES[name])
            return SONAMES[name]
    # The wrapper lies beside python-iptables, which looks there next.
    return None if "xtwrapper" in name else otherwise(name)


@cache
def adapt(family: int) -> None:
    """Let python-iptables 1.0.1 read the option tables of libxtables 1.8.11.

    Their entries have become longer by one field, so python-iptables finds the first
    option of an extension and no other.
    """
    library: Library = sys.modules["iptc.xtables"]
    short = library.xt_option_entry

    class LongEntry(ctypes.Structure):
        _fields_ = [("entry", short), ("base", ctypes.c_size_t)]

    def lookup(_self: object, entries: Any, name: bytes) -> Any:  # noqa: ANN401
        table = ctypes.cast(entries, ctypes.POINTER(LongEntry))
        entries_of_table = takewhile(lambda entry: entry.name, (table[i].entry for i in count()))
        return next((entry for entry in entries_of_table if entry.name == name), None)

    # TCPMSS has two options, and the new field of the first is zero.  A short entry is
    # followed by the name of the next entry, a long one by that zero.
    protocol = library.NFPROTO_IPV4 if family == 4 else library.NFPROTO_IPV6
    options = library.xtables(protocol).find_target("TCPMSS")[0].x6_options
    words = ctypes.cast(options, ctypes.POINTER(ctypes.c_void_p))
    if not words[ctypes.sizeof(short) // ctypes.sizeof(ctypes.c_void_p)]:
        library.xtables._option_lookup = lookup


def rule_class(table: IptcTable) -> type[IptcRule]:
    """Return the class of a table's rules, which ask no other table."""
    base = iptc().Rule6 if isinstance(table, iptc().Table6) else iptc().Rule

    class OwnTableRule(base):  # type: ignore[misc, valid-type]
        @property
        def tables(self) -> list[IptcTable]:
            return [self.chain.table]

    return OwnTableRule


def known_rule(entry: Any, chain: IptcChain) -> IptcRule:  # noqa: ANN401
    """Return an entry that the kernel holds as a rule."""
    return rule_class(chain.table)(entry, chain)
