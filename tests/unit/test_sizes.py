# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sizes of the package's modules, classes and functions, and counts of parameters."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "libvirt_natns"
MODULES = sorted(PACKAGE.rglob("*.py"))

MODULE_LINES = 300
FUNCTION_LINES = 50
METHODS = 20
PARAMETERS = 6

Function = ast.FunctionDef | ast.AsyncFunctionDef


def excesses(source: str) -> Iterator[str]:
    """Yield in words what is too large in a module."""
    lines = len(source.splitlines())
    if lines > MODULE_LINES:
        yield f"{lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            methods = sum(isinstance(part, Function) for part in node.body)
            if methods > METHODS:
                yield f"class {node.name}: {methods} methods"
        if isinstance(node, Function):
            yield from excesses_of(node)


def excesses_of(function: Function) -> Iterator[str]:
    """Yield in words what is too large in a function, without ``self`` and decorators."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if lines > FUNCTION_LINES:
        yield f"{function.name}: {lines} lines"
    listed = function.args
    parameters = [*listed.posonlyargs, *listed.args, *listed.kwonlyargs]
    own = [parameter for parameter in parameters if parameter.arg not in ("self", "cls")]
    if len(own) > PARAMETERS:
        yield f"{function.name}: {len(own)} parameters"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_can_be_read_in_one_go(module: Path) -> None:
    assert list(excesses(module.read_text())) == []


def test_what_is_too_large_is_seen() -> None:
    names = ", ".join(f"p{number}" for number in range(PARAMETERS + 1))
    method = "    def m{}(self): pass\n"
    source = (
        "class C:\n"
        + "".join(method.format(number) for number in range(METHODS + 1))
        + f"def f({names}):\n"
        + "    pass\n" * FUNCTION_LINES
        + "\n" * MODULE_LINES
    )
    assert [text.split(":")[0] for text in excesses(source)] == ["373 lines", "class C", "f", "f"]
