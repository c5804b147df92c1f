# SPDX-License-Identifier: LGPL-2.1-or-later
"""An entry of a chain in iptables' own words: the same for the child, for people and for tests."""

from dataclasses import dataclass

Parameters = dict[str, str | list[str]]
Match = tuple[str, Parameters]
"""A module of iptables with its options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainEntry:
    """An entry of a chain, in iptables' own words; "!" in front negates a value."""

    source: str = ""
    destination: str = ""
    iif: str = ""
    oif: str = ""
    protocol: str = ""
    matches: tuple[Match, ...] = ()
    target: Match

    def __str__(self) -> str:
        parts = [
            _option(option, value)
            for option, value in (
                ("-s", self.source),
                ("-d", self.destination),
                ("-i", self.iif),
                ("-o", self.oif),
                ("-p", self.protocol),
            )
            if value
        ]
        parts += [f"-m {module}{_parameters(values)}" for module, values in self.matches]
        return " ".join([*parts, f"-j {self.target[0]}{_parameters(self.target[1])}"])


def _option(option: str, value: str) -> str:
    return (
        f"! {option} {value[1:].lstrip()}".rstrip()
        if value.startswith("!")
        else f"{option} {value}".rstrip()
    )


def _parameters(values: Parameters) -> str:
    return "".join(f" {_option(f'--{key}', _word(value))}" for key, value in values.items())


def _word(value: str | list[str]) -> str:
    if isinstance(value, list):
        return " ".join(value)
    return f'"{value}"' if " " in value else value
