# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reports to an observer of the verbs."""

import io
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

from libvirt_natns.engine.observer import Nobody, note, tell
from libvirt_natns.service.change_observer import ChangeObserver
from libvirt_natns.service.log import Log
from libvirt_natns.service.metrics import Metrics


class Broken(Nobody):
    def done(self, verb: str, name: str, changed: Sequence[str], seconds: float) -> None:
        raise OSError(28, "No space left on device")

    def note(self, event: str, name: str, changed: Sequence[str]) -> None:
        raise OSError(28, "No space left on device")

    def failed(self, when: str, error: Exception) -> None:
        """Look away."""


def test_telling_fails_no_work() -> None:
    tell(Broken(), "up", "lab", ["namespace nat-lab is missing"], 0.1)
    note(Broken(), "choose a port", "lab", ["20001 instead of 20000"])


def test_a_note_is_logged_and_is_no_sample_of_a_duration() -> None:
    log, sampled = io.StringIO(), []
    metrics = SimpleNamespace(changed=lambda verb, seconds: sampled.append(verb))
    observer = ChangeObserver(Log(log), cast(Metrics, metrics), lambda: None)
    note(observer, "choose a port", "lab", ["guest web: tcp port 20000 is taken, 20001 instead"])
    tell(observer, "up", "lab", [], 0.5)
    assert 'event="choose a port" network=lab changed="guest web: tcp' in log.getvalue()
    assert sampled == ["up"]
