# SPDX-License-Identifier: LGPL-2.1-or-later
"""The parser of the command line: a mistake is told in one line, with the likeliest remedy.

A remedy is a command or an option of a similar name, or the place for a name that looks like an
option.  libvirt takes names of networks and guests that begin with "-".
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from libvirt_natns.values import alternatives, nearest, quoted


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with errors of one line and a line that names the help."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:  # noqa: ANN401
        super().__init__(*arguments, **keywords)
        self._given: list[str] = []

    # argparse has overloads, which say nothing more.
    def parse_args(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        namespace: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Return the options; end with status 2 for words that no command takes."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            is_option = unknown[0].startswith("-") and unknown[0] != "-"
            kind = "unknown option" if is_option else "unexpected argument"
            self.error(f"{kind} {shlex.quote(unknown[0])}")
        return options

    def parse_known_args(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        namespace: Any = None,  # noqa: ANN401
    ) -> tuple[Any, list[str]]:
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End with status 2, a line that says what is wrong, and a line that names the help."""
        meant = self._meant().prog
        fault = self._misspelt() or message + self._hint()
        self.exit(2, f"{meant}: {fault}\nsee {meant} --help\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:  # noqa: ANN401
        """Refuse a command, or a value of an option, that is none of the choices."""
        if action.choices is None or value in action.choices:
            return
        known = list(map(str, action.choices))
        close = nearest(str(value), known)
        hint = f"did you mean {close}?" if close else f"expected {alternatives(known)}"
        if isinstance(action, argparse._SubParsersAction):
            fact = f"there is no command {quoted(str(value))}: {hint}"
            raise argparse.ArgumentError(None, fact)
        raise argparse.ArgumentError(action, f"is {str(value)!r}: {hint}")

    # -- hints -----------------------------------------------------------------

    def _unknown(self) -> Iterator[tuple[str, str]]:
        """Yield each word that looks like an option and is none, with the word before it."""
        ahead = self._given[: self._given.index("--")] if "--" in self._given else self._given
        for before, word in zip(["", *ahead], ahead, strict=False):
            if word.startswith("-") and word != "-" and not self._option(word):
                yield before, word

    def _misspelt(self) -> str | None:
        """Return a message about a misspelt option, which makes other words look wrong."""
        for _, word in self._unknown():
            option = word.partition("=")[0]
            close = nearest(option, self._options()) if word.startswith("--") else None
            if close:
                return f"unknown option {shlex.quote(option)}: did you mean {close}?"
        return None

    def _hint(self) -> str:
        """Return how to type a name that begins with "-"; "" if there is no such word."""
        for before, word in self._unknown():
            option = None if "=" in before else self._option(before)
            # A flag takes no value.
            if option is not None and option.nargs != 0:
                return f': a value that begins with "-" is written {before}={shlex.quote(word)}'
            if any(not action.option_strings for action in self._meant()._actions):
                return f': a name that begins with "-" goes after "--": -- {shlex.quote(word)}'
        return ""

    def _meant(self) -> argparse.ArgumentParser:
        """Return the parser of the command, or of the command below it, that was typed."""
        parser: argparse.ArgumentParser = self
        for word in self._given:
            commands = _commands(parser)
            if word in commands:
                parser = commands[word]
            elif commands and not word.startswith("-"):
                break
        return parser

    def _options(self) -> Iterator[str]:
        """Yield the long options of the command that was typed."""
        for action in self._meant()._actions:
            yield from (option for option in action.option_strings if option.startswith("--"))

    def _option(self, word: str) -> argparse.Action | None:
        """Return the option of that name, of this parser or of one of its commands.

        A long option may be shortened.
        """
        option = word.partition("=")[0]
        parsers: list[argparse.ArgumentParser] = [self]
        while parsers:
            parser = parsers.pop()
            for action in parser._actions:
                shortened = len(option) > 2 and option.startswith("--")
                if any(
                    option == each or (shortened and each.startswith(option))
                    for each in action.option_strings
                ):
                    return action
            parsers += _commands(parser).values()
        return None


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the commands below a parser, by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}
