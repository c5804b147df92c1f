# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operation on the rule set of a namespace."""

from dataclasses import dataclass
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.firewall.loaded import RuleSet
from libvirt_natns.firewall.rule import LayoutName, Rule
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations.operation import ApplyContext, Operation


@dataclass(frozen=True, slots=True)
class Firewall(Operation):
    """The whole rule set of a namespace; ``owner`` is a network's uuid, or a router's name."""

    namespace: str
    owner: str
    backend: str
    rules: tuple[Rule, ...]
    layout: LayoutName = "namespace"

    @property
    def rule_set(self) -> RuleSet:
        file = fingerprint_file(self.owner, self.layout)
        return RuleSet(self.namespace, self.backend, self.rules, self.layout, file)

    def describe(self) -> str:
        return f"firewall of {self.namespace}: {len(self.rules)} rules, {self.backend}"

    def differs(self, kernel: Kernel) -> list[str]:
        return self.rule_set.differences()

    def ensure(self, context: ApplyContext) -> None:
        self.rule_set.load(fresh=context.is_fresh(self))


def fingerprint_file(owner: str, layout: LayoutName = "namespace") -> Path:
    """Return the file with the fingerprint of the loaded rules of a network or router."""
    if layout == "router":
        return names.router_file(owner, "rules")
    return names.network_directory(owner) / "firewall"
