# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rooms of the package: imports point down, each library has one importer, names are unique."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "libvirt_natns"
LIBRARIES = ("iptc", "libvirt", "lxml", "prometheus_client", "pyroute2", "sqlite3")

ROOMS = (
    ("ground",),
    ("model",),
    ("kernel",),
    ("daemons", "firewall", "state"),
    ("documents", "operations"),
    ("upstream",),
    ("engine",),
    ("service",),
    ("cli",),
    ("hook",),
)
"""From the ground up: a room imports from itself and from rooms below; those beside it not."""

IMPORTERS = {
    "iptc": {"firewall.iptc_library"},
    "libvirt": {"daemons.libvirt", "daemons.libvirt_events"},
    "lxml": {"documents.xml_tree"},
    "prometheus_client": {"service.metrics"},
    "pyroute2": {"kernel.route_socket"},
    "sqlite3": {"state.database", "state.recorded", "state.salvage"},
}

START = {"__main__"}
"""Runs the command line, and is imported by nothing."""


def modules() -> dict[str, Path]:
    """Return each module's file by its name below the package."""
    files = {file.relative_to(PACKAGE).with_suffix(""): file for file in PACKAGE.rglob("*.py")}
    names = {".".join(place.parts): file for place, file in files.items()}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


def room(module: str) -> str:
    """Return a module's room; modules that stand in none are the ground."""
    head, _, rest = module.partition(".")
    return head if rest or head == "hook" or (PACKAGE / head).is_dir() else "ground"


def imports(file: Path) -> Iterator[str]:
    """Yield all that a file imports, in functions and for types as well, dotted."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(module: str) -> set[str]:
    """Return the modules of the package that a module imports."""
    found = set()
    for name in imports(MODULES[module]):
        head, _, inner = name.partition(".")
        if head == PACKAGE.name:
            found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found - {""}


def types(module: str) -> Iterator[str]:
    """Yield the classes of a module, those inside of functions included, and its type aliases."""
    tree = ast.parse(MODULES[module].read_text())
    yield from (node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else ()
        for target in targets:
            if isinstance(target, ast.Name) and TYPE_NAME.fullmatch(target.id):
                yield target.id


def repeated(places: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the names that stand in more than one place, with these places."""
    return {name: modules for name, modules in places.items() if len(modules) > 1}


def private_names(file: Path) -> Iterator[str]:
    """Yield private names of other objects that a test reads, calls or replaces."""
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Attribute(ast.Name("self" | "cls")):
                continue
            case ast.Attribute(attr=name):
                pass
            case ast.Call(ast.Attribute(attr="setattr"), [_, ast.Constant(str(name)), *_]):
                pass
            case _:
                continue
        if re.match("_[a-z]|__defaults__", name):
            yield name


PRIVATE = {
    # A namedtuple's method, and the lists of a parser: they have no other names.
    "test_netlink_messages: _replace",
    "test_docs: _actions",
    "test_look: _actions",
    "test_messages_language: _actions",
    "test_completion: _actions",
    # Work after a start, whose fault no caller sees.
    "test_events: _beside",
    # State of the process, which each test begins anew.
    "test_hook: _ends",
    "test_one_pass: _parsed_network",
    # The system calls and sockets themselves.
    "test_netns: _call",
    "test_rtnetlink: _socket",
}
"""Private names that unit tests use, and why."""

TYPE_NAME = re.compile(r"_?[A-Z][a-z]\w*")
TWO_MEANINGS = {
    # Each backend's own places of the same chains.
    "Layout",
}
"""Names of types that two modules may use."""

MODULES = modules()
PLACE = {name: number for number, names in enumerate(ROOMS) for name in names}


def test_each_room_has_its_place() -> None:
    assert {room(module) for module in MODULES} == set(PLACE)


@pytest.mark.parametrize("module", sorted(MODULES.keys() - START))
def test_imports_point_down(module: str) -> None:
    own = room(module)
    above = {
        other
        for other in imported_modules(module)
        if room(other) != own and PLACE[room(other)] >= PLACE[own]
    }
    assert not above


def test_each_library_has_its_importer() -> None:
    importers: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        for name in imports(file):
            if (library := name.partition(".")[0]) in LIBRARIES:
                importers.setdefault(library, set()).add(module)
    assert importers == IMPORTERS


def test_unit_tests_use_public_names() -> None:
    """A test by a private name would hold the shape of the code, rather than what it does."""
    reached = {
        f"{file.stem}: {name}"
        for file in Path(__file__).parent.rglob("*.py")
        for name in private_names(file)
    }
    assert reached <= PRIVATE


def test_no_two_modules_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for module, file in MODULES.items():
        if file.stem != "__init__":
            places.setdefault(file.stem, []).append(module)
    assert not repeated(places)


def test_no_two_types_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for module in MODULES:
        for name in types(module):
            places.setdefault(name, []).append(module)
    assert repeated(places).keys() <= TWO_MEANINGS
