# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on policy routing rules of the host."""

from dataclasses import dataclass

from libvirt_natns.kernel.policy_rules import MarkRule
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations.operation import ApplyContext, Operation


@dataclass(frozen=True, slots=True)
class MarkRules(Operation):
    """All policy routing rules for marked packets that come in by a link of the host."""

    link: str
    rules: tuple[MarkRule, ...]

    def describe(self) -> str:
        return "\n".join(map(_said, self.rules))

    def differs(self, kernel: Kernel) -> list[str]:
        present = {rule for rule in kernel.host.policy_rules.marked() if rule.link == self.link}
        return [
            *(f"the host lacks the {_said(each)}" for each in sorted(set(self.rules) - present)),
            *(f"the {_said(each)} is left over" for each in sorted(present - set(self.rules))),
        ]

    def ensure(self, context: ApplyContext) -> None:
        context.kernel.host.policy_rules.replace_marked(self.link, self.rules)


def _said(rule: MarkRule) -> str:
    return (
        f"IPv{rule.family} rule {rule.priority} from {rule.link} with mark {rule.mark:#x}"
        f" for table {rule.table}"
    )
