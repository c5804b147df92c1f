# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration file, /etc/libvirt-natns/config.toml, as a ``Config``.

Every key is optional, and so is the file; its content must be right.  A wrong key, type or value is
a ConfigError of one line: the file, the key, the value and what was expected.  The reader looks up
no bridge: a network that needs a bridge finds out whether it exists.
"""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import get_args

from libvirt_natns import names
from libvirt_natns.documents import config_spans, config_upstream
from libvirt_natns.documents.config_table import NAME, TomlTable, choice, text
from libvirt_natns.errors import ConfigError
from libvirt_natns.model.configuration import Config, FirewallChoice, Scope
from libvirt_natns.model.metadata import DefaultRoute
from libvirt_natns.model.upstream import (
    HOST_UPSTREAM,
    BridgeUpstream,
    Upstream,
)
from libvirt_natns.values import alternatives, shown

BARE_TEXT = r"([\w.-]+)\s*=\s*([A-Za-z_][^\s\"'#]*)"
"""A key with a word for a value."""

AUTO_PORTS_EXPECTED = 'a range of ports such as "20000-29999"'
AUTO_PORTS = text(re.compile(r"[0-9]{1,5}-[0-9]{1,5}"), AUTO_PORTS_EXPECTED)


def load(path: Path | None = None) -> Config:
    """Return the configuration in ``path``; the defaults where there is no such file.

    Without ``path``, the machine's own file counts.  ConfigError if it cannot be read or
    something in it is wrong.
    """
    path = names.CONFIG_FILE if path is None else path
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Config()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "make it a readable file") from error
    return parse_octets(content, str(path))


def parse_octets(content: bytes, where: str) -> Config:
    """Return the configuration in a file's content, see ``parse``."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        fact = f"{where}: not UTF-8 at byte {error.start}"
        raise ConfigError(fact, "save it as UTF-8") from error
    return parse(text, where)


def parse(content: str, where: str) -> Config:
    """Return the configuration in a text; ``where`` is the file's name in messages.

    ConfigError if something in it is wrong.
    """
    # Needless where there is no configuration: hooks are waited for.
    import tomllib

    try:
        data = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        reason = f"{error}{_in_line(content, str(error))}"
        raise ConfigError(f"{where}: not valid TOML", reason) from error
    except RecursionError:
        raise ConfigError(f"{where}: not valid TOML", "too deeply nested") from None
    except ValueError:
        # Python converts no decimal integer of more than 4300 digits.
        raise ConfigError(f"{where}: not valid TOML", "a number is too long") from None
    table = TomlTable(where, "", data)
    table.only(KEYS)
    upstreams = _upstreams(table)
    name = data.get("upstream", HOST_UPSTREAM.name)
    if not isinstance(name, str) or name not in upstreams:
        expected = alternatives([f'"{upstream}"' for upstream in sorted(upstreams)])
        raise table.wrong("upstream", name, f"{expected}, or a table [upstreams.NAME]")
    values = {key: read(table, key) for key, read in READERS.items() if key in data}
    return Config(upstream=name, upstreams=upstreams, **values)


def _in_line(content: str, reason: str) -> str:
    """Return the line that TOML refuses, with the remedy for a value without quotes."""
    place = re.search(r"at line (\d+)", reason)
    if place is None:
        return ""
    # TOML's lines end with a newline alone.
    line = content.split("\n")[int(place[1]) - 1].strip()
    bare = re.fullmatch(BARE_TEXT, line)
    remedy = f': a text needs quotes: {bare[1]} = "{bare[2]}"' if bare else ""
    return f": {shown(line)}{remedy}" if line else ""


def _auto_ports(table: TomlTable, key: str) -> tuple[int, int]:
    """Return the range of ports that start="auto" chooses from."""
    value = AUTO_PORTS(table, key)
    first, last = map(int, value.split("-"))
    if not 1 <= first <= last <= 65535:
        raise table.wrong(key, value, AUTO_PORTS_EXPECTED)
    return first, last


READERS = {
    "scope": choice(get_args(Scope)),
    "firewall": choice(get_args(FirewallChoice)),
    "auto_ports": _auto_ports,
    "default_route": choice(get_args(DefaultRoute)),
}
KEYS = (*READERS, "upstream", "upstreams")


def _upstreams(table: TomlTable) -> dict[str, Upstream]:
    tables = table.data.get("upstreams", {})
    if not isinstance(tables, dict):
        raise table.wrong("upstreams", tables, "a table [upstreams.NAME]")
    upstreams: dict[str, Upstream] = {HOST_UPSTREAM.name: HOST_UPSTREAM}
    for name, data in tables.items():
        if not NAME.fullmatch(name):
            key = f"upstreams.{shown(name)}"
            raise table.error(key, "wrong name", "1 to 64 of A-Z a-z 0-9 _ . -")
        if not isinstance(data, dict):
            raise table.wrong(f"upstreams.{name}", data, f"a table [upstreams.{name}]")
        own = TomlTable(table.where, f"upstreams.{name}.", data)
        upstreams[name] = config_upstream.parse(name, own)
    _check_shared(table, upstreams)
    return upstreams


def _check_shared(table: TomlTable, upstreams: dict[str, Upstream]) -> None:
    """Refuse an address in two upstreams of one bridge: both would lease it."""
    for first, second in combinations(upstreams.values(), 2):
        if not first.place or first.place != second.place:
            continue
        others = _spans(second)
        for key, spans in _spans(first).items():
            shared = config_spans.overlap(spans + others[key])
            if shared:
                fact = f"shares {shared.text} with upstreams.{first.name}.{key}"
                expected = f"other addresses, as both upstreams are {first.place}"
                raise table.error(f"upstreams.{second.name}.{key}", fact, expected)


def _spans(upstream: Upstream) -> dict[str, list[config_spans.NamedSpan]]:
    """Return the addresses that an upstream leases, by the key they stand in."""
    bridged = upstream if isinstance(upstream, BridgeUpstream) else None
    return {
        "pool": config_spans.of_ranges(bridged.pool if bridged else ()),
        "pool6": config_spans.of_ranges(bridged.pool6 if bridged else ()),
        "prefixes6": config_spans.of_prefixes(upstream.prefixes6),
    }


__all__ = ["Config", "load", "parse"]
