# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files in contrib/completion are those that the parser gives, and their shells parse them."""

import argparse
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from libvirt_natns.cli import commands

DIRECTORY = Path(__file__).resolve().parents[2] / "contrib" / "completion"
SHELLS = {"virt-natns": "bash", "_virt-natns": "zsh", "virt-natns.fish": "fish"}


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DIRECTORY / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    # Data classes look their module up.
    sys.modules["generate"] = module
    spec.loader.exec_module(module)
    return module


generate = load()


def arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the options and operands of a parser and of all below it."""
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for below in action.choices.values():
                yield from arguments(below)
        else:
            yield action


@pytest.mark.parametrize("file", SHELLS)
def test_the_file_has_the_grammar_of_the_parser(file: str) -> None:
    written = (DIRECTORY / file).read_text()
    assert written == generate.completed(file), "run contrib/completion/generate.py"


@pytest.mark.parametrize("file", SHELLS)
def test_a_change_of_the_parser_changes_the_file(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parser() -> argparse.ArgumentParser:
        made = argparse.ArgumentParser(prog="virt-natns")
        below = made.add_subparsers()
        below.add_parser("another", help="another's command").add_argument("--guest-of")
        return made

    monkeypatch.setattr(commands, "make_parser", parser)
    # Nobody has said what the words of a new option are.
    with pytest.raises(KeyError, match="guest_of"):
        generate.completed(file)
    monkeypatch.setitem(generate.KINDS, "guest_of", "guests")
    completed = generate.completed(file)
    assert "another" in completed
    assert "guest-of" in completed
    assert "forward" not in completed.partition("begin: grammar")[2]


def test_every_argument_is_there() -> None:
    whole = list(arguments(commands.make_parser()))
    made = [each for command in generate.grammar().all() for each in
            (*command.options, *command.operands)]  # fmt: skip
    assert len(made) == len(whole) > 40
    options = {name for action in whole for name in action.option_strings}
    assert options == {name for each in made for name in each.options}


def test_no_kind_is_left_over() -> None:
    known = {action.dest for action in arguments(commands.make_parser())}
    assert {kind.rpartition(" ")[2] for kind in generate.KINDS} <= known


@pytest.mark.parametrize("file", SHELLS)
def test_the_shell_parses_its_file(file: str) -> None:
    shell = SHELLS[file]
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", DIRECTORY / file], check=True, capture_output=True)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_bash_has_no_warning() -> None:
    done = subprocess.run(
        ["shellcheck", "--shell=bash", "--severity=warning", DIRECTORY / "virt-natns"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == ""


def test_names_are_a_script_of_any_shell() -> None:
    # The text stands in single quotes, in three shells.
    assert "'" not in generate.NAMES
    done = subprocess.run(
        ["sh", "-euc", generate.NAMES, "sh", "no-such-kind"], capture_output=True, check=False
    )
    assert (done.stdout, done.stderr) == (b"", b"")
