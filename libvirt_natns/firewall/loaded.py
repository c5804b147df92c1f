# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rule sets of namespaces: loads a rule set, and tells whether it is in force unaltered.

A file has the fingerprint of the loaded rules: the backend, a digest of the wanted rules, a
digest of what the kernel holds, and the rules' generation.  The kernel words rules in a way of
its own, and so does each program that lists them.  So only the digest that is taken right
after loading tells later whether the rules were altered.

Limits: legacy iptables counts no generations, so each comparison lists the rules.
"""

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import backends, missed_flows
from libvirt_natns.firewall.backends import Backend
from libvirt_natns.firewall.rule import LayoutName, Rule
from libvirt_natns.kernel.locks import make_directory

LOADS = 3
"""Loads of a rule set that another program changes at the same time."""

NOTHING = "nothing"
"""The word of a fingerprint for a kernel that holds no rules."""


@dataclass(frozen=True, slots=True)
class RuleSet:
    """All rules of a namespace; ``file`` is for the fingerprint of the loaded rules."""

    namespace: str
    backend: str
    rules: tuple[Rule, ...]
    layout: LayoutName
    file: Path

    def differences(self) -> list[str]:
        """Return a line if the rules are missing or were altered."""
        if self._is_loaded():
            return []
        return [f"firewall of {self.namespace} is missing or was altered"]

    def was_loaded_last(self) -> bool:
        """True if these rules were loaded last, by the file; the kernel is not asked."""
        return " ".join(self._recorded()[:2]) == self._wanted()

    def load(self, *, fresh: bool = False) -> None:
        """Load the rules and record their fingerprint; a ``fresh`` namespace has had no packets.

        Flows that began before the rules end.  Raises FirewallError or OSError.
        """
        earlier = next((each for each in self._recorded()[:1] if each in backends.NAMES), "")
        make_directory(self.file.parent)
        self._make_way()
        with suppress(OSError):
            # A full disk must not keep the rules away.  The backend's name alone differs
            # from any fingerprint, and tells which rules there are.
            self.file.write_text(earlier or self.backend)
        generation = self._load()
        if not fresh:
            missed_flows.end(self.namespace, self.rules)
        fingerprint = self._dated_fingerprint(generation)
        try:
            if earlier not in ("", self.backend):
                # The configured backend has changed: the former one's rules go after the load.
                backends.named(earlier).clear(self.namespace)
        finally:
            # Also where the former backend cannot work any more: the rules are in force.
            with suppress(OSError):
                # A file that is not whole differs, so the next look loads the rules again.
                self.file.write_text(fingerprint)

    def _make_way(self) -> None:
        """Remove a link or directory in the place of the file."""
        if self.file.is_symlink():
            self.file.unlink()
        elif self.file.is_dir():
            shutil.rmtree(self.file)

    def _load(self) -> str:
        """Load the rules while no other program changes them; return their generation.

        Raises FirewallError.
        """
        for _ in range(LOADS):
            before = self._generation()
            self._backend.apply(self.namespace, self.rules, self.layout)
            after = self._generation()
            # A load is a single change.
            if not before or (int(after or 0) - int(before)) % 2**32 == 1:
                return after
        raise FirewallError(
            f"another program changes the rules of {self.namespace} while they are loaded",
            "find the program (nft monitor)",
        )

    def _is_loaded(self) -> bool:
        """True if the rules are in force and unaltered."""
        if not self.was_loaded_last():
            return False
        *fingerprint, recorded = [*self._recorded(), ""][:4]
        # To read the rules takes as long as all other comparisons together.
        generation = self._generation()
        unchanged = recorded != "" and recorded == generation
        if NOTHING in fingerprint:
            return False
        return unchanged or self._is_what_was_loaded(fingerprint)

    def _is_what_was_loaded(self, fingerprint: list[str]) -> bool:
        if " ".join(fingerprint) == self._fingerprint():
            return True
        # An earlier version wrote down a digest of the listing.
        listing = self._backend.listing(self.namespace)
        return fingerprint[2:] == [backends.fingerprint(listing)]

    @property
    def _backend(self) -> Backend:
        return backends.named(self.backend)

    def _generation(self) -> str:
        return self._backend.generation(self.namespace)

    def _recorded(self) -> list[str]:
        """Return the words of the file; a file that cannot be read has none."""
        try:
            return self.file.read_text().split()
        except (OSError, UnicodeDecodeError):
            return []

    def _wanted(self) -> str:
        rendered = self._backend.render(self.rules, self.layout)
        return f"{self.backend} {backends.fingerprint(rendered)}"

    def _fingerprint(self) -> str:
        """Return the backend, a digest of the wanted rules, and a digest of the loaded ones."""
        return f"{self._wanted()} {self._backend.digest(self.namespace) or NOTHING}"

    def _dated_fingerprint(self, generation: str) -> str:
        """Return the fingerprint of rules that were loaded as a generation, followed by that.

        Where another program has changed the rules since, the digest would be that of the
        other program's rules.  Then the fingerprint says that nothing is loaded.
        """
        fingerprint = self._fingerprint()
        if self._generation() != generation:
            return f"{self._wanted()} {NOTHING}"
        return f"{fingerprint} {generation}".rstrip()
