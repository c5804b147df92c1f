# SPDX-License-Identifier: LGPL-2.1-or-later
"""Telling of work that is done."""

from collections.abc import Sequence

from libvirt_natns.engine.observer import Nobody, note, tell


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
