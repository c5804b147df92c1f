# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service's observer of verbs, for the kernel watch, the healer, the log and the metrics."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from libvirt_natns.operations.operation import Operation
from libvirt_natns.service.healer import Healer
from libvirt_natns.service.kernel_watch import KernelWatch
from libvirt_natns.service.log import Log
from libvirt_natns.service.metrics import Metrics

LIMIT = 300
"""Characters of a verb's changes that the log shows."""


class ChangeObserver:
    """See ``Observer``.  ``after_work`` is called after each verb."""

    def __init__(self, log: Log, metrics: Metrics, after_work: Callable[[], None]) -> None:
        self._log = log
        self._metrics = metrics
        self._after_work = after_work
        self._healer: Healer | None = None
        self._watch: KernelWatch | None = None

    def connect(self, healer: Healer, watch: KernelWatch) -> None:
        """Tell these of changes, too.  They are made later, as they use observed sessions."""
        self._healer, self._watch = healer, watch

    def step(self, what: Operation | str) -> None:
        """See ``Observer``: the service hears of whole verbs alone."""

    def changing(self, uuid: str) -> AbstractContextManager[None]:
        """See ``Observer``."""
        return self._watch.changing(uuid) if self._watch else nullcontext()

    def done(self, verb: str, name: str, changed: Sequence[str], seconds: float) -> None:
        """See ``Observer``."""
        try:
            self._metrics.changed(verb, seconds)
            self._after_work()
            self._say(verb, name, changed, seconds)
        except Exception as error:  # the work is done, even if its account fails
            self._log.say("error", "failed", when=f"logging {verb}", error=error)

    def note(self, event: str, name: str, changed: Sequence[str]) -> None:
        """See ``Observer``.  An event has no duration, and no metric counts it."""
        self._say(event, name, changed, 0.0)

    def failed(self, when: str, error: Exception) -> None:
        """See ``Observer``."""
        self._log.say("warning", "failed", when=when, error=error)

    def _say(self, verb: str, name: str, changed: Sequence[str], seconds: float) -> None:
        # The healer logs a repair itself, with the damage.
        if changed and not (self._healer and self._healer.at_work):
            if self._healer:
                self._healer.relent(name)
            text = "; ".join(changed)
            self._log.say("info", verb, network=name, changed=text[:LIMIT], seconds=seconds)
