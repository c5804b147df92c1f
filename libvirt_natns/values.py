# SPDX-License-Identifier: LGPL-2.1-or-later
"""Forms of values that the XML and the configuration share, and values in messages."""

import re
import reprlib
import shlex
from collections.abc import Iterable

from libvirt_natns.names import IFNAMSIZ

# Narrower than the kernel's own rule: these names end up in rule sets and in
# dnsmasq's configuration.  A trailing + makes a name a wildcard to iptables.
INTERFACE = re.compile(
    rf"(?!\.{{1,2}}$)[A-Za-z0-9_.+@=~][A-Za-z0-9_.+@=~-]{{0,{IFNAMSIZ - 1}}}(?<!\+)"
)
INTERFACE_EXPECTED = (
    f"an interface name: up to {IFNAMSIZ} of A-Z a-z 0-9 and _.+@=~-, not ending in +"
)


class _Shown(reprlib.Repr):
    """Short representations of values that a person wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = 80

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:
            # Python converts no integer of more than 4300 digits to decimal.
            return f"an integer of {x.bit_length()} bits"


_shown = _Shown()


def shown(value: object) -> str:
    """Return ``value`` for a message: quoted, without control characters, not too long."""
    return _shown.repr(value)


PLAIN_NAME = re.compile(r"[^\W_][\w.+:@-]*")
"""A name that stands in a message as it is."""


def quoted(name: str) -> str:
    """Return the name of a network or a guest for a message: quoted unless it is plain."""
    return name if PLAIN_NAME.fullmatch(name) else shown(name)


def as_argument(name: str) -> str:
    """Return a name as a person types it at a shell, after a command and its options."""
    return f"-- {shlex.quote(name)}" if name.startswith("-") else shlex.quote(name)


def alternatives(words: Iterable[str]) -> str:
    """Return the words as "a, b or c", each once; there is at least one."""
    *others, last = dict.fromkeys(words)
    return f"{', '.join(others)} or {last}" if others else last


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that resembles a mistyped word; None if no word does.

    Upper-case letters count as lower-case letters.
    """
    # Needless unless a person mistypes.
    from difflib import get_close_matches

    by_form = {each.casefold(): each for each in sorted(known, reverse=True)}
    close = get_close_matches(word.casefold(), by_form, n=1)
    return by_form[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean NAME?)" for the known name that resembles a name; "" for none."""
    close = nearest(name, known)
    return f" (did you mean {quoted(close)}?)" if close else ""
