# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names that come and go in a directory, and the directory itself."""

from pathlib import Path

from libvirt_natns.service.inotify import DirectoryMonitor


def test_a_directory_that_comes_and_goes(tmp_path: Path) -> None:
    path = tmp_path / "netns"
    directory = DirectoryMonitor(path)
    try:
        assert list(directory.changes()) == []
        path.mkdir()
        (path / "early").touch()
        (tmp_path / "other").touch()
        assert ("early", True) in list(directory.changes())
        (path / "late").touch()
        (path / "early").unlink()
        assert list(directory.changes()) == [("late", True), ("early", False)]
        (path / "late").unlink()
        path.rmdir()
        assert list(directory.changes()) == [("late", False)]
        path.mkdir()
        list(directory.changes())
        (path / "again").touch()
        assert ("again", True) in list(directory.changes())
    finally:
        directory.close()
