# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks on directories that others remove, or put something else in the place of."""

import time
from pathlib import Path

import pytest

from libvirt_natns import names
from libvirt_natns.errors import LockError
from libvirt_natns.kernel import locks
from libvirt_natns.kernel.locks import locked

MOST = 1000
"""Tries after which a waiter counts as waiting for ever."""


@pytest.fixture
def tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    made: list[Path] = []
    make = locks.make_directory

    def counted(directory: Path) -> None:
        made.append(directory)
        assert len(made) < MOST, "it waits for ever"
        make(directory)

    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path / "run")
    monkeypatch.setattr(locks, "make_directory", counted)
    return made


@pytest.mark.parametrize("place", [".", "networks", "networks/uuid"])
def test_a_link_to_nothing_is_refused_at_once(
    place: str, tmp_path: Path, tries: list[Path]
) -> None:
    """There, mkdir(2) finds a name that is taken, and open(2) finds nothing."""
    link = names.RUN_DIRECTORY / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / "missing")
    with (
        pytest.raises(LockError, match=rf"{link} is a link to .*missing, .*: rm {link}"),
        locked(names.RUN_DIRECTORY / "networks/uuid"),
    ):
        pass
    assert len(tries) == 1


def test_a_link_to_a_directory_serves(tmp_path: Path, tries: list[Path]) -> None:
    (tmp_path / "elsewhere").mkdir()
    names.RUN_DIRECTORY.symlink_to(tmp_path / "elsewhere")
    with locked(names.RUN_DIRECTORY / "networks/uuid"):
        assert (tmp_path / "elsewhere/networks/uuid").is_dir()


def test_a_directory_that_is_removed_again_and_again_is_waited_for_a_while(
    tmp_path: Path, tries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = locks.make_directory

    def removed(directory: Path) -> None:
        counted(directory)
        directory.rmdir()

    monkeypatch.setattr(locks, "make_directory", removed)
    began = time.monotonic()
    with (
        pytest.raises(LockError, match=r"cannot lock .*networks"),
        locked(names.RUN_DIRECTORY / "networks", 0.1),
    ):
        pass
    assert time.monotonic() - began >= 0.1
    assert len(tries) > 1


def test_a_directory_that_is_removed_once_is_made_again(
    tries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = locks.make_directory

    def removed(directory: Path) -> None:
        counted(directory)
        if len(tries) == 1:
            directory.rmdir()

    monkeypatch.setattr(locks, "make_directory", removed)
    with locked(names.RUN_DIRECTORY / "networks"):
        assert len(tries) == 2
