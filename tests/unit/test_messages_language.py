# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages, remedies, plans and help texts are plain: no banned word, and no long sentence.

All literals of the package that read as text are examined, also parts of a message.  Texts in
other languages (SQL, shell, nft, regular expressions) are left out.
"""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from libvirt_natns.cli import commands

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGE = CHECKOUT / "libvirt_natns"
HOOKS = ("network", "qemu", "lxc")

LONGEST = 30
"""Words of a sentence."""

BANNED = re.compile(
    r"\b(what|who|whom|whose|whoever|whomever|whatever|whichever|nobody|somebody|anybody|meanwhile"
    r"|mends?|mended|stand-ins?|those (?:that|who)|that one|such an? one|cut flows|for no reason"
    r"|not so|guests' own|in vain)\b",
    re.IGNORECASE,
)

BEGINNING = re.compile(r"(one|those|such)\b", re.IGNORECASE)
"""First words that name nothing, beside the banned ones."""

FOREIGN = re.compile(
    r"\b(SELECT|INSERT|UPDATE|DELETE|CREATE|DROP|PRAGMA|BEGIN|UNION|CASE|EXISTS)\b|#!/bin/sh"
)
"""Parts of SQL statements and of shell scripts."""


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each literal that is no docstring; "{}" for values."""
    tree = ast.parse(source)
    parts = set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            parts.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            parts.update(map(id, node.values))
    for node in ast.walk(tree):
        if id(node) in parts:
            continue
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "{}"
                    for part in node.values
                ),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def fault(text: str) -> str | None:
    """Return what is wrong with a message, a part of it or a help text; None for a good text."""
    if " " not in text or FOREIGN.search(text):
        return None
    banned = BANNED.search(text)
    if banned:
        return f"{banned[0]!r} is not plain English"
    if BEGINNING.match(text):
        return f"{text.split()[0]!r} is not a beginning"
    for sentence in re.split(r"[.;:]\s|\n", text):
        if len(sentence.split()) > LONGEST:
            return f"a sentence of {len(sentence.split())} words"
    return None


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_messages_of_a_module(path: Path) -> None:
    faults = [
        f"{path.relative_to(CHECKOUT)}:{line}: {wrong}: {text}"
        for line, text in texts(path.read_text())
        if (wrong := fault(text))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("hook", HOOKS)
def test_messages_of_a_hook(hook: str) -> None:
    printed = re.findall(r'echo "([^"]+)" >&2', (CHECKOUT / "hooks" / hook).read_text())
    assert printed
    assert not [text for text in printed if fault(text)]


def arguments(parser: argparse.ArgumentParser, command: str) -> Iterator[tuple[str, str | None]]:
    """Yield the name and the help text of each argument of a command and of those below it."""
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for name, below in action.choices.items():
                yield from arguments(below, f"{command} {name}")
        else:
            yield f"{command} {action.dest}", action.help


def test_a_help_text_for_each_argument() -> None:
    listed = list(arguments(commands.make_parser(), "virt-natns"))
    assert len(listed) > 40
    assert not [argument for argument, text in listed if not text]


@pytest.mark.parametrize(
    "text",
    [
        "create it, or mend {}",
        "cannot start what takes the router back in time",
        "dnsmasq of {} runs for no reason",
        "{}: not so, or more than that",
        "cannot cut flows in {}",
        "one such as {}",
        "those that are active in libvirt have their routers",
        "{} was leased to another meanwhile",
        "somebody changes the rules of {}",
        "a " + "very " * LONGEST + "long sentence",
    ],
)
def test_texts_that_are_refused(text: str) -> None:
    assert fault(text)


@pytest.mark.parametrize(
    "text",
    [
        "dnsmasq of {} should not run",
        "network {}: there is no upstream {}",
        "none",
        "SELECT one FROM whose",
        "address {} is {} instead of {}",
        "; ".join(["a sentence " + "word " * 20] * 3),
    ],
)
def test_texts_that_are_taken(text: str) -> None:
    assert fault(text) is None


AS_RECORDED = {
    "engine/publication/resolve.py: {network.name}",
    "engine/publication/resolve.py: {domain.name}",
    "engine/publication/static_nat.py: {domain.name}",
}
"""Owners of claims, by which a claim of an earlier version is the same claim."""


def test_names_of_networks_and_guests_are_quoted() -> None:
    """libvirt takes names with blanks and quotes; ``values.quoted`` leaves plain names."""
    bare = {
        f"{file.relative_to(PACKAGE)}: {name}"
        for file in PACKAGE.rglob("*.py")
        for name in re.findall(r"\b(?:network|guest) (\{[a-z_.]*name\})", file.read_text())
    }
    assert bare == AS_RECORDED
