# SPDX-License-Identifier: LGPL-2.1-or-later
"""The model of a picture: upstreams, networks and guests, as all formats draw them.

All texts are ready to be drawn, except for the escapes of a format.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

NONE = "no network is up: start a network (virsh net-start)"

OK = "ok"
"""The health of a network without a fault, as ``virt-natns status`` tells it."""


@dataclass(frozen=True, slots=True)
class DrawnGuest:
    """A guest with its addresses in a network; none where its addresses are not known."""

    name: str
    addresses: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The guest in one line."""
        return " ".join((self.name, *self.addresses))


@dataclass(frozen=True, slots=True)
class DrawnForward:
    """A published port, or static NAT with ``proto`` "address".

    ``listen`` is the place outside, and ``target`` the guest's.  ``waiting``: the host lacks the
    address for now.
    """

    proto: str
    listen: str
    target: str
    waiting: bool = False

    @property
    def where(self) -> str:
        """The target, and whether the forward waits."""
        return f"{self.target} (waits)" if self.waiting else self.target


@dataclass(frozen=True, slots=True)
class DrawnNetwork:
    """A network with its namespace.

    ``gateways`` have prefixes.  ``addresses`` are the network's own on ``upstream``.
    """

    name: str
    bridge: str
    namespace: str
    upstream: str
    gateways: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    health: str = OK
    guests: tuple[DrawnGuest, ...] = ()
    forwards: tuple[DrawnForward, ...] = ()

    @property
    def outside(self) -> tuple[str, ...]:
        """The addresses outside, in words where there are none."""
        return self.addresses or ("no address",)

    @property
    def forward_texts(self) -> list[str]:
        """The forwards, each in one line of ASCII."""
        return [f"{self.place(forward)} -> {forward.where}" for forward in self.forwards]

    def place(self, forward: DrawnForward) -> str:
        """Return the protocol and the place outside: no address where the network has one alone."""
        if forward.proto == "address":
            return forward.listen
        own = f"{self.addresses[0]}:" if len(self.addresses) == 1 else None
        short = own is not None and forward.listen.startswith(own)
        port = forward.listen.removeprefix(own or "")
        return f"{forward.proto} {':' if short else ''}{port}"


@dataclass(frozen=True, slots=True)
class DrawnUpstream:
    """An upstream: its bridge ("?" for unknown), its way (``how``), and ``details`` in words."""

    name: str
    bridge: str
    how: tuple[str, ...] = ()
    details: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The upstream in one line."""
        return ", ".join((f"upstream {self.name}", *self.how, *self.details))


@dataclass(frozen=True, slots=True)
class Picture:
    """All networks that are up, and the upstreams by which they get out."""

    networks: tuple[DrawnNetwork, ...] = ()
    upstreams: tuple[DrawnUpstream, ...] = ()

    @property
    def by_upstream(self) -> list[tuple[DrawnUpstream, list[DrawnNetwork]]]:
        """The upstreams in use, each with its networks, in the order of their names."""
        named = {upstream.name: upstream for upstream in self.upstreams}
        ordered = sorted(self.networks, key=lambda each: (each.upstream, each.name))
        return [
            (named.get(name) or DrawnUpstream(name, "?"), list(group))
            for name, group in groupby(ordered, key=lambda each: each.upstream)
        ]


def first_of(texts: Sequence[str], most: int) -> list[str]:
    """Return the first texts, and the number of the others; at most ``most`` lines."""
    if len(texts) <= most:
        return list(texts)
    return [*texts[: most - 1], f"and {len(texts) - most + 1} more"]


def drawable(text: str) -> str:
    """Return ``text`` with an escape for each character that would not show.

    A control character would command a terminal, and no XML document may have one.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def cells(text: str) -> int:
    """Return the columns of a text on a terminal: 2 for a wide character, 0 for a mark."""
    return sum(map(_cells, text)) if not text.isascii() else len(text)


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def widest(texts: Iterable[str]) -> int:
    """Return the columns of the widest text; 0 for none."""
    return max(map(cells, texts), default=0)
