# SPDX-License-Identifier: LGPL-2.1-or-later
"""Late starts by the service, with notes in a directory and no libvirt."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

from libvirt_natns import names
from libvirt_natns.daemons import libvirt
from libvirt_natns.engine import late_starts
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.factory import Sessions
from libvirt_natns.engine.late_starts import LateStart
from libvirt_natns.model.configuration import Config
from libvirt_natns.service.arrivals import Arrivals
from libvirt_natns.service.log import Log


class NoEngines:
    """Sessions without an engine: the notes are judged by the test."""

    @contextmanager
    def engine(self, settings: Config | None = None) -> Iterator[Engine]:
        yield cast("Engine", None)


def test_a_note_that_comes_during_a_look_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path)
    directory = tmp_path / "late"
    directory.mkdir()
    for uuid in ("started", "gone"):
        (directory / uuid).touch()

    def waiting(_: Engine, uuids: Iterable[str]) -> Iterator[LateStart]:
        listed = list(uuids)
        # A second network is refused while the service looks at the first one.
        (directory / "refused").touch()
        yield from (LateStart(uuid, uuid, "") for uuid in listed if uuid == "started")

    began: list[str] = []
    monkeypatch.setattr(late_starts, "waiting", waiting)
    monkeypatch.setattr(libvirt, "autostart", began.append)
    arrivals = Arrivals(cast("Sessions", NoEngines()), Log())
    arrivals.look(late_starts.noted())
    assert began == ["started"]
    assert late_starts.noted() == ["refused"]
