#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write the grammar of the command line into the completions for bash, zsh and fish.

    contrib/completion/generate.py

The parser of virt-natns has the commands, options and operands.  The rest of each file is written
by hand.  Run the program after each change of the parser; tests/unit/test_completion.py tells if
that was forgotten.

Names of networks and guests come from virsh at each Tab.  Libraries that complete from argparse
were tried: argcomplete starts our interpreter at each Tab, which takes longer than a person waits
for.  shtab knows no fish, and writes no names with blanks.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))

from libvirt_natns.cli import commands  # noqa: E402 - the checkout's own package

NAMES = """
driver=libvirt/connection-driver/libvirt_driver_lxc.so
ask() {
    timeout 2 virsh -r -q -c "$@"
}
case $1 in
networks) ask qemu:///system net-list --all --name ;;
active) ask qemu:///system net-list --name ;;
guests)
    ask qemu:///system list --all --name
    for file in /usr/lib*/$driver /usr/lib/*/$driver; do
        [ ! -e "$file" ] || ask lxc:///system list --all --name
    done
    ;;
routers)
    sed -n -e "/^ *\\[upstreams\\./{s/^ *\\[upstreams\\.\\([A-Za-z0-9_-]*\\)].*/\\1/;h;}" \\
        -e "/^ *kind *= *.router/{g;p;}" /etc/libvirt-natns/config.toml
    ;;
esac 2>/dev/null | grep .
"""
"""Prints names of one kind, for any POSIX shell.  It has no single quote."""

KINDS = {
    "network": "networks",
    "plan network": "networks|files",
    "check network": "active",
    "exec network": "active",
    "guest": "guests",
    "name": "routers",
    "files": "files",
    "file": "files",
    "argv": "command",
    "spec": "text",
    "mac": "text",
    "source": "text",
    "guest_address": "text",
    "confirm_within": "text",
}
"""The words for an operand or for the value of an option, by its name, or command and name."""


@dataclass(frozen=True)
class Argument:
    """An operand, or an option with the names that it is typed by.

    ``kind`` is the kind of its words: None for a flag, and "=A B" for a choice.
    """

    label: str
    help: str
    kind: str | None
    options: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    optional: bool = False
    repeated: bool = False


@dataclass(frozen=True)
class Command:
    """A command, by its path such as ("forward", "add"); with ``below``, it has commands."""

    path: tuple[str, ...]
    help: str
    options: tuple[Argument, ...]
    operands: tuple[Argument, ...]
    below: tuple["Command", ...]

    @property
    def words(self) -> str:
        """The path as it is typed."""
        return " ".join(self.path)

    def all(self) -> Iterator["Command"]:
        """Yield the command and all commands below it."""
        yield self
        for command in self.below:
            yield from command.all()


def grammar() -> Command:
    """Return the grammar of the parser."""
    return _command(commands.make_parser(), (), "")


def _command(parser: argparse.ArgumentParser, path: tuple[str, ...], text: str) -> Command:
    options, operands, below = list[Argument](), list[Argument](), list[Command]()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            below += (
                _command(inner, (*path, name), helps[name])
                for name, inner in action.choices.items()
            )
        elif action.option_strings:
            options.append(_option(parser, action, path))
        else:
            operands.append(_argument(action, path))
    return Command(path, text, tuple(options), tuple(operands), tuple(below))


def _option(
    parser: argparse.ArgumentParser, action: argparse.Action, path: tuple[str, ...]
) -> Argument:
    made = _argument(action, path) if action.nargs != 0 else None
    others = [
        name
        for group in parser._mutually_exclusive_groups
        if action in group._group_actions
        for other in group._group_actions
        if other is not action
        for name in other.option_strings
    ]
    return Argument(
        label=made.label if made else "",
        help=_plain(action),
        kind=made.kind if made else None,
        options=tuple(action.option_strings),
        excludes=tuple(others),
    )


def _argument(action: argparse.Action, path: tuple[str, ...]) -> Argument:
    if action.choices is not None:
        kind = f"={' '.join(map(str, action.choices))}"
    else:
        own = f"{' '.join(path)} {action.dest}"
        kind = KINDS[own] if own in KINDS else KINDS[action.dest]
    return Argument(
        label=action.dest.replace("_", " "),
        help=_plain(action),
        kind=kind,
        optional=action.nargs in ("?", "*"),
        repeated=action.nargs in ("*", "+", argparse.REMAINDER),
    )


def _plain(action: argparse.Action) -> str:
    """Return a help text without values that argparse would fill in."""
    return (action.help or "").replace("%(prog)s", "virt-natns")


def quoted(text: str) -> str:
    """Return a word for a POSIX shell, always in single quotes."""
    return "'" + text.replace("'", "'\\''") + "'"


# -- bash ----------------------------------------------------------------------


def bash(command: Command) -> Iterator[str]:
    """Yield the cases of the grammar for bash."""
    for each in command.all():
        yield f"{quoted(each.words)})"
        if each.below:
            yield f"    commands={quoted(' '.join(below.path[-1] for below in each.below))}"
        yield f"    options={quoted(' '.join(o for a in each.options for o in a.options))}"
        values = [f"[{o}]={quoted(a.kind)}" for a in each.options if a.kind for o in a.options]
        if values:
            yield f"    values=({' '.join(values)})"
        if each.operands:
            yield f"    operands=({' '.join(quoted(a.kind or '') for a in each.operands)})"
        yield "    ;;"


# -- zsh -----------------------------------------------------------------------


def zsh(command: Command) -> Iterator[str]:
    """Yield the cases of the grammar for zsh, in the words of _arguments and _describe."""
    for each in command.all():
        yield f"{quoted(each.words)})"
        if each.below:
            yield "    commands=("
            for below in each.below:
                described = f"{below.path[-1]}:{_escaped(below.help, ':')}"
                yield f"        {quoted(described)}"
            yield "    )"
        yield "    specs=("
        for argument in each.options:
            yield from (f"        {quoted(spec)}" for spec in _zsh_option(argument))
        for number, argument in enumerate(each.operands, 1):
            yield f"        {quoted(_zsh_operand(argument, number))}"
        yield "    )"
        yield "    ;;"


def _zsh_option(argument: Argument) -> Iterator[str]:
    is_last = {"-h", "--help", "--version"} & set(argument.options)
    apart = "- : *" if is_last else " ".join((*argument.options, *argument.excludes))
    value = f":{argument.label}:{_zsh_action(argument)}" if argument.kind else ""
    for option in argument.options:
        equals = "=" if value and option.startswith("--") else ""
        yield f"({apart}){option}{equals}[{_escaped(argument.help, '[]:')}]{value}"


def _zsh_operand(argument: Argument, number: int) -> str:
    if argument.kind == "command":
        return f"*:::{argument.label}:_normal"
    place = "*" if argument.repeated else f"{number}:" if argument.optional else str(number)
    return f"{place}:{argument.label}:{_zsh_action(argument)}"


def _zsh_action(argument: Argument) -> str:
    kind = argument.kind or ""
    if kind.startswith("="):
        return f"({kind[1:]})"
    if kind.endswith("|files"):
        return f" _virt_natns_names_or_files {kind.removesuffix('|files')}"
    # Behind a blank, _arguments adds no words of its own to a call.
    return {"files": "_files", "text": " "}.get(kind, f" _virt_natns_names {kind}")


def _escaped(text: str, characters: str) -> str:
    return re.sub(f"[{re.escape(characters)}]", r"\\\g<0>", text)


# -- fish ----------------------------------------------------------------------


def fish(command: Command) -> Iterator[str]:
    """Yield the lines of the grammar for fish."""
    everything = list(command.all())
    valued = sorted({o for c in everything for a in c.options if a.kind for o in a.options})
    yield f"set -g __virt_natns_with_value {' '.join(valued)}"
    paths = [_fish(each.words) for each in everything if each.path]
    yield f"set -g __virt_natns_paths {' '.join(paths)}"
    for each in everything:
        yield ""
        for below in each.below:
            here = f"__virt_natns_at {_fish(each.words)} 0"
            yield _complete(here, f"-a {below.path[-1]}", below.help)
        for argument in each.options:
            here = f"__virt_natns_in {_fish(each.words)}"
            names = [f"-s {o[1:]}" if o[1] != "-" else f"-l {o[2:]}" for o in argument.options]
            yield _complete(here, " ".join([*names, *_fish_words(argument)]), argument.help)
        for number, argument in enumerate(each.operands):
            place = _fish("*") if argument.repeated else str(number)
            here = f"__virt_natns_at {_fish(each.words)} {place}"
            for words in _fish_words(argument):
                yield _complete(here, words.removeprefix("-x "), argument.help)


def _fish_words(argument: Argument) -> list[str]:
    """Return the options of complete(1) for the words of an argument; none for a flag."""
    kind = argument.kind
    if kind is None:
        return []
    if kind.startswith("="):
        return [f"-x -a {_fish(kind[1:])}"]
    if kind == "text":
        return ["-x"] if argument.options else []
    if kind == "command":
        return ["-a '(__virt_natns_command)'"]
    names, _, files = kind.partition("|")
    made = [] if names == "files" else [f"-x -a '(__virt_natns_names {names})'"]
    return [*made, "-F"] if "files" in (names, files) else made


def _complete(here: str, words: str, text: str) -> str:
    # A word of the shell within a word: the condition is parsed once more.
    return f"complete -c virt-natns -n {_fish(here)} {words} -d {_fish(text)}"


def _fish(text: str) -> str:
    """Return a word for fish, always in single quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# -- files ---------------------------------------------------------------------


def in_posix_shell(_: Command) -> Iterator[str]:
    """Yield the command that prints names, for a function of bash or zsh."""
    yield from f'sh -c {quoted(NAMES)} sh "$1"'.splitlines()


def in_fish(_: Command) -> Iterator[str]:
    """Yield the command that sets names, for a function of fish."""
    yield from f"set -l names (sh -c {_fish(NAMES)} sh $argv)".splitlines()


PARTS: dict[str, dict[str, Any]] = {
    "virt-natns": {"names": in_posix_shell, "grammar": bash},
    "_virt-natns": {"names": in_posix_shell, "grammar": zsh},
    "virt-natns.fish": {"names": in_fish, "grammar": fish},
}
"""The files, and the writer of each part between two marks."""


def completed(file: str) -> str:
    """Return the content of a file with today's grammar."""
    text = (HERE / file).read_text()
    for part, write in PARTS[file].items():
        marks = re.compile(rf"(?ms)^( *)# begin: {part}\n.*?^ *# end: {part}\n")
        found = marks.search(text)
        if found is None:
            raise ValueError(f"{file} has no marks for {part}")
        # A line within a quoted word keeps its beginning: the text of names is not indented.
        indent = "" if part == "names" else found[1]
        lines = [f"{indent}{line}".rstrip() for line in write(grammar())]
        if part == "names":
            lines[0] = found[1] + lines[0]
        whole = [f"{found[1]}# begin: {part}", *lines, f"{found[1]}# end: {part}", ""]
        text = text[: found.start()] + "\n".join(whole) + text[found.end() :]
    return text


def main() -> None:
    """Write all files."""
    for file in PARTS:
        (HERE / file).write_text(completed(file))


if __name__ == "__main__":
    main()
