# SPDX-License-Identifier: LGPL-2.1-or-later
"""A table of the configuration file, and readers for the values of its keys.

A reader takes the table and a key that the table has.  It returns the key's value, or
raises a ConfigError of one line: the file, the key, the value and what was expected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from libvirt_natns.errors import ConfigError
from libvirt_natns.values import alternatives, shown

Value = TypeVar("Value")

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""Names of upstreams, and keys that a message shows without quotes."""


@dataclass(frozen=True, slots=True)
class TomlTable:
    """A table of the file, and its place there: "" or "upstreams.NAME."."""

    where: str
    prefix: str
    data: dict[str, Any]

    def error(self, key: str, fact: str, expected: str) -> ConfigError:
        """Return an error about ``key``."""
        return ConfigError(f"{self.where}: {self.prefix}{key}: {fact}", f"expected {expected}")

    def wrong(self, key: str, value: object, expected: str) -> ConfigError:
        """Return an error about the value of ``key``."""
        return self.error(key, f"is {shown(value)}", expected)

    def only(self, keys: Iterable[str], of: str = "") -> None:
        """Refuse any key beside ``keys``; ``of`` names the owner of the keys, in words."""
        allowed = sorted(keys)
        for key in self.data:
            if key not in allowed:
                from difflib import get_close_matches

                close = get_close_matches(key, allowed, n=1)
                hint = f"{close[0]} (did you mean that?)" if close else alternatives(allowed)
                name = key if NAME.fullmatch(key) else shown(key)
                raise self.error(name, f"unknown key{of}", hint)


Reader = Callable[[TomlTable, str], Any]


def text(pattern: re.Pattern[str], expected: str) -> Reader:
    """Return a reader for a string that matches ``pattern``."""

    def read(table: TomlTable, key: str) -> str:
        value = table.data[key]
        if not (isinstance(value, str) and pattern.fullmatch(value)):
            raise table.wrong(key, value, expected)
        return value

    return read


def choice(options: tuple[str, ...]) -> Reader:
    """Return a reader for a string that is one of ``options``."""

    def read(table: TomlTable, key: str) -> str:
        value = table.data[key]
        if value not in options:
            raise table.wrong(key, value, alternatives([f'"{option}"' for option in options]))
        return str(value)

    return read


def one(make: Callable[[str], Value], expected: str) -> Reader:
    """Return a reader for a string, of which ``make`` makes the value."""

    def read(table: TomlTable, key: str) -> Value:
        return _made(table, key, table.data[key], make, expected)

    return read


def several(make: Callable[[str], Value], expected: str) -> Reader:
    """Return a reader for an array of strings; ``make`` makes a value of each."""

    def read(table: TomlTable, key: str) -> tuple[Value, ...]:
        values = table.data[key]
        if not isinstance(values, list):
            raise table.wrong(key, values, f"an array, each {expected}")
        return tuple(
            _made(table, f"{key}[{number}]", value, make, expected)
            for number, value in enumerate(values)
        )

    return read


def _made(
    table: TomlTable, key: str, value: object, make: Callable[[str], Value], expected: str
) -> Value:
    try:
        # ipaddress takes anything for an IPv6 scope that follows a "%".
        if isinstance(value, str) and "%" not in value:
            return make(value)
    except ValueError:
        pass
    raise table.wrong(key, value, expected)


def seconds(most: float) -> Reader:
    """Return a reader for a time from 0 to ``most`` seconds."""

    def read(table: TomlTable, key: str) -> float:
        value = table.data[key]
        # A bool is an int to Python, and nan is in no range.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise table.wrong(key, value, f"seconds from 0 to {most:g}")
        return float(value)

    return read


def number(allowed: range) -> Reader:
    """Return a reader for a whole number in a range."""

    def read(table: TomlTable, key: str) -> int:
        value = table.data[key]
        if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
            raise table.wrong(key, value, f"a number from {allowed[0]} to {allowed[-1]}")
        return value

    return read
