# SPDX-License-Identifier: LGPL-2.1-or-later
"""Telling of work that is done."""

from collections.abc import Sequence

from libvirt_natns.engine.observer import Nobody, tell


class Broken(Nobody):
    def done(self, verb: str, name: str, changed: Sequence[str], seconds: float) -> None:
        raise OSError(28, "No space left on device")

    def failed(self, when: str, error: Exception) -> None:
        """Look away."""


def test_telling_fails_no_work() -> None:
    tell(Broken(), "up", "lab", ["namespace nat-lab is missing"])
