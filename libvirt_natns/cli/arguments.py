# SPDX-License-Identifier: LGPL-2.1-or-later
"""The parser of the command line, with a hint for names that look like options.

libvirt takes names of networks and guests that begin with "-".
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with a hint in the message where a name may be taken for an option."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:  # noqa: ANN401
        super().__init__(*arguments, **keywords)
        self._given: list[str] = []

    # argparse has overloads, which say nothing more.
    def parse_known_args(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        namespace: Any = None,  # noqa: ANN401
    ) -> tuple[Any, list[str]]:
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End with status 2, the usage and a line that says what is wrong."""
        super().error(message + self._hint())

    def _hint(self) -> str:
        """Return how to type a name that begins with "-"; "" if there is no such word."""
        ahead = self._given[: self._given.index("--")] if "--" in self._given else self._given
        for before, word in zip(["", *ahead], ahead, strict=False):
            if not word.startswith("-") or word == "-" or self._option(word):
                continue
            option = None if "=" in before else self._option(before)
            # A flag takes no value.
            if option is not None and option.nargs != 0:
                return f': a value that begins with "-" is written {before}={shlex.quote(word)}'
            return f': a name that begins with "-" goes after "--": -- {shlex.quote(word)}'
        return ""

    def _option(self, word: str) -> argparse.Action | None:
        """Return the option of that name, of this parser or of one of its commands."""
        option = word.partition("=")[0]
        parsers: list[argparse.ArgumentParser] = [self]
        while parsers:
            for action in parsers.pop()._actions:
                if option in action.option_strings:
                    return action
                if isinstance(action, argparse._SubParsersAction):
                    parsers += action.choices.values()
        return None
