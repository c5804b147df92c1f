# SPDX-License-Identifier: LGPL-2.1-or-later
"""The firewall backends: one behaviour, two modules that render and load it."""

from collections.abc import Iterable
from typing import Protocol

from libvirt_natns import names
from libvirt_natns.addresses import Family
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import iptables, nft, nftables
from libvirt_natns.firewall.rule import LayoutName, Rule
from libvirt_natns.model.configuration import FirewallChoice

NAMES = (nftables.name, iptables.name)


class Backend(Protocol):
    """A firewall backend; the modules ``nftables`` and ``iptables`` are the backends.

    Errors are FirewallError, and KernelError for a namespace that is missing.
    """

    @property
    def name(self) -> str:
        """ "nftables" or "iptables"."""

    def render(self, rules: Iterable[Rule], layout: LayoutName = "namespace", /) -> str:
        """Return the rules as text: pure, and what ``apply`` loads."""

    def apply(
        self, namespace: str | None, rules: Iterable[Rule], layout: LayoutName = "namespace", /
    ) -> None:
        """Replace the rules of an earlier ``apply``; None is the caller's namespace."""

    def clear(self, namespace: str, /) -> None:
        """Delete all rules of ``apply``; success where there are none."""

    def digest(self, namespace: str, /) -> str:
        """Return a digest that only changes with the rules that the kernel holds.

        "" where the kernel holds none.
        """

    def listing(self, namespace: str, /) -> str:
        """Return what the kernel holds, as text; "" for nothing."""

    def generation(self, namespace: str, /) -> str:
        """Return a number that each change of the kernel's rules raises by one; "" if unknown."""

    def require(self, family: Family = 4, /) -> None:
        """Raise FirewallError, with a remedy, where the backend cannot work with that family."""


def choose(choice: FirewallChoice, *, ipv6: bool = False) -> Backend:
    """Return the backend for a configured choice, ready to work, with ``ipv6`` in both families.

    "auto" takes nftables wherever the program nft is, else iptables.  The check costs a
    question to the kernel (0.1 ms) or some look-ups of files.  Raises FirewallError, with a
    remedy, when the chosen backend cannot work here.
    """
    if choice == "auto":
        choice = "nftables" if nft.program() else "iptables"
    backend = named(choice)
    backend.require()
    if ipv6:
        backend.require(6)
    return backend


def named(name: str) -> Backend:
    """Return the backend of a recorded name, whether the backend works or not."""
    if name not in NAMES:
        raise FirewallError(f"there is no firewall backend {name}")
    backends: dict[str, Backend] = {"nftables": nftables, "iptables": iptables}
    return backends[name]


def fingerprint(text: str) -> str:
    """Return a digest of a text of rules."""
    return names.digest(text, names.WHOLE_DIGEST)
