# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operation on the rate at which a link sends."""

from dataclasses import dataclass

from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.bandwidth import RateLimit
from libvirt_natns.operations.operation import ApplyContext, Operation


@dataclass(frozen=True, slots=True)
class SendRate(Operation):
    """The rates at which a link may send; ``namespace`` None is the host.

    The limit goes with the link, so nothing takes it back.
    """

    namespace: str | None
    link: str
    limit: RateLimit

    def describe(self) -> str:
        return f"link {self.link} in {self.namespace or 'the host'} sends {self.limit}"

    def differs(self, kernel: Kernel) -> list[str]:
        return kernel.at(self.namespace).queues.differences(self.link, self.limit)

    def ensure(self, context: ApplyContext) -> None:
        context.kernel.at(self.namespace).queues.limit(self.link, self.limit)
