# SPDX-License-Identifier: LGPL-2.1-or-later
"""The firewall: one behaviour, two backends that render it.

``rules`` says what must hold, ``nftables`` and ``iptables`` put it into a
namespace, ``host`` keeps the few rules that the host itself needs.  Importing
this package loads neither python-iptables nor anything else that is slow.
"""

import hashlib
from collections.abc import Iterable
from typing import Protocol

from libvirt_natns.addresses import Family
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import iptables, nftables
from libvirt_natns.firewall.rules import Policy, Rule, ruleset
from libvirt_natns.model.configuration import FirewallChoice


class Backend(Protocol):
    """What a firewall backend can do; the modules themselves are the backends.

    Errors are FirewallError, and KernelError for a namespace that is missing.
    """

    @property
    def name(self) -> str:
        """ "nftables" or "iptables"."""

    def render(self, rules: Iterable[Rule], /) -> str:
        """The rules as text: pure, and what ``apply`` loads."""

    def apply(self, namespace: str | None, rules: Iterable[Rule], /) -> None:
        """Put the rules in place of those of an earlier ``apply``; None is the caller's own."""

    def clear(self, namespace: str, /) -> None:
        """Take everything out again; nothing there is success."""

    def listing(self, namespace: str, /) -> str:
        """What the kernel holds, in a form that only changes with the rules; "" if nothing."""

    def generation(self, namespace: str, /) -> str:
        """A number that each change of the kernel's rules raises by one; "" where nothing tells."""

    def require(self, family: Family = 4, /) -> None:
        """Raise FirewallError with a remedy where the backend cannot work with that family."""


def choose(choice: FirewallChoice, *, ipv6: bool = False) -> Backend:
    """The backend for a configured choice, ready to work, with ``ipv6`` in both families.

    "auto" takes nftables wherever the program nft is, else iptables.  Costs one
    question to nft's library (0.1 ms) or some look-ups of files.  Raises FirewallError, with a
    remedy, when the chosen backend cannot work here.
    """
    if choice == "auto":
        choice = "nftables" if nftables.program() else "iptables"
    backend = named(choice)
    backend.require()
    if ipv6:
        backend.require(6)
    return backend


def named(name: str) -> Backend:
    """The backend of that name, as recorded state bears it; whether it works or not."""
    backends: dict[str, Backend] = {"nftables": nftables, "iptables": iptables}
    if name not in backends:
        raise FirewallError(f"there is no firewall backend {name}")
    return backends[name]


def missing_tables(script: str, listing: str) -> set[str]:
    """Return the heads of nftables' tables that a script makes and a listing lacks."""
    made, there = (
        {line for line in text.splitlines() if line.startswith("table ")}
        for text in (script, listing)
    )
    return made - there


def fingerprint(listing: str) -> str:
    """What is kept of a listing to see later whether the rules were altered."""
    return hashlib.sha256(listing.encode()).hexdigest()


__all__ = [
    "Backend",
    "Policy",
    "Rule",
    "choose",
    "fingerprint",
    "missing_tables",
    "named",
    "ruleset",
]
